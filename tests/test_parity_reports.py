"""JUnit and HTML: what they say of a report, that files cannot speak in them, and that a browser has no complaint."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from click.testing import CliRunner
from reporting import RUN

from oss_model.taps import LAYER_TAPS
from parity.cli import main
from parity.reports import html as page
from parity.reports import junit
from parity.reports.report import STORED, FormResult, Report, TapResult, Weight
from parity.reports.sections import sections


def fails_nothing(report: Report) -> None:
    """What a right port may show: near-ties, what follows from them, ratios and gradients within their bounds."""
    flip = {"layer": 2, "token": 3, "lost": [0], "took": [1], "margin": 0.0, "explained": True}
    report.judged_flips, report.flips = [flip], [flip | {"follows": None}, flip | {"follows": {"layer": 1, "token": 3}}]
    report.flips.append(flip | {"explained": False, "follows": None})
    report.gradients = [{"name": "norm.scale", "relative_l2": 1e-5, "verdict": "ok"}]
    report.taps[5].port_over_reference = 2.9


def jumps(layer: int | None):
    def make(report: Report) -> None:
        report.free_run = {**RUN, "max_abs": 2.0, "gate": 2e-4, "verdict": "fail", "own_routing": dict(RUN)}
        report.growth = [
            {"layer": n, "replayed": 1e-6 if layer is None or n < layer else 1e-2 * (n + 1), "own": 0.5} for n in range(24)
        ]

    return make


def configs_differ(report: Report) -> None:
    report.configs = [{"name": "sliding_window", "checkpoint": 129, "source": 128, "logits": True}]


def flips_unexplained(*layers: int):
    flip = {"token": 3, "lost": [0], "took": [1], "margin": 0.5, "explained": False}
    return lambda report: report.judged_flips.extend(flip | {"layer": n} for n in layers)


def gradients_wrong(*names: str):
    return lambda report: report.gradients.extend({"name": name, "relative_l2": 1.0, "verdict": "fail"} for name in names)


FAILING = {
    "a tap": (lambda report: setattr(report.taps[19], "verdict", "fail"), {"layer": 1, "tap": "q_rope"}),
    "a parameter": (lambda report: setattr(report.weights[7], "note", "differs"), {"layer": 6, "tap": "weights"}),
    "the free run, from a layer on": (jumps(5), {"layer": 5, "tap": "free run"}),
    "the free run, from the first layer on": (jumps(0), {"layer": 0, "tap": "free run"}),
    "the free run, after the layers": (jumps(None), {"layer": None, "tap": "logits"}),
    "a configuration": (configs_differ, {"layer": None, "tap": "config"}),
    "a choice": (flips_unexplained(4, 9), {"layer": 4, "tap": "expert_choice"}),
    "gradients": (gradients_wrong("layers.0.q", "layers.10.q", "layers.9.q"), {"layer": 10, "tap": "gradients"}),
    "gradients of the norm": (gradients_wrong("layers.0.q", "norm.scale"), {"layer": None, "tap": "gradients"}),
    "a gradient of the embedding": (gradients_wrong("embedding.weight"), {"layer": None, "tap": "gradients"}),
    "precision": (lambda report: setattr(report.taps[20], "port_over_reference", 3.1), {"layer": 1, "tap": "k_rope"}),
}  # fmt: skip


def test_what_fails_nothing_has_no_place(healthy):
    fails_nothing(healthy)
    assert (healthy.verdict, healthy.first_divergence) == ("pass", None)


@pytest.mark.parametrize("name", FAILING)
def test_whatever_fails_says_where(healthy, name):
    make, place = FAILING[name]
    fails_nothing(healthy)
    make(healthy)
    assert (healthy.verdict, healthy.first_divergence) == ("fail", place)
    where = "the whole model" if place["layer"] is None else f"layer {place['layer']}"
    assert f"first divergence: {where}, {place['tap']}" in healthy.table()
    assert f"First divergence: {where}, {place['tap']} " in Page(page.render(healthy)).text


def test_of_several_arms_the_one_that_comes_first_says_where(healthy):
    """A router whose input is wrong chooses wrongly: then it is not the router that is named."""
    jumps(5)(healthy)
    flips_unexplained(5, 6)(healthy)
    gradients_wrong("layers.10.q")(healthy)
    assert healthy.first_divergence == {"layer": 5, "tap": "free run"}
    flips_unexplained(4)(healthy)
    assert healthy.first_divergence == {"layer": 4, "tap": "expert_choice"}
    healthy.weights[7].note = "differs"
    assert healthy.first_divergence == {"layer": 6, "tap": "weights"}


def test_flips_are_counted_by_what_explains_them(broken):
    table = broken.table()
    assert "expert flips  routing replayed 2: 1 near-ties, 1 not explained   FAIL" in table
    assert "expert flips  own routing      40: 37 near-ties, 2 follow from an earlier flip, 1 not explained" in table
    broken.judged_flips = broken.judged_flips[:1]
    assert "expert flips  routing replayed 1: 1 near-ties, 0 not explained   ok" in broken.table()


def test_wrong_gradients_are_named_from_the_last_layer_back(healthy):
    gradients_wrong("embedding.weight", "layers.0.q", "layers.2.q", "layers.1.q", "layers.2.k")(healthy)
    assert "FAIL: layers.2.q, layers.2.k, layers.1.q, layers.0.q, ..." in healthy.table()
    failed = cases(healthy)["check-parity.gradients"][0]
    assert (failed.text or "").split(":")[0] == "layers.2.q"
    assert "of 5 gradients: layers.2.q, layers.2.k, layers.1.q, layers.0.q, …" in Page(page.render(healthy)).text


def test_wrong_gradients_alone_are_seen_everywhere(healthy):
    right = {"name": "norm.scale", "relative_l2": 1e-5, "verdict": "ok"}
    healthy.gradients = [right, {"name": "layers.3.attn.sinks", "relative_l2": 0.5, "verdict": "fail"}]
    assert healthy.verdict == "fail"
    assert "gradients  2 parameters, worst 5.0e-01, layers.3.attn.sinks   FAIL" in healthy.table()
    failed = [
        case.get("name") for case in ET.fromstring(junit.render(healthy)).iter("testcase") if case.find("failure") is not None
    ]
    assert failed == ["gradients"]
    assert "gradients beyond their bound: 1 of 2 gradients: layers.3.attn.sinks ✕ FAIL" in Page(page.render(healthy)).text
    healthy.gradients = [right]
    assert "gradients gradients of all 1 parameters are within their bound ✓ ok" in Page(page.render(healthy)).text


# --- JUnit ------------------------------------------------------------------------------------------------------


def cases(report: Report) -> dict[str, ET.Element]:
    return {
        f"{case.get('classname')}.{case.get('name')}": case for case in ET.fromstring(junit.render(report)).iter("testcase")
    }


def test_junit_has_a_case_a_tap_and_all_are_good(healthy):
    found = cases(healthy)
    named = ["configuration", "weights", "rope", "final_norm", "logits", "free run", "expert flips", "complete"]
    inside = [f"check-parity.layer {n}.{name}" for n in range(24) for name in LAYER_TAPS]
    models = {f"check-parity.{'model.' if name in ('rope', 'final_norm', 'logits') else ''}{name}" for name in named}
    assert set(found) == {*inside, *models}
    assert all(len(case) == 0 for case in found.values())
    suites = ET.fromstring(junit.render(healthy))
    assert [suites.get(key) for key in ("tests", "failures", "errors", "skipped")] == [str(len(found)), "0", "0", "0"]
    assert suites[0].attrib == suites.attrib
    assert {p.get("name"): p.get("value") for p in suites.iter("property")}["verdict"] == "pass"


def test_a_configuration_that_differs_fails_in_every_report(healthy):
    configs_differ(healthy)
    said = "DST/config.json says sliding_window 129, SRC says 128"
    found = cases(healthy)["check-parity.configuration"]
    assert (found[0].tag, found[0].get("message")) == ("failure", said)
    assert f"config     {said}   FAIL" in healthy.table()
    assert said in page.render(healthy)


def test_junit_fails_what_diverged_and_errs_on_what_was_not_compared(broken):
    found = cases(broken)
    bad = {name: (case[0].tag, case[0].get("message")) for name, case in found.items() if len(case)}
    assert bad == {
        "check-parity.weights": ("failure", "not bit-exact: 1 of 25 parameters"),
        "check-parity.layer 16.attn_core": ("failure", "worst token's relative L2 3.100e-01; only tokens >= 128"),
        "check-parity.layer 18.attn_core": ("failure", "worst token's relative L2 1.000e+09; all tokens"),
        "check-parity.layer 20.q": ("error", "the candidate has no such tap"),
        "check-parity.free run": ("failure", "max |difference of logits| 2.500e+00, bound 2.000e-04"),
        "check-parity.expert flips": ("failure", "not explained: 1 of 2 expert flips, routing replayed"),
        "check-parity.precision": ("failure", "more than 3 times as far from float32 as the reference: 1 tap"),
        "check-parity.diagnosis": ("system-out", None),
        "check-parity.complete": ("error", "one reason"),
    }
    assert found["check-parity.complete"][0].text == "one reason\nanother reason"
    assert "port/reference 5.25" in (found["check-parity.layer 16.attn_core"][0].text or "")
    suites = ET.fromstring(junit.render(broken))
    assert [suites.get(key) for key in ("failures", "errors", "skipped")] == ["6", "2", "0"]


def test_junit_is_never_green_when_nothing_was_computed():
    found = cases(Report("src", "dst", "gpt-oss", 28, 0, incomplete=["the parameters do not fit"]))
    assert {name for name, case in found.items() if case.find("error") is not None} == {
        "check-parity.weights", "check-parity.free run", "check-parity.complete",
    }  # fmt: skip


def test_junit_is_xml_whatever_a_path_holds(healthy):
    healthy.checkpoint = 'a\x00b\x1b[31m\udcff<&"]]>'
    values = {p.get("name"): p.get("value") for p in ET.fromstring(junit.render(healthy).encode("utf-8")).iter("property")}
    assert values["checkpoint"] == 'a\ufffdb\ufffd[31m\ufffd<&"]]>'


# --- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 200])
@pytest.mark.parametrize("ratios", [False, True])
def test_the_table_fits_and_its_columns_hold(broken, width, ratios):
    if not ratios:
        for tap in broken.taps:
            tap.port_over_reference = None
    broken.taps[20] = TapResult(1, "a_tap_of_my_own_whose_name_is_long", 4e-7, 1e-5, "ok")
    broken.taps[21] = TapResult(1, "another_tap_of_my_own", 4e-7, 1e-5, "fail", "a note that is longer than most are")
    lines = broken.table(width).splitlines()
    assert max(map(len, lines)) <= width
    head = next(n for n, line in enumerate(lines) if line.startswith("layer "))
    assert ("port/ref" in lines[head]) == ratios
    start = lines[head].index("verdict")
    rows = [line for line in lines[head + 1 :] if re.match(r"(model|[\d-]+) ", line)]
    assert len(rows) == 19
    for row in rows:
        assert re.match(r"(ok|FAIL|incomplete)( x\d+)?(  |$)", row[start:]), row
        assert row[start - 2 : start] == "  "
    words = broken.table()
    if "note" not in lines[head]:  # notes have lines of their own
        words = words.replace("verdict     note", "verdict")
    assert Counter("".join("".join(lines).split())) == Counter("".join(words.split()))  # nothing is cut off


def test_a_table_without_a_width_has_a_line_a_row(healthy):
    lines = healthy.table().splitlines()
    assert lines[2:6] == [
        "layer     tap                 worst token  verdict  note",
        "model     rope                2.3e-07      ok       cos and sin up to position 32767",
        "0-23      all 14 taps         4.0e-07      ok x336",
        "model     final_norm..logits  3.0e-07      ok x2",
    ]


# --- HTML -------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text a person may read."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def test_the_verdict_comes_first(healthy):
    found = Page(page.render(healthy))
    assert "✓ Pass All 25 parameters are bit-exact; every component computes what PyTorch computes, and so" in found.text
    assert found.text.startswith("Pass · gpt-oss, 24 layers · check-parity")
    assert "What failed" not in found.text


def test_a_failing_page_says_where_what_and_why(broken):
    text = Page(page.render(broken)).text
    assert (
        "✕ Diverged First divergence: layer 16, attn_core Worst token 0.31 , 3,100 times the gate; only tokens"
        in text.replace("0.31,", "0.31 ,")
    )
    assert "Diagnosis: the sliding window is 129, should be 128: residual 0.31 → 4.0e-6" in text
    assert "one reason another reason" in text
    assert "layers.6.attn.sinks 1 of 64 values differ" in text
    assert "expert flips not explained: 1 of 2 expert flips, routing replayed ✕ FAIL" in text
    assert "Expert flips 40 1 unexplained where judged" in text
    rows = re.findall(r"(replayed|own) 17 (\d+) 2, 6 0, 3 1e-7 (✓ [\w -]+?|✕ no|no) (?=replayed|own|22 more|<|Thi)", text)
    assert rows[:4] == [
        ("replayed", "130", "✕ no"),
        ("replayed", "128", "✓ near-tie"),
        ("own", "167", "no"),
        ("own", "128", "✓ near-tie"),
    ]
    assert ("own", "131", "✓ follows from layer 16") in rows
    assert ("own", "132", "✓ follows from layer 16 of token 131") in rows
    assert "22 more flips" in text
    assert "5.25×" in text
    assert "not finite" in text


@pytest.mark.parametrize(("ratio", "says"), [(1.4, "✓ ok"), (2.0, "? warn"), (3.5, "✕ FAIL")])
def test_a_port_less_precise_than_the_reference_is_named(healthy, ratio, says):
    tap = next(tap for tap in healthy.taps if (tap.layer, tap.tap) == (3, "q"))
    tap.port_over_reference = ratio
    text = Page(page.render(healthy)).text
    what = (
        "more than 3 times as far from float32 as the reference: 1 tap"
        if ratio > 3
        else (f"layer 3 q is {ratio:g} times as far from float32 as the reference in the same dtype")
    )
    assert f"precision {what} {says}" in text
    assert ("✕ Diverged" in text) == (ratio > 3)
    failed = [name for name, case in cases(healthy).items() if case.find("failure") is not None]
    assert failed == (["check-parity.precision"] if ratio > 3 else [])


def test_the_page_has_every_arm_and_every_form(broken):
    broken.forms = [
        FormResult("jit", "model", "float32", "ok", 3e-6, "not told of one that is right"),
        FormResult("cache", "model", "float32", "fail", 0.9, "parts at layer 0 attn_core"),
        FormResult("generate", "replica", "bfloat16", "incomplete", None, "takes the package peft"),
    ]
    text = Page(page.render(broken)).text
    words = {"ok": "✓ ok", "fail": "✕ FAIL", "incomplete": "? incomplete", "warn": "? warn"}
    arms = [arm for arm in sections(broken) if arm.name != "diagnosis"]
    assert len(arms) >= 6
    for arm in arms:
        assert re.search(f"{arm.name} {re.escape(arm.headline)}.*? {re.escape(words[arm.verdict])}", text), arm.name
    assert "cache float32 model 0.9 parts at layer 0 attn_core ✕ FAIL" in text
    assert "generate bfloat16 replica – takes the package peft ? incomplete jit float32 model 3.0e-6 ✓ ok" in text


def test_what_stands_in_backquotes_is_code():
    assert page.marked("see `k > q - window`, <not> this") == "see <code>k &gt; q - window</code>, &lt;not&gt; this"


def test_other_faults_and_the_third_witness_stand_behind_the_diagnosis(broken):
    other = {"layer": 3, "tap": "mlp_out", "fault": "swiglu's alpha is 1", "name": "swiglu-alpha-one", "pattern": ""}
    broken.findings = [broken.diagnosis, other | {"follows": None, "forms": []}]
    broken.witness = {"layer": 16, "tap": "attn_core", "noise": 1e-7, "reference": 2e-7, "port": 0.5, "left": "port"}
    items = "Also wrong: layer 3 mlp_out: swiglu's alpha is 1 [swiglu-alpha-one] Third witness, from the equation"
    assert f"itself included {items}" in Page(page.render(broken)).text


def test_what_was_trained_is_not_called_bit_exact(healthy):
    healthy.weights[3] = Weight("layers.2.attn.sinks", moved=0.5)
    text = Page(page.render(healthy)).text
    assert "✓ Pass All 24 other parameters are bit-exact; 1 changed, as expected; every" in text
    assert "Parameters bit-exact 24 of 25 decoded by transformers" in text


def test_a_report_of_stored_bytes_claims_no_pytorch(healthy):
    text = Page(page.render(Report("a", "b", "gpt-oss", 0, 0, oracle=STORED, weights=[Weight("norm.scale")]))).text
    assert "0 tokens · stored bytes alone" in text
    assert "Parameters bit-exact 1 of 1 as stored" in text
    assert "PyTorch in float32" not in text
    assert "against PyTorch in float32" in Page(page.render(healthy)).text


def test_colours_are_of_the_error_over_each_components_own_gate(healthy):
    """The gates are ten times each one's own noise: 1e-6 is quiet beside one, and fails another."""
    healthy.taps[1] = dataclasses.replace(healthy.taps[1], worst_token_rel_l2=1e-6, gate=1e-5)
    healthy.taps[2] = dataclasses.replace(healthy.taps[2], worst_token_rel_l2=1e-6, gate=1e-7, verdict="fail")
    text = page.render(healthy)
    assert re.findall(r'class="cell (\w+)[ \w]*" style="--at:(\d+)"[^>]*aria-label="layer 0 · (?:attn_norm|q) ', text) == [
        ("ok", "80"), ("fail", "25"),
    ]  # fmt: skip
    assert "1e-5× 1e-3× its gate 100× 1e4×" in Page(text).text


