"""Where tokens go: the load of experts, and a loss that evens it out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def load_balancing_loss(
    router_logits: Sequence[Float[Array, "t e"]], k: int, real: Bool[Array, "t"] | None = None
) -> Float[Array, ""]:
    """1 or more: experts times the sum over them of the share of choices and the mean probability, over all layers together.

    As `load_balancing_loss_func` of transformers' modeling_gpt_oss.py computes it (Switch Transformers, arXiv:2101.03961,
    equations 4 to 6, summed over k choices): k where the load is even.

    Args:
      router_logits: of each layer, [tokens, experts].
      k: experts a token goes to.
      real: the tokens that are no padding; all if None.
    """
    logits = jnp.stack(list(router_logits)).astype(jnp.float32)
    probability = jax.nn.softmax(logits, axis=-1)
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, k)[1], logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    weight = jnp.ones(logits.shape[1], jnp.float32) if real is None else real.astype(jnp.float32)
    tokens = jnp.maximum(weight.sum() * len(logits), 1.0)

    def mean(values: Float[Array, "n t e"]) -> Float[Array, "e"]:
        return (values * weight[None, :, None]).sum(axis=(0, 1)) / tokens

    return (mean(chosen) * mean(probability)).sum() * logits.shape[-1]


def counts(choices: Sequence[Int[Array, "t k"]], experts: int, real: Bool[Array, "t"] | None = None) -> Int[Array, "n e"]:
    """How many tokens each expert of each layer was chosen for."""
    weight = jnp.ones(choices[0].shape[0], jnp.int32) if real is None else real.astype(jnp.int32)
    return jnp.stack([jnp.zeros(experts, jnp.int32).at[choice].add(weight[:, None]) for choice in choices])


def evenness(load: np.ndarray) -> np.ndarray:
    """float64 [layers] of `counts`: the entropy of the load over that of an even one. 1 is even, 0 is one expert for all."""
    share = load / np.maximum(load.sum(axis=-1, keepdims=True), 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return entropy / np.log(max(load.shape[-1], 2))


def dead(load: np.ndarray) -> np.ndarray:
    """int64 [layers] of `counts`: experts that no token went to."""
    return (load == 0).sum(axis=-1)
