"""Ways to compute the experts' sum, all of one meaning: which is best goes by the backend and the number of tokens.

Letters in einsum strings: t tokens (batch and length flattened), e experts, h hidden, i intermediate, s the two halves of the
gated unit (0 gate, 1 up). Parameters come as a dict an expert map (`oss_model.experts.ExpertLinear.stored`), the expert first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from oss_model.config import ModelConfig
from oss_model.errors import InputError
from oss_model.layers import contract, delta
from oss_model.mxfp4 import dequantize


def add_up(x, choice, weights, gate_up: dict[str, Array], down: dict[str, Array], cfg: ModelConfig):
    """float32 [t, h]: the sum of weight · expert(x) over those of the chosen experts that are in these arrays."""
    return PATHS[_path(x, gate_up, cfg)](x, choice, weights, gate_up, down, cfg)


def _path(x: Array, gate_up: dict[str, Array], cfg: ModelConfig) -> str:
    if cfg.expert_path != "auto":
        return cfg.expert_path
    if x.shape[0] * cfg.num_experts_per_tok <= gate_up["bias"].shape[0]:
        return "pairs"
    return "scan" if jax.default_backend() == "cpu" else "ragged"


def swiglu(gate: Float[Array, "*s"], up: Float[Array, "*s"], cfg: ModelConfig) -> Float[Array, "*s"]:
    """(up + 1) · gate · sigmoid(alpha · gate), both clamped: the gate only from above (gpt_oss/torch/model.py).

    In bfloat16 the sigmoid's argument and result are rounded where torch rounds them.
    """
    gate = jnp.minimum(gate, cfg.swiglu_limit)
    up = jnp.clip(up, -cfg.swiglu_limit, cfg.swiglu_limit)
    scaled = (gate.astype(jnp.float32) * cfg.swiglu_alpha).astype(gate.dtype)
    return (up + 1) * (gate * jax.nn.sigmoid(scaled.astype(jnp.float32)).astype(gate.dtype))


def _weight(stored: dict[str, Array], dtype) -> Array:
    """The matrix, or matrices, of one expert or several, in the dtype computed in."""
    if "blocks" in stored:
        return dequantize(stored["blocks"], stored["scales"], dtype)
    return stored["weight"].astype(dtype)


def _linear(x: Float[Array, "t in"], stored: dict[str, Array]) -> Float[Array, "t *out"]:
    """W·x + b of one expert, and its update where it has one."""

    def product(x, weight):
        return contract("ti,oi->to", x, weight.reshape(-1, weight.shape[-1])).reshape(-1, *weight.shape[:-1])

    out = product(x, _weight(stored, x.dtype)) + stored["bias"].astype(jnp.float32)[None]
    if "lora_a" in stored:
        out += delta(x, stored, product, product)
    return out.astype(x.dtype)


def _expert(x: Float[Array, "t h"], gate_up: dict[str, Array], down: dict[str, Array], cfg: ModelConfig) -> Float[Array, "t h"]:
    """One expert on every row of x: W2 · swiglu(W1 · x + b1) + b2."""
    both = _linear(x, gate_up)
    return _linear(swiglu(both[:, 0], both[:, 1], cfg), down)


def _loop(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each expert in turn on its own tokens alone: for values at hand, so it is taken only where it is asked for.

    One expert's values in memory at a time, and experts / k times less work than `_scan`. Experts are cut out by NumPy,
    on the same bytes: XLA on CPU slices bfloat16 by way of the whole array in float32.

    Raises:
      InputError: under jit or grad, with respect to anything, and where an array is on several devices.
    """
    arrays = (x, choice, weights, *gate_up.values(), *down.values())
    if any(isinstance(a, Tracer) or (isinstance(a, jax.Array) and len(a.sharding.device_set) > 1) for a in arrays):
        raise InputError(
            "expert_path: expected values on one device for 'loop', found some that are traced (jit, grad) or on several;"
            " use 'auto'"
        )
    chosen, weighed = np.asarray(choice), np.asarray(weights)
    gate_up, down = ({name: np.asarray(array) for name, array in stored.items()} for stored in (gate_up, down))
    total = jnp.zeros(x.shape, jnp.float32)
    for e in np.unique(chosen):
        token, slot = np.nonzero(chosen == e)
        room = -len(token) % min(64, x.shape[0])  # a few lengths to compile for; the rest has weight zero
        rows, weight = (jnp.asarray(np.pad(a, (0, room))) for a in (token, weighed[token, slot]))
        # Dequantized apart from the products: compiled together, XLA on CPU takes twice as long.
        w1, w2 = (_as_values({name: array[e] for name, array in stored.items()}, x.dtype) for stored in (gate_up, down))
        total = _add_expert(total, x, rows, weight, w1, w2, cfg)
    return total


