"""A checkpoint that holds other values by design: quantized, or rounded. They follow the rule; the code is judged on SRC's."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_converter_export import change
from test_oss_model_quantization import any_bits, huge, normal, on_ties, tiny, with_zeros

from converter import convert
from oss_model import ModelConfig, create_model_from_checkpoint, mxfp4
from oss_model.layouts import BFLOAT16
from oss_model.quantization import RULES, quantize
from oss_model.shards import Checkpoint
from oss_model.synthetic import write_checkpoint
from parity import compare
from parity.design import ROUNDED, Design, by_design
from parity.equations import quantized

EXPERTS = {"layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight"}
RULE = "best"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A model of one layer whose experts were trained, and what is made of it."""
    root = tmp_path_factory.mktemp("design")
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=1, layer_types=())
    write_checkpoint(root / "before", cfg, "hf-bf16")
    rng = np.random.default_rng(0)

    def train(arrays, to=None):
        for name in arrays:
            if to is not None or name.endswith(("gate_up_proj", "down_proj")):
                wide = arrays[name].astype(np.float32)
                arrays[name] = (wide + 0.01 * rng.standard_normal(wide.shape, np.float32)).astype(to or arrays[name].dtype)

    trained = change(root / "before", root / "trained", train)
    convert(trained, root / "orbax")
    convert(trained, root / "packed", "mxfp4", quantizer=RULE)
    convert(root / "orbax", root / "served", to="hf", quantizer=RULE)
    convert(root / "orbax", root / "original", to="openai", quantizer="ocp")
    wide = change(root / "before", root / "wide", lambda arrays: train(arrays, np.float32))
    convert(wide, root / "orbax32", "float32")
    convert(root / "orbax32", root / "rounded", to="hf-bf16")
    return {path.name: path for path in root.iterdir()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "checkpoint", "rule"),
    [
        ("served", "orbax", RULE),
        ("orbax", "served", RULE),  # safetensors are the reference, whichever comes first
        ("original", "orbax", "ocp"),
        ("trained", "packed", RULE),
        ("trained", "served", RULE),
    ],
)
def test_a_quantized_checkpoint_follows_its_rule(made, source, checkpoint, rule):
    report = compare(made[source], made[checkpoint], layers=False)
    assert report.verdict == "pass", report.table()
    assert {weight.name: weight.rule for weight in report.weights if weight.moved} == dict.fromkeys(EXPERTS, rule)
    found = json.loads(report.to_json())
    assert found["weights"]["exact"] == len(report.weights) - 2
    assert {one["name"] for one in found["weights"]["by_design"]} == EXPERTS == set(report.righted)
    assert all(0.01 < one["moved"] < 0.15 for one in found["weights"]["by_design"])
    assert f"2 quantized, each value as rule '{rule}' says" in report.table()
    assert 1e-3 < found["as_stored"]["kl_mean"] < 1 > found["as_stored"]["top1"] > 0
    assert "as stored  max |d logit|" in report.table()


def test_what_is_said_of_the_logits_as_stored(made):
    """With the values of DST itself, which are not those that the code is judged on."""
    prompt = np.arange(30, dtype=np.int32)[None]
    from parity.prompts import Prompt
    from parity.reference import Reference

    report = compare(made["served"], made["orbax"], layers=False, prompt=Prompt(prompt, np.ones_like(prompt, bool)))
    cfg = dataclasses.replace(ModelConfig.from_json(made["orbax"] / "config.json"), dtype=np.float32)
    ours = np.asarray(create_model_from_checkpoint(made["orbax"], cfg)(jnp.asarray(prompt)))
    reference = Reference(made["served"])
    theirs = reference.unembed(reference.layer(0).run(reference.embed(prompt, np.dtype(np.float32)))["layer_out"])["logits"]
    assert report.as_stored["max_abs"] == pytest.approx(np.abs(ours - theirs).max(), rel=1e-4)


def test_what_is_rounded_to_bfloat16(made):
    report = compare(made["rounded"], made["orbax32"], layers=False)
    assert report.verdict == "pass", report.table()
    assert {weight.rule for weight in report.weights} == {ROUNDED}
    assert "rounded to bfloat16: moved by" in report.table()


@pytest.mark.parametrize("wrong", ["another rule", "another scale", "another code", "a value that was not quantized"])
def test_values_that_do_not_follow_the_rule_differ(made, tmp_path, wrong):
    served = shutil.copytree(made["served"], tmp_path / "served")

    def edit(arrays):
        blocks, scales = (arrays[f"model.layers.0.mlp.experts.down_proj_{kind}"] for kind in ("blocks", "scales"))
        if wrong == "another scale":
            scales[3, 7, 1] += 1
        elif wrong == "another code":
            blocks[3, 7, 1, 5] ^= 1
        elif wrong == "a value that was not quantized":
            arrays["model.layers.0.self_attn.sinks"][2] += 1

    shutil.rmtree(served)
    change(made["served"], served, edit)
    manifest = json.loads((served / "conversion.json").read_text())
    manifest["form"]["quantizer"] = "ceil" if wrong == "another rule" else RULE
    (served / "conversion.json").write_text(json.dumps(manifest))
    report = compare(served, made["orbax"], layers=False)
    assert report.verdict == "fail"
    named = {weight.name for weight in report.weights if weight.note}
    both = EXPERTS if wrong == "another rule" else {"layers.0.mlp.down.weight"}
    assert named == ({"layers.0.attn.sinks"} if wrong.startswith("a value") else both)


