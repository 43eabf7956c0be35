"""Precision, decoding, gradients, and how the model is loaded, put together and called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converter import convert
from oss_model import (
    Transformer,
    attention,
    cache,
    create_model_from_checkpoint,
    experts,
    layers,
    modeling,
)
from oss_model.synthetic import write_checkpoint
from oss_model.taps import in_layer
from parity import candidate as candidate_module
from parity import compare, metrics
from parity.injection.candidate import Faulty
from parity.prompts import Prompt


def test_precision_in_bfloat16_is_the_references_own(sources, checkpoints):
    report = compare(sources["hf"], checkpoints["bfloat16"], dtype="bfloat16")
    assert report.verdict == "pass"
    assert report.precision in ("ok", "warn")
    judged = [tap for tap in report.taps if tap.port_over_reference is not None]
    assert len(judged) == 5 * 14 + 3  # RoPE tables and expert choices too
    assert report.free_run["bfloat16"]["kl_max"] > 100 * report.free_run["kl_max"]
    assert report.free_run["bfloat16"]["kl_mean"] < 3 * report.free_run["reference_bfloat16"]["kl_mean"]


@pytest.mark.long
def test_careless_rounding_fails_the_precision_arm(monkeypatch, sources, checkpoints):
    """Softmax weights cut to five bits: right in float32, and far noisier than the reference in bfloat16."""

    right = attention.sink_attention

    def careless(*given):
        out = right(*given)
        return out if out.dtype == jnp.float32 else jnp.round(out * 8) / 8

    monkeypatch.setattr(attention, "sink_attention", careless)
    jax.clear_caches()
    report = compare(sources["hf"], checkpoints["bfloat16"], dtype="bfloat16")
    jax.clear_caches()
    assert all(tap.verdict == "ok" for tap in report.taps)
    assert (report.precision, report.verdict) == ("fail", "fail")


@pytest.mark.long
@pytest.mark.parametrize(
    ("owner", "name", "make", "tap"),
    [
        (modeling, "choose", lambda right: lambda logits, k: _last_but_one(right, logits, k), "expert_choice"),
        (layers.RotaryEmbedding, "__call__", lambda right: lambda self, at: _rounded_angles(right, self, at), "rope"),
    ],
)
def test_what_is_wrong_in_bfloat16_alone_fails_the_precision_arm(monkeypatch, sources, checkpoints, owner, name, make, tap):
    monkeypatch.setattr(owner, name, make(owner.__dict__[name]))
    report = compare(sources["hf"], checkpoints["bfloat16"], dtype="bfloat16", tokens=24)
    assert all(one.verdict == "ok" for one in report.taps)
    worst = max(report.taps, key=lambda one: one.port_over_reference or 0.0)
    assert (worst.tap, report.precision, report.verdict) == (tap, "fail", "fail")


def _last_but_one(right, logits, k):
    """In bfloat16 the last of the experts is the next one's."""
    best = right(logits, k + 1)
    return right(logits, k) if logits.dtype == jnp.float32 else jnp.concatenate([best[:, : k - 1], best[:, k:]], axis=1)


def _rounded_angles(right, self, positions):
    if self.cfg.dtype == jnp.float32:
        return right(self, positions)
    cos, sin = right(self, positions.astype(jnp.bfloat16).astype(jnp.int32))
    return cos, sin


@pytest.mark.long
def test_decoding_equals_the_whole_prompt(sources, checkpoints):
    report = compare(sources["hf"], checkpoints["bfloat16"], layers=False, decode=True)
    assert report.verdict == "pass"
    assert [tap.layer for tap in report.taps if tap.tap == "decode"] == [0, 1, 2, 3, 4]


@pytest.mark.long
def test_a_cache_that_forgets_one_key_too_early_is_found(monkeypatch, sources, checkpoints):
    monkeypatch.setattr(candidate_module, "init_cache", lambda cfg, *rest: cache.init_cache(
        dataclasses.replace(cfg, sliding_window=9), *rest))  # fmt: skip
    jax.clear_caches()
    report = compare(sources["hf"], checkpoints["bfloat16"], layers=False, decode=True)
    jax.clear_caches()
    assert [tap.layer for tap in report.taps if tap.verdict == "fail"] == [0, 2, 4]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "mxfp4"])
def test_gradients_of_every_parameter(sources, checkpoints, dtype):
    report = compare(sources["hf"], checkpoints[dtype], layers=False, gradients=True)
    assert report.verdict == "pass"
    assert len(report.gradients) == (88 if dtype == "bfloat16" else 78)
    assert max(gradient["relative_l2"] for gradient in report.gradients) < metrics.GRADIENT_GATE / 3


@pytest.mark.long
def test_gradients_of_a_router_that_chooses_one_expert_are_zero(tmp_path, cfg):
    """One expert a token has weight 1 whatever the router says: nothing flows through it, on either side."""
    one = dataclasses.replace(cfg, num_hidden_layers=1, layer_types=(), num_experts_per_tok=1)
    convert(write_checkpoint(tmp_path / "source", one), tmp_path / "checkpoint")
    report = compare(tmp_path / "source", tmp_path / "checkpoint", layers=False, gradients=True)
    assert report.verdict == "pass"
    router = [gradient["relative_l2"] for gradient in report.gradients if "router" in gradient["name"]]
    assert router == [0.0, 0.0]