def test_what_a_screen_reader_meets_has_a_name(broken):
    broken.forms = [FormResult("jit", "model", "float32", "ok", 3e-6)]
    found = Page(page.render(broken))
    named = ("table", "figure", "section")
    assert {tag for tag, _ in found.elements} >= set(named)
    assert [(tag, attrs) for tag, attrs in found.elements if tag in named and not attrs.get("aria-label")] == []
    operated = [(tag, attrs) for tag, attrs in found.elements if "tabindex" in attrs]
    assert operated
    assert [one for one in operated if not one[1].get("aria-label")] == []
    (tip,) = (attrs for _, attrs in found.elements if attrs.get("id") == "tip")
    assert tip["aria-hidden"] == "true"  # it shows the label, which is read already


def test_forms_are_parted_by_what_no_name_of_theirs_has(healthy):
    healthy.forms = [FormResult(name, "model", "float32", "ok", 0.0) for name in ("generate", "generate, eos", "jit")]
    assert "ok x3   generate; generate, eos; jit" in healthy.table()
    healthy.forms[1].verdict = healthy.forms[2].verdict = "fail"
    assert [one.headline for one in sections(healthy) if one.name == "forms"] == ["wrong as it is run: generate, eos; jit"]


def test_every_tap_of_every_layer_is_a_cell(broken):
    found = Page(page.render(broken))
    labels = [attrs["aria-label"] or "" for attrs in found.with_class("cell") if "aria-label" in attrs]
    assert [label.split(" · ")[:2] for label in labels] == [[f"layer {n}", name] for n in range(24) for name in LAYER_TAPS]
    (first,) = (attrs for attrs in found.with_class("first") if "aria-label" in attrs)
    assert (first["aria-label"] or "").splitlines() == [
        "layer 16 · attn_core · FAIL", "worst token 0.31 = 3,100 × the gate of 1e-4", "max |Δ| 1.2", "port/reference 5.25×",
        "only tokens >= 128",
    ]  # fmt: skip
    assert first["tabindex"] == "0"


