"""The report as a verification card: Markdown for a hub repository or a pull request, dated, with all it takes to repeat it."""

import hashlib
import json
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oss_model.files import parse_json
from parity.reports.report import FormResult, Report
from parity.reports.sections import Section, sections

PACKAGES = ("convert-oss", "jax", "flax", "orbax-checkpoint", "torch", "transformers", "numpy")
SAID = {"pass": "PASS", "fail": "FAIL", "incomplete": "INCOMPLETE"}


def render(report: Report, command: str) -> str:
    """
    Args:
      command: by which the report was made, as typed.
    """
    arms = [section for section in sections(report) if section.name not in ("diagnosis", "errors")]
    what = {
        "model": report.model,
        "reference": f"{report.oracle}: {_named(report.source)}",
        "candidate": _named(report.checkpoint),
        "prompt": f"{report.tokens} tokens a row at the most, seed {report.seed}",
        "computed on": report.device or f"CPU ({platform.machine()})",
        "versions": ", ".join(f"{name} {number}" for name, number in _versions()),
        "took": f"{report.seconds:.0f} s, peak memory {report.peak_rss_bytes / 2**30:.1f} GiB",
    }
    lines = [
        f"# Verification: {SAID[report.verdict]}",
        "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, by `check-parity` of convert-oss {_version('convert-oss')}. What is"
        " compared with what, and by how much it may differ, is in its docs/parity.md.",
        "",
        *_table(("", ""), what.items()),
        "",
        "## What was found",
        "",
        *_table(("arm", "verdict", "finding"), ((arm.name, arm.verdict, _finding(arm)) for arm in arms)),
    ]
    worst = sorted((tap for tap in report.taps), key=lambda tap: tap.worst_token_rel_l2 / tap.gate, reverse=True)[:5]
    if worst:
        rows = ((tap.place, f"{tap.worst_token_rel_l2:.1e}", f"{tap.gate:.1e}", tap.verdict) for tap in worst)
        lines += ["", f"Of {len(report.taps)} taps those nearest to their bound, or beyond it:", ""]
        lines += _table(("tap", "worst token, relative L2", "bound", "verdict"), rows)
    if report.forms:
        rows = ((form.form, form.dtype, form.on, _worst(form), form.verdict) for form in report.forms)
        lines += ["", "As people run it:", "", *_table(("form", "dtype", "on", "worst", "verdict"), rows)]
    for section in sections(report):
        if section.verdict in ("fail", "incomplete", "warn") or section.name == "diagnosis":
            lines += ["", f"### {section.name}", "", section.headline, *(f"- {line}" for line in section.lines[:20])]
    both = (("SRC", report.source), ("DST", report.checkpoint))
    hashes = [(role, *found) for role, path in both if (found := _hashed(path))]
    if hashes:
        lines += ["", "## Of what", "", *_table(("", "manifest", "made from", "sha256 over the hashes of all tensors"), hashes)]
    lines += ["", "## To repeat it", "", "```", command, "```", ""]
    return "\n".join(lines)


def _finding(arm: Section) -> str:
    return "; ".join([arm.headline, *arm.lines]) if arm.name == "free run" else arm.headline


def _worst(form: FormResult) -> str:
    """Of a form: see `FormResult.worst`."""
    if form.worst is None:
        return "not run"
    return f"{form.worst:.2f} times PyTorch's own error" if form.dtype == "bfloat16" else f"{form.worst:.1e}"


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> list[str]:
    marked = [tuple(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *marked)]


def _named(path: str) -> str:
    """A checkpoint as others know it: by its repository and commit if it came from the hub, else by its last name."""
    from oss_model.hub import origin

    found = origin(Path(path).resolve())
    if found is None:
        return f"`{Path(path).name or path}`"
    return f"`{found['repository']}` at `{found['commit']}`{' ' + found['subfolder'] if 'subfolder' in found else ''}"


def _hashed(path: str) -> tuple[str, str, str] | None:
    """(xxh3 of the manifest, what it says SRC was, sha256 over every tensor's hash) of a checkpoint that has a manifest."""
    try:
        manifest = parse_json((Path(path) / "conversion.json").read_bytes())
        tensors = sorted((name, one["hash"]) for name, one in manifest["tensors"].items())
        made_from = manifest["source"].get("hub") or {"layout": manifest["source"]["layout"]}
        said = " ".join(str(value) for value in made_from.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(manifest.get("self", "")), said, hashlib.sha256(json.dumps(tensors).encode()).hexdigest()


def _versions() -> list[tuple[str, str]]:
    return [(name, found) for name in PACKAGES if (found := _version(name))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
