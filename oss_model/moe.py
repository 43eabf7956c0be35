"""Mixture of experts: which experts a token goes to, and their sum.

Letters in einsum strings: t tokens (batch and length flattened), e experts, h hidden, i intermediate,
s the two halves of the gated unit (0 gate, 1 up).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt8

from oss_model.config import MXFP4_BLOCK, ModelConfig
from oss_model.layers import contract, param_dtype, swiglu
from oss_model.mxfp4 import dequantize


class Mxfp4(nnx.Variable):
    """Packed MXFP4 bytes. Not an `nnx.Param`: uint8 has no gradient, and `nnx.grad` would try."""


class ExpertLinear(nnx.Module):
    """One linear map an expert: weight [experts, *out, in], bias [experts, *out], stored as values."""

    def __init__(self, out: tuple[int, ...], width: int, cfg: ModelConfig, *, rngs: nnx.Rngs):
        shape = (cfg.num_experts, *out, width)
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype(cfg)))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], param_dtype(cfg)))

    def stored(self) -> dict[str, Array]:
        """Arrays whose first axis is the expert."""
        return {"weight": self.weight[...], "bias": self.bias[...]}


class PackedExpertLinear(nnx.Module):
    """The same map, stored as MXFP4: blocks [experts, *out, in / 32, 16], scales [experts, *out, in / 32]."""

    def __init__(self, out: tuple[int, ...], width: int, cfg: ModelConfig):
        shape = (cfg.num_experts, *out, width // MXFP4_BLOCK)
        self.blocks: nnx.Variable[UInt8[Array, ...]] = Mxfp4(jnp.zeros((*shape, MXFP4_BLOCK // 2), jnp.uint8))
        self.scales: nnx.Variable[UInt8[Array, ...]] = Mxfp4(jnp.full(shape, 127, jnp.uint8))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], param_dtype(cfg)))

    def stored(self) -> dict[str, Array]:
        return {"blocks": self.blocks[...], "scales": self.scales[...], "bias": self.bias[...]}


def expert_linear(out: tuple[int, ...], width: int, cfg: ModelConfig, *, rngs: nnx.Rngs) -> ExpertLinear | PackedExpertLinear:
    if cfg.param_dtype == "mxfp4":
        return PackedExpertLinear(out, width, cfg)
    return ExpertLinear(out, width, cfg, rngs=rngs)


def choose(logits: Float[Array, "t e"], k: int) -> Int[Array, "t k"]:
    """The k experts with the highest logits, highest first; of equals, the lower number."""
    return jax.lax.top_k(logits, k)[1]


def weigh(logits: Float[Array, "t e"], choice: Int[Array, "t k"]) -> Float[Array, "t k"]:
    """Softmax over the chosen experts only."""
    chosen = jnp.take_along_axis(logits, choice, axis=-1)
    return jax.nn.softmax(chosen.astype(jnp.float32), axis=-1).astype(logits.dtype)


def experts(
    x: Float[Array, "t h"],
    choice: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    gate_up: ExpertLinear | PackedExpertLinear,
    down: ExpertLinear | PackedExpertLinear,
    cfg: ModelConfig,
) -> Float[Array, "t h"]:
    """Sum of weight · expert(x) over the chosen experts. One meaning; the path is what the backend is good at."""
    return PATHS[_path(x, cfg)](x, choice, weights, gate_up.stored(), down.stored(), cfg)


def _path(x: Array, cfg: ModelConfig) -> str:
    if cfg.expert_path != "auto":
        return cfg.expert_path
    if jax.default_backend() == "cpu" and not isinstance(x, Tracer):
        return "loop"
    if x.shape[0] * cfg.num_experts_per_tok <= cfg.num_experts:
        return "pairs"
    return "scan" if jax.default_backend() == "cpu" else "ragged"


def _weight(stored: dict[str, Array], dtype) -> Array:
    """The matrix, or matrices, of one expert or several, in the dtype computed in."""
    if "blocks" in stored:
        return dequantize(stored["blocks"], stored["scales"], dtype)
    return stored["weight"].astype(dtype)


def _expert(x: Float[Array, "t h"], gate_up: dict[str, Array], down: dict[str, Array], cfg: ModelConfig) -> Float[Array, "t h"]:
    """One expert on every row of x: W2 · swiglu(W1 · x + b1) + b2."""
    both = contract("th,sih->sti", x, _weight(gate_up, x.dtype)) + gate_up["bias"].astype(jnp.float32)[:, None]
    gate, up = both.astype(x.dtype)
    out = contract("ti,hi->th", swiglu(gate, up, cfg), _weight(down, x.dtype)) + down["bias"].astype(jnp.float32)[None]
    return out.astype(x.dtype)


def _loop(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each expert in turn on its own tokens alone; only where values are at hand, so not under jit or grad.

    One expert's values in memory at a time, and experts / k times less work than `_scan`. Experts are cut out by NumPy,
    on the same bytes: XLA on CPU slices bfloat16 by way of the whole array in float32.
    """
    chosen, weighed = np.asarray(choice), np.asarray(weights)
    gate_up, down = ({name: np.asarray(array) for name, array in stored.items()} for stored in (gate_up, down))
    total = jnp.zeros(x.shape, jnp.float32)
    for e in np.unique(chosen):
        token, slot = np.nonzero(chosen == e)
        room = -len(token) % min(64, x.shape[0])  # a few lengths to compile for; the rest has weight zero
        rows, weight = (jnp.asarray(np.pad(a, (0, room))) for a in (token, weighed[token, slot]))
        w1, w2 = ({name: jnp.asarray(array[e]) for name, array in stored.items()} for stored in (gate_up, down))
        total = _add_expert(total, x, rows, weight, w1, w2, cfg)
    return total.astype(x.dtype)


