"""What each arm of a comparison found, as every report shows it: a new arm is a function here.

`table`, JUnit and HTML go through `sections`; JSON has them beside the numbers they are made of.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from oss_model.terminal import counted
from parity import configs
from parity.design import ROUNDED
from parity.metrics import PRECISION_FAIL
from parity.reports.report import STORED, Report


class Section(NamedTuple):
    """
    Attributes:
      name: of the arm.
      verdict: "ok", "warn", "fail" or "incomplete"; "info" where nothing is judged.
      headline: a sentence, of what failed if something did.
      lines: what is behind it, the worst first.
      table: the same as lines of the table on a screen; empty if `headline` is that line.
    """

    name: str
    verdict: str
    headline: str
    lines: Sequence[str] = ()
    table: Sequence[str] = ()


def sections(report: Report) -> list[Section]:
    arms = (
        _configuration,
        _weights,
        _loading,
        _semantics,
        _precision,
        _free_run,
        _as_stored,
        _flips,
        _gradients,
        _forms,
        _complete,
        _errors,
        _diagnosis,
    )
    return [section for arm in arms for section in arm(report)]


def _configuration(report: Report) -> Iterator[Section]:
    wrong = [configs.said(one) for one in report.configs if one["logits"]]
    harmless = [f"{configs.said(one)}, which is not in the logits" for one in report.configs if not one["logits"]]
    table = [f"warning: {warning}" for warning in report.warnings]
    table += [f"config     {configs.said(one)}   {'FAIL' if one['logits'] else 'not in the logits'}" for one in report.configs]
    lines = [*wrong, *harmless, *report.warnings]
    verdict = "fail" if wrong else "warn" if lines else "ok"
    yield Section("configuration", verdict, lines[0] if lines else "both configurations say the same", lines, table)


def _weights(report: Report) -> Iterator[Section]:
    wrong = [f"{weight.name}: {weight.note}" for weight in report.weights if weight.note]
    others = [weight for weight in report.weights if weight.moved is not None]
    count, exact = len(report.weights), len(report.weights) - len(wrong) - len(others)
    verdict = "fail" if wrong else "ok"
    how = "as stored" if report.oracle == STORED else "decoded by transformers"
    line = f"weights   {exact}/{count} bit-exact, {how}   {verdict.replace('fail', 'FAIL')}"
    table = [line, *(f"          {one}" for one in wrong[:8])]
    if len(wrong) > 8:
        table.append(f"          ... and {len(wrong) - 8} more: --json FILE names each")
    said = []
    for rule in sorted({weight.rule for weight in others}):
        moved = [weight.moved or 0.0 for weight in others if weight.rule == rule]
        what = {"": "changed, as expected", ROUNDED: "rounded to bfloat16"}
        said.append(f"{len(moved)} {what.get(rule, f'quantized, each value as rule {rule!r} says')}")
        table.append(f"          {said[-1]}: moved by {min(moved):.1e} to {max(moved):.1e} (relative L2)")
    if not count:
        yield Section("weights", "incomplete", "no parameter was compared", [], table)
    elif wrong:
        yield Section("weights", verdict, f"not bit-exact: {len(wrong)} of {count} parameters", wrong, table)
    else:
        lines = [f"{weight.name}: moved by {weight.moved:.1e}" for weight in others]
        headline = "; ".join([f"all {exact} other parameters are bit-exact", *said])
        yield Section("weights", verdict, headline if others else f"all {count} parameters are bit-exact", lines, table)


def _loading(report: Report) -> Iterator[Section]:
    """Whether what the model goes by is what is stored."""
    if not report.loaded:
        return
    wrong = [f"{weight.name}: {weight.note}" for weight in report.loading]
    table = [f"loading    not what is stored: {one}   FAIL" for one in wrong[:8]]
    if len(wrong) > 8:
        table.append(f"          ... and {len(wrong) - 8} more: --json FILE names each")
    if report.righted:
        unexpected = any(weight.note for weight in report.weights)
        done = "put right  " if unexpected else "SRC's values given to "
        table.append(f"{done}{counted(len(report.righted), 'parameter')} of the loaded model: the code is judged behind them")
    headline = f"all {report.loaded} loaded parameters are the stored bytes"
    if wrong:
        headline = f"{len(wrong)} of {report.loaded} loaded parameters are not what is stored"
    yield Section("loading", "fail" if wrong else "ok", headline, wrong, table)


def _semantics(report: Report) -> Iterator[Section]:
    """A line a tap that is not right; how the others are shown is each report's own: rows folded, cases, a heatmap."""
    if report.taps:
        bad = [tap for tap in report.taps if tap.verdict != "ok"]
        lines = [f"{tap.place}: {tap.worst_token_rel_l2:.1e}; {tap.note}".removesuffix("; ") for tap in bad]
        verdict = "fail" if any(tap.verdict == "fail" for tap in bad) else "incomplete" if bad else "ok"
        headline = f"{len(bad)} of {len(report.taps)} taps are not right" if bad else f"all {len(report.taps)} taps are right"
        yield Section("taps", verdict, headline, lines)


