"""The report as one page of HTML that needs nothing else: no network, no fonts, no second file.

What is drawn is worked out here; `report.html.jinja` says how it looks.
"""

import importlib.resources
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from parity import metrics
from parity.reports.report import STORED, Report, TapResult
from parity.reports.sections import Section, sections

_BELOW, _ABOVE = 5, 4  # decades of the colour scale on the two sides of the gate
_RUNS = {"bfloat16": "port in bfloat16", "reference_bfloat16": "reference in bfloat16: what noise is"}
_BARS = 400  # of the strip of tokens; longer prompts are gathered, the worst token of each stretch shown


def marked(text: str) -> Any:
    """Words in backquotes as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def render(report: Report) -> str:
    import jinja2

    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "tip": tip, "marked": marked}
    template = importlib.resources.files("parity.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    arms, differing = sections(report), [weight for weight in report.weights if weight.note]
    page = env.from_string(template).render(
        report=report,
        first=_first(report),
        arms=[arm for arm in arms if arm.name != "diagnosis"],
        besides=_besides(arms),
        differing=differing,
        stored=report.oracle == STORED,
        exact=sum(not weight.note and weight.moved is None for weight in report.weights),
        ok_taps=sum(tap.verdict == "ok" for tap in report.taps),
        wrong_taps=[tap for tap in report.taps if tap.verdict != "ok"],
        model_taps=[_cell(report, tap) for tap in report.taps if tap.layer is None],
        heat=_heat(report),
        scale=[{"at": 100 * i / (_BELOW + _ABOVE), "value": 10.0 ** (i - _BELOW)} for i in range(10)],
        forms=sorted(report.forms, key=lambda form: form.verdict == "ok"),
        runs=_runs(report),
        growth=_growth(report),
        strip=_strip(report.token_kl),
        flips=_flips(report),
        ratios=_ratios(report.taps),
        ratio_warn=metrics.PRECISION_WARN,
        ratio_fail=metrics.PRECISION_FAIL,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a path need not be valid Unicode


def number(value: float | None, digits: int = 3) -> str:
    """A number as a person reads it: 3.1e-7, 0, 42.5."""
    if value is None:
        return "–"
    if not math.isfinite(value) or abs(value) >= metrics.WORST:
        return "not finite"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    if math.isclose(value, 10.0 ** (power := round(math.log10(abs(value))))):
        return f"1e{power}"
    return re.sub(r"e([+-])0?(\d+)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", f"{value:.1e}")


def tip(tap: TapResult) -> str:
    """All that is known about one tap, a line each."""
    where = "whole model" if tap.layer is None else f"layer {tap.layer}"
    times = tap.worst_token_rel_l2 / tap.gate
    lines = [f"{where} · {tap.tap} · {'FAIL' if tap.verdict == 'fail' else tap.verdict}"]
    if tap.verdict != "incomplete":
        over = (
            f" = {number(times)} × the gate of {number(tap.gate)}"
            if 1 < times < metrics.WORST
            else f", gate {number(tap.gate)}"
        )
        lines += [f"worst token {number(tap.worst_token_rel_l2)}{over}", f"max |Δ| {number(tap.max_abs)}"]
    if tap.port_over_reference is not None:
        lines.append(f"port/reference {number(tap.port_over_reference)}×")
    return "\n".join([*lines, tap.note] if tap.note else lines)


def _first(report: Report) -> dict[str, Any] | None:
    """The first divergence, and what there is to say about it."""
    where = report.first_divergence
    if where is None:
        return None
    place = "the whole model" if where["layer"] is None else f"layer {where['layer']}"
    found: dict[str, Any] = {"place": place, "tap": where["tap"], "worst": None, "note": ""}
    if where["tap"] == "weights":
        weight = next(weight for weight in report.weights if weight.note)
        return found | {
            "place": "outside the layers" if weight.layer is None else place,
            "note": f"{weight.name}: {weight.note}",
        }
    failed = next((tap for tap in report.taps if tap.verdict == "fail"), None)
    if failed is None:
        return found | {"note": _why(report, where["tap"])}
    return found | {"worst": failed.worst_token_rel_l2, "over": failed.worst_token_rel_l2 / failed.gate, "note": failed.note}


def _why(report: Report, tap: str) -> str:
    """What is wrong there, where no component that is fed the reference's own input is."""
    if tap == "config":
        return "the two configurations differ in what logits depend on, however little of it this prompt shows"
    if tap == "gradients":
        return "gradients are computed from the last layer back, so what lies before it gets wrong ones from here"
    if tap == "expert_choice":
        return (
            "a token chose other experts here, which no near-tie explains, although every choice before it was the reference's"
        )
    if report.free_run is not None and report.free_run["verdict"] == "fail":
        parts = "; no component, fed the reference's own input, fails by itself" if report.layers else ""
        return f"here the whole model, on its own states, parts from the reference most{parts}"
    return "right in float32, but here less precise than the reference in the same dtype"