def test_failed_and_incomplete_cells_are_told_apart_without_colour(broken):
    text = page.render(broken)
    marks = dict(re.findall(r'class="cell (\w+)[^>]*aria-label="layer (?:16 · attn_core|20 · q) [^>]*>(.)', text))
    assert marks == {"fail": "✕", "incomplete": "?"}


@pytest.mark.parametrize("field", ["source", "checkpoint", "model"])
def test_a_path_cannot_speak_html(healthy, field):
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
    text = page.render(dataclasses.replace(healthy, **{field: evil}))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert evil in Page(text).text


def test_names_notes_and_reasons_cannot_speak_html_either(broken):
    evil = "</script><script>alert(1)</script>\"'><b onmouseover=alert(2)>"
    broken.weights[3] = Weight(evil, evil)
    broken.taps[20] = TapResult(1, evil, 1.0, 1.0, "fail", evil)
    broken.incomplete = [evil]
    broken.diagnosis["fault"] = evil
    scripts = [attrs for tag, attrs in Page(page.render(broken)).elements if tag == "script"]
    assert len(scripts) == 1
    assert not [attrs for _, attrs in Page(page.render(broken)).elements if "onmouseover" in attrs]


def test_a_path_that_is_no_unicode_is_written_all_the_same(healthy, tmp_path):
    healthy.source = "weights\udcff"
    (tmp_path / "report.html").write_text(page.render(healthy), encoding="utf-8")