def _precision(report: Report) -> Iterator[Section]:
    if report.precision is None:
        return
    by_ratio = sorted(report.taps, key=lambda tap: tap.port_over_reference or 0.0, reverse=True)
    worst, over = by_ratio[0], [tap for tap in by_ratio if (tap.port_over_reference or 0.0) > PRECISION_FAIL]
    said = report.precision.upper() if report.precision == "fail" else report.precision
    table = (
        f"precision in bfloat16: at most {worst.port_over_reference:.2f} times the reference's error, {worst.place}   {said}"
    )
    ratio = f"{worst.port_over_reference:.3g}"
    times = f"{worst.place} is {ratio} times as far from float32 as the reference in the same dtype"
    if over:
        times = f"more than {PRECISION_FAIL:g} times as far from float32 as the reference: {counted(len(over), 'tap')}"
    lines = [f"{tap.place}: {tap.port_over_reference:.2f}" for tap in over or [worst]]
    yield Section("precision", report.precision, times, lines, [table])


def _as_stored(report: Report) -> Iterator[Section]:
    """What it does to the logits that values are others, by design or by training: told, not judged."""
    if report.as_stored is not None:
        headline = f"logits with DST's own values against SRC's: {_apart(report.as_stored)}"
        yield Section("as stored", "info", headline, [], [f"as stored  {_apart(report.as_stored)}"])


def _apart(run: dict[str, float]) -> str:
    """How far logits are apart."""
    kl = f"KL {run['kl_mean']:.1e} mean, {run['kl_p95']:.1e} p95, {run['kl_max']:.1e} max   top-1 {run['top1']:.1%}"
    return f"max |d logit| {run['max_abs']:.1e} of {run['max_logit']:.3g}   {kl}"


def _free_run(report: Report) -> Iterator[Section]:
    run = report.free_run
    if run is None:
        yield Section("free run", "incomplete", "the whole model was not run", report.incomplete, [])
        return
    runs = {"routing replayed": run, "own routing": run["own_routing"]}
    if "bfloat16" in run:
        runs["in bfloat16"] = run["bfloat16"]
        runs["reference in it"] = run["reference_bfloat16"]  # what noise is: PyTorch against itself
    table = []
    for name, one in runs.items():
        verdict = {"ok": "ok", "fail": "FAIL"}.get(one.get("verdict", ""), "")
        table.append(f"free run  {name:<16} {_apart(one)}   {verdict}".rstrip())
    if "amplified" in run:
        moved = f"moves by up to {run['amplified']:.1e}: bound {run['gate']:.1e}"
        table.append(f"          PyTorch itself, nudged by what float32 rounds, {moved}")
    headline = f"max |difference of logits| {run['max_abs']:.3e}, bound {run['gate']:.3e}"
    lines = [f"KL {run['kl_mean']:.3e} mean, {run['kl_max']:.3e} max; top-1 {run['top1']:.2%}"]
    yield Section("free run", run["verdict"], headline, lines, table)


