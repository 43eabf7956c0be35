"""What a report says of a failure: configurations first, then parameters, then the code, and nothing it did not see."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from converter import convert
from oss_model import ModelConfig, attention, modeling
from oss_model.synthetic import write_checkpoint
from parity import compare, configs
from parity.candidate import Candidate
from parity.injection.candidate import Faulty
from parity.injection.files import CHECKPOINT, corrupt_checkpoint
from parity.mistakes import catalogue as faults
from parity.mistakes import edits
from parity.prompts import Prompt, random_prompt
from parity.protocols import Sizes
from parity.reference import Reference
from parity.reference.bits import difference
from parity.reports.report import Report

ROOT = Path(__file__).parent.parent


def wrong_config(tmp_path, checkpoint, edit):
    shutil.copytree(checkpoint, tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    edit(config)
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    return tmp_path / "wrong"


def test_a_wrong_window_is_named_with_both_numbers(sources, checkpoints):
    report = compare(sources["hf"], Faulty(checkpoints["bfloat16"], "window-one-long", 0, {}))
    assert report.first_divergence == {"layer": 0, "tap": "attn_core"}
    assert report.diagnosis["fault"] == "the sliding window is 12, should be 11"
    assert report.diagnosis["cause"] == "code"
    assert report.diagnosis["residual_before"] > 0.1
    assert report.diagnosis["residual_after"] < 4e-6
    (row,) = [row for row in report.table().splitlines() if "first" in row and "FAIL" in row]
    assert "only tokens >= 11" in row
    assert "diagnosis: the sliding window is 12, should be 11: residual" in report.table()


CONFIG = {"layer": None, "tap": "config"}


@pytest.mark.parametrize(
    ("edit", "first", "said"),
    [
        (lambda c: c.update(sliding_window=128), {"layer": 0, "tap": "attn_core"}, "sliding_window 128, SRC says 11"),
        (
            lambda c: c["rope_scaling"].update(truncate=True),
            {"layer": None, "tap": "rope"},
            "rope_truncate True, SRC says False",
        ),
        (
            lambda c: c.update(num_experts_per_tok=3, experts_per_token=3),
            {"layer": 0, "tap": "expert_choice"},
            "num_experts_per_tok 3, SRC says 4",
        ),
        (
            lambda c: c.update(layer_types=["full_attention"] * 5),
            {"layer": 0, "tap": "attn_core"},
            "layer_types[0] full_attention, SRC says sliding_attention (and of 2 layers more)",
        ),
        (lambda c: c.update(swiglu_limit=1.0), {"layer": 0, "tap": "mlp_out"}, "swiglu_limit 1.0, SRC says 7.0"),
        (lambda c: c.update(rms_norm_eps=1.1e-5), CONFIG, "rms_norm_eps 1.1e-05, SRC says 1e-05"),  # below every gate
    ],
    ids=["window", "truncate", "k", "layer types", "limit", "eps"],
)
def test_configurations_come_first(tmp_path, sources, checkpoints, edit, first, said):
    """What DST/config.json says otherwise is the diagnosis, and no mistake of the code is named."""
    report = compare(sources["hf"], wrong_config(tmp_path, checkpoints["bfloat16"], edit))
    assert (report.verdict, report.first_divergence) == ("fail", first)
    assert report.diagnosis["fault"] == f"DST/config.json says {said}"
    assert (report.diagnosis["cause"], report.diagnosis["name"], report.tried) == ("config", "config-differs", 0)
    assert f"diagnosis: DST/config.json says {said}   [config-differs]" in report.table()
    assert f"config     DST/config.json says {said}   FAIL" in report.table()


def test_what_differs_in_configurations_without_changing_logits_is_listed(tmp_path, sources, checkpoints):
    def edit(config):
        config.update(max_position_embeddings=2048, eos_token_id=7)

    wrong = wrong_config(tmp_path, checkpoints["bfloat16"], edit)
    (wrong / "generation_config.json").unlink(missing_ok=True)
    report = compare(sources["hf"], wrong, layers=False)
    assert report.verdict == "pass"
    assert [(one["name"], one["checkpoint"], one["logits"]) for one in report.configs] == [
        ("max_position_embeddings", 2048, False), ("eos_token_id", [7], False),
    ]  # fmt: skip
    assert "config     DST/config.json says max_position_embeddings 2048, SRC says 32768   not in the logits" in report.table()
    assert json.loads(report.to_json())["configs"] == report.configs


def test_both_sides_read_every_setting_alike(sources, checkpoints):
    """transformers' reading of each dialect, and ours: of a right pair nothing differs, and nothing is left out."""
    for layout, source in sources.items():
        ours, theirs = Candidate(checkpoints["bfloat16"]).settings, Reference(source).settings
        assert ours.keys() >= set(configs.LOGITS) | set(configs.OTHERS)
        assert theirs.keys() >= set(configs.LOGITS)
        different = [one["name"] for one in configs.differences(ours, theirs)]
        assert different == (["max_position_embeddings"] if layout == "openai" else []), layout  # it cannot say that


