"""Any two checkpoints: which is the reference, and what can be said where none is safetensors."""

import pytest
from click.testing import CliRunner

from parity import compare
from parity.cli import main
from parity.injection.files import corrupt_checkpoint


@pytest.mark.long
def test_safetensors_are_judged_as_our_model_reads_them(sources):
    report = compare(sources["hf"], sources["openai"], tokens=24)
    assert report.verdict == "pass"
    assert len(report.weights) == 98


def test_the_reference_is_the_one_of_safetensors(sources, checkpoints):
    report = compare(checkpoints["mxfp4"], sources["hf"], tokens=24, layers=False)
    assert (report.source, report.checkpoint) == (str(sources["hf"]), str(checkpoints["mxfp4"]))
    assert report.verdict == "pass"


@pytest.mark.long
def test_two_orbax_checkpoints_are_bytes_alone(checkpoints, tmp_path):
    stored = checkpoints["bfloat16"]
    same = compare(stored, stored)
    assert same.verdict == "incomplete"
    assert "stored bytes alone were compared" in same.incomplete[0]
    assert "PyTorch, transformers, float32" not in same.table()
    assert "decoded by transformers" not in same.table()

    changed = corrupt_checkpoint("sinks-shifted", stored, tmp_path / "changed", 2, stored)
    report = compare(stored, tmp_path / "changed")
    assert changed
    assert [weight.name for weight in report.weights if weight.note] == changed
    assert report.verdict == "fail"
    expected = compare(stored, tmp_path / "changed", expect_changed=[".*sinks"])
    assert expected.verdict == "incomplete"
    assert [weight.name for weight in expected.weights if weight.moved] == changed


def test_packed_beside_values_is_said(checkpoints):
    report = compare(checkpoints["bfloat16"], checkpoints["mxfp4"])
    assert report.verdict == "incomplete"
    assert any("packed in one and values in the other" in reason for reason in report.incomplete)


def test_on_the_command_line(checkpoints, sources):
    result = CliRunner().invoke(main, [str(checkpoints["mxfp4"]), str(checkpoints["mxfp4"])], standalone_mode=False)
    assert "oracle: none, stored bytes" in result.output
    assert result.exit_code == 3 or result.return_value == 3
