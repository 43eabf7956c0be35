"""The report as JUnit XML: a test case a tap, and one for each other arm.

What could not be compared is an error, never skipped: most viewers show a skipped test as a good one.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from parity.reports.report import Report, TapResult
from parity.reports.sections import sections

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> str:
    name = "check-parity --layers" if report.layers else "check-parity"
    suite = ET.Element("testsuite", name=name, time=f"{report.seconds:.3f}")
    properties = ET.SubElement(suite, "properties")
    for key in ("verdict", "model", "source", "checkpoint", "tokens", "seed", "peak_rss_bytes"):
        ET.SubElement(properties, "property", name=key, value=_text(getattr(report, key)))
    for section in sections(report):
        if section.name == "taps":
            for tap in report.taps:
                _tap(suite, tap)
            continue
        case = _case(suite, "check-parity", section.name)
        kind = {"fail": "failure", "incomplete": "error"}.get(section.verdict)
        if kind is not None:
            _outcome(case, kind, section.headline, section.lines)
        elif section.name == "diagnosis":  # beside the cases that fail: what explains them
            ET.SubElement(case, "system-out").text = _text("\n".join([section.headline, *section.lines]))
    cases = suite.findall("testcase")
    counts = {"tests": len(cases), "skipped": 0}
    counts |= {f"{kind}s": sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error")}
    suite.attrib |= {key: str(count) for key, count in counts.items()}
    suites = ET.Element("testsuites", suite.attrib)
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


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


def _case(suite: ET.Element, classname: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_text(classname), name=_text(name))


def _outcome(case: ET.Element, kind: str, message: str, lines: Iterable[str]) -> None:
    ET.SubElement(case, kind, message=_text(message), type=kind).text = _text("\n".join(lines)) or None


def _text(value: object) -> str:
    """Control characters and halves of surrogate pairs, which a path may hold, are not XML."""
    return _NOT_XML.sub("\ufffd", str(value))