def test_published_sizes_with_other_constants_are_another_model():
    published = {name: getattr(ModelConfig.gpt_oss_20b(), name) for name in configs.LOGITS}
    published["layer_types"] = list(published["layer_types"])
    sizes = Sizes(24, 32, 201088, 128, 131072)
    assert configs.title(sizes, published) == ("gpt-oss-20b", [])
    title, warnings = configs.title(sizes, published | {"rope_theta": 1e4, "num_experts_per_tok": 8})
    assert title == "gpt-oss, 24 layers, 32 experts, vocabulary 201088"
    assert warnings == [
        "SRC has the sizes of gpt-oss-20b and another num_experts_per_tok: 8, published is 4",
        "SRC has the sizes of gpt-oss-20b and another rope_theta: 10000.0, published is 150000.0",
    ]
    report = Report("SRC", "DST", title, 320, 0, warnings=warnings)
    assert f"warning: {warnings[0]}" in report.table()
    assert configs.title(sizes, {})[0] == title  # nobody has said what its constants are


def corrupted(monkeypatch, checkpoint, packed, out, change, n=0):
    """A copy with parameters of layer n changed: {name: value} of `change(tree, prefix)`."""
    monkeypatch.setitem(CHECKPOINT, "changed", lambda tree, n: change(tree, f"layers.{n}."))
    corrupt_checkpoint("changed", checkpoint, out, n, packed)
    return out


def times(name, factor):
    return lambda tree, p: {p + name: (tree[p + name].astype(np.float32) * factor).astype(tree[p + name].dtype)}


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (times("attn.sinks", -1), "attn.sinks", "it is -1 times what it should be"),
        (times("attn.sinks", 24**-0.5), "attn.sinks", "it is 0.204"),
        (lambda tree, p: {p + "attn.norm.scale": np.ones_like(tree[p + "attn.norm.scale"])}, "attn.norm.scale",
         "every value is 1"),
        (lambda tree, p: {p + "mlp.norm.scale": tree[p + "mlp.norm.scale"] + np.asarray(1, tree[p + "mlp.norm.scale"].dtype)},
         "mlp.norm.scale", "relative"),
        (times("mlp.router.weight", 1.004), "mlp.router.weight", "relative"),
    ],
    ids=["sinks negated", "sinks scaled", "norm of ones", "norm plus one", "router trained"],
)  # fmt: skip
def test_wrong_parameters_are_never_called_mistakes_of_the_code(
    monkeypatch, tmp_path, sources, checkpoints, change, name, said
):
    """Each is what a known mistake of the code computes with right parameters."""
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", change)
    report = compare(sources["hf"], wrong)
    assert report.verdict == "fail"
    found = report.diagnosis
    assert (found["cause"], found["name"], found["tap"]) == ("weights", "weights-differ", f"layers.0.{name}")
    assert found["fault"].startswith("it is not that of SRC: ")
    assert said in found["fault"]
    assert f"diagnosis: layers.0.{name}: it is not that of SRC: " in report.table()


def test_right_parameters_elsewhere_in_the_layer_do_not_hide_a_mistake_of_the_code(monkeypatch, tmp_path, sources, checkpoints):
    """Experts that were trained, and a wrong window: attention has its own parameters, and they are right."""
    change = times("mlp.down.bias", 1.5)
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", change)
    report = compare(sources["hf"], Faulty(wrong, "window-one-long", 0, {}))
    assert (report.first_divergence, report.diagnosis["name"]) == ({"layer": 0, "tap": "attn_core"}, "window-one-long")