def _flips(report: Report) -> Iterator[Section]:
    """Judged with the reference's routing replayed, told with the port's own."""
    judged, told = report.judged_flips, report.flips
    wrong = [flip for flip in judged if not flip["explained"]]
    verdict, table = "fail" if wrong else "ok", []
    if judged or told:
        near = f"{len(judged) - len(wrong)} near-ties, {len(wrong)} not explained   {verdict.replace('fail', 'FAIL')}"
        follow = sum(flip["follows"] is not None for flip in told)
        unclear = sum(not flip["explained"] for flip in told)
        kinds = f"{len(told) - follow - unclear} near-ties, {follow} follow from an earlier flip, {unclear} not explained"
        table = [
            f"expert flips  routing replayed {len(judged)}: {near}",
            f"expert flips  own routing      {len(told)}: {kinds}",
        ]
    headline = f"not explained: {len(wrong)} of {len(judged)} expert flips, routing replayed"
    yield Section("expert flips", verdict, headline if wrong else "all are explained", [str(flip) for flip in wrong], table)


def _gradients(report: Report) -> Iterator[Section]:
    count = len(report.gradients)
    if not count:
        return
    worst = max(report.gradients, key=lambda gradient: gradient["relative_l2"])
    wrong = report.wrong_gradients
    names = [gradient["name"] for gradient in wrong]
    noise = [one for one in report.gradients if one["verdict"] == "incomplete"]
    said = f"FAIL: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if wrong else "incomplete" if noise else "ok"
    table = f"gradients  {count} parameters, worst {worst['relative_l2']:.1e}, {worst['name']}   {said}"
    lines = [f"{one['name']}: {one['relative_l2']:.3e}" for one in wrong]
    headline = f"gradients of all {count} parameters are within their bound"
    if wrong:
        some = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        headline = f"beyond their bound: {len(wrong)} of {count} gradients: {some}"
    elif noise:
        headline = (
            f"not judged, since rounding alone moves PyTorch's: {len(noise)} of {count} gradients, such as {noise[0]['name']}"
        )
    verdict = "fail" if wrong else "incomplete" if noise else "ok"
    yield Section("gradients", verdict, headline, lines, [table])


def _forms(report: Report) -> Iterator[Section]:
    """A line for those that are right, and one for each that is not."""
    forms = report.forms
    if not forms:
        return
    wrong, missing = ([one for one in forms if one.verdict == verdict] for verdict in ("fail", "incomplete"))
    verdict = "fail" if wrong else "incomplete" if missing else "ok"
    table = []
    for on, dtype in dict.fromkeys((one.on, one.dtype) for one in forms):
        right = [one for one in forms if (one.on, one.dtype, one.verdict) == (on, dtype, "ok")]
        if right:
            of_logits = [one.worst or 0.0 for one in right if "generate" not in one.form and "remat" not in one.form]
            worst = max(of_logits, default=0.0)
            said = f"worst {worst:.1e}" if dtype == "float32" else f"at most {worst:.2f} times the reference's error"
            names = "; ".join(one.form for one in right)  # some have a comma inside
            table.append(f"forms     {f'{dtype}, on the {on}':<26} {said}   ok x{len(right)}   {names}")
    for one in (*wrong, *missing):
        worst = "" if one.worst is None else f"{one.worst:.1e}   "
        said = "FAIL" if one.verdict == "fail" else one.verdict
        table.append(f"form      {one.form} ({one.dtype}, on the {one.on})   {worst}{one.note}   {said}")
    lines = [f"{one.form} in {one.dtype}: {one.note}" for one in (*wrong, *missing)]
    headline = f"all {len(forms)} runs are right"
    if wrong:
        names = "; ".join(dict.fromkeys(one.form for one in wrong))
        headline = f"wrong as it is run: {names}"
    elif missing:
        headline = f"{len(missing)} of {len(forms)} were not compared"
    yield Section("forms", verdict, headline, lines, table)


