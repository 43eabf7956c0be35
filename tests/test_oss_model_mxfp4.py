"""MXFP4 decoding: every (scale, byte) there is, against transformers' own decoder, bit for bit."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oss_model import mxfp4

GOOD_SCALES = 253  # 0..252
SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)


def every_pair() -> tuple[np.ndarray, np.ndarray]:
    """blocks [253, 16, 16], scales [253, 16]: row s has scale s in every block, and each of the 256 bytes once."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (GOOD_SCALES, 16, 16)).copy()
    scales = np.repeat(np.arange(GOOD_SCALES, dtype=np.uint8)[:, None], 16, axis=1)
    return blocks, scales


@pytest.fixture(scope="module")
def reference():
    """transformers' values of `every_pair`, as integers: name of the dtype -> [253, 512]."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (torch.from_numpy(array)[None] for array in every_pair())
    bits = {"bfloat16": torch.int16, "float32": torch.int32}
    found = {}
    for name, integer in bits.items():
        # Theirs is transposed for x @ W: [experts, in, out].
        values = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, name))
        found[name] = values[0].T.contiguous().view(integer).numpy()
    return found


def bits(values) -> np.ndarray:
    values = np.asarray(values)
    return values.view(np.int16 if values.dtype == ml_dtypes.bfloat16 else np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_pair_on_the_host(reference, dtype):
    values = mxfp4.decode(*every_pair(), np.dtype(dtype))
    assert (values.shape, values.dtype) == ((GOOD_SCALES, 512), np.dtype(dtype))
    np.testing.assert_array_equal(bits(values), reference[dtype])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_pair_inside_the_model(reference, dtype, compiled):
    function = jax.jit(mxfp4.dequantize, static_argnums=2) if compiled else mxfp4.dequantize
    values = function(*map(jnp.asarray, every_pair()), jnp.dtype(dtype))
    assert (values.shape, values.dtype) == ((GOOD_SCALES, 512), np.dtype(dtype))
    np.testing.assert_array_equal(bits(values), reference[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_pair_as_tpus_compute_it(reference, dtype):
    blocks, scales = map(jnp.asarray, every_pair())
    rows = blocks.shape[0] - blocks.shape[0] % 2
    two = [a[:rows].reshape(2, -1, *a.shape[1:]) for a in (blocks, scales)]  # as gate and up
    one, both = (mxfp4._by_arithmetic(*given).astype(dtype) for given in ((blocks, scales), two))
    np.testing.assert_array_equal(bits(one), reference[dtype])
    np.testing.assert_array_equal(bits(both), reference[dtype][:rows].reshape(2, -1, 512))


def test_tpus_look_nothing_up():
    given = [jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in ((2, 8, 3, 16), (2, 8, 3))]
    traced = jax.jit(lambda *given: mxfp4.dequantize(*given, jnp.bfloat16)).trace(*given)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
    assert {platform: "gather" in lines for platform, lines in text.items()} == {"tpu": False, "cpu": True, "cuda": True}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_agree_on_the_scales_that_a_checkpoint_may_not_have(dtype):
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 16, 16))
    scales = np.repeat(np.arange(253, 256, dtype=np.uint8)[:, None], 16, axis=1)
    host = mxfp4.decode(blocks, scales, np.dtype(dtype))
    np.testing.assert_array_equal(bits(host), bits(mxfp4.dequantize(jnp.asarray(blocks), jnp.asarray(scales), dtype)))


def by_definition(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """OCP Microscaling Formats 1.0, spelt out: sign, two exponent bits, one mantissa bit; float64."""
    out = []
    for block, scale in zip(blocks.reshape(-1, 16), scales.reshape(-1), strict=True):
        for byte in map(int, block):
            for code in (byte % 16, byte // 16):  # the low nibble comes first
                exponent, mantissa = code // 2 % 4, code % 2
                size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
                out.append((-1 if code >= 8 else 1) * size * 2.0 ** (int(scale) - 127))
    return np.array(out).reshape(*blocks.shape[:-2], -1)


def test_every_pair_by_the_definition():
    blocks, scales = every_pair()
    expected = by_definition(blocks, scales)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        values = mxfp4.decode(blocks, scales, dtype)
        np.testing.assert_array_equal(values.astype(np.float64), expected)
        np.testing.assert_array_equal(np.signbit(values.astype(np.float64)), np.signbit(expected))


def test_minus_zero_and_subnormals_are_kept():
    blocks = np.zeros((3, 1, 16), np.uint8)
    blocks[0, 0, :2] = 0x80, 0x08  # elements 1 and 2 are -0.0
    blocks[1, 0, 0] = blocks[2, 0, 0] = 0x91  # 0.5, -0.5
    scales = np.array([[127], [0], [1]], np.uint8)
    for values in (
        mxfp4.decode(blocks, scales, np.float32),
        np.asarray(jax.jit(mxfp4.dequantize, static_argnums=2)(jnp.asarray(blocks), jnp.asarray(scales), jnp.float32)),
    ):
        assert np.flatnonzero(np.signbit(values[0])).tolist() == [1, 2]
        assert not values[0].any()
        assert values[1, :2].tolist() == [2.0**-128, -(2.0**-128)]  # below the smallest normal number, 2**-126
        assert values[2, :2].tolist() == [2.0**-127, -(2.0**-127)]


@SETTINGS
@given(
    rows=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    wide=st.booleans(),
)
def test_any_shape(rows, groups, seed, wide):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*rows, groups, 16), np.uint8)
    scales = rng.integers(0, GOOD_SCALES, (*rows, groups), np.uint8)
    dtype = np.float32 if wide else ml_dtypes.bfloat16
    values = mxfp4.decode(blocks, scales, dtype)
    assert values.shape == (*rows, groups * 32)
    np.testing.assert_array_equal(values.astype(np.float64), by_definition(blocks, scales))


@pytest.mark.parametrize("rows", [8191, 8192, 8193, 20_000])  # around the piece that decoding works in
def test_more_than_one_piece(rows):
    rng = np.random.default_rng(rows)
    blocks = rng.integers(0, 256, (rows, 1, 16), np.uint8)
    scales = rng.integers(0, GOOD_SCALES, (rows, 1), np.uint8)
    whole = mxfp4.decode(blocks, scales)
    for start in (0, 8190, rows - 1):
        part = slice(start, start + 2)
        np.testing.assert_array_equal(bits(whole[part]), bits(mxfp4.decode(blocks[part], scales[part])))


def test_parts_of_larger_arrays():
    """Neither contiguous nor writable: what `Entry.to_model` hands on."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 2, 3, 16), np.uint8)
    scales = rng.integers(100, 130, (6, 2, 3), np.uint8)
    blocks.flags.writeable = False
    views = blocks.swapaxes(0, 1)[:, ::2], scales.swapaxes(0, 1)[:, ::2]
    np.testing.assert_array_equal(bits(mxfp4.decode(*views)), bits(mxfp4.decode(*map(np.ascontiguousarray, views))))