def test_without_a_manifest_nothing_is_by_design(made, tmp_path):
    served = shutil.copytree(made["served"], tmp_path / "served")
    (served / "conversion.json").unlink()
    report = compare(served, made["orbax"], layers=False)
    assert {weight.name for weight in report.weights if weight.note} == EXPERTS
    assert by_design(made["served"], made["orbax"]) == Design(RULE, of_reference=True)
    assert by_design(made["trained"], made["packed"]) == Design(RULE, of_reference=False)


def changed(directory: Path, name: str, to: Path, bit: int = 0) -> Path:
    """A copy of an Orbax checkpoint in which a bit of every bfloat16 of a parameter is another, its checksums all right."""
    import google_crc32c

    shutil.copytree(directory, to)
    for chunk in (to / f"{name}.value/c").rglob("*"):
        if chunk.is_file():
            data = bytearray(chunk.read_bytes()[:-4])
            data[::2] = bytes(byte ^ 1 << bit for byte in data[::2])
            chunk.write_bytes(bytes(data) + google_crc32c.value(bytes(data)).to_bytes(4, "little"))
    return to


def test_what_was_made_from_an_export_is_not_what_the_export_was_made_from(made, tmp_path):
    """The rule is that of the one that was made: a conversion without one is exact, though SRC was quantized before."""
    convert(made["served"], tmp_path / "again")
    assert by_design(made["served"], tmp_path / "again") is None
    wrong = changed(tmp_path / "again", "layers.0.mlp.down.weight", tmp_path / "wrong")
    report = compare(made["served"], wrong, layers=False)
    assert {weight.name for weight in report.weights if weight.note} == {"layers.0.mlp.down.weight"}
    convert(made["rounded"], tmp_path / "wide", "float32")
    assert by_design(made["rounded"], tmp_path / "wide") is None


def test_both_may_have_been_moved_but_not_exchanged(made, tmp_path):
    orbax, served = (shutil.copytree(made[name], tmp_path / name) for name in ("orbax", "served"))
    manifest = json.loads((served / "conversion.json").read_text())
    manifest["source"]["path"] = "/nowhere"
    (served / "conversion.json").write_text(json.dumps(manifest))
    assert by_design(served, orbax) == Design(RULE, of_reference=True)
    assert by_design(served, made["orbax32"]) is None
    next((orbax / "norm.scale.value/c").rglob("0")).unlink()
    assert by_design(served, orbax) is None


@pytest.mark.parametrize("rule", ["nope", ["best"], 7, {}])
def test_a_rule_that_nobody_knows_is_none(made, tmp_path, rule):
    served = shutil.copytree(made["served"], tmp_path / "served")
    manifest = json.loads((served / "conversion.json").read_text())
    manifest["form"]["quantizer"] = rule
    (served / "conversion.json").write_text(json.dumps(manifest))
    assert by_design(served, made["orbax"]) is None
    with pytest.raises(ValueError, match="rule: expected one of best, ocp, ceil"):
        quantized(np.zeros((1, 32), np.float32), "nope")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"source": 1}', '{"source": {"path": "x"}, "form": []}', '{"source": {"path": 1}}', "["]
)
def test_a_manifest_that_is_none_says_nothing(made, tmp_path, text):
    (tmp_path / "conversion.json").write_text(text)
    assert by_design(tmp_path, made["orbax"]) is by_design(made["trained"], tmp_path) is None


def test_a_recording_of_values_is_compared_with_packed_experts(made, tmp_path):
    from parity.recording import Recording

    convert(made["before"], tmp_path / "packed", "mxfp4", quantizer=RULE)
    compare(made["before"], tmp_path / "packed", layers=False, record=tmp_path / "golden")
    report = compare(Recording(tmp_path / "golden"), tmp_path / "packed", layers=False)
    assert report.verdict == "pass", report.table()


@pytest.mark.long
def test_a_trained_embedding_is_put_right_in_bfloat16_too(made, tmp_path):
    wrong = changed(made["orbax"], "embedding.weight", tmp_path / "wrong", bit=5)
    report = compare(made["trained"], wrong, dtype="bfloat16", expect_changed=["embedding.weight"])
    assert report.free_run["bfloat16"]["kl_mean"] < 3 * report.free_run["reference_bfloat16"]["kl_mean"]


def test_packed_experts_of_values_that_are_mxfp4(made, tmp_path):
    """Nothing is lost: every parameter is exact, though one side holds values and the other blocks."""
    convert(made["before"], tmp_path / "packed", "mxfp4", quantizer=RULE)
    assert Checkpoint(made["before"]).layout.packed is False
    report = compare(made["before"], tmp_path / "packed", layers=True)
    assert report.verdict == "pass", report.table()
    assert not any(weight.moved for weight in report.weights)
    assert {weight.name for weight in report.weights} > EXPERTS
    assert report.as_stored is None


@pytest.mark.long
def test_gradients_and_forms_are_not_those_of_other_values(made):
    report = compare(made["served"], made["orbax"], layers=False, gradients=True, forms=("jit",))
    assert report.verdict == "incomplete"
    assert report.incomplete == ["gradients: they would be of other values than SRC's: they were not compared"]
    assert {(one.form, one.on, one.verdict) for one in report.forms} == {("jit", "replica", "ok")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [normal, any_bits, tiny, huge, on_ties, with_zeros])
def test_the_equation_is_what_is_written(kind, rule):
    for dtype in (BFLOAT16, np.float32):
        values = kind(np.random.default_rng(0)).astype(np.float32).astype(dtype)
        found = quantize(values, rule)
        decoded = mxfp4.decode(found.blocks, found.scales, np.float32).reshape(values.shape)
        np.testing.assert_array_equal(quantized(values, rule).astype(np.float32).view(np.uint32), decoded.view(np.uint32))