def _besides(arms: Sequence[Section]) -> list[str]:
    """What the diagnosis says behind what it names and what to do: other faults, what follows from them, the third witness."""
    said = [line for arm in arms if arm.name == "diagnosis" for line in arm.lines]
    return [line for line in said if not line.startswith(("diagnosis:", "to do:"))]


# --- the heatmap ------------------------------------------------------------------------------------------------


def _cell(report: Report, tap: TapResult) -> dict[str, Any]:
    """`at`: place on its side of the colour scale in percent, from the quiet end below the gate, from the gate above."""
    decades = math.log10(max(tap.worst_token_rel_l2, 1e-300) / tap.gate)
    share = decades / _ABOVE if tap.verdict == "fail" else 1 + decades / _BELOW
    first = tap.verdict == "fail" and {"layer": tap.layer, "tap": tap.tap} == report.first_divergence
    return {"tap": tap, "at": round(100 * min(max(share, 0), 1)), "first": first}


def _heat(report: Report) -> dict[str, Any] | None:
    inside = [tap for tap in report.taps if tap.layer is not None]
    if not inside:
        return None
    cells = {(tap.layer, tap.tap): _cell(report, tap) for tap in inside}
    taps = list(dict.fromkeys(tap.tap for tap in inside))
    layers = sorted({tap.layer for tap in inside if tap.layer is not None})
    rows = [{"layer": layer, "cells": [cells.get((layer, tap)) for tap in taps]} for layer in layers]
    firsts = [(layer, tap) for (layer, tap), cell in cells.items() if cell["first"]]
    return {"taps": taps, "rows": rows, "entry": firsts[0] if firsts else next(iter(cells))}


# --- the charts -------------------------------------------------------------------------------------------------


def _growth(report: Report) -> dict[str, Any] | None:
    """Two lines over the layers, in percent of the plot."""
    if not report.growth:
        return None
    layers = [point["layer"] for point in report.growth]
    axis = _Decades([point[name] for point in report.growth for name in ("replayed", "own")])
    width = max(layers[-1] - layers[0], 1)
    lines = []
    for name, label in (("replayed", "the reference's routing replayed"), ("own", "the port's own routing")):
        points = [
            {
                "x": round(100 * (point["layer"] - layers[0]) / width, 2),
                "y": round(100 - axis.at(point[name]), 2),
                "tip": f"after layer {point['layer']}\n{label}\nworst token {number(point[name])}",
            }
            for point in report.growth
        ]
        lines.append({"name": name, "label": label, "points": points, "last": report.growth[-1][name]})
    same = all(point["replayed"] == point["own"] for point in report.growth)
    ticks = [{"at": 100 * (layer - layers[0]) / width, "label": layer} for layer in _steps(layers[0], layers[-1], 12)]
    return {"lines": lines, "ticks": ticks, "decades": axis.ticks(), "same": same}


