"""Attention with sinks: which keys a query sees, and what it takes from them. Letters as in `oss_model.layers`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oss_model.layers import contract


def visibility(queries: Int[Array, "b l"], keys: Int[Array, "b m"], window: int | None) -> Bool[Array, "b l m"]:
    """Which keys a query sees, by position: itself and what came before, at most `window` of them.

    A negative position is padding: nobody sees it.
    """
    ahead = queries[:, :, None] - keys[:, None, :]
    seen = (ahead >= 0) & (keys >= 0)[:, None, :]
    return seen if window is None else seen & (ahead < window)


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