def test_the_page_needs_nothing_else(broken):
    text = page.render(broken)
    assert not re.search(r"https?:|//[\w.]+/|@import|url\(", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    for tag, attrs in Page(text).elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (tag, attrs.get(name)) in {(tag, None), ("link", "data:,")}


def test_the_page_says_its_language_and_heads_its_tables(broken):
    found = Page(page.render(broken))
    assert ("html", {"lang": "en"}) in found.elements
    heads = [attrs for tag, attrs in found.elements if tag == "th"]
    assert heads
    assert all(attrs.get("scope") in ("col", "row") for attrs in heads)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.14e-7, "3.1e-7"), (1e-4, "1e-4"), (0.6931, "0.693"), (3100.0, "3,100"), (1e9, "not finite"),
     (float("inf"), "not finite"), (float("nan"), "not finite"), (2.5e5, "2.5e5"), (None, "–")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert page.number(value) == text


def test_long_prompts_are_gathered_and_the_worst_token_of_each_stretch_shows(healthy):
    healthy.token_kl = [1e-9] * 1000
    healthy.token_kl[501] = 0.5
    bars = [attrs["aria-label"] for tag, attrs in Page(page.render(healthy)).elements if tag == "i" and "aria-label" in attrs]
    assert len(bars) == 334
    assert bars[167] == "tokens 501 to 503, worst\nKL 0.5 nats"


