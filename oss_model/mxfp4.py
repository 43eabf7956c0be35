"""MXFP4: packed blocks and scales <-> values.

A block is 32 values along the input axis, stored as 16 bytes and one scale byte (OCP Microscaling Formats 1.0).
Byte i of a block holds element 2i in its low nibble and element 2i + 1 in its high nibble. A nibble is an E2M1
code; value = code * 2**(scale - 127). Scales 0..252 give values that are exact in bfloat16; 253 and 254 overflow
for some codes, and 255 is NaN, so these three are rejected where a checkpoint is read (`bad_scales`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

MAX_SCALE = 252
STEP_BYTES = 1 << 17  # of blocks, decoded at a time: small enough for a core's cache
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@functools.cache
def _pair_table() -> np.ndarray:
    """[scale, byte] -> the two bfloat16 values of the byte, as one little-endian uint32. 65,536 entries, 256 KiB."""
    codes = np.asarray(E2M1, np.float64)
    scales = np.ldexp(1.0, np.arange(256) - 127)
    with np.errstate(over="ignore"):  # scales 253..255, which `bad_scales` rejects
        values = (scales[:, None] * codes).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    byte = np.arange(256)
    low, high = values[:, byte & 15].astype(np.uint32), values[:, byte >> 4].astype(np.uint32)
    return (low | high << 16).reshape(-1)


def bad_scales(scales: np.ndarray) -> tuple[int, tuple[int, ...]] | None:
    """How many scale bytes of `scales` (uint8, any shape) are not finite in bfloat16, and the first one's index.

    Returns None if there is none.
    """
    if scales.size == 0 or scales.max() <= MAX_SCALE:
        return None
    where = np.argwhere(scales > MAX_SCALE)
    return len(where), tuple(int(i) for i in where[0])


def scale_faults(scales: np.ndarray, where: str) -> list[str]:
    """A line for `InputError` if `scales` has bytes that are no scale; `where` names the file and tensor."""
    bad = bad_scales(scales)
    if bad is None:
        return []
    count, index = bad
    found = f"{count} of {scales.size} out of range, the first {scales[index]} at {list(index)}"
    return [f"{where}: expected scale bytes 0..{MAX_SCALE}, found {found}; the file is damaged, or not MXFP4"]


def decode(
    blocks: np.ndarray, scales: np.ndarray, dtype: Any = ml_dtypes.bfloat16, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode on the host, exactly.

    Args:
      blocks: uint8 [..., groups, 16].
      scales: uint8 [..., groups].
      dtype: bfloat16 or float32.
      out: bfloat16, contiguous, as many elements as the result: decoded into, instead of new memory.

    Returns:
      [..., groups * 32] in `dtype`. Subnormals (scales 0 and 1) and -0.0 are kept: this is a table, not arithmetic.
    """
    *rows, groups, width = blocks.shape
    if out is None:
        out = np.empty(blocks.size * 2, ml_dtypes.bfloat16)
    pairs = out.reshape(-1, groups * width).view(np.uint32).reshape(-1, groups, width)
    blocks, scales = blocks.reshape(pairs.shape), scales.reshape(pairs.shape[:-1])
    table = _pair_table()
    step = max(1, STEP_BYTES // (groups * width))
    index = np.empty((min(step, len(pairs)), groups, width), np.intp)
    small = np.empty(index.shape, np.uint16)
    for start in range(0, len(pairs), step):
        piece = slice(start, start + step)
        count = len(pairs[piece])
        # Added as uint16 and widened afterwards, which NumPy does with vector instructions: 1.7 times as fast.
        np.add(scales[piece, :, None].astype(np.uint16) << 8, blocks[piece], out=small[:count])
        index[:count] = small[:count]
        # "clip" writes straight to `out`; no index is out of range.
        np.take(table, index[:count], out=pairs[piece], mode="clip")
    values = out.reshape(*rows, groups * width * 2)
    return values if np.dtype(dtype) == ml_dtypes.bfloat16 else widen(values)


def decode_into(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """`decode` into `out`, contiguous bfloat16 or float32, an expert at a time."""
    for n in range(len(out)):
        if out.dtype == ml_dtypes.bfloat16:
            decode(blocks[n], scales[n], out=out[n])
        else:
            widen_into(decode(blocks[n], scales[n]), out[n])


def widen(values: np.ndarray) -> np.ndarray:
    """bfloat16 -> float32 of the same shape, bit for bit: a float32 whose low half is zero. NaNs keep their payload."""
    out = np.empty(values.shape, np.float32)
    widen_into(values, out)
    return out


def widen_into(values: np.ndarray, out: np.ndarray) -> None:
    """`widen` into `out`, float32 of the same shape."""
    np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def dequantize(
    blocks: UInt8[Array, "*rest rows groups 16"], scales: UInt8[Array, "*rest rows groups"], dtype
) -> Float[Array, "*rest rows values"]:
    """`decode` inside the model, for jit and for any backend: never a product, whose subnormal results XLA flushes."""
    ways = {"tpu": _by_arithmetic, "default": _by_table}
    return jax.lax.platform_dependent(blocks, scales, **ways).astype(dtype)


def _by_table(blocks, scales):
    """As `decode` does it."""
    table = jnp.asarray(_pair_table())
    pairs = table[scales[..., None].astype(jnp.int32) << 8 | blocks.astype(jnp.int32)]
    values = jax.lax.bitcast_convert_type(pairs, jnp.bfloat16)  # [..., groups, 16, 2]
    return values.reshape(*blocks.shape[:-2], -1)


def _by_arithmetic(blocks, scales):
    """For TPUs, which gather slowly, and which pad a last axis of 16 to 128: rows come last while it is computed.

    Gate and up each for itself: what is made of both at once has them side by side in memory, which bytes do not, and XLA
    would copy those of all layers.
    """
    if blocks.ndim > 3 and blocks.shape[-4] == 2:
        halves = [_by_arithmetic(b, s) for b, s in zip(jnp.moveaxis(blocks, -4, 0), jnp.moveaxis(scales, -3, 0), strict=True)]
        both = jnp.concatenate(halves, axis=-2)
        return both.reshape(*both.shape[:-2], len(halves), -1, both.shape[-1])
    blocks, scales = (jnp.moveaxis(a, axis, -1).astype(jnp.int32) for a, axis in ((blocks, -3), (scales, -2)))
    pairs = jnp.stack([_bits(nibble, scales[..., None, :]) for nibble in (blocks & 15, blocks >> 4)], axis=-2)
    values = jax.lax.bitcast_convert_type(pairs.astype(jnp.uint16), jnp.bfloat16)  # [..., groups, 16, 2, rows]
    return jnp.moveaxis(values.reshape(*blocks.shape[:-3], -1, blocks.shape[-1]), -1, -2)


def _bits(nibble, scales):
    """int32: those of the bfloat16 that an E2M1 code times 2**(scale - 127) is, for scales that `bad_scales` lets pass."""
    code = nibble & 7
    normal = (scales << 7) + jnp.where(code < 2, 0, code << 6) - 128  # 0.5, which is code 1, has no mantissa
    exponent = normal >> 7
    subnormal = ((normal & 127) | 128) >> jnp.clip(1 - exponent, 0, 8)
    return jnp.where(code == 0, 0, jnp.where(exponent > 0, normal, subnormal)) | (nibble & 8) << 12