def _complete(report: Report) -> Iterator[Section]:
    table = [f"incomplete: {reason}" for reason in report.incomplete]
    first = report.incomplete[0] if report.incomplete else "nothing that was asked for is missing"
    yield Section("complete", "incomplete" if report.incomplete else "ok", first, report.incomplete, table)


def _errors(report: Report) -> Iterator[Section]:
    if report.errors:
        said = [f"{error}; this is a bug of check-parity, please report it" for error in report.errors]
        yield Section("errors", "warn", said[0], said, [f"error: {one}" for one in said])


def _diagnosis(report: Report) -> Iterator[Section]:
    """Where it first goes wrong, and what explains it."""
    where = report.first_divergence
    if where is None:
        return
    place = "the whole model" if where["layer"] is None else f"layer {where['layer']}"
    if "form" in where:
        place = f"as it is run ({where['form']})" + ("" if where["layer"] is None else f", {place}")
    said, found = [], report.diagnosis
    if found is not None:
        parameter = f"{found['tap']}: " if "." in found["tap"] else ""
        said = [f"diagnosis: {parameter}{found['fault']}{residuals(found)}   [{found['name']}]", f"  to do: {found['fix']}"]
        if found["others"]:
            said.append(f"  as well as: {', '.join(other['name'] for other in found['others'])}")
        if found.get("forms"):
            said.append(f"  as it is run ({'; '.join(found['forms'])}): {found['pattern']}".removesuffix(": "))
    elif report.explained:
        pattern = f"; {report.pattern}" if report.pattern else ""
        why = f"none of the {report.tried} known mistakes of this place explains it"
        why = why if report.tried else "no known mistake could be tried here; it takes SRC and PyTorch"
        said = [f"diagnosis: {report.explained}: {why}{pattern}"]
    said += _others(report)
    if report.witness is not None and report.witness["left"]:
        one = report.witness
        distances = f"PyTorch {one['reference']:.1e}, the port {one['port']:.1e}, what float32 rounds {one['noise']:.1e}"
        said.append(f"  third witness, from the equation in float64: {distances}")
    first = f"first divergence: {place}, {where['tap']}"
    yield Section("diagnosis", "info", first, [line.strip() for line in said], [first, *said])


def _others(report: Report) -> list[str]:
    """What else is wrong by itself, layers of the same mistake together; what follows from something is said to."""
    rest: dict[tuple, list[int | None]] = {}
    for one in report.findings:
        if one is not report.diagnosis and not (one["fault"] is None and _place(one) == report.explained):
            said = one["fault"] or ", ".join(part for part in ("no known mistake explains it", one["pattern"]) if part)
            if one["follows"] is not None:
                said = f"follows from {_place(one['follows'])}"
            rest.setdefault((one["tap"], said, one["name"], "; ".join(one.get("forms", ()))), []).append(one["layer"])
    lines = []
    for (tap, said, name, forms), layers in rest.items():
        inside = [str(layer) for layer in layers if layer is not None]
        where = f"layer{'s' * (len(inside) > 1)} {', '.join(inside)} " if inside and "." not in tap else ""
        how = f"as it is run ({forms}), " if forms else ""
        lines.append(f"also wrong: {how}{where}{tap}: {said}{f'   [{name}]' if name else ''}")
    return lines


def _place(one: dict[str, Any]) -> str:
    place = one["tap"] if one["layer"] is None else f"layer {one['layer']} {one['tap']}"
    return f"{one['forms'][0]}, {place}" if one.get("forms") else place


def residuals(diagnosis: dict) -> str:
    """Measured of a mistake that was tried; nothing was of what two files say."""
    before, after = diagnosis["residual_before"], diagnosis["residual_after"]
    return "" if before is None else f": residual {before:.1e} -> {after:.1e}"
