"""Attention where the mesh's `context` axis cuts the length: each device has a slice of every row.

Keys and values are few in grouped queries, so full layers gather all of them, and sliding layers take those that their window
reaches from the slice before.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from oss_model import attention, sharding
from oss_model.attention import PADDING, Tokens
from oss_model.errors import raise_all
from oss_model.gathering import gather

AXIS = "context"


def attend(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l k d"],
    v: Float[Array, "b l k d"],
    sinks: Float[Array, " n"],
    at: Tokens,
    window: int | None,
    block: int | None = None,
) -> Float[Array, "b l n d"]:
    """`attention.attend` of tokens to one another, on the mesh that is set.

    Raises:
      InputError: if `context` does not cut the length into slices of two equal halves, or into slices shorter than the window.
    """
    shape = sharding.mesh_shape()
    count, length = shape.get(AXIS, 1), q.shape[1]
    if count == 1:
        return attention.attend(q, k, v, sinks, at, at, window, block)
    raise_all(length_faults(length, window, count))
    of_q, of_k = (sharding.activation_spec(letters, a.shape, shape) for letters, a in (("blnd", q), ("blkd", k)))
    if of_q[2] != of_k[2]:  # the heads of a group stay with their keys
        of_q = PartitionSpec(*of_q[:2], None, None)
        of_k = PartitionSpec(*of_k[:2], None, None)
    places = PartitionSpec(*of_q[:2])
    of_tokens = Tokens(places, None if at.segments is None else places, PartitionSpec())  # type: ignore[arg-type]
    local = functools.partial(_sliding if window is not None else _full, window=window, block=block, count=count)
    inputs = (of_q, of_k, of_k, PartitionSpec(of_q[2]), of_tokens)
    on_devices = jax.shard_map(local, in_specs=inputs, out_specs=of_q, check_vma=False)
    return on_devices(q, k, v, sinks, at._replace(ordered=jnp.asarray(at.ordered)))


def length_faults(length: int, window: int | None, count: int) -> list[str]:
    """A line for each reason why rows of this length cannot be cut by a `context` axis of this size."""
    found = []
    if length % (2 * count):
        found.append(f"context: expected rows whose length is a multiple of {2 * count}, twice the axis, found {length}")
    if window is not None and length // count < window:
        found.append(
            f"context: expected slices of at least the window of {window} tokens, found {length} tokens cut into {count}"
        )
    return found


def _sliding(q, k, v, sinks, at: Tokens, window, block, count):
    """The last keys of the slice before, in front of this one's own; the first device has padding there."""
    following = [(n, n + 1) for n in range(count - 1)]

    def joined(a, none=0):
        moved = jax.lax.ppermute(a[:, -window:], AXIS, following)
        first = jax.lax.axis_index(AXIS) == 0
        return jnp.concatenate([jnp.where(first, jnp.asarray(none, a.dtype), moved), a], axis=1)

    segments = None if at.segments is None else joined(at.segments)
    keys = Tokens(joined(at.positions, PADDING), segments, at.ordered)
    return attention.attend(q, joined(k), joined(v), sinks, at, keys, window, block)


def _full(q, k, v, sinks, at: Tokens, window, block, count):
    """All keys, gathered. Of the queries a device takes one piece from the front and one from the back.

    What comes early in a row sees few keys, what comes late sees many: piece n of the 2 · count and the one as far from the
    end see as many together, whatever n is (as in arXiv:2310.03294, §3.1, and the Llama 3 report, arXiv:2407.21783, §3.3.2).
    """
    keys = Tokens(_gathered(at.positions), None if at.segments is None else _gathered(at.segments), at.ordered)
    k, v, half, index = _gathered(k), _gathered(v), q.shape[1] // 2, jax.lax.axis_index(AXIS)
    homes = [(n // 2, min(n, 2 * count - 1 - n)) for n in range(2 * count)]
    even = index % 2 == 0  # which of the two that came is the piece from the front

    def traded(a):
        """[b, l, ...] -> [2, b, l / 2, ...]"""
        first, second = (
            jax.lax.ppermute(jax.lax.slice_in_dim(a, n * half, (n + 1) * half, axis=1), AXIS, homes[n::2]) for n in (0, 1)
        )
        return jnp.stack([jnp.where(even, first, second), jnp.where(even, second, first)])

    def returned(front, back):
        first, second = jnp.where(even, front, back), jnp.where(even, back, front)
        ways = ([(home, n) for n, home in homes[n::2]] for n in (0, 1))
        return jnp.concatenate([jax.lax.ppermute(a, AXIS, way) for a, way in zip((first, second), ways, strict=True)], axis=1)

    pieces, positions = traded(q), traded(at.positions)
    segments = (None, None) if at.segments is None else traded(at.segments)
    starts = index * half, (2 * count - 1 - index) * half
    out = (
        attention.attend(pieces[n], k, v, sinks, Tokens(positions[n], segments[n], at.ordered), keys, window, block, starts[n])
        for n in (0, 1)
    )
    return returned(*out)


def _gathered(a: Array) -> Array:
    return gather(a, (AXIS,), axis=1)
