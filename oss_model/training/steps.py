"""A step of training, compiled as one: gradients of a batch or of parts of one, and what the optimizer makes of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from oss_model.errors import InputError
from oss_model.loss import cross_entropy
from oss_model.taps import keeping
from oss_model.training.router import counts, load_balancing_loss


class Batch(NamedTuple):
    """What `cross_entropy` takes: arrays of NumPy or JAX.

    Attributes:
      tokens: int32 [rows, length].
      counted: bool [rows, length], whose loss counts; all if None.
      segment_ids: int32 [rows, length], of packed documents, from 1 on in each row; 0 is padding. None where a row is one.
    """

    tokens: Any
    counted: Any = None
    segment_ids: Any = None


class Stepped(NamedTuple):
    """
    Attributes:
      loss: mean cross entropy of the tokens that count.
      tokens: how many these are.
      norm: of the gradient, before it is clipped.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    norm: Float[Array, ""]


SCHEDULES = ("constant", "linear", "cosine")


def schedule(rate: float, steps: int, warmup: int = 10, kind: str = "constant") -> optax.Schedule:
    """Up to `rate` in `warmup` steps, from a tenth of it; then constant, or down to nothing at `steps`."""
    if kind not in SCHEDULES:
        raise InputError(f"schedule: expected one of {', '.join(SCHEDULES)}, found {kind!r}")
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
    }[kind]
    return optax.join_schedules([optax.linear_schedule(rate / 10, rate, warmup), after], [warmup]) if warmup else after


def optimizer(rate: float | optax.Schedule, clip: float = 1.0, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """AdamW (Adam without decay) on gradients cut to a global norm of `clip`.

    Norms, biases and sinks do not decay: by name, since those of layers in one loop are stacked (`oss_model.scanned`).
    """
    adam = optax.adam(rate) if not weight_decay else optax.adamw(rate, weight_decay=weight_decay, mask=_matrices)
    return optax.chain(optax.clip_by_global_norm(clip), adam)


def _matrices(params: Any) -> Any:
    def matrix(path: tuple, _value: Array) -> bool:
        return not any(getattr(key, "key", None) in ("bias", "scale", "sinks") for key in path)

    return jax.tree_util.tree_map_with_path(matrix, params)


def train_step(
    graphdef: nnx.GraphDef, descent: optax.GradientTransformation, accumulate: int = 1, balance: float = 0.0
) -> Callable[[Any, Any, Any, Batch], tuple[Any, Any, Stepped]]:
    """To be compiled: (params, moments, frozen, batch) -> (params, moments, `Stepped`).

    Args:
      graphdef: of a model that `nnx.split(model, trained, ...)` took apart into it, params and frozen.
      accumulate: into how many parts a batch is cut, whose gradients are summed one after the other; the arrays of the batch
        then are [parts, rows, length]. The loss is the sum over all that counts over its number, so parts of unequal counts
        give what the whole batch gives.
      balance: times `load_balancing_loss` is added to what is minimized. The model then keeps what `cfg.remat` would compute
        again.
    """

    def total(params: Any, frozen: Any, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
        model = nnx.merge(graphdef, params, frozen)
        if not balance:
            loss, count = cross_entropy(model, *batch)
            return loss, (loss, count)
        with keeping("router_logits") as seen:
            loss, count = cross_entropy(model, *batch)
        evened = load_balancing_loss(seen, model.cfg.num_experts_per_tok, _real(batch))
        return loss + balance * count * evened, (loss, count)

    def step(params: Any, moments: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, Stepped]:
        gradient = jax.grad(total, has_aux=True)
        if accumulate == 1:
            grads, (loss, count) = gradient(params, frozen, batch)
        else:
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), params)

            def add(sums: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, gradient(params, frozen, part)), None

            start = zeros, (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
            (grads, (loss, count)), _ = jax.lax.scan(add, start, batch)
        count = jnp.maximum(count, 1.0)  # of a batch in which nothing counts
        grads = jax.tree.map(lambda grad, param: (grad / count).astype(param.dtype), grads, params)
        updates, moments = descent.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, Stepped(loss / count, count, optax.tree.norm(grads))

    return step


def eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, Any, Batch], tuple[Array, Array, Array]]:
    """To be compiled: (params, frozen, batch) -> (loss summed, how many tokens counted, `counts` of the router)."""

    def step(params: Any, frozen: Any, batch: Batch) -> tuple[Array, Array, Array]:
        model = nnx.merge(graphdef, params, frozen)
        with keeping("expert_choice") as seen:
            loss, count = cross_entropy(model, *batch)
        return loss, count, counts(seen, model.cfg.num_experts, _real(batch))

    return step


def _real(batch: Batch) -> Array | None:
    """Which of the tokens that go through the model are no padding; all if None."""
    return None if batch.segment_ids is None else batch.segment_ids[:, :-1].reshape(-1) != 0
