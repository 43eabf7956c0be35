"""report-diff: what became worse, or better, between two reports."""

import dataclasses
import json
import re

import pytest
from click.testing import CliRunner

from parity.cli import _report_diff, diff_main
from parity.reports.report import FormResult, Weight


@pytest.fixture
def two(tmp_path, healthy):
    """Writes a report before and after `edit`, and gives what report-diff prints and exits with."""

    def run(edit, *options: str) -> tuple[int, list[str]]:
        before, after = tmp_path / "before.json", tmp_path / "after.json"
        before.write_text(healthy.to_json())
        edit(healthy)
        after.write_text(healthy.to_json())
        result = CliRunner().invoke(_report_diff, [str(before), str(after), *options], standalone_mode=False)
        assert result.exception is None, result.exception
        return result.return_value, result.output.splitlines()

    return run


def test_the_same_twice_is_no_difference(two):
    assert two(lambda report: None) == (0, ["PASS -> PASS", "0 worse, 0 better, 0 otherwise different"])


def test_what_became_worse_comes_first(two):
    def edit(report):
        report.taps[5] = dataclasses.replace(report.taps[5], worst_token_rel_l2=0.3, verdict="fail")
        report.taps[6] = dataclasses.replace(report.taps[6], worst_token_rel_l2=1e-7)
        report.taps[7] = dataclasses.replace(report.taps[7], worst_token_rel_l2=5e-7)  # as another seed would
        report.weights[3] = Weight(report.weights[3].name, "one value differs")
        report.tokens = 64

    code, lines = two(edit)
    assert code == 1
    assert lines[0] == "PASS -> FAIL"
    assert [line.split()[0] for line in lines[1:-1]] == ["worse"] * 4 + ["tokens", "better"]
    assert re.search(r"^worse   tap layer 0 q_rope +4\.0e-07 -> 3\.0e-01 fail$", "\n".join(lines), re.MULTILINE)
    assert any(line.startswith("worse   weight layers.2.attn.sinks") for line in lines)
    assert lines[-1] == "4 worse, 1 better, 1 otherwise different"


def test_two_reports_as_json(two):
    code, (line,) = two(lambda report: report.forms.append(FormResult("jit", "model", "float32", "fail", 0.1)), "--json")
    found = json.loads(line)
    assert (code, found["before"], found["after"]) == (0, "pass", "fail")
    assert {"what": "form jit (float32, model)", "before": "", "after": "1.0e-01 fail", "worse": None} in found["changes"]


def test_two_reports_as_json_in_a_file(two, tmp_path):
    code, lines = two(lambda report: None, "--json-file", str(tmp_path / "changes.json"))
    assert json.loads((tmp_path / "changes.json").read_text()) == {"before": "pass", "after": "pass", "changes": []}
    assert (code, len(lines)) != (0, 0)  # and the table
    assert two(lambda report: None, "--json-file", "-")[1] == [(tmp_path / "changes.json").read_text().strip()]


NO_REPORTS = ["", "[]", "{}", '{"verdict": 1, "taps": [], "sections": [], "weights": {"differing": []}}',
              '{"verdict": "pass", "taps": 2, "sections": 3, "weights": 4}']  # fmt: skip


@pytest.mark.parametrize("text", NO_REPORTS)
def test_what_is_no_report_is_a_line(tmp_path, text, capsys):
    (tmp_path / "a.json").write_text(text)
    assert diff_main([str(tmp_path / "a.json")] * 2) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_figure_of_zero_and_what_was_trained_are_told(two, healthy):
    healthy.taps[6] = dataclasses.replace(healthy.taps[6], worst_token_rel_l2=0.0)

    def edit(report):
        report.taps[6] = dataclasses.replace(report.taps[6], worst_token_rel_l2=1e-7)
        report.taps[5] = dataclasses.replace(report.taps[5], worst_token_rel_l2=0.0)
        report.weights[3] = Weight(report.weights[3].name, moved=0.1)

    code, lines = two(edit)
    assert code == 1
    assert re.search(r"^worse +tap layer 0 k_rope +0\.0e\+00 -> 1\.0e-07$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^ +weight layers\.2\.attn\.sinks +exact -> changed$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^better +tap layer 0 q_rope +4\.0e-07 -> 0\.0e\+00$", "\n".join(lines), re.MULTILINE)