@functools.partial(jax.jit, static_argnames="cfg")
def _add_expert(total, x, rows, weight, w1, w2, cfg: ModelConfig):
    return total.at[rows].add((_expert(x[rows], w1, w2, cfg) * weight[:, None]).astype(jnp.float32))


def _scan(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Every expert in turn on every token, most with weight zero: one expert's values in memory at a time.

    experts / k times the work, and still faster on a CPU than a grouped product, which is masked there. Recomputed in
    the backward pass, so that dequantized weights are not kept for it.
    """
    by_expert = jnp.zeros((cfg.num_experts, x.shape[0]), weights.dtype)
    by_expert = by_expert.at[choice, jnp.arange(x.shape[0])[:, None]].add(weights)

    @jax.checkpoint
    def step(total, one):
        weight, w1, w2 = one
        # Rounded to x's dtype where the reference rounds (GptOssExperts.forward); the sum stays in float32.
        out = (_expert(x, w1, w2, cfg) * weight[:, None]).astype(jnp.float32)
        return total + out, None

    total, _ = jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), (by_expert, gate_up, down))
    return total.astype(x.dtype)


def _pairs(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Each (token, expert) pair in turn, reading only the experts that are used: for the few tokens of decoding."""
    k = choice.shape[1]

    def one(pair):
        token, expert, weight = pair
        w1, w2 = ({name: array[expert] for name, array in stored.items()} for stored in (gate_up, down))
        return (_expert(x[token][None], w1, w2, cfg)[0] * weight).astype(jnp.float32)

    tokens = jnp.repeat(jnp.arange(x.shape[0]), k)
    out = jax.lax.map(one, (tokens, choice.reshape(-1), weights.reshape(-1)))
    return out.reshape(x.shape[0], k, -1).sum(axis=1).astype(x.dtype)


def _ragged(x, choice, weights, gate_up, down, cfg: ModelConfig):
    """Rows sorted by expert, one grouped matrix product a map: for accelerators, which have kernels for it."""
    k = choice.shape[1]
    order = jnp.argsort(choice.reshape(-1), stable=True)
    expert_of = choice.reshape(-1)[order]
    sizes = jnp.bincount(expert_of, length=cfg.num_experts).astype(jnp.int32)

    def product(rows, stored):
        """rows [t·k, in] by weight [experts, *out, in] -> [t·k, *out]"""
        weight, bias = _weight(stored, x.dtype), stored["bias"].astype(jnp.float32)
        flat = weight.reshape(weight.shape[0], -1, weight.shape[-1])
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        out = jax.lax.ragged_dot(rows, flat.swapaxes(1, 2), sizes, precision=precision, preferred_element_type=jnp.float32)
        return (out.reshape(-1, *bias.shape[1:]) + bias[expert_of]).astype(x.dtype)

    both = product(x[order // k], gate_up)
    out = product(swiglu(both[:, 0], both[:, 1], cfg), down) * weights.reshape(-1)[order][:, None]
    total = jnp.zeros(x.shape, jnp.float32).at[order // k].add(out.astype(jnp.float32))
    return total.astype(x.dtype)


PATHS = {"loop": _loop, "scan": _scan, "pairs": _pairs, "ragged": _ragged}
