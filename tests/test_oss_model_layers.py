"""The layers against formulas written out here in float64, and against transformers' own modules."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from oss_model import ModelConfig, RMSNorm, RotaryEmbedding
from oss_model.attention import sink_attention, visibility
from oss_model.expert_paths import swiglu
from oss_model.layers import rotate

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


# --- RMSNorm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_bit_equal_to_transformers_in_bfloat16(cfg, dtype):
    """The order of casts matters: Llama's differs in a quarter of the elements."""
    x, scale = normal(2, 5, cfg.hidden_size), 1 + normal(cfg.hidden_size, scale=0.1)
    scale = torch.from_numpy(scale).bfloat16()
    ours = RMSNorm(cfg)
    ours.scale.set_value(jnp.asarray(scale.float().numpy(), jnp.bfloat16))
    theirs = gpt_oss.GptOssRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    theirs.weight.data = scale.float()
    want = theirs(torch.from_numpy(x).to(getattr(torch, dtype))).float().detach().numpy()
    got = np.asarray(ours(jnp.asarray(x, dtype)).astype(jnp.float32))
    if dtype == "bfloat16":
        assert (got == want).mean() > 0.999  # a mean summed in another order moves a value across a rounding edge
    np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float32" else 2**-7)


def test_rms_norm_adds_eps_before_the_root(cfg):
    """1e-6 for 1e-5 is 3e-6 on the logits, below what parity sees: inputs as small as eps show it."""
    x = normal(1, 3, cfg.hidden_size, scale=3e-3)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(RMSNorm(cfg)(jnp.asarray(x))), want, rtol=1e-6)


# --- RotaryEmbedding --------------------------------------------------------------------------------------------


def test_inv_freq_has_the_published_check_values():
    inv_freq = RotaryEmbedding(ModelConfig.default()).inv_freq
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq[[8, 12, 31]], [0.0508132726, 0.00679495931, 3.02351140e-7], rtol=2e-7)


def test_concentration_has_the_published_value():
    assert RotaryEmbedding(ModelConfig.default()).concentration == pytest.approx(1.3465735902799727, abs=1e-15)


@pytest.mark.parametrize("truncate", [False, True])
def test_inv_freq_equals_transformers(truncate):
    config = GptOssConfig()
    config.rope_parameters["truncate"] = truncate
    want = gpt_oss.GptOssRotaryEmbedding(config).inv_freq.numpy()
    got = RotaryEmbedding(dataclasses.replace(ModelConfig.default(), rope_truncate=truncate)).inv_freq
    np.testing.assert_allclose(got, want, rtol=1.3e-7)  # one unit in the last place: pow is rounded differently


def test_truncation_changes_the_frequencies():
    truncated = RotaryEmbedding(dataclasses.replace(ModelConfig.default(), rope_truncate=True)).inv_freq
    assert np.abs(truncated / RotaryEmbedding(ModelConfig.default()).inv_freq - 1).max() > 0.01


def test_rotation_at_far_positions_equals_float64():
    """Angles of 10^5 radians: cos and sin must reduce their argument well."""
    cfg = dataclasses.replace(ModelConfig.default(), dtype=np.float32)
    rope = RotaryEmbedding(cfg)
    positions = np.array([0, 1, 127, 128, 4096, 131071])
    cos, sin = (np.asarray(table[0]) for table in rope(jnp.asarray(positions[None], jnp.int32)))
    angle = (positions[:, None].astype(np.float32) * rope.inv_freq).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angle) * rope.concentration, atol=3e-7)
    np.testing.assert_allclose(sin, np.sin(angle) * rope.concentration, atol=3e-7)