def test_a_harmless_difference_does_not_hide_a_mistake_further_on(monkeypatch, tmp_path, sources, checkpoints):
    """-0.0 that became 0.0 is explained, and changes nothing; a later layer's window does."""

    def lost(tree, p):
        value = tree[p + "mlp.gate_up.weight"].copy()
        value[value == 0] = 0
        return {p + "mlp.gate_up.weight": value}

    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", lost)
    assert compare(sources["hf"], wrong).diagnosis["name"] == "minus-zero-lost"
    report = compare(sources["hf"], Faulty(wrong, "window-one-long", 2, {}))
    assert (report.first_divergence, report.diagnosis["name"]) == ({"layer": 2, "tap": "attn_core"}, "window-one-long")


def flip(value, index, bit):
    value = value.copy()
    value.view(np.uint16)[index] ^= 1 << bit
    return value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree, p: {p + "mlp.down.weight": flip(tree[p + "mlp.down.weight"], (2, 3, 40), 14)},
         "one bit of one value differs, at [2, 3, 40]: "),
        (lambda tree, p: {p + "mlp.down.weight": flip(flip(tree[p + "mlp.down.weight"], (2, 3, 40), 14), (2, 3, 40), 3)},
         "one value differs, at [2, 3, 40]: "),
    ],
    ids=["bit", "value"],
)  # fmt: skip
def test_one_bit_is_not_a_block(monkeypatch, tmp_path, sources, checkpoints, change, said):
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", change)
    report = compare(sources["hf"], wrong, layers=False)
    assert report.diagnosis["fault"].startswith(f"it is not that of SRC: {said}")
    assert report.diagnosis["name"] == "weights-differ"


@pytest.mark.parametrize("fault", ["lm-head-is-embedding", "embedding-is-lm-head", "embedding-lm-head-swapped"])
def test_a_copy_is_not_an_exchange(tmp_path, sources, checkpoints, fault):
    corrupt_checkpoint(fault, checkpoints["bfloat16"], tmp_path / "wrong", 0, checkpoints["mxfp4"])
    report = compare(sources["hf"], tmp_path / "wrong", layers=False)
    assert (report.diagnosis["name"], report.diagnosis["cause"]) == (fault, "weights")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("attn.norm.scale", "mlp.norm.scale"),
        ("mlp.norm.scale", "attn.norm.scale"),
        ("attn.v_proj.weight", "attn.k_proj.weight"),
    ],
)
def test_a_copy_within_a_layer_is_not_an_exchange(monkeypatch, tmp_path, sources, checkpoints, name, other):
    change = lambda tree, p: {p + name: tree[p + other]}  # noqa: E731
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", change, 1)
    report = compare(sources["hf"], wrong, layers=False)
    assert report.diagnosis["fault"] == f"it is a copy of layers.1.{other}, which is as it should be"
    assert report.diagnosis["name"] == "weights-differ"


def test_lm_head_is_not_exchanged_only_because_it_is_wrong_too(monkeypatch, tmp_path, sources, checkpoints):
    change = lambda tree, p: {"embedding.weight": tree["lm_head.weight"], "lm_head.weight": tree["lm_head.weight"][::-1]}  # noqa: E731
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], checkpoints["mxfp4"], tmp_path / "wrong", change)
    assert compare(sources["hf"], wrong, layers=False).diagnosis["name"] == "embedding-is-lm-head"


def of_experts(change, *experts):
    """`change` of these experts' down projections alone."""

    def apply(tree, p):
        value = tree[p + "mlp.down.weight"].copy()
        for e in experts:
            value[e] = change(value[e])
        return {p + "mlp.down.weight": value}

    return apply


def one_block(value):
    value = value.copy()
    value[7, 32:64] *= np.asarray(2, value.dtype)
    return value


@pytest.mark.long
def test_what_is_wrong_in_some_experts_is_said_of_these(monkeypatch, tmp_path, sources, checkpoints):
    packed = checkpoints["mxfp4"]
    zeros = of_experts(np.zeros_like, 1, 4)
    wrong = corrupted(monkeypatch, checkpoints["bfloat16"], packed, tmp_path / "zeros", zeros)
    assert compare(sources["hf"], wrong, layers=False).diagnosis["fault"] == "experts 1, 4 of 9: it is all zeros"
    one = corrupted(monkeypatch, checkpoints["bfloat16"], packed, tmp_path / "block", of_experts(one_block, 2))
    said = "expert 2 of 9: several values of one block of 32 are wrong, all others are right"
    assert compare(sources["hf"], one, layers=False).diagnosis["fault"] == said
    both = lambda tree, p: of_experts(one_block, 2)(tree | of_experts(np.zeros_like, 5)(tree, p), p)  # noqa: E731
    two = corrupted(monkeypatch, checkpoints["bfloat16"], packed, tmp_path / "both", both)
    assert compare(sources["hf"], two, layers=False).diagnosis["name"] == "weights-differ"


