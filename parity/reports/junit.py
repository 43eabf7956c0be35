"""The report as JUnit XML: a test case a tap, one for the weights, one for the free run.

What could not be compared is an error, never skipped: most viewers show a skipped test as a good one.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from parity import configs
from parity.metrics import PRECISION_FAIL
from parity.reports.report import Report, TapResult, Weight

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    name = "check-parity --layers" if report.layers else "check-parity"
    suite = ET.Element("testsuite", name=name, time=f"{report.seconds:.3f}")
    properties = ET.SubElement(suite, "properties")
    for key in ("verdict", "model", "source", "checkpoint", "tokens", "seed", "peak_rss_bytes"):
        ET.SubElement(properties, "property", name=key, value=_text(getattr(report, key)))
    case = _case(suite, "check-parity", "configuration")
    if wrong := [configs.said(one) for one in report.configs if one["logits"]]:
        _outcome(case, "failure", wrong[0], wrong)
    _weights(suite, report.weights)
    for tap in report.taps:
        _tap(suite, tap)
    _free_run(suite, report)
    unexplained = [flip for flip in report.judged_flips if not flip["explained"]]
    flips = _case(suite, "check-parity", "expert flips")
    if unexplained:
        message = f"not explained: {len(unexplained)} of {len(report.judged_flips)} expert flips, routing replayed"
        _outcome(flips, "failure", message, map(str, unexplained))
    if report.precision is not None:
        _precision(suite, report)
    if report.gradients:
        case = _case(suite, "check-parity", "gradients")
        wrong = [f"{one['name']}: {one['relative_l2']:.3e}" for one in report.wrong_gradients]
        if wrong:
            _outcome(case, "failure", f"beyond their bound: {len(wrong)} of {len(report.gradients)} gradients", wrong)
    complete = _case(suite, "check-parity", "complete")
    if report.incomplete:
        _outcome(complete, "error", report.incomplete[0], report.incomplete)
    cases = suite.findall("testcase")
    counts = {"tests": len(cases), "skipped": 0}
    counts |= {f"{kind}s": sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error")}
    suite.attrib |= {key: str(count) for key, count in counts.items()}
    suites = ET.Element("testsuites", suite.attrib)
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _weights(suite: ET.Element, weights: list[Weight]) -> None:
    case = _case(suite, "check-parity", "weights")
    wrong = [f"{weight.name}: {weight.note}" for weight in weights if weight.note]
    if wrong:
        _outcome(case, "failure", f"not bit-exact: {len(wrong)} of {len(weights)} parameters", wrong)
    elif not weights:
        _outcome(case, "error", "no parameter was compared", [])


def _tap(suite: ET.Element, tap: TapResult) -> None:
    where = "model" if tap.layer is None else f"layer {tap.layer}"
    case = _case(suite, f"check-parity.{where}", tap.tap)
    if tap.verdict == "ok":
        return
    numbers = [f"worst token's relative L2 {tap.worst_token_rel_l2:.3e}", f"max |difference| {tap.max_abs:.3e}"]
    if tap.port_over_reference is not None:
        numbers.append(f"port/reference {tap.port_over_reference:.2f}")
    if tap.verdict == "fail":
        _outcome(case, "failure", "; ".join(part for part in (numbers[0], tap.note) if part), numbers)
    else:
        _outcome(case, "error", tap.note or "incomplete", [])


def _free_run(suite: ET.Element, report: Report) -> None:
    case = _case(suite, "check-parity", "free run")
    run = report.free_run
    if run is None:
        _outcome(case, "error", "the whole model was not run", report.incomplete)
    elif run["verdict"] == "fail":
        message = f"max |difference of logits| {run['max_abs']:.3e}, bound {run['gate']:.3e}"
        _outcome(case, "failure", message, [f"KL {run['kl_mean']:.3e} mean, {run['kl_max']:.3e} max; top-1 {run['top1']:.2%}"])


def _precision(suite: ET.Element, report: Report) -> None:
    case = _case(suite, "check-parity", "precision")
    if report.precision == "fail":
        over = [tap for tap in report.taps if (tap.port_over_reference or 0.0) > PRECISION_FAIL]
        message = f"more than {PRECISION_FAIL:g} times as far from float32 as the reference: {len(over)} taps"
        lines = [
            f"{'model' if tap.layer is None else f'layer {tap.layer}'} {tap.tap}: {tap.port_over_reference:.2f}" for tap in over
        ]
        _outcome(case, "failure", message, lines)


def _case(suite: ET.Element, classname: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_text(classname), name=_text(name))


def _outcome(case: ET.Element, kind: str, message: str, lines: Iterable[str]) -> None:
    ET.SubElement(case, kind, message=_text(message), type=kind).text = _text("\n".join(lines)) or None


def _text(value: object) -> str:
    """Control characters and halves of surrogate pairs, which a path may hold, are not XML."""
    return _NOT_XML.sub("\ufffd", str(value))
