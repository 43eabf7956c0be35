"""Values -> MXFP4: one rule, twice. In NumPy, as the exporter streams it; in JAX, for training that is to end in it.

A block is 32 values along the input axis. Its scale comes first, then each value goes to the nearest E2M1 code of that scale,
ties to the even code, what is larger than 6 of them to 6 (OCP Microscaling Formats 1.0, §5.3, §6.3). Rules for the scale's
exponent, of the block's largest magnitude `amax`:

ocp     floor(log2 amax) - 2: OCP's own; amax / scale is below 8, so some values are cut to 6
ceil    the smallest that cuts nothing: ceil(log2(amax / 6))
best    that of ocp or the next larger one, whichever squared error is the smaller; of equals that of ocp

Scales stay in 0..252, which decode exactly (`oss_model.mxfp4`). The choice of "best" does not depend on the order of a sum: the
errors that are compared are those of the values cut to bfloat16, which are integers of 2**-9 scales where the two differ.
Values go to their codes from what they are, float32 or bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from oss_model.config import MXFP4_BLOCK, QUANTIZERS
from oss_model.errors import InputError
from oss_model.layouts import BFLOAT16
from oss_model.mxfp4 import E2M1, MAX_SCALE, decode, dequantize, widen

RULES = QUANTIZERS
STEP_BLOCKS = 4096  # in NumPy, at a time: what is worked on then is in the cache

_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the magnitudes of E2M1
_TO_EVEN_IS_UP = (False, True, False, True, False, True, False)
_UNIT = 512  # integers to a scale: what bfloat16 can tell apart where codes, and errors, begin
SCALE_BIAS = 127
_OCTAVES = 12  # of a block's values below 8 scales, that are told apart; what is less is as good as 0
_NORMAL = _OCTAVES - 2  # from this scale byte on, these are normal numbers
_LIFT = 64  # doublings that make it so


class Quantized(NamedTuple):
    """
    Attributes:
      blocks: uint8 [..., in / 32, 16]
      scales: uint8 [..., in / 32]
      error: sum of squares of what was lost.
      square: sum of the values' squares: the root of error / square is the relative error.
    """

    blocks: np.ndarray
    scales: np.ndarray
    error: float
    square: float


def quantize(values: np.ndarray, rule: str = "best") -> Quantized:
    """Quantize on the host.

    Args:
      values: [..., in], bfloat16 or float32, contiguous; `in` a multiple of 32.
      rule: one of `RULES`.

    Raises:
      InputError: if a value is not finite.
    """
    blocks = np.empty((*values.shape[:-1], values.shape[-1] // MXFP4_BLOCK, MXFP4_BLOCK // 2), np.uint8)
    scales = np.empty(blocks.shape[:-1], np.uint8)
    flat, out, into = values.reshape(-1, MXFP4_BLOCK), blocks.reshape(-1, MXFP4_BLOCK // 2), scales.reshape(-1)
    # Fresh memory for each step would cost as much as the work.
    work = [np.empty((min(STEP_BLOCKS, len(flat)), MXFP4_BLOCK), kind) for kind in (np.uint16, np.intp, np.int64, np.uint8)]
    error = square = 0.0
    for start in range(0, len(flat), STEP_BLOCKS):
        step = slice(start, start + STEP_BLOCKS)
        part = flat[step]
        into[step], lost = _quantize(part, rule, out[step], *(array[: len(part)] for array in work))
        wide = widen(part) if values.dtype == BFLOAT16 else part
        if values.dtype != BFLOAT16:  # what was lost of the values cut to bfloat16 is not all
            off = wide - decode(out[step, None], into[step, None], np.float32)
            lost = float(np.vdot(off, off))
        error, square = error + lost, square + float(np.vdot(wide, wide))
    return Quantized(blocks, scales, error, square)


def _quantize(
    values: np.ndarray, rule: str, out: np.ndarray, high: np.ndarray, index: np.ndarray, found: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, float]:
    """[n, 32] -> scales [n], and the squared error; blocks [n, 16] into `out`. The other arrays, [n, 32], are worked in."""
    (table, errors), scale = _tables(), _scales(values, rule, high)
    _place(values, scale, high, index)
    sums = np.take(errors, index, out=found, mode="clip").sum(-1)
    more = sums.astype(np.int32)  # the lower half
    error, unit = (sums - more) >> 32, np.ldexp(1.0, 2 * (scale - SCALE_BIAS)) / _UNIT**2
    if rule == "best":
        raised = (more < 0) & (scale < MAX_SCALE)
        error += more * raised
        index += (len(errors) * raised)[:, None]
        scale += raised
    if values.dtype != BFLOAT16:
        index += len(errors) * 2 * ((values.view(np.uint32) & 0xFFFF) != 0)  # a little more than their first 16 bits say
    np.take(table, index, out=codes, mode="clip")
    signs = values.view(np.uint16).reshape(len(values), -1)[:, values.itemsize // 2 - 1 :: values.itemsize // 2]
    np.right_shift(signs, 12, out=high)
    np.bitwise_and(high, 8, out=high)
    np.bitwise_or(codes, high, out=codes, casting="unsafe")
    pairs = codes.view(np.uint16)  # the even value's code is in the lower byte
    np.bitwise_or(pairs, pairs >> 4, out=out, casting="unsafe")
    return scale.astype(np.uint8), float(np.vdot(error, unit))


def _scales(values: np.ndarray, rule: str, high: np.ndarray) -> np.ndarray:
    """int16 [n]: the scale byte of `rule`, for "best" the lower of its two. Into `high`: the first 16 bits of magnitudes."""
    if values.dtype == BFLOAT16:
        np.bitwise_and(values.view(np.uint16), 0x7FFF, out=high)
        top = high.max(-1).astype(np.uint32) << 16
    else:
        bits = values.view(np.uint32) & 0x7FFFFFFF
        top = bits.max(-1)
        np.right_shift(bits, 16, out=high, casting="unsafe")
    exponent = (top >> 23).astype(np.int16)
    if exponent.max(initial=0) == 255:
        raise InputError("expected finite values, found infinity or NaN")
    scale = exponent - 2
    if rule == "ceil":
        scale += (top & 0x7FFFFF) > 0x400000
    return np.clip(scale, 0, MAX_SCALE)


def _place(values: np.ndarray, scale: np.ndarray, high: np.ndarray, index: np.ndarray) -> None:
    """Into `index`: places in the tables of `_tables`, by `high` beside the block's scale."""
    small = scale < _NORMAL
    if small.any():  # their exponents would be below the smallest there is: as if all were larger
        lifted = (high[small].astype(np.uint32) << 16).view(np.float32) * np.float32(2.0**_LIFT)
        high[small] = lifted.view(np.uint32) >> 16
        scale = scale + _LIFT * small
    below = ((scale[:, None].astype(np.int32) + 3 - _OCTAVES << 7) - 1).astype(np.uint16)
    np.maximum(high, below, out=high)
    np.subtract(high, below, out=high)
    index[...] = high


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """By place: first for whatever is small, then for each bfloat16 of the octaves below 8 scales.

    Returns:
      codes: four tables, one after the other: at the scale and at the next larger one, then both of values a little larger.
      errors: int64: squared ones at the scale in the upper half, what the next larger scale adds to them in the lower; in
        units of 2**-18 of the scale's square.
    """
    place = np.arange(_OCTAVES * 128)
    octave, rest = place >> 7, place & 127
    units = np.concatenate([[0], (128 + rest << octave) >> _OCTAVES - 5])
    grid = [round(value * _UNIT) for value in E2M1[:8]]
    exact, next_larger = (_codes_of(units, False, times) for times in (1, 2))
    codes = [exact, next_larger, *(_codes_of(units, units > 0, times) for times in (1, 2))]
    at, above = ((units - np.take(grid, found) * times) ** 2 for found, times in ((exact, 1), (next_larger, 2)))
    return np.concatenate(codes).astype(np.uint8), (at << 32) + above - at


