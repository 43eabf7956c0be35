"""Mixture of experts: the experts' parameters, which experts a token goes to, and their sum.

t tokens (batch and length flattened), e experts, h hidden, k experts chosen.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from oss_model import sharding
from oss_model.config import MXFP4_BLOCK, ModelConfig
from oss_model.expert_parallel import add_up_on_mesh
from oss_model.expert_paths import add_up
from oss_model.layers import LowRank, param_dtype


class Mxfp4(nnx.Variable):
    """Packed MXFP4 bytes. Not an `nnx.Param`: uint8 has no gradient, and `nnx.grad` would try."""


class ExpertLinear(nnx.Module):
    """One linear map an expert.

    As values: weight [experts, *out, in]. With `param_dtype="mxfp4"`: blocks [experts, *out, in / 32, 16] and scales
    [experts, *out, in / 32]. Always: bias [experts, *out].

    Args:
      out: names of the output axes, in `ModelConfig.axes`.
      width: name of the input axis.

    Attributes:
      lora: an update an expert, where `oss_model.lora` has put one.
    """

    lora: LowRank | None = None

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
        """Those of the arrays above that there are, and the update's; the first axis of each is the expert."""
        arrays = {name: variable[...] for name, variable in vars(self).items() if isinstance(variable, nnx.Variable)}
        return arrays if self.lora is None else arrays | self.lora.stored()

    def specs(self, cfg: ModelConfig, mesh_shape: Mapping[str, int]) -> dict[str, PartitionSpec]:
        """How each array of `stored` is cut on a mesh of this shape."""
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
    x: Float[Array, "b l h"],
    choice: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    gate_up: ExpertLinear,
    down: ExpertLinear,
    cfg: ModelConfig,
) -> Float[Array, "b l h"]:
    """Sum of weight · expert(x) over the chosen experts. `oss_model.expert_paths` has the ways to compute it."""
    mesh_shape = sharding.mesh_shape()
    if mesh_shape:
        return add_up_on_mesh(x, choice, weights, gate_up, down, cfg, mesh_shape)
    rows = x.reshape(-1, x.shape[-1])
    return add_up(rows, choice, weights, gate_up.stored(), down.stored(), cfg).astype(x.dtype).reshape(x.shape)