@pytest.mark.long
def test_a_gradient_that_does_not_flow_is_found_in_its_layer(monkeypatch, sources, checkpoints):
    """Right forward, wrong backward: in layer 2 nothing flows through the router, and what lies before it gets too little."""
    traced = 0

    def weigh(logits, choice):
        nonlocal traced
        traced += isinstance(logits, jax.core.Tracer)
        return experts.weigh(jax.lax.stop_gradient(logits) if traced % 5 == 3 else logits, choice)

    monkeypatch.setattr(modeling, "weigh", weigh)
    jax.clear_caches()
    report = compare(sources["hf"], checkpoints["bfloat16"], layers=False, gradients=True)
    jax.clear_caches()
    wrong = {gradient["name"] for gradient in report.gradients if gradient["verdict"] == "fail"}
    assert {f"layers.2.mlp.router.{leaf}" for leaf in ("weight", "bias")} <= wrong
    assert {"embedding.weight", "layers.0.attn.v_proj.weight", "layers.1.mlp.down.weight"} <= wrong
    assert not any(name.startswith(("layers.3.", "layers.4.", "norm.", "lm_head.")) for name in wrong)
    assert (report.verdict, report.first_divergence) == ("fail", {"layer": 2, "tap": "gradients"})
    assert report.free_run["verdict"] == "ok"


def without_the_last_layer(self, tokens, positions=None, cache=None, segment_ids=None):
    """A wrong `Transformer.stream`."""
    at = self.place(tokens.shape, positions, cache, segment_ids)
    x, rope = self.embed(tokens), self.rope(at.positions)
    for n, block in enumerate(list(self.layers)[:-1]):
        with in_layer(n):
            x, _ = block(x, at, rope)
    return x, None


def without_sinks(*arguments):
    """A wrong `create_model_from_checkpoint`."""
    model = create_model_from_checkpoint(*arguments)
    for block in model.layers:
        block.attn.sinks.set_value(jnp.zeros_like(block.attn.sinks.get_value()))
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    ("owner", "name", "wrong", "place"),
    [
        (Transformer, "stream", without_the_last_layer, {"layer": 1, "tap": "layer_out"}),
        (candidate_module, "create_model_from_checkpoint", without_sinks, {"layer": 0, "tap": "attn_core"}),
    ],
)
def test_how_the_model_is_loaded_and_put_together_is_compared(monkeypatch, tmp_path, cfg, owner, name, wrong, place):
    two = dataclasses.replace(cfg, num_hidden_layers=2, layer_types=())
    convert(write_checkpoint(tmp_path / "source", two), tmp_path / "checkpoint")
    monkeypatch.setattr(owner, name, wrong)
    jax.clear_caches()
    report = compare(tmp_path / "source", tmp_path / "checkpoint", gradients=True)
    jax.clear_caches()
    assert report.first_divergence == place
    if wrong is without_sinks:
        assert {one.name: one.note for one in report.loading} == {
            f"layers.{n}.attn.sinks": "14 of 14 values are not those that are stored, all of them zero" for n in range(2)
        }
    else:
        (failed,) = (tap for tap in report.taps if tap.layer == 1)
        assert failed.note == "the model does not run this layer when it is its turn"
    assert {"norm.scale", "layers.1.attn.sinks", "layers.0.attn.sinks"} <= {one["name"] for one in report.wrong_gradients}


@pytest.mark.long
def test_what_a_call_returns_is_compared(monkeypatch, sources, checkpoints):
    """Logits of the token before: every tap is right."""
    right = Transformer.__call__
    monkeypatch.setattr(Transformer, "__call__", lambda self, *given: jnp.roll(right(self, *given), 1, axis=1))
    report = compare(sources["hf"], checkpoints["bfloat16"])
    assert report.first_divergence == {"layer": None, "tap": "returned"}
    assert report.free_run["verdict"] == "fail"


def test_rows_of_unequal_length_are_called_with_their_padding(monkeypatch, sources, checkpoints):
    """A row that sees another's keys, or padding, fails at its place."""
    tokens = np.random.default_rng(0).integers(0, 509, (2, 28))
    prompt = Prompt(tokens, np.arange(28)[None] < np.array([[28], [21]]))
    assert compare(sources["hf"], checkpoints["bfloat16"], prompt=prompt).verdict == "pass"
    right = layers.RotaryEmbedding.__call__
    more = lambda self, positions: right(self, positions + jnp.arange(len(positions), dtype=jnp.int32)[:, None])  # noqa: E731
    monkeypatch.setattr(layers.RotaryEmbedding, "__call__", more)
    report = compare(sources["hf"], checkpoints["bfloat16"], prompt=prompt)
    assert report.first_divergence == {"layer": 0, "tap": "q_rope"}


# --- a model that makes much of rounding --------------------------------------------------------------------------------


@pytest.mark.long
def test_where_attention_is_very_sharp_the_free_run_may_be_as_far_as_rounding_moves_the_reference(tmp_path, cfg):
    """And no further: sinks that are lost are not excused by it."""
    source = write_checkpoint(tmp_path / "source", dataclasses.replace(cfg, num_hidden_layers=3, layer_types=()))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "q_proj" in name:
            tensors[name] = tensors[name] * 100
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "checkpoint")
    report = compare(source, tmp_path / "checkpoint", forms=())
    run = report.free_run
    assert (report.verdict, run["verdict"]) == ("pass", "ok")
    assert metrics.FREE_RUN_GATE * run["max_logit"] < run["max_abs"] < run["gate"] == metrics.TIMES * run["amplified"]
    assert "PyTorch itself, nudged by what float32 rounds, moves by up to" in report.table()
    run = compare(source, Faulty(tmp_path / "checkpoint", "sinks-zeroed", 0), forms=()).free_run
    assert (run["verdict"], run["max_abs"] > run["gate"] == metrics.TIMES * run["amplified"]) == ("fail", True)
