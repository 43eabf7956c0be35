"""Who computes what on a mesh: each device its own experts, for all tokens that are routed to them."""

from typing import TYPE_CHECKING

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from oss_model import sharding
from oss_model.config import ModelConfig
from oss_model.expert_paths import add_up

if TYPE_CHECKING:
    from oss_model.experts import ExpertLinear


def add_up_on_mesh(
    x, choice, weights, gate_up: "ExpertLinear", down: "ExpertLinear", cfg: ModelConfig, mesh_shape: dict[str, int]
) -> Array:
    """Each device computes its own experts, or its slice of their inner axis, for every token that is routed to them.

    Tokens are gathered over the mesh axes that cut experts, and their sums scattered back. Only where the experts are
    cut by `fsdp` or `context` alone is it the weights that are gathered, a layer at a time, and tokens stay.
    """
    tokens = sharding.activation_spec("blh", x.shape, mesh_shape)
    choice, weights = (a.reshape(*x.shape[:2], -1) for a in (choice, weights))
    stored = gate_up.stored(), down.stored()
    specs = tuple({name: linear.specs(cfg, mesh_shape)[name] for name in linear.stored()} for linear in (gate_up, down))
    of_experts, of_inner = (sharding.mesh_axes(specs[0]["bias"], axis) for axis in (0, -1))
    gathered = () if "expert" in of_experts else tuple(a for a in (*of_experts, *of_inner) if a in sharding.SHARES)
    of_experts, of_inner = (tuple(a for a in axes if a not in gathered) for axes in (of_experts, of_inner))
    # Along these the tokens are gathered, and their sums scattered; along the others sums are added up in place.
    token_axes = tuple(a for n in (0, 1) for a in sharding.mesh_axes(tokens, n) if a in of_experts + of_inner)
    sum_axes = tuple(a for a in of_experts + of_inner if a not in token_axes)

    def whole(array: Array, spec: PartitionSpec) -> Array:
        for axis in range(len(spec)):
            if shares := tuple(a for a in sharding.mesh_axes(spec, axis) if a in gathered):
                array = jax.lax.all_gather(array, shares, axis=axis, tiled=True)
        return array

    def local(x, choice, weights, *stored):
        shape = x.shape
        x, choice, weights = (a.reshape(-1, a.shape[-1]) for a in (x, choice, weights))
        gate_up, down = jax.tree.map(whole, stored, specs)
        if token_axes:
            x, choice, weights = (jax.lax.all_gather(a, token_axes, tiled=True) for a in (x, choice, weights))
        if of_experts:
            choice = choice - jax.lax.axis_index(of_experts) * down["bias"].shape[0]
        if of_inner:  # the bias of the sum is one device's to add
            down["bias"] = down["bias"] * (jax.lax.axis_index(of_inner) == 0).astype(down["bias"].dtype)
        total = add_up(x, choice, weights, gate_up, down, cfg)
        total = jax.lax.psum(total, sum_axes) if sum_axes else total
        total = jax.lax.psum_scatter(total, token_axes, tiled=True) if token_axes else total
        return total.astype(x.dtype).reshape(shape)

    inputs = (tokens, tokens, tokens, *specs)
    # check_vma: the paths start their sums from zeros, which it would have them mark as different on every device.
    on_devices = jax.shard_map(local, in_specs=inputs, out_specs=tokens, check_vma=False)
    return on_devices(x, choice, weights, *stored)