def _codes_of(units, more, times: int):
    """E2M1 magnitudes of `units` of 1 / 512 scale, at `times` the scale; `more`: they are somewhat larger than that."""
    return sum(
        (units > middle * _UNIT * times) | ((units == middle * _UNIT * times) & (more | up))
        for middle, up in zip(_MIDDLES, _TO_EVEN_IS_UP, strict=True)
    )


# --- the same in JAX ---------------------------------------------------------------------------------------------


def quantize_jax(
    values: Float[Array, "*rows in"], rule: str = "best"
) -> tuple[UInt8[Array, "*rows groups 16"], UInt8[Array, "*rows groups"]]:
    """`quantize` under jit, bit for bit: in integers, because backends flush what is subnormal. Not finite: anything."""
    groups = values.reshape(*values.shape[:-1], -1, MXFP4_BLOCK)
    if values.dtype == jnp.bfloat16:  # no cast, which may flush
        bits = jax.lax.bitcast_convert_type(groups, jnp.int16).astype(jnp.int32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(groups, jnp.int32)
    magnitudes = bits & 0x7FFFFFFF
    top = magnitudes.max(-1)
    scale = (top >> 23) - 2
    if rule == "ceil":
        scale += ((top & 0x7FFFFF) > 0x400000).astype(jnp.int32)
    scale = jnp.clip(scale, 0, MAX_SCALE)
    if rule == "best":
        units, _ = _units(magnitudes & ~0xFFFF, scale)
        errors = [jnp.square(units - _magnitude(_codes_of_jax(units, None, times)) * times).sum(-1) for times in (1, 2)]
        scale += ((errors[1] < errors[0]) & (scale < MAX_SCALE)).astype(jnp.int32)
    units, more = _units(magnitudes, scale)
    codes = _codes_of_jax(units, more, 1) | ((bits >> 28) & 8)
    codes = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    return codes[..., 0] | codes[..., 1] << 4, scale.astype(jnp.uint8)


def _units(magnitudes: Int[Array, "*s 32"], scale: Int[Array, "*s"]) -> tuple[Int[Array, "*s 32"], Array]:
    """Magnitudes in 1 / 512 of the scale, cut off; and whether anything was cut."""
    exponent = magnitudes >> 23
    significand = magnitudes & 0x7FFFFF | jnp.where(exponent > 0, 1 << 23, 0)
    shift = jnp.clip(scale[..., None] + 14 - jnp.maximum(exponent, 1), 0, 31)
    units = significand >> shift
    return units, significand != units << shift


def _codes_of_jax(units: Array, more: Array | None, times: int) -> Array:
    found = jnp.zeros_like(units)
    for middle, up in zip(_MIDDLES, _TO_EVEN_IS_UP, strict=True):
        threshold = round(middle * _UNIT * times)
        over = units > threshold
        if up:
            over |= units == threshold
        elif more is not None:
            over |= (units == threshold) & more
        found += over.astype(jnp.int32)
    return found


def _magnitude(codes: Array) -> Array:
    """In units."""
    return jnp.asarray([round(value * _UNIT) for value in E2M1[:8]], jnp.int32)[codes]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(values: Float[Array, "*rows in"], rule: str) -> Float[Array, "*rows in"]:
    """What `values` become when they are exported to MXFP4, in their own dtype; the gradient goes through as if they stayed.

    The estimator of Bengio et al. (arXiv:1308.3432), as quantization-aware training uses it.
    """
    return dequantize(*quantize_jax(values, rule), values.dtype)


def _forward(values, rule):
    return straight_through(values, rule), None


def _backward(rule, _, gradient):
    return (gradient,)


straight_through.defvjp(_forward, _backward)