def _strip(kl: Sequence[float]) -> dict[str, Any] | None:
    """A bar a token, or a bar a stretch of tokens, its worst."""
    if not kl:
        return None
    each = math.ceil(len(kl) / _BARS)
    axis = _Decades(kl)
    bars = []
    for start in range(0, len(kl), each):
        stretch = kl[start : start + each]
        places = f"token {start}" if each == 1 else f"tokens {start} to {start + len(stretch) - 1}, worst"
        bars.append({"height": round(axis.at(max(stretch)), 1), "tip": f"{places}\nKL {number(max(stretch))} nats"})
    worst = max(range(len(kl)), key=kl.__getitem__)
    ticks = [{"at": 100 * (token + 0.5) / len(kl), "label": token} for token in _steps(0, len(kl) - 1, 8)]
    return {"bars": bars, "each": each, "ticks": ticks, "decades": axis.ticks(), "worst": worst, "worst_kl": kl[worst]}


class _Decades:
    """A logarithmic axis of three to fifteen whole decades; what is smaller, zero too, lies at its foot."""

    def __init__(self, values: Iterable[float]):
        logs = [math.log10(value) for value in values if value > 0] or [0.0]
        self.high = math.ceil(max(logs)) if max(logs) % 1 else round(max(logs)) + 1
        decades = min(max(self.high - math.floor(min(logs)), 3), 15)
        self.step = math.ceil(decades / 5)
        self.low = self.high - -(-decades // self.step) * self.step

    def at(self, value: float) -> float:
        """0 to 100, from the foot."""
        log = math.log10(value) if value > 0 else self.low
        return 100 * min(max((log - self.low) / (self.high - self.low), 0), 1)

    def ticks(self) -> list[dict[str, Any]]:
        ticks = range(self.low, self.high + 1, self.step)
        return [{"at": 100 * (n - self.low) / (self.high - self.low), "label": number(10.0**n)} for n in ticks]


def _steps(first: int, last: int, most: int) -> range:
    """At most `most` round numbers from first to last."""
    for step in (scale * n for scale in (10**power for power in range(12)) for n in (1, 2, 5)):
        if (last - first) // step < most:
            return range(-(-first // step) * step, last + 1, step)
    return range(first, first + 1)


# --- the tables -------------------------------------------------------------------------------------------------


def _runs(report: Report) -> list[dict[str, Any]]:
    """The free run and what stands beside it: every entry that is itself a measured run."""
    if report.free_run is None:
        return []
    beside = [
        {"name": _RUNS.get(name, name.replace("_", " "))} | run
        for name, run in report.free_run.items()
        if isinstance(run, dict)
    ]
    return [{"name": "routing replayed"} | report.free_run, *(run for run in beside if "kl_mean" in run)]


def _flips(report: Report) -> list[dict[str, Any]]:
    """Judged ones first, and of each kind those that are not explained; `why` says what explains one."""
    found = []
    for judged, flips in ((True, report.judged_flips), (False, report.flips)):
        for flip in sorted(flips, key=lambda flip: flip["explained"]):
            why, follows = "near-tie" if flip["explained"] else "", flip.get("follows")
            if follows is not None:
                other = "" if follows["token"] == flip["token"] else f" of token {follows['token']}"
                why = f"follows from layer {follows['layer']}{other}"
            found.append(flip | {"judged": judged, "why": why})
    return found


def _ratios(taps: Iterable[TapResult]) -> list[dict[str, Any]]:
    """The precision arm, tap by tap over the layers."""
    found: dict[str, list[TapResult]] = {}
    for tap in taps:
        if tap.port_over_reference is not None:
            found.setdefault(tap.tap, []).append(tap)
    rows = []
    for name, group in found.items():
        values = [tap.port_over_reference or 0.0 for tap in group]
        worst = max(range(len(group)), key=values.__getitem__)
        rows.append({"tap": name, "median": statistics.median(values), "worst": values[worst], "layer": group[worst].layer})
    return rows