@functools.partial(jax.jit, static_argnums=1)
def _as_values(stored: dict[str, Array], dtype) -> dict[str, Array]:
    """One expert with its matrix in the dtype computed in."""
    rest = {name: array for name, array in stored.items() if name not in ("blocks", "scales", "weight")}
    return rest | {"weight": _weight(stored, dtype)}


@functools.partial(jax.jit, static_argnames="cfg")
def _add_expert(total, x, rows, weight, w1, w2, cfg: ModelConfig):
    return total.at[rows].add((_expert(x[rows], w1, w2, cfg) * weight[:, None]).astype(jnp.float32))


# Jitted, these three: where the model is called without jit, JAX would compile their loops anew at every call.


@functools.partial(jax.jit, static_argnames="cfg")
def _scan(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Every expert in turn on every token, most with weight zero: one expert's values in memory at a time.

    experts / k times the work, and still faster on a CPU than a grouped product, which is masked there. Recomputed in
    the backward pass, so that dequantized weights are not kept for it.
    """
    count = down["bias"].shape[0]
    by_expert = jnp.zeros((count, x.shape[0]), weights.dtype)
    slot = jnp.where(_here(choice, count), choice, count)
    by_expert = by_expert.at[slot, jnp.arange(x.shape[0])[:, None]].add(weights, mode="drop")

    @jax.checkpoint
    def step(total, one):
        weight, w1, w2 = one
        # Rounded to x's dtype where the reference rounds (GptOssExperts.forward); the sum stays in float32.
        out = (_expert(x, w1, w2, cfg) * weight[:, None]).astype(jnp.float32)
        return total + out, None

    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), (by_expert, gate_up, down))[0]


@functools.partial(jax.jit, static_argnames="cfg")
def _pairs(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each (token, expert) pair in turn, reading only the experts that are used: for the few tokens of decoding."""
    k = choice.shape[1]

    def compute(token, expert, weight):
        w1, w2 = ({name: array[expert] for name, array in stored.items()} for stored in (gate_up, down))
        return (_expert(x[token][None], w1, w2, cfg)[0] * weight).astype(jnp.float32)

    def one(pair):
        token, expert, weight = pair
        elsewhere = functools.partial(jnp.zeros, x.shape[1:], jnp.float32)
        here = _here(expert, down["bias"].shape[0])
        return jax.lax.cond(here, compute, lambda *_: elsewhere(), token, expert, weight)

    tokens = jnp.repeat(jnp.arange(x.shape[0]), k)
    out = jax.lax.map(one, (tokens, choice.reshape(-1), weights.reshape(-1)))
    return out.reshape(x.shape[0], k, -1).sum(axis=1)


@functools.partial(jax.jit, static_argnames="cfg")
def _ragged(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Rows sorted by expert, one grouped matrix product a map: for accelerators, which have kernels for it."""
    k, count = choice.shape[1], down["bias"].shape[0]
    expert = jnp.where(_here(choice, count), choice, count).reshape(-1)  # those of other devices last
    order = jnp.argsort(expert, stable=True)
    expert_of = expert[order]
    sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)

    def product(rows, weight):
        """rows [t·k, in] by weight [experts, *out, in] -> [t·k, *out]"""
        flat = weight.reshape(count, -1, weight.shape[-1]).swapaxes(1, 2)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        out = jax.lax.ragged_dot(rows, flat, sizes, precision=precision, preferred_element_type=jnp.float32)
        return out.reshape(-1, *weight.shape[1:-1])

    mine = expert_of < count

    def linear(rows, stored):
        out = product(rows, _weight(stored, x.dtype)) + stored["bias"].astype(jnp.float32)[expert_of]
        if "lora_a" in stored:
            out += delta(rows, stored, product, product)
        # A kernel may leave anything in the rows that belong to no expert; here, before NaN can reach a gradient.
        return jnp.where(mine.reshape(-1, *(1,) * (out.ndim - 1)), out, 0).astype(x.dtype)

    both = linear(x[order // k], gate_up)
    out = linear(swiglu(both[:, 0], both[:, 1], cfg), down) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // k].add(out.astype(jnp.float32))


def _here(expert: Int[Array, "*s"], count: int) -> Bool[Array, "*s"]:
    """Whether an expert, counted from this device's first, is among its `count`."""
    return (expert >= 0) & (expert < count)


PATHS = {"loop": _loop, "scan": _scan, "pairs": _pairs, "ragged": _ragged}
