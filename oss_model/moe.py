"""Mixture of experts: which experts a token goes to, and their sum.

Letters in einsum strings: t tokens (batch and length flattened), e experts, h hidden, i intermediate,
s the two halves of the gated unit (0 gate, 1 up).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from oss_model import sharding
from oss_model.config import MXFP4_BLOCK, ModelConfig
from oss_model.errors import InputError
from oss_model.layers import contract, param_dtype, swiglu
from oss_model.mxfp4 import dequantize


class Mxfp4(nnx.Variable):
    """Packed MXFP4 bytes. Not an `nnx.Param`: uint8 has no gradient, and `nnx.grad` would try."""


class ExpertLinear(nnx.Module):
    """One linear map an expert.

    As values: weight [experts, *out, in]. With `param_dtype="mxfp4"`: blocks [experts, *out, in / 32, 16] and scales
    [experts, *out, in / 32]. Always: bias [experts, *out]. `oss_model.lora` adds lora_a [experts, rank, in], lora_b
    [experts, *out, rank] and lora_scale.

    Args:
      out: names of the output axes, in `ModelConfig.axes`.
      width: name of the input axis.
    """

    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam
    lora_scale: float

    def __init__(self, out: tuple[str, ...], width: str, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.out, self.width = out, width
        shape = tuple(cfg.axes[axis] for axis in ("experts", *out, width))
        if cfg.param_dtype == "mxfp4":
            groups = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
            self.blocks: nnx.Variable[UInt8[Array, ...]] = Mxfp4(jnp.zeros((*groups, MXFP4_BLOCK // 2), jnp.uint8))
            self.scales: nnx.Variable[UInt8[Array, ...]] = Mxfp4(jnp.full(groups, 127, jnp.uint8))
        else:
            self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype(cfg)))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], param_dtype(cfg)))

    def stored(self) -> dict[str, Array]:
        """Those of the arrays above that there are; the first axis of each is the expert. lora_b is scaled."""
        arrays = {name: variable[...] for name, variable in vars(self).items() if isinstance(variable, nnx.Variable)}
        return arrays | ({"lora_b": arrays["lora_b"] * self.lora_scale} if "lora_b" in arrays else {})

    def specs(self, cfg: ModelConfig, mesh_shape: Mapping[str, int]) -> dict[str, PartitionSpec]:
        """How each of the arrays above is cut on a mesh of this shape."""
        rows = ("experts", *self.out)
        axes = {
            "weight": (*rows, self.width),
            "blocks": (*rows, f"{self.width}_groups", "bytes"),
            "scales": (*rows, f"{self.width}_groups"),
            "bias": rows,
            "lora_a": ("experts", "rank", self.width),
            "lora_b": (*rows, "rank"),
        }
        return {name: sharding.partition_spec(names, cfg, mesh_shape) for name, names in axes.items()}


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
    gate_up: ExpertLinear,
    down: ExpertLinear,
    cfg: ModelConfig,
) -> Float[Array, "t h"]:
    """Sum of weight · expert(x) over the chosen experts. One meaning; the path is what the backend is good at."""
    mesh_shape = sharding.mesh_shape()
    if mesh_shape:
        return _on_mesh(x, choice, weights, gate_up, down, cfg, mesh_shape)
    stored = gate_up.stored(), down.stored()
    return PATHS[_path(x, stored[0], cfg)](x, choice, weights, *stored, cfg).astype(x.dtype)


def _path(x: Array, gate_up: dict[str, Array], cfg: ModelConfig) -> str:
    if cfg.expert_path != "auto":
        return cfg.expert_path
    if x.shape[0] * cfg.num_experts_per_tok <= gate_up["bias"].shape[0]:
        return "pairs"
    return "scan" if jax.default_backend() == "cpu" else "ragged"


def _on_mesh(x, choice, weights, gate_up: ExpertLinear, down: ExpertLinear, cfg: ModelConfig, mesh_shape: dict[str, int]):
    """Each device computes its own experts, or its slice of their inner axis, for every token that is routed to them.

    Tokens are gathered over the mesh axes that cut experts, and their sums scattered back. Only where the experts are
    cut by `fsdp` alone is it the weights that are gathered, a layer at a time, and tokens stay.
    """
    tokens = sharding.activation_spec("bh", x.shape, mesh_shape)
    stored = gate_up.stored(), down.stored()
    specs = tuple({name: map_.specs(cfg, mesh_shape)[name] for name in map_.stored()} for map_ in (gate_up, down))
    of_experts, of_inner = (sharding.mesh_axes(specs[0]["bias"], axis) for axis in (0, -1))
    gathered = () if "expert" in of_experts else tuple(a for a in (*of_experts, *of_inner) if a == "fsdp")
    of_experts, of_inner = (tuple(a for a in axes if a not in gathered) for axes in (of_experts, of_inner))
    travel = tuple(a for a in sharding.mesh_axes(tokens, 0) if a in of_experts + of_inner)
    stay = tuple(a for a in of_experts + of_inner if a not in travel)

    def whole(array: Array, spec: PartitionSpec) -> Array:
        for axis in range(len(spec)):
            if set(gathered) & set(sharding.mesh_axes(spec, axis)):
                array = jax.lax.all_gather(array, gathered, axis=axis, tiled=True)
        return array

    def local(x, choice, weights, *stored):
        gate_up, down = jax.tree.map(whole, stored, specs)
        if travel:
            x, choice, weights = (jax.lax.all_gather(a, travel, tiled=True) for a in (x, choice, weights))
        if of_experts:
            choice = choice - jax.lax.axis_index(of_experts) * down["bias"].shape[0]
        if of_inner:  # the bias of the sum is one device's to add
            down["bias"] = down["bias"] * (jax.lax.axis_index(of_inner) == 0).astype(down["bias"].dtype)
        total = PATHS[_path(x, gate_up, cfg)](x, choice, weights, gate_up, down, cfg)
        total = jax.lax.psum(total, stay) if stay else total
        return (jax.lax.psum_scatter(total, travel, tiled=True) if travel else total).astype(x.dtype)

    inputs = (tokens, tokens, tokens, *specs)
    # check_vma: the paths start their sums from zeros, which it would have them mark as different on every device.
    on_devices = jax.shard_map(local, in_specs=inputs, out_specs=tokens, check_vma=False)
    return on_devices(x, choice, weights, *stored)


def _weight(stored: dict[str, Array], dtype) -> Array:
    """The matrix, or matrices, of one expert or several, in the dtype computed in."""
    if "blocks" in stored:
        return dequantize(stored["blocks"], stored["scales"], dtype)
    return stored["weight"].astype(dtype)


def _linear(x: Float[Array, "t in"], stored: dict[str, Array]) -> Float[Array, "t *out"]:
    """W·x + b of one expert, and B·(A·x) where it has LoRA parameters."""

    def product(x, weight):
        return contract("ti,oi->to", x, weight.reshape(-1, weight.shape[-1])).reshape(-1, *weight.shape[:-1])

    out = product(x, _weight(stored, x.dtype)) + stored["bias"].astype(jnp.float32)[None]
    if "lora_a" in stored:
        low = product(x, stored["lora_a"].astype(x.dtype)).astype(x.dtype)
        out += product(low, stored["lora_b"].astype(x.dtype))
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
            low = product(rows, stored["lora_a"].astype(x.dtype)).astype(x.dtype)
            out += product(low, stored["lora_b"].astype(x.dtype))
        # A kernel may leave anything in the rows that belong to no expert; here, before NaN can reach a gradient.
        return jnp.where(mine.reshape(-1, *(1,) * (out.ndim - 1)), out, 0).astype(x.dtype)

    both = linear(x[order // k], gate_up)
    out = linear(swiglu(both[:, 0], both[:, 1], cfg), down) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // k].add(out.astype(jnp.float32))


def _here(expert: Int[Array, "*s"], count: int) -> Bool[Array, "*s"]:
    """Whether an expert, counted from this device's first, is among its `count`."""
    return (expert >= 0) & (expert < count)


PATHS = {"loop": _loop, "scan": _scan, "pairs": _pairs, "ragged": _ragged}
