"""What ports of gpt-oss got wrong (MODEL_SPEC §6), put into our model one at a time: parity must fail, and say where.

Mistakes of arithmetic are made in the functions the real model calls; mistakes of configuration in the checkpoint's
config.json. Those that are numerically invisible (eps, the gate's lower clamp) or that live in tables (MXFP4, dialects of
config.json) have unit tests of their own.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from oss_model import layers, modeling, moe
from parity import compare


@pytest.fixture
def judge(sources, checkpoints):
    """Compare with compiled functions thrown away before and after: a mistake must not be compiled around."""
    jax.clear_caches()
    yield lambda checkpoint=checkpoints["bfloat16"]: compare(sources["hf"], checkpoint, layers=True)
    jax.clear_caches()


def first(report) -> tuple:
    assert report.exit_code == 1
    return report.first_divergence["layer"], report.first_divergence["tap"]


# --- arithmetic -------------------------------------------------------------------------------------------------


def _no_sinks(q, k, v, sinks, visible):
    return layers.sink_attention(q, k, v, jnp.full_like(sinks, -1e30), visible)


def _zero_sinks(q, k, v, sinks, visible):
    return layers.sink_attention(q, k, v, jnp.zeros_like(sinks), visible)


def _neighbours_rotated(x, rope):
    cos, sin = (table[:, :, None] for table in rope)
    x1, x2 = x[..., ::2], x[..., 1::2]
    return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)


def _gate_and_up_exchanged(gate, up, cfg):
    return layers.swiglu(up, gate, cfg)


def _halves(gate, up, cfg):
    """Split in the middle instead of interleaved."""
    both = jnp.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)
    return layers.swiglu(*jnp.split(both, 2, axis=-1), cfg)


def _alpha_one(gate, up, cfg):
    gate, up = jnp.minimum(gate, cfg.swiglu_limit), jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    return (up + 1) * gate * jax.nn.sigmoid(gate)


def _no_plus_one(gate, up, cfg):
    return layers.swiglu(gate, jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit) - 1, cfg)


def _no_clamp(gate, up, cfg):
    return (up + 1) * gate * jax.nn.sigmoid(gate * cfg.swiglu_alpha)


def _gate_clamped_below(gate, up, cfg):
    return layers.swiglu(jnp.maximum(gate, -0.5), up, cfg)


def _softmax_over_all(logits, choice):
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choice, axis=-1)


def _not_normalised(logits, choice):
    return jax.nn.sigmoid(jnp.take_along_axis(logits, choice, axis=-1))


def _down_bias_not_weighted(x, choice, weights, gate_up, down, cfg):
    stored = down.stored()
    unweighted = jnp.sum((1 - weights)[..., None] * stored["bias"][choice].astype(x.dtype), axis=1)
    return moe.experts(x, choice, weights, gate_up, down, cfg) + unweighted


@pytest.mark.parametrize(
    ("module", "name", "mistake", "tap"),
    [
        (modeling, "sink_attention", _no_sinks, "attn_core"),
        (modeling, "sink_attention", _zero_sinks, "attn_core"),
        (modeling, "rotate", _neighbours_rotated, "q_rope"),
        (moe, "swiglu", _gate_and_up_exchanged, "mlp_out"),
        (moe, "swiglu", _halves, "mlp_out"),
        (moe, "swiglu", _alpha_one, "mlp_out"),
        (moe, "swiglu", _no_plus_one, "mlp_out"),
        (moe, "swiglu", _no_clamp, "mlp_out"),
        (moe, "swiglu", _gate_clamped_below, "mlp_out"),
        (modeling, "weigh", _softmax_over_all, "expert_weights"),
        (modeling, "weigh", _not_normalised, "expert_weights"),
        (modeling, "experts", _down_bias_not_weighted, "mlp_out"),
    ],
)
def test_a_mistake_of_arithmetic_is_found_at_its_tap(monkeypatch, judge, module, name, mistake, tap):
    monkeypatch.setattr(module, name, mistake)
    report = judge()
    assert first(report) == (0, tap)
    assert report.free_run["verdict"] == "fail"
    others = {found.tap for found in report.taps if found.verdict == "fail" and found.layer == 0}
    assert others <= {tap, "k_rope"}  # forced inputs: the error does not spread to other components


def test_a_router_without_its_bias_is_found(monkeypatch, judge):
    """The bias of the router alone: every other linear map keeps its own."""
    call = layers.Linear.__call__

    def without(self, x):
        if self.spec != "blh,eh->ble":
            return call(self, x)
        return layers.contract(self.spec, x, self.weight[...].astype(x.dtype))

    monkeypatch.setattr(layers.Linear, "__call__", without)
    assert first(judge()) == (0, "router_logits")


def test_concentration_left_out_is_found(monkeypatch, judge):
    monkeypatch.setattr(layers.RotaryEmbedding, "concentration", 1.0)
    report = judge()
    assert first(report) == (None, "rope")
    assert {"q_rope", "k_rope"} <= {tap.tap for tap in report.taps if tap.verdict == "fail" and tap.layer == 0}


def test_wrong_wiring_that_no_single_component_shows_fails_the_free_run(monkeypatch, judge):
    """A block that is run twice: each component is right, fed the right input."""
    call = modeling.TransformerBlock.__call__
    monkeypatch.setattr(
        modeling.TransformerBlock, "__call__", lambda self, x, *rest: call(self, call(self, x, *rest)[0], *rest)
    )
    assert judge().free_run["verdict"] == "fail"


# --- configuration ----------------------------------------------------------------------------------------------


def _swap_layer_types(config):
    config["layer_types"] = config["layer_types"][1:] + config["layer_types"][:1]
    config["layer_types"][-1] = "full_attention"


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda c: c.update(sliding_window=12), (0, "attn_core")),
        (lambda c: c.update(sliding_window=10), (0, "attn_core")),
        (lambda c: c.update(sliding_window=4096), (0, "attn_core")),
        (lambda c: c.update(layer_types=["full_attention"] * 5), (0, "attn_core")),
        (_swap_layer_types, (0, "attn_core")),
        (lambda c: c["rope_scaling"].update(truncate=True), (None, "rope")),
        (lambda c: c["rope_scaling"].update(factor=1.0), (None, "rope")),
        (lambda c: c.update(rope_theta=10000.0), (None, "rope")),
        (lambda c: c.update(swiglu_limit=1.0), (0, "mlp_out")),
        (lambda c: c.update(num_experts_per_tok=3, experts_per_token=3), (0, "expert_choice")),
    ],
    ids=["window+1", "window-1", "no window", "no sliding layer", "odd layers slide", "truncate", "no yarn", "theta", "limit",
         "top 3"],
)  # fmt: skip
def test_a_mistake_of_configuration_is_found(tmp_path, judge, checkpoints, edit, where):
    wrong = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["bfloat16"], wrong)
    config = json.loads((wrong / "config.json").read_text())
    edit(config)
    (wrong / "config.json").write_text(json.dumps(config))
    report = judge(wrong)
    assert first(report) == where
    if where == (0, "attn_core"):
        (found,) = (tap for tap in report.taps if tap.layer == 0 and tap.verdict == "fail")
        window = min(config["sliding_window"], 11)
        assert found.note == f"only tokens >= {window}"


def test_below_two_windows_a_wrong_window_does_not_show(tmp_path, sources, checkpoints):
    """Which is why a prompt that short cannot pass."""
    wrong = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["bfloat16"], wrong)
    config = json.loads((wrong / "config.json").read_text()) | {"sliding_window": 12}
    (wrong / "config.json").write_text(json.dumps(config))
    report = compare(sources["hf"], wrong, layers=True, tokens=11)
    assert report.exit_code == 3
    assert report.incomplete == ["11 tokens, but faults of the sliding window (11) only show from 22 on: use --tokens 22"]