def test_one_bit_is_one_and_not_all_the_others():
    value = np.array([1.0, 2.0, 3.0], np.float32).astype(ml_dtypes.bfloat16)
    for mask, said in (
        (0x8000, "one bit of one value"),
        (0x0001, "one bit of one value"),
        (0xFFFE, "one value"),
        (0x7FFF, "one"),
    ):
        wrong = value.copy()
        wrong.view(np.uint16)[1] ^= np.uint16(mask)
        assert difference(torch.from_numpy(value.astype(np.float32)).bfloat16(), wrong).startswith(f"{said} "), hex(mask)


def test_another_model_is_called_one(tmp_path, cfg, sources):
    write_checkpoint(tmp_path / "other", cfg, seed=5)
    convert(tmp_path / "other", tmp_path / "orbax")
    report = compare(sources["hf"], tmp_path / "orbax", layers=False)
    assert report.diagnosis["fault"].startswith("0 of 88 parameters are exact: another model, or all of it was trained; ")


@pytest.mark.parametrize("name", ["swiglu-alpha-one", "swiglu-limit-ten", "rope-theta", "norm-eps"])
def test_a_number_that_was_not_measured_is_what_it_is_consistent_with(name):
    settings = {"swiglu_alpha": 1.702, "swiglu_limit": 5.0, "rope_theta": 2e5, "rms_norm_eps": 1e-5}
    said = faults.sentence(faults.CATALOGUE[name], 11, settings)
    assert said.startswith("consistent with ")
    assert str(settings[faults.FILLED[re.search(r"{(\w+)}", faults.CATALOGUE[name].says)[1]]]) in said


def test_the_pattern_of_a_mistake_nobody_has_made_before(monkeypatch, sources, checkpoints):
    attend = attention.sink_attention
    monkeypatch.setattr(attention, "sink_attention", lambda *args: attend(*args).at[:, :, 3].multiply(1.1))
    report = compare(sources["hf"], checkpoints["bfloat16"])
    assert report.diagnosis is None
    assert report.pattern == "head 3 of 14; all channels"
    assert "layer 0 attn_core: none of the" in report.table()
    assert "known mistakes of this place explains it; head 3 of 14; all channels" in report.table()
    assert json.loads(report.to_json())["pattern"] == report.pattern


@pytest.mark.long
def test_a_trial_that_breaks_is_shown_and_does_not_end_the_run(monkeypatch, tmp_path, sources, checkpoints):
    def broken(*args):
        raise RuntimeError("no such\nthing")

    fault = faults.CATALOGUE["sinks-zeroed"]
    monkeypatch.setitem(faults.CATALOGUE, fault.name, fault._replace(wrong=fault.wrong._replace(equation=broken)))
    report = compare(sources["hf"], Faulty(checkpoints["bfloat16"], "window-one-long", 0, {}))
    assert report.diagnosis["name"] == "window-one-long"
    assert report.errors == ["trying sinks-zeroed at attn_core: RuntimeError: no such thing"]
    assert f"error: {report.errors[0]}; this is a bug of check-parity, please report it" in report.table()
    misnamed = fault.wrong._replace(values=lambda p: p, equation=lambda t, p, s: p["attn.sink"])
    monkeypatch.setitem(faults.CATALOGUE, fault.name, fault._replace(wrong=misnamed))
    report = compare(sources["hf"], Faulty(checkpoints["bfloat16"], "window-one-long", 0, {}))
    assert report.diagnosis["name"] == "window-one-long"
    assert report.errors == ["trying sinks-zeroed at attn_core: KeyError: 'layers.0.attn.sink'"]
    monkeypatch.setattr(edits, "_made", broken)
    corrupt_checkpoint("bias-dropped", checkpoints["bfloat16"], tmp_path / "zeroed", 1, checkpoints["mxfp4"])
    report = compare(sources["hf"], tmp_path / "zeroed")
    assert (report.verdict, [weight.name for weight in report.weights if weight.note]) == ("fail", ["layers.1.mlp.down.bias"])
    assert report.errors == ["looking into layers.1.mlp.down.bias: RuntimeError: no such thing"]


