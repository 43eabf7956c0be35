"""Mesh axes -> how each parameter is cut.

Meshes have axes named `fsdp`, `tensor` and `expert`, any of them, of any size. Which axis of which parameter goes
to which mesh axis follows from the names of the parameters' own axes in `oss_model.layouts`.
"""

from collections.abc import Mapping

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from oss_model import layouts
from oss_model.config import ModelConfig

# Axis of a parameter -> axis of the mesh. The residual stream's axis is the one every parameter has: fsdp.
RULES = {
    "experts": "expert",
    "heads": "tensor",
    "kv": "tensor",
    "inner": "tensor",
    "inner_groups": "tensor",
    "vocab": "tensor",
    "hidden": "fsdp",
    "hidden_groups": "fsdp",
}


def partition_specs(cfg: ModelConfig, mesh_shape: Mapping[str, int] | None = None) -> dict[str, PartitionSpec]:
    """Parameter name -> PartitionSpec.

    Args:
      cfg: the model.
      mesh_shape: mesh axis -> size. Axes the mesh lacks are left out, and a dimension that a mesh axis does not
        divide is replicated. Without it, every rule applies.
    """
    specs = {}
    for name, axes in layouts.parameter_axes(cfg).items():
        shape = [cfg.axes[axis] for axis in axes]
        wanted = [RULES.get(axis) for axis in axes]
        if mesh_shape is not None:
            parts = [mesh_shape.get(m, 0) if m else 0 for m in wanted]
            wanted = [m if p and n % p == 0 else None for m, n, p in zip(wanted, shape, parts, strict=True)]
        specs[name] = PartitionSpec(*wanted)
    return specs


def shardings(cfg: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Parameter name -> NamedSharding on `mesh`."""
    return {name: NamedSharding(mesh, spec) for name, spec in partition_specs(cfg, mesh.shape).items()}


def annotate(model: nnx.Module, cfg: ModelConfig) -> None:
    """Note every parameter's PartitionSpec in its metadata, where `nnx.get_partition_spec` finds it."""
    specs = partition_specs(cfg)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_metadata(out_sharding=specs[".".join(map(str, path))])