@pytest.mark.parametrize("flat", [False, True])
def test_decoding_into_a_buffer(flat):
    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, (5, 3, 16), np.uint8), rng.integers(0, GOOD_SCALES, (5, 3), np.uint8)
    expected = mxfp4.decode(blocks, scales)
    buffer = np.full(5 * 96 if flat else (5, 96), 7, ml_dtypes.bfloat16)
    values = mxfp4.decode(blocks, scales, out=buffer)
    assert np.shares_memory(values, buffer)
    assert values.shape == (5, 96)
    np.testing.assert_array_equal(bits(values), bits(expected))
    again = mxfp4.decode(blocks[::-1], scales[::-1], out=buffer)  # reused: the first result is overwritten
    np.testing.assert_array_equal(bits(again), bits(expected[::-1]))
    np.testing.assert_array_equal(bits(values), bits(expected[::-1]))


def test_widening_is_exact_for_every_bfloat16():
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    wide = mxfp4.widen(values)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide.view(np.uint32) >> 16, np.arange(1 << 16))
    np.testing.assert_array_equal(wide.view(np.uint32) & 0xFFFF, 0)
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(wide[finite], values.astype(np.float32)[finite])


# --- scales that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", range(253, 256))
def test_bad_scale_is_counted_and_found(byte):
    scales = np.full((3, 5, 7), 252, np.uint8)
    assert mxfp4.bad_scales(scales) is None
    assert mxfp4.scale_faults(scales, "here") == []
    scales[1, 4, 2] = scales[2, 0, 0] = byte
    assert mxfp4.bad_scales(scales) == (2, (1, 4, 2))
    assert mxfp4.scale_faults(scales, "shard: tensor") == [
        f"shard: tensor: expected scale bytes 0..252, found 2 of 105 out of range, the first {byte} at [1, 4, 2];"
        " the file is damaged, or not MXFP4"
    ]


def test_no_scales_at_all_are_not_bad():
    assert mxfp4.bad_scales(np.zeros((0, 4), np.uint8)) is None


@SETTINGS
@given(st.lists(st.integers(0, 255), min_size=1, max_size=50))
def test_bad_scales_are_those_above_252(scales):
    bad = [i for i, scale in enumerate(scales) if scale > 252]
    assert mxfp4.bad_scales(np.array(scales, np.uint8)) == ((len(bad), (bad[0],)) if bad else None)


def test_the_scales_accepted_are_those_whose_values_are_finite():
    blocks, _ = every_pair()
    for scale in (252, 253, 254, 255):
        values = mxfp4.decode(blocks[:1], np.full((1, 16), scale, np.uint8), np.float32)
        finite = bool(np.isfinite(values).all())
        assert finite == (mxfp4.bad_scales(np.array([scale], np.uint8)) is None) == (scale <= 252)


# --- the tests above can fail -----------------------------------------------------------------------------------

MUTATIONS = {
    "high nibble first": ("(low | high << 16)", "(high | low << 16)"),
    "bias of 128": ("np.arange(256) - 127", "np.arange(256) - 128"),
    "scale read as linear": ("np.ldexp(1.0, np.arange(256) - 127)", "np.arange(256) / 127"),
    "positive zero for code 8": ("6.0, -0.0,", "6.0, 0.0,"),
    "5 for 6": ("4.0, 6.0, -0.0", "4.0, 5.0, -0.0"),
    "scale 0 is zero": ("np.ldexp(1.0, np.arange(256) - 127)", "np.ldexp(1.0, np.arange(256) - 127) * (np.arange(256) > 0)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_in_the_table_is_caught(mutation, reference):
    source = Path(mxfp4.__file__).read_text(encoding="utf-8")
    right, wrong = MUTATIONS[mutation]
    assert source.count(right) == 1, f"the mutation no longer applies: {right}"
    mutated = type(sys)("mutated")
    exec(compile(source.replace(right, wrong), "mutated", "exec"), mutated.__dict__)
    values = mutated.decode(*every_pair())
    assert not np.array_equal(bits(values), reference["bfloat16"])
