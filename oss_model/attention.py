"""Attention with sinks: which keys a query sees, and what it takes from them. Letters as in `oss_model.layers`.

Two forms of one meaning. Dense: all logits at once, for few tokens. In blocks: memory linear in the length, the softmax
summed up block by block of keys (Rabe and Staats, arXiv:2112.05682; Dao et al., arXiv:2205.14135) with the sink as its
start, and computed again in the backward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oss_model.layers import contract

DENSE = 512 * 512  # logits a head and row, up to which the dense form is faster and takes little
BLOCK, NARROW = 512, 128  # queries, and keys, that are looked at at a time; in a window at most, where it is no longer
PADDING = -1


class Tokens(NamedTuple):
    """Where tokens are: what decides who sees whom.

    Attributes:
      positions: a negative one is padding, which nobody sees.
      segments: of packed documents; a token sees its own alone. None: all are one.
      ordered: whether neighbours in a row are neighbours in the text, so that what lies `window` places back or more is out of
        the window (`in_order`). Else every block of keys is looked at.
    """

    positions: Int[Array, "b l"]
    segments: Int[Array, "b l"] | None = None
    ordered: bool | Bool[Array, ""] = False


def in_order(positions: Int[Array, "b l"], segments: Int[Array, "b l"] | None = None) -> Bool[Array, ""]:
    """Whether positions of a document increase from place to place, and its padding is at the ends."""
    before, after = positions[:, :-1], positions[:, 1:]
    same = jnp.ones_like(before, bool) if segments is None else segments[:, :-1] == segments[:, 1:]
    real = positions >= 0
    begins = (real[:, 1:] & ~real[:, :-1]) if segments is None else jnp.zeros_like(same)
    once = (begins.sum(axis=1) + real[:, 0].astype(jnp.int32) <= 1).all()
    return once & ((before < after) | ~same | ~real[:, 1:]).all()


def starts(segments: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Of each place the first of its document."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(first, places, 0), axis=1)


def visibility(queries: Int[Array, "b l"], keys: Int[Array, "b m"], window: int | None) -> Bool[Array, "b l m"]:
    """Which keys a query sees, by position: itself and what came before, at most `window` of them.

    A negative position is padding: nobody sees it.
    """
    ahead = queries[:, :, None] - keys[:, None, :]
    seen = (ahead >= 0) & (keys >= 0)[:, None, :]
    return seen if window is None else seen & (ahead < window)


def attend(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    sinks: Float[Array, " n"],
    queries: Tokens,
    keys: Tokens,
    window: int | None,
    block: int | None = None,
    before: Int[Array, ""] | None = None,
) -> Float[Array, "b l n d"]:
    """Grouped-query attention with sinks, in whichever form suits the sizes.

    Args:
      queries, keys: where they are.
      window: how many keys a query sees; None for all.
      block: 0 for the dense form, a number for blocks of so many; by size if None.
      before: how many keys come before the queries' own tokens. If None, these are the last ones, after those of a cache.
    """
    if block is None:
        block = 0 if q.shape[1] * k.shape[1] <= DENSE else BLOCK
    if block == 0:
        return sink_attention(q, k, v, sinks, visible(queries, keys, window))
    return in_blocks(q, k, v, sinks, queries, keys, window, block, before)


def visible(queries: Tokens, keys: Tokens, window: int | None) -> Bool[Array, "b l m"]:
    seen = visibility(queries.positions, keys.positions, window)
    if queries.segments is None or keys.segments is None:
        return seen
    return seen & (queries.segments[:, :, None] == keys.segments[:, None, :])


def sink_attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    sinks: Float[Array, " n"],
    visible: Bool[Array, "b l m"],
) -> Float[Array, "b l n d"]:
    """Grouped-query attention with one more logit a head, the sink, that takes probability and gives no value."""
    (batch, length, n, d), kv = q.shape, k.shape[2]
    logits = contract("blkgd,bmkd->bkglm", q.reshape(batch, length, kv, n // kv, d), k) * d**-0.5
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    sink = sinks.astype(jnp.float32).reshape(1, kv, n // kv, 1, 1)
    # A query that sees no key (padding) still has the sink to subtract, so nothing becomes NaN.
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), sink))
    weights = jnp.exp(logits - top)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
    return contract("bkglm,bmkd->blkgd", weights.astype(q.dtype), v).astype(q.dtype).reshape(q.shape)


# --- in blocks --------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How many blocks of `size` there are. Static."""

    size: int
    queries: int
    keys: int
    window: int | None

    def reach(self, i, order: "Order") -> tuple[Array, Array]:
        """The first block of keys that block i of the queries looks at, and the one after the last."""
        own = order.before + i * self.size
        first = jnp.zeros_like(own) if self.window is None else jnp.maximum(own - self.window + 1, 0) // self.size
        last = jnp.minimum((own + self.size - 1) // self.size + 1, self.keys)
        return jnp.where(order.holds, first, 0), jnp.where(order.holds, last, self.keys)

    def reached(self, j, order: "Order") -> tuple[Array, Array]:
        """The other way round: which queries look at block j of the keys."""
        ahead = j * self.size - order.before
        last = self.queries if self.window is None else (ahead + self.size + self.window - 2) // self.size + 1
        last = jnp.minimum(last, self.queries)
        return jnp.where(order.holds, jnp.maximum(ahead // self.size, 0), 0), jnp.where(order.holds, last, self.queries)


class Order(NamedTuple):
    """
    Attributes:
      holds: whether places tell who may see whom (`Tokens.ordered`).
      before: the place among the keys, as they are padded, of the first of the queries' own tokens.
    """

    holds: Bool[Array, ""]
    before: Int[Array, ""]


def in_blocks(q, k, v, sinks, queries: Tokens, keys: Tokens, window: int | None, block: int, before: Array | None = None):
    """`sink_attention`, block by block. Arguments as `attend`."""
    (batch, length, n, d), kv = q.shape, k.shape[2]
    size = block if window is None else max(window, min(block, NARROW))
    earlier = k.shape[1] - length if before is None else 0
    front = -earlier % size
    blocks = Blocks(size, -(-length // size), -(-(front + k.shape[1]) // size), window)

    def padded(a, left, count, value=0):
        right = count * size - left - a.shape[1]
        return jnp.pad(a, ((0, 0), (left, right), *((0, 0),) * (a.ndim - 2)), constant_values=value)

    marks = []
    for tokens, left, count in ((queries, 0, blocks.queries), (keys, front, blocks.keys)):
        segments = jnp.zeros_like(tokens.positions) if tokens.segments is None else tokens.segments
        marks.append((padded(tokens.positions, left, count, PADDING), padded(segments, left, count)))
    heads = padded(q.reshape(batch, length, kv, n // kv, d), 0, blocks.queries)
    ordered = jnp.asarray(queries.ordered)
    if earlier and window is not None:
        # The slots of a ring are in any order: all of it is one block, next to the first new token where that is no padding.
        empty, next_to = (keys.positions[:, :earlier] < 0).all(), (queries.positions[:, 0] >= 0).all()
        ordered &= (earlier + front == size) & (empty | next_to)
    order = Order(ordered, jnp.asarray(earlier + front if before is None else before, jnp.int32))
    k, v = (padded(a, front, blocks.keys) for a in (k, v))
    out: Array = _blockwise(heads, k, v, sinks.reshape(kv, n // kv), *marks, order, blocks)  # type: ignore[assignment]
    return out[:, :length].reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
@functools.partial(jax.jit, static_argnums=7)
def _blockwise(q, k, v, sinks, queries, keys, order: Order, blocks: Blocks):
    return _forward(q, k, v, sinks, queries, keys, order, blocks)[0]


def _at(a, i, size):
    return jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)


def _logits(q, k, queries, keys, i, j, blocks: Blocks):
    """float32 [b, kv, g, l, m] of one block of queries and one of keys; -inf where a key is not seen."""
    q, k = _at(q, i, blocks.size), _at(k, j, blocks.size)
    at, other = ((_at(positions, n, blocks.size), _at(segments, n, blocks.size)) for (positions, segments), n in
                 ((queries, i), (keys, j)))  # fmt: skip
    seen = visible(Tokens(*at), Tokens(*other), blocks.window)
    return jnp.where(seen[:, None, None], contract("blkgd,bmkd->bkglm", q, k) * q.shape[-1] ** -0.5, -jnp.inf)


@functools.partial(jax.jit, static_argnums=7)
def _forward(q, k, v, sinks, queries, keys, order: Order, blocks: Blocks):
    """The sums, and of each query the logarithm of what it divides by, float32 [b, kv, g, l]."""
    batch, _, kv, groups, d = q.shape
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None], (batch, kv, groups, blocks.size))

    def one(i):
        def step(j, carry):
            top, total, out = carry
            logits = _logits(q, k, queries, keys, i, j, blocks)
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights, kept = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            taken = contract("bkglm,bmkd->bkgld", weights.astype(v.dtype), _at(v, j, blocks.size))
            return higher, total * kept + weights.sum(axis=-1), out * kept[..., None] + taken

        start = sink, jnp.ones_like(sink), jnp.zeros((*sink.shape, d), jnp.float32)
        top, total, out = jax.lax.fori_loop(*blocks.reach(i, order), step, start)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, divisor = jax.lax.map(one, jnp.arange(blocks.queries))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)
    return out, divisor.transpose(1, 2, 3, 0, 4).reshape(batch, kv, groups, -1)


def _blockwise_forward(q, k, v, sinks, queries, keys, order: Order, blocks: Blocks):
    out, divisor = _forward(q, k, v, sinks, queries, keys, order, blocks)
    return out, (q, k, v, sinks, queries, keys, order, out, divisor)


def _blockwise_backward(blocks: Blocks, kept, slope):
    q, k, v, sinks, queries, keys, order, out, divisor = kept
    *grads, of_sinks = _backward(q, k, v, sinks, queries, keys, order, out, divisor, slope, blocks)
    return (*grads, of_sinks, (None, None), (None, None), Order(None, None))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=10)
def _backward(q, k, v, sinks, queries, keys, order: Order, out, divisor, slope, blocks: Blocks):
    """Weights are computed again from the logits and the divisor, once for the queries and once for the keys."""
    size, scale = blocks.size, q.shape[-1] ** -0.5
    along = contract("blkgd,blkgd->bkgl", slope.astype(jnp.float32), out.astype(jnp.float32))

    def weights_and_slopes(i, j):
        """Of the block (i, j): weights, and the loss's slope along the logits."""
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size, axis=3)
        weights = jnp.exp(_logits(q, k, queries, keys, i, j, blocks) - rows(divisor)[..., None])
        of_weights = contract("blkgd,bmkd->bkglm", _at(slope, i, size), _at(v, j, size))
        return weights.astype(q.dtype), (weights * (of_weights - rows(along)[..., None])).astype(q.dtype)

    def of_queries(i):
        def step(j, total):
            return total + contract("bkglm,bmkd->blkgd", weights_and_slopes(i, j)[1], _at(k, j, size))

        start = jnp.zeros((q.shape[0], size, *q.shape[2:]), jnp.float32)
        return (jax.lax.fori_loop(*blocks.reach(i, order), step, start) * scale).astype(q.dtype)

    def of_keys(j):
        def step(i, total):
            weights, slopes = weights_and_slopes(i, j)
            of_k = contract("bkglm,blkgd->bmkd", slopes, _at(q, i, size))
            return total[0] + of_k, total[1] + contract("bkglm,blkgd->bmkd", weights, _at(slope, i, size))

        start = jnp.zeros((k.shape[0], size, *k.shape[2:]), jnp.float32)
        of_k, of_v = jax.lax.fori_loop(*blocks.reached(j, order), step, (start, start))
        return (of_k * scale).astype(k.dtype), of_v.astype(v.dtype)

    def whole(parts, like):
        return jnp.moveaxis(parts, 0, 1).reshape(like.shape)

    taken = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - divisor)  # what the sink takes, which gives nothing
    of_sinks = -(taken * along).sum(axis=(0, 3)).astype(sinks.dtype)
    of_k, of_v = jax.lax.map(of_keys, jnp.arange(blocks.keys))
    return whole(jax.lax.map(of_queries, jnp.arange(blocks.queries)), q), whole(of_k, k), whole(of_v, v), of_sinks


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