@pytest.mark.parametrize("k", [1, 9])
def test_mistakes_that_a_model_cannot_have_are_not_tried(tmp_path, k):
    """One expert of nine, or all of them: no trial breaks, and the right port passes."""
    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), num_experts_per_tok=k)
    write_checkpoint(tmp_path / "source", cfg)
    convert(tmp_path / "source", tmp_path / "orbax")
    port = Faulty(tmp_path / "orbax", "window-one-long", 0, {})
    settings = Reference(tmp_path / "source").settings
    for tap in ("expert_choice", "expert_weights", "mlp_out"):
        names = {fault.name for fault in faults.at(tap, settings)}
        assert names.isdisjoint({"router-top-k-less", "router-uniform"} if k == 1 else {"router-top-k-more", "router-lowest"})
    report = compare(tmp_path / "source", port)
    assert (report.errors, report.diagnosis["name"]) == ([], "window-one-long")


@pytest.mark.long
def test_a_trained_parameter_does_not_hide_a_wrong_window(monkeypatch, tmp_path, sources, checkpoints):
    """Nothing explains the parameter, a row that the prompt does not use; the window is explained all the same."""
    unused = np.setdiff1d(np.arange(509), random_prompt(509, 28, 0).tokens)[0]

    def trained(tree, n):
        value = tree["embedding.weight"].copy()
        value[unused] *= np.asarray(1.5, value.dtype)
        return {"embedding.weight": value}

    monkeypatch.setitem(CHECKPOINT, "trained", trained)
    corrupt_checkpoint("trained", checkpoints["bfloat16"], tmp_path / "trained", 0, checkpoints["mxfp4"])
    report = compare(sources["hf"], tmp_path / "trained")
    assert (report.diagnosis["cause"], report.diagnosis["tap"]) == ("weights", "embedding.weight")
    assert "diagnosis: embedding.weight: it is not that of SRC: 96 of 48864 values differ (0.20%)" in report.table()
    report = compare(sources["hf"], Faulty(tmp_path / "trained", "window-one-long", 0, {}))
    assert [weight.name for weight in report.weights if weight.note] == ["embedding.weight"]
    assert report.diagnosis["name"] == "window-one-long"


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "dtype"), [("hf", "float32"), ("hf", "mxfp4"), ("openai", "bfloat16"), ("hf-bf16", "float32")]
)
@pytest.mark.parametrize("fault", ["bias-dropped", "norm-scales-swapped", "qkv-split-by-group", "experts-permuted"])
def test_mistakes_in_files_of_every_layout_and_dtype(tmp_path, sources, checkpoints, layout, dtype, fault):
    changed = corrupt_checkpoint(fault, checkpoints[dtype], tmp_path / "wrong", 3, checkpoints["mxfp4"])
    report = compare(sources[layout], tmp_path / "wrong", layers=False)
    assert sorted(weight.name for weight in report.weights if weight.note) == changed
    assert report.diagnosis["name"] == fault


def test_the_pattern_leaves_padding_out_and_sees_what_is_no_number(monkeypatch, sources, checkpoints):
    attend = attention.sink_attention
    monkeypatch.setattr(attention, "sink_attention", lambda *args: attend(*args).at[:, :, 3].set(jnp.nan).at[1, 10:].set(7.0))
    valid = np.arange(28)[None] < np.array([[28], [10]])
    report = compare(sources["hf"], checkpoints["bfloat16"], prompt=Prompt(np.full((2, 28), 5), valid))
    assert report.pattern == "head 3 of 14; all channels"


def test_wrong_wiring_that_no_single_component_shows_fails_the_free_run(monkeypatch, sources, checkpoints):
    """A block that is run twice: each component is right, fed the right input."""
    call = modeling.TransformerBlock.__call__
    monkeypatch.setattr(
        modeling.TransformerBlock, "__call__", lambda self, x, *rest: call(self, call(self, x, *rest)[0], *rest)
    )
    assert compare(sources["hf"], checkpoints["bfloat16"]).free_run["verdict"] == "fail"


@pytest.mark.long
def test_below_two_windows_a_wrong_window_does_not_show(sources, checkpoints):
    """Which is why a prompt that short cannot pass."""
    wrong = Faulty(checkpoints["bfloat16"], "window-one-long", 0, {})
    report = compare(sources["hf"], wrong, layers=True, tokens=11)
    assert report.exit_code == 3
    assert report.incomplete == ["11 tokens, but faults of the sliding window (11) only show from 22 on: use --tokens 22"]