def test_rotation_pairs_halves_as_transformers_does(cfg):
    x = normal(2, 6, 3, cfg.head_dim)
    cos, sin = normal(2, 6, cfg.head_dim // 2), normal(2, 6, cfg.head_dim // 2)
    want, _ = gpt_oss.apply_rotary_pos_emb(*(torch.from_numpy(a) for a in (x, x, cos, sin)), unsqueeze_dim=2)
    np.testing.assert_allclose(np.asarray(rotate(jnp.asarray(x), (jnp.asarray(cos), jnp.asarray(sin)))), want, atol=1e-6)


# --- attention --------------------------------------------------------------------------------------------------


def test_a_window_of_three_by_hand():
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    want = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(visibility(positions, positions, 3)[0], want)
    np.testing.assert_array_equal(visibility(positions, positions, None)[0], np.tril(np.ones((5, 5), bool)))


def test_padding_is_seen_by_nobody_and_gives_no_nan():
    positions = jnp.asarray([[-1, -1, 0, 1]], jnp.int32)
    visible = visibility(positions, positions, None)
    np.testing.assert_array_equal(visible[0, :, :2], np.zeros((4, 2), bool))
    q, k, v = (jnp.asarray(normal(1, 4, n, 6)) for n in (4, 2, 2))
    out = np.asarray(sink_attention(q, k, v, jnp.zeros(4), visible))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, :2], 0)


def test_sink_attention_by_hand():
    """float64, one query and head at a time: head h reads kv head h // group, and the sink only takes probability."""
    heads, kv, dim, length, window = 6, 3, 4, 7, 3
    q, k, v, sinks = normal(1, length, heads, dim), normal(1, length, kv, dim), normal(1, length, kv, dim), normal(heads)
    want = np.zeros((length, heads, dim))
    for t in range(length):
        for h in range(heads):
            seen = range(max(0, t - window + 1), t + 1)
            logits = [float(q[0, t, h].astype(np.float64) @ k[0, s, h // 2]) / np.sqrt(dim) for s in seen] + [float(sinks[h])]
            p = np.exp(logits) / np.exp(logits).sum()
            want[t, h] = sum(p[i] * v[0, s, h // 2].astype(np.float64) for i, s in enumerate(seen))
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    arrays = (jnp.asarray(a) for a in (q, k, v, sinks))
    got = sink_attention(*arrays, visibility(positions, positions, window))
    np.testing.assert_allclose(np.asarray(got)[0], want, atol=1e-6)


def test_large_logits_do_not_overflow():
    q = jnp.full((1, 2, 1, 4), 100.0)
    visible = visibility(jnp.arange(2, dtype=jnp.int32)[None], jnp.arange(2, dtype=jnp.int32)[None], None)
    out = sink_attention(q, q, jnp.ones((1, 2, 1, 4)), jnp.full((1,), 1e4), visible)
    assert np.isfinite(np.asarray(out)).all()


# --- SwiGLU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [7.0, 2.5])
def test_swiglu_over_the_whole_range(limit):
    """Gates clamped from above only, ups from both sides; the limit is the configuration's."""
    cfg = dataclasses.replace(ModelConfig.tiny(), swiglu_limit=limit)
    gate, up = (a.ravel().astype(np.float32) for a in np.meshgrid(np.linspace(-30, 30, 61), np.linspace(-12, 12, 49)))
    g, u = np.minimum(gate.astype(np.float64), limit), np.clip(up.astype(np.float64), -limit, limit)
    want = (u + 1) * g / (1 + np.exp(-1.702 * g))
    np.testing.assert_allclose(np.asarray(swiglu(jnp.asarray(gate), jnp.asarray(up), cfg)), want, rtol=2e-6, atol=1e-6)
    below = np.asarray(swiglu(jnp.float32(-limit - 0.5), jnp.float32(1.0), cfg))
    assert abs(below - 2 * (-limit - 0.5) / (1 + np.exp(1.702 * (limit + 0.5)))) < 1e-7  # not clamped at -limit


def test_swiglu_rounds_where_torch_rounds():
    """`a * 1.702` on a bfloat16 array would multiply by 1.703125."""
    experts = gpt_oss.GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1))
    both = normal(4096, 2, scale=4.0)
    want = experts._apply_gate(torch.from_numpy(both).bfloat16()).float().numpy()[:, 0]
    gate, up = (jnp.asarray(half, jnp.bfloat16) for half in both.T)
    got = np.asarray(swiglu(gate, up, ModelConfig.tiny()).astype(jnp.float32))
    assert (got == want).mean() > 0.995  # the sigmoids differ in the last float32 bit now and then
    np.testing.assert_allclose(got, want, rtol=2**-7)


def test_no_table_becomes_a_parameter(cfg):
    assert not nnx.to_flat_state(nnx.state(RotaryEmbedding(cfg)))
