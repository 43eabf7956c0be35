"""Two reports of check-parity, before and after a change: what became better, worse, or stopped being compared."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from oss_model.errors import InputError
from oss_model.files import parse_json
from oss_model.terminal import fit
from parity.reports.report import EXIT

TIMES = 2.0  # a figure that became so many times larger or smaller is told; less is what another seed, or machine, does
_RANK = {"ok": 0, "info": 0, "warn": 1, "incomplete": 2, "fail": 3}


class Change(NamedTuple):
    """
    Attributes:
      what: "layer 3 attn_core", "form jit (float32, model)", ...
      before, after: as shown; "" where one report has it not.
      worse: True, False (better), or None where it is neither.
    """

    what: str
    before: str
    after: str
    worse: bool | None


def read(file: Path) -> dict[str, Any]:
    """
    Raises:
      InputError: if it is no report that `check-parity --json` wrote.
    """
    try:
        report = parse_json(file.read_bytes())
        if not isinstance(report, dict) or not {"verdict", "taps", "sections", "weights"} <= report.keys():
            raise ValueError("it has no verdict, taps, sections and weights")
        if report["verdict"] not in EXIT:
            raise ValueError(f"its verdict is {report['verdict']!r}")
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: expected a report of check-parity --json, found something else ({e})") from None
    return report


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The worst first."""
    try:
        found = [*_setting(before, after), *_sections(before, after), *_weights(before, after)]
        found += _figures("tap", *({_place(tap): tap for tap in report["taps"]} for report in (before, after)))
        found += _figures("form", *({_form(form): form for form in report.get("forms", [])} for report in (before, after)))
        found += _run(before, after)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as e:
        raise InputError(
            f"expected two reports of check-parity --json, found one with something missing in it ({e!r})"
        ) from None
    return sorted(found, key=lambda one: {True: 0, None: 1, False: 2}[one.worse])


def table(before: dict[str, Any], after: dict[str, Any], width: int | None = None) -> str:
    """
    Args:
      width: of the terminal; None: lines are as long as they need.
    """
    found = changes(before, after)
    head = f"{before['verdict'].upper()} -> {after['verdict'].upper()}"
    signs = {True: "worse", False: "better", None: ""}
    rows = [(one.what, one.before or "-", one.after or "-") for one in found]
    what, was, now = (max((len(row[n]) for row in rows), default=0) for n in range(3))
    what = what if width is None else min(what, width - was - now - 14)  # a longer one has a line of its own
    said = zip([signs[one.worse] for one in found], rows, strict=True)
    lines = [f"{sign:<7} {row[0]:<{what}}  {row[1]:>{was}} -> {row[2]}" for sign, row in said]
    worse = sum(one.worse is True for one in found)
    better = sum(one.worse is False for one in found)
    lines.append(f"{worse} worse, {better} better, {len(found) - worse - better} otherwise different")
    text = "\n".join([head, *lines])
    return text if width is None else fit(text, width)


def _setting(before: dict, after: dict) -> Iterator[Change]:
    """What makes the two no like against like."""
    for name in ("source", "tokens", "seed", "dtype", "device", "oracle"):
        if before.get(name) != after.get(name):
            yield Change(name, str(before.get(name, "")), str(after.get(name, "")), None)


def _sections(before: dict, after: dict) -> Iterator[Change]:
    sides = [
        {one["name"]: one["verdict"] for one in report["sections"] if one["verdict"] != "info"} for report in (before, after)
    ]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        was, now = (side.get(name, "") for side in sides)
        if was != now:
            yield Change(f"arm {name}", was, now, None if "" in (was, now) else _RANK[now] > _RANK[was])


def _weights(before: dict, after: dict) -> Iterator[Change]:
    """Exact is what is in none of the lists."""
    sides: list[dict[str, str]] = []
    for report in (before, after):
        found = report["weights"]
        kinds = {"differing": "differs", "changed": "changed", "by_design": "by design"}
        sides.append({one["name"]: said for kind, said in kinds.items() for one in found.get(kind, [])})
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        was, now = (side.get(name, "exact") for side in sides)
        if was != now:
            yield Change(f"weight {name}", was, now, {"differs": True}.get(now, False if was == "differs" else None))


def _figures(kind: str, was: dict[str, dict], now: dict[str, dict]) -> Iterator[Change]:
    """Of taps or forms: those whose verdict is another, or whose figure is."""
    key = "worst_token_rel_l2" if kind == "tap" else "worst"
    for name in dict.fromkeys([*was, *now]):
        old, new = was.get(name), now.get(name)
        if old is None or new is None:
            yield Change(f"{kind} {name}", _shown(old, key), _shown(new, key), None)
        elif old["verdict"] != new["verdict"]:
            yield Change(f"{kind} {name}", _shown(old, key), _shown(new, key), _RANK[new["verdict"]] > _RANK[old["verdict"]])
        elif _is_another(old[key], new[key]):
            yield Change(f"{kind} {name}", _shown(old, key), _shown(new, key), new[key] > old[key])


def _run(before: dict, after: dict) -> Iterator[Change]:
    was, now = (report.get("free_run") or {} for report in (before, after))
    for name in ("max_abs", "kl_mean", "kl_max"):
        old, new = was.get(name), now.get(name)
        if old is not None and new is not None and _is_another(old, new):
            yield Change(f"free run {name}", f"{old:.1e}", f"{new:.1e}", new > old)
    old, new = before.get("seconds"), after.get("seconds")
    if old and new and not 1 / TIMES < new / old < TIMES:
        yield Change("seconds", f"{old:.0f}", f"{new:.0f}", None)


def _is_another(old: float | None, new: float | None) -> bool:
    if old is None or new is None or not (old or new):
        return False
    return not old or not new or not 1 / TIMES < new / old < TIMES


def _shown(one: dict | None, key: str) -> str:
    if one is None:
        return ""
    figure = "not run" if one[key] is None else f"{one[key]:.1e}"
    return figure if one["verdict"] == "ok" else f"{figure} {one['verdict']}"


def _place(tap: dict) -> str:
    return tap["tap"] if tap["layer"] is None else f"layer {tap['layer']} {tap['tap']}"


def _form(form: dict) -> str:
    return f"{form['form']} ({form['dtype']}, {form['on']})"
