#!/usr/bin/env python3
"""docs/faults.md, from the catalogue of known mistakes.

python scripts/faults_page.py > docs/faults.md
"""

import re

from parity.injection.runs import EQUIVALENT_RUNS
from parity.mistakes.catalogue import CHECKPOINT, CODE, EQUIVALENT, FILLED, MODEL, Fault
from parity.mistakes.run_catalogue import RUN_CATALOGUE

_AS_RUN = (
    "Of how the model is put together, loaded, compiled, cached and trained. A form that is wrong is run again and watched, and",
    "what it computed before it went wrong is right: from that each of these makes what would come next with a wrong walk, a wrong",
    "cache, or rows that are mixed up ([`parity/mistakes/wrong_runs.py`](../parity/mistakes/wrong_runs.py)), and so does each mistake",
    "of the code above that shows at that tap. The one that gives what the form gave is named. The last ones may be wrong in any way:",
    "they are told by the forms in which the same value is right, which are run for it. If no name is left, or several are, the",
    "report says which rows, tokens, heads and forms are wrong, and no name.",
)


def page() -> str:
    """docs/faults.md."""
    lines = [
        "# Known mistakes",
        "",
        "What `check-parity` means when it names one. The tap is where the report first shows it: `weights` means that the",
        "parameter itself differs, in the checkpoint; any other tap that the tap's own parameters are right, and the code is",
        "wrong. Configurations are compared first, then parameters, then code: where DST/config.json says something else than",
        "SRC's, or a parameter of the failing tap differs, that is said, and no mistake of the code is named.",
        "This page is made from [`parity/mistakes/catalogue.py`](../parity/mistakes/catalogue.py) by",
        "`python scripts/faults_page.py`; a test compares it.",
        "",
        "How a name is found: each mistake is a wrong equation ([`parity/equations.py`](../parity/equations.py) has the right",
        "ones). Those of the failing tap are computed from what the tap was given, and the port is measured against each. The",
        "one that takes the residual down to noise is the one that was made. If none does, the report says so, and which heads,",
        "experts and channels are wrong. Neither PyTorch nor the port's own code is needed for it. `check-parity --self-test`",
        "puts each of these into a right port, and expects it found, located and named.",
    ]
    groups: list[tuple[str, list[Fault]]] = [
        ("In a layer's code", CODE), ("Outside the layers", MODEL), ("In the checkpoint", CHECKPOINT),
    ]  # fmt: skip
    where = {"sliding": " (sliding layers)", "full": " (full layers)"}
    for title, faults in groups:
        lines += ["", f"## {title}", "", "| name | shows at | what is wrong | usual cause | fix |", "|---|---|---|---|---|"]
        for one in faults:
            words = {"window": "window", "longer": "window + 1", "shorter": "window - 1", "half": "window / 2"}
            says = one.says.format(**words, **FILLED)
            cells = (f"`{one.name}`", f"`{one.tap}`{where.get(one.where, '')}", says, one.seen, one.fix)
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    lines += ["", "## As it is run", "", *_AS_RUN, "", "| name | shows at | what is wrong | usual cause | fix |"]
    lines += ["|---|---|---|---|---|"]
    for row in RUN_CATALOGUE:
        at = "any tap" if len(row.at) > 8 else ", ".join(f"`{tap}`" for tap in row.at) or "loading"
        says = re.sub(r"\{(\w+)\}", r"*\1*", row.says)
        lines.append(f"| `{row.name}` | {at} | {says} | {row.seen} | {row.fix} |")
    lines += ["", "## Numerically equivalent", "", "These make no difference that the gate can see; the proofs are in"]
    lines += ["[`tests/test_parity_faults.py`](../tests/test_parity_faults.py), and of those as it is run in"]
    lines += ["[`tests/test_parity_forms.py`](../tests/test_parity_forms.py).", ""]
    lines += ["| name | what is done | why it makes no difference |", "|---|---|---|"]
    lines += [f"| `{one.name}` | {one.says.format(**FILLED)} | {one.equivalent} |" for one in EQUIVALENT]
    lines += [f"| `{name}` | {run.says}; as it is run | {run.equivalent} |" for name, run in EQUIVALENT_RUNS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