def nothing_computed() -> Report:
    report = Report("src", "dst", "gpt-oss", 28, 0, True, weights=[Weight("layers.0.attn.sinks", "missing in the checkpoint")])
    report.incomplete = ["the parameters do not fit the reference"]
    return report


def test_a_run_in_which_nothing_could_be_computed_has_a_page():
    assert "First divergence: layer 0, weights layers.0.attn.sinks: missing" in Page(page.render(nothing_computed())).text


# --- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here: apt-get install chromium")
    return found


def load(chromium: str, directory, text: str) -> tuple[str, list[str]]:
    """The page after its scripts ran, and every line it wrote to the console, errors of the browser's own included."""
    file = directory / "report.html"
    file.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={directory / 'profile'}",
    ]
    run = subprocess.run(
        [chromium, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("name", ["healthy", "broken", "nothing"])
def test_a_browser_opens_it_from_disk_without_a_complaint(chromium, tmp_path, request, name):
    report = nothing_computed() if name == "nothing" else request.getfixturevalue(name)
    # The page's own script is asked for the first cell's tooltip; what it shows is read from the document.
    probe = '<script>document.querySelector("[data-tip]")?.focus()</script></body>'
    document, complaints = load(chromium, tmp_path, page.render(report).replace("</body>", probe))
    assert complaints == []
    assert ("rope" in document) == (name != "nothing")
    if name != "nothing":
        assert re.search(r'<div id="tip"[^>]*>layer 0 · attn_norm · ok\nworst token 4.0e-7', document)


@pytest.mark.parametrize("fault", ["<script>nowhere()</script>", "<img src='https://example.invalid/a.png'>"])
def test_the_browser_test_hears_complaints(chromium, tmp_path, healthy, fault):
    """An error in a script, and a request: the page's own policy forbids every one."""
    assert load(chromium, tmp_path, page.render(healthy).replace("</body>", f"{fault}</body>"))[1]


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_all_three(tmp_path, sources, monkeypatch, healthy):
    monkeypatch.setattr("parity.comparison.compare", lambda *args, **options: healthy)
    files = {form: tmp_path / f"report.{form}" for form in ("json", "junit", "html")}
    options = [word for form, file in files.items() for word in (f"--{form}", str(file))]
    result = CliRunner().invoke(main, [str(sources["hf"]), str(tmp_path / "dst"), *options])
    assert result.exit_code == 0, result.output
    assert "✓ Pass" in Page(files["html"].read_text(encoding="utf-8")).text
    assert ET.parse(files["junit"]).getroot().get("failures") == "0"
    assert [line for line in result.stderr.splitlines() if line.startswith("report")] == [f"report {f}" for f in files.values()]


def test_every_bad_place_is_named_at_once(tmp_path):
    same = tmp_path / "both"
    result = CliRunner().invoke(
        main,
        [
            str(tmp_path / "src"),
            str(tmp_path / "dst"),
            "--json",
            str(tmp_path / "no/a"),
            "--junit",
            str(same),
            "--html",
            str(same),
        ],
    )
    assert result.exit_code == 2
    assert [line.split(";")[0].split(" (")[0] for line in result.stderr.splitlines()] == [
        f"error: {tmp_path}/no/a: expected a file in an existing directory",
        f"error: {same}: expected a file for each report, found --junit and --html here",
        f"error: {tmp_path}/src: expected a directory of safetensors files, found nothing",
    ]


def test_a_report_that_cannot_be_written_is_an_error_not_a_traceback(tmp_path, monkeypatch, healthy):
    from pathlib import Path

    from oss_model.errors import Incomplete
    from parity import cli

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Incomplete, match="could not be written \\(No space left on device\\)"):
        cli._write(healthy, {"html": tmp_path / "report.html"}, "check-parity")


# --- in a notebook, and as JSON -------------------------------------------------------------------------------------


def test_a_notebook_shows_the_page_in_a_frame(healthy):
    shown = healthy._repr_html_()
    assert shown.startswith('<iframe srcdoc="')
    inside = html.unescape(shown.removeprefix('<iframe srcdoc="').partition('" title=')[0])
    assert shown.endswith('title="check-parity" style="width: 100%; height: 80vh; border: 0" sandbox="allow-scripts"></iframe>')
    assert inside == page.render(healthy)
    assert repr(healthy) == "<Report PASS: 25 of 25 weights exact, 339 taps>"


def test_taps_become_a_table_of_pandas(healthy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    rows = healthy.to_pandas()
    assert len(rows) == len(healthy.taps)
    assert rows[1] == dataclasses.asdict(healthy.taps[1])


def test_what_moved_beyond_all_numbers_is_json_too(healthy):
    healthy.weights[0] = Weight("embedding.weight", moved=float("inf"), rule="bfloat16")
    healthy.weights[1] = Weight("layers.0.attn.sinks", moved=float("nan"))
    found = json.loads(healthy.to_json())["weights"]
    assert [found[kind][0]["moved"] for kind in ("by_design", "changed")] == [None, None]
