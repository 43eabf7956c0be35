"""Values -> MXFP4: against plain float64 arithmetic, in NumPy and in JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from oss_model import mxfp4, quantization
from oss_model.errors import InputError
from oss_model.quantization import RULES, quantize, quantize_jax, straight_through

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BLOCKS = 3000


def normal(rng):
    return rng.standard_normal((BLOCKS, 32))


def any_bits(rng):
    bits = rng.integers(0, 1 << 32, (BLOCKS, 32), np.uint64).astype(np.uint32)
    return np.where((bits >> 23 & 255) < 254, bits, 0).astype(np.uint32).view(np.float32)


def tiny(rng):
    return normal(rng) * 2.0 ** rng.integers(-149, -110, (BLOCKS, 1))


def huge(rng):
    return normal(rng) * 2.0 ** rng.integers(120, 126, (BLOCKS, 1))


def on_ties(rng):
    """Codes and the middles between them, and what is next to these."""
    values = (rng.integers(-28, 29, (BLOCKS, 32)) * 0.25 * 2.0 ** rng.integers(-20, 20, (BLOCKS, 1))).astype(np.float32)
    return np.where(rng.random(values.shape) < 0.3, np.nextafter(values, np.float32(np.inf)), values)


def with_zeros(rng):
    return np.where(rng.random((BLOCKS, 1)) < 0.3, -0.0, normal(rng))


def nearest(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E2M1 magnitudes, as numbers 0 to 7, of float64 [n, 32] at these scale bytes: of two that are as near the even one."""
    distances = np.abs(np.abs(values)[..., None] / 2.0 ** (scale[:, None, None] - 127.0) - MAGNITUDES)
    first, last = distances.argmin(-1), 7 - distances[..., ::-1].argmin(-1)
    return np.where((first != last) & (first % 2 == 1), last, first)


def plain(values: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, 32] and scale bytes [n] by the words of the rule."""
    wide = values.astype(np.float64)
    largest = np.abs(wide).max(-1)
    fraction, exponent = np.frexp(largest / 6 if rule == "ceil" else largest)  # largest = fraction * 2**exponent, from 1/2 on
    exponent = exponent - (fraction == 0.5) if rule == "ceil" else exponent - 3
    scale = np.where(largest > 0, np.clip(exponent + 127, 0, 252), 0)
    if rule == "best":
        cut = (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        pair = scale, np.minimum(scale + 1, 252)
        unit = 2.0 ** (scale[:, None] - 127.0)
        errors = [((np.abs(cut) - MAGNITUDES[nearest(cut, s)] * 2.0 ** (s[:, None] - 127.0)) / unit) ** 2 for s in pair]
        more = np.rint((errors[1] - errors[0]) * 2**18).astype(np.int64).sum(-1)  # exact: all are integers, or no different
        scale = np.where(more < 0, pair[1], scale)
    return nearest(wide, scale) | np.signbit(wide) * 8, scale


def codes(blocks: np.ndarray) -> np.ndarray:
    flat = blocks.reshape(-1, 16)
    return np.stack([flat & 15, flat >> 4], -1).reshape(-1, 32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [normal, any_bits, tiny, huge, on_ties, with_zeros])
def test_numpy_and_jax_do_what_the_words_say(kind, dtype, rule):
    values = kind(np.random.default_rng(0)).astype(np.float32).astype(BFLOAT16 if dtype == "bfloat16" else np.float32)
    found, (wanted, scale) = quantize(values, rule), plain(values, rule)
    np.testing.assert_array_equal(found.scales.reshape(-1), scale)
    np.testing.assert_array_equal(codes(found.blocks), wanted)
    blocks, scales = jax.jit(quantize_jax, static_argnums=1)(values, rule)
    np.testing.assert_array_equal(blocks, found.blocks)
    np.testing.assert_array_equal(scales, found.scales)
    if np.abs(values.astype(np.float64)).max() < 1e15:  # squares of float32
        off = values.astype(np.float64) - mxfp4.decode(found.blocks, found.scales, np.float32)
        assert found.error == pytest.approx((off**2).sum(), rel=2e-3, abs=1e-60)


@pytest.mark.parametrize(("rule", "most"), [("ocp", 0.1142), ("ceil", 0.1188), ("best", 0.1115)])
def test_what_is_lost_of_normal_values(rule, most):
    """Of the size that weights have. A rule is better at some sizes than at others; "best" is never worse than both."""
    values = np.random.default_rng(1).standard_normal((50_000, 32), np.float32)
    lost = {size: quantize(values * np.float32(size), rule) for size in (0.02, 0.025)}
    assert 0.97 * most < np.sqrt(lost[0.02].error / lost[0.02].square) < most
    assert quantize(values * np.float32(0.025), "best").error <= lost[0.025].error


@pytest.mark.parametrize("rule", RULES)
def test_values_that_are_mxfp4_are_kept(rule):
    rng = np.random.default_rng(2)
    blocks, scales = rng.integers(0, 256, (500, 3, 16), np.uint8), rng.integers(4, 250, (500, 3), np.uint8)
    values = mxfp4.decode(blocks, scales)
    found = quantize(values, rule)
    np.testing.assert_array_equal(mxfp4.decode(found.blocks, found.scales).view(np.uint16), values.view(np.uint16))
    assert found.error == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad, dtype):
    values = np.zeros((4, 64), BFLOAT16 if dtype == "bfloat16" else np.float32)
    values[2, 40] = bad
    with pytest.raises(InputError, match="expected finite values"):
        quantize(values)


def test_more_than_a_step_and_more_axes_than_two():
    values = np.random.default_rng(3).standard_normal((3, 2, 700, 96)).astype(BFLOAT16)
    assert values.size // 32 > 2 * quantization.STEP_BLOCKS
    found = quantize(values)
    assert found.blocks.shape == (3, 2, 700, 3, 16)
    alone = quantize(np.ascontiguousarray(values[2, 1, 650:]))
    np.testing.assert_array_equal(found.blocks[2, 1, 650:], alone.blocks)
    np.testing.assert_array_equal(found.scales[2, 1, 650:], alone.scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_straight_through_is_what_is_exported_and_lets_gradients_through(dtype):
    values = np.random.default_rng(4).standard_normal((5, 64)).astype(BFLOAT16 if dtype == "bfloat16" else np.float32)
    exported = quantize(values)
    through, gradient = jax.value_and_grad(lambda v: (straight_through(v, "best") * jnp.arange(64, dtype=v.dtype)[None]).sum())(
        jnp.asarray(values)
    )
    del through
    np.testing.assert_array_equal(
        np.asarray(straight_through(jnp.asarray(values), "best")), mxfp4.decode(exported.blocks, exported.scales, values.dtype)
    )
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), np.broadcast_to(np.arange(64.0), (5, 64)))
