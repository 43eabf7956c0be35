"""docs/json.md has every key that the commands write, and no other."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from converter import cli
from parity import compare
from parity.cli import _report_diff
from parity.injection.outcomes import Outcome, RunOutcome, SelfTest
from parity.reports.report import FormResult

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts" / "examples"))

import compare_own_model

PAGE = (Path(__file__).parent.parent / "docs/json.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
# Whose keys are names of tensors, modules, dtypes and the like.
OF_DATA = {"tensors", "config", "dtypes", "scales", "made_from", "updates"}


def first_column(section: str) -> set[str]:
    rows = re.findall(r"^\| (`[^|]*`) \|", SECTIONS[section], re.M)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def nested(found: object) -> set[str]:
    if isinstance(found, list):
        return set().union(*map(nested, found))
    if not isinstance(found, dict):
        return set()
    return set(found).union(*(nested(value) for name, value in found.items() if name not in OF_DATA))


def check(section: str, found: dict, besides: tuple[str, ...] = ()) -> None:
    assert first_column(section) == {*found, *besides}
    said = set(re.findall(r'["`](\w+)["`]', SECTIONS[section]))
    assert nested(found) - said == set()


@pytest.fixture
def said(capsys):
    def run(main, *arguments: object) -> dict:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out)

    return run


def test_converting(said, sources, checkpoints, tmp_path):
    of = "Of convert-oss"
    check(of, said(cli.main, sources["hf"], tmp_path / "out", "--json"), ("pushed",))
    quantized = said(cli.main, checkpoints["bfloat16"], tmp_path / "hf", "--to", "hf", "--quantizer", "best", "--json")
    check(of, quantized, ("pushed",))
    check("Of a dry run", said(cli.main, sources["hf"], tmp_path / "other", "--dry-run", "--json"))
    check("Of a failure", said(cli.main, tmp_path / "nothing", tmp_path / "other", "--json"))
    check("Of verify-oss", said(cli.verify_main, tmp_path / "out", "--json"))
    check("Of inspect-oss", said(cli.inspect_main, tmp_path / "out", "--json", "-"))


def test_updates(said, checkpoints, sources, cfg, tmp_path):
    from flax import nnx

    from oss_model import add_lora, create_model_from_checkpoint, save_lora

    model = create_model_from_checkpoint(checkpoints["bfloat16"], cfg)
    add_lora(model, r".*(q|k)_proj", rank=2, rngs=nnx.Rngs(0))
    save_lora(model, tmp_path / "lora")
    arguments = (tmp_path / "lora", tmp_path / "adapter", "--to", "peft", "--base", sources["hf"], "--json")
    check("Of LoRA updates", said(cli.main, *arguments))


@pytest.mark.long
def test_a_report(small, small_out, tmp_path, monkeypatch):
    """Of real comparisons with something wrong: in a configuration, and in code."""
    wrong = shutil.copytree(small_out, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"sliding_window": config["sliding_window"] + 1}))
    misconfigured = compare(small, wrong, dtype="bfloat16", gradients=True)
    assert all(getattr(misconfigured, name) for name in ("configs", "diagnosis", "findings", "gradients", "growth", "taps"))
    monkeypatch.setattr(compare_own_model, "rotate", lambda x, cos, sin: x)
    with jax.numpy_rank_promotion("allow"):
        miscoded = compare(small, compare_own_model.OwnModel(small_out))
    assert all(getattr(miscoded, name) for name in ("witness", "diagnosis", "findings", "pattern"))
    for report in (misconfigured, miscoded):
        check("Of check-parity", json.loads(report.to_json()))
    said = set(re.findall(r'["`](\w+)["`]', SECTIONS["Of check-parity"]))
    assert {field.name for field in dataclasses.fields(FormResult)} <= said

    (tmp_path / "report.json").write_text(misconfigured.to_json())
    (tmp_path / "other.json").write_text(miscoded.to_json())
    arguments = [str(tmp_path / "report.json"), str(tmp_path / "other.json"), "--json"]
    found = json.loads(CliRunner().invoke(_report_diff, arguments, standalone_mode=False).output)
    assert found["changes"]
    check("Of report-diff", found)


def test_a_self_test():
    result = SelfTest(
        [Outcome("a", 0, 0, True, True, True, [], "", False)], [RunOutcome("b", "c", "d", 0, True, None, True, [], "")]
    )
    check("Of the self-test", json.loads(result.to_json()))
