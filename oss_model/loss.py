"""The loss of training: cross entropy of the next token, without all logits in memory at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oss_model import sharding
from oss_model.modeling import Transformer

CHUNK = 256  # places of each row whose logits are there at a time


def cross_entropy(
    model: Transformer,
    tokens: Int[Array, "b l"],
    mask: Bool[Array, "b l"] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """-log p of each token after those before it, summed, and how many were counted.

    Divide one by the other for the mean; over several batches, their sums by one another, and not the mean of means. Logits are
    computed and differentiated `chunk` places at a time, in float32 from what `Transformer` gives: [batch, length, vocab] is
    never there.

    Args:
      tokens: int32 [batch, length].
      mask: the tokens that count, such as those of answers; all if None. The first of a row never does.
      segment_ids: of packed documents (`Transformer.__call__`): a token of another one than the token before it, or padding,
        does not count.
      chunk: places of each row.
    """
    labels, counted = tokens[:, 1:], jnp.ones_like(tokens[:, 1:], bool) if mask is None else mask[:, 1:]
    if segment_ids is not None:
        counted &= (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    x, _ = model.stream(tokens[:, :-1], segment_ids=None if segment_ids is None else segment_ids[:, :-1])
    length, vocab = labels.shape[1], model.cfg.vocab_size
    # On a mesh that can cut the vocabulary in place of rows: tokens are gathered, a few MB, rather than all of `lm_head`, once
    # a chunk and again for its gradient, 1.2 GB each time.
    turned, joined = sharding.turned_to_vocabulary(labels.shape[0], length, vocab)
    slices = sharding.slices()
    chunk = min(-(-chunk // slices) if "context" in turned else chunk, length // slices)

    # One row after the other, as they are gathered; place by place where the length goes on being cut, so that these stay put.
    inner = 2 if slices > 1 and "context" not in turned else 1

    def of_all(a):
        """[b, l, ...] -> [b / joined, l · joined, ...]: rows of devices that now have a part of the vocabulary, in one."""
        a = jnp.moveaxis(a.reshape(joined, -1, *a.shape[1:]), 0, inner)
        return a.reshape(a.shape[0], -1, *a.shape[3:])

    @jax.checkpoint
    def add(total, part):
        x, labels, counted = map(of_all, part)
        with sharding.whole("bl", turned):
            logits = model.unembed(x).astype(jnp.float32)
        # Not a gather, which would have the logits whole on every device.
        right = jnp.where(jnp.arange(vocab)[None, None] == labels[..., None], logits, 0).sum(axis=-1)
        return total + jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - right, 0).sum(), None

    parts = tuple(sharding.cut_rows(a, chunk) for a in (x, labels, counted))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)
    return total, counted.sum(dtype=jnp.float32)
