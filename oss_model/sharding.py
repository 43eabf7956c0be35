"""Mesh axes -> how every parameter and activation is cut.

Meshes have axes named `fsdp`, `tensor`, `expert` and `context`, any of them, of any size. Which axis of which array goes to
which mesh axis follows from the names of the array's own axes: a parameter's from `oss_model.layouts`, an activation's from
the letters of einsum strings. Activations follow the mesh that is set (`with jax.set_mesh(mesh): …`).

- `fsdp`: the batch, and every parameter along its first axis, which is how the checkpoint is cut into chunks: a process
  reads its share and no more. Parameters are gathered where they are used.
- `tensor`: attention heads, the inner axis of the experts, the vocabulary.
- `expert`: the experts, the vocabulary, and the batch. Experts stay where they are and tokens travel
  (`oss_model.expert_parallel`); with it on, `fsdp` cuts the experts further, and moves weights only where it cuts within one.
- `context`: the length (`oss_model.context_parallel`), and the parameters as `fsdp` does.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oss_model import layouts
from oss_model.config import ModelConfig
from oss_model.errors import InputError, raise_all
from oss_model.memory import size

AXES = ("expert", "tensor", "fsdp", "context")
SHARES = ("fsdp", "context")  # along these parameters are kept in shares, and gathered where they are used

# Mesh axis -> axes of a parameter that it may cut: the first, in the parameter's own order, that it divides.
PARAMETERS = {
    "expert": ("experts", "vocab"),
    "tensor": ("heads", "kv", "vocab", "inner", "inner_groups"),
    **dict.fromkeys(SHARES, ("experts", "heads", "kv", "vocab", "inner", "inner_groups", "hidden")),
}
# The same for activations: b batch, l length, n heads, k kv heads, v vocab (where there is nothing before it to cut). Other
# letters are never cut.
ACTIVATIONS = {"expert": "bv", "tensor": "nkv", "fsdp": "bv", "context": "lv"}
WHOLE_BYTES = 64 << 20  # an array larger than this may be on no two devices alike


def _partition(
    axes: Sequence[str], sizes: Mapping[str, int], mesh_shape: Mapping[str, int] | None, rules: Mapping[str, Sequence[str]]
) -> PartitionSpec:
    """The cut of one array whose axes have these names, on a mesh of this shape, or (None) one that divides everything."""
    cuts: dict[str, list[str]] = {axis: [] for axis in axes}
    for name, candidates in rules.items():
        if mesh_shape is not None and mesh_shape.get(name, 1) == 1:
            continue
        for axis in (axis for axis in axes if axis in candidates):
            parts = 1 if mesh_shape is None else math.prod(mesh_shape[cut] for cut in (name, *cuts[axis]))
            if sizes[axis] % parts == 0:
                cuts[axis].append(name)
                break
    return PartitionSpec(*(tuple(c) if len(c) > 1 else c[0] if c else None for c in cuts.values()))


def partition_spec(axes: Sequence[str], cfg: ModelConfig, mesh_shape: Mapping[str, int] | None) -> PartitionSpec:
    """The cut of one parameter.

    Args:
      axes: names of its axes, those of `ModelConfig.axes`; others are not cut.
      cfg: the model.
      mesh_shape: mesh axis -> size. Axes the mesh lacks are left out, and a dimension that a mesh axis does not divide
        is replicated. None: every rule applies.
    """
    sizes, rules = cfg.axes, dict(PARAMETERS)
    if cfg.param_dtype == "mxfp4":
        sizes["inner"] = sizes["inner_groups"]  # packed experts are cut between blocks only
    if "experts" in axes:  # along `hidden` they would have to be gathered, with expert parallelism too
        rules |= {share: tuple(axis for axis in rules[share] if axis != "hidden") for share in SHARES}
    if mesh_shape is not None and sizes["inner"] % mesh_shape.get("tensor", 1):
        rules["tensor"] += ("experts",)  # where the inner axis cannot be cut
    return _partition(axes, sizes, mesh_shape, rules)


def partition_specs(cfg: ModelConfig, mesh_shape: Mapping[str, int] | None = None) -> dict[str, PartitionSpec]:
    """Parameter name -> PartitionSpec (`partition_spec`)."""
    return {name: partition_spec(axes, cfg, mesh_shape) for name, axes in layouts.parameter_axes(cfg).items()}


def shardings(cfg: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Parameter name -> NamedSharding on `mesh`.

    Raises:
      InputError: if the mesh has axes of other names, or Explicit ones, or if a large array would be on several devices alike.
    """
    check(mesh)
    raise_all(replication_faults(cfg, mesh.shape))
    return {name: NamedSharding(mesh, spec) for name, spec in partition_specs(cfg, mesh.shape).items()}


def replication_faults(cfg: ModelConfig, mesh_shape: Mapping[str, int]) -> list[str]:
    """A line for what is larger than WHOLE_BYTES and not cut by every axis of the mesh; with a mesh that works."""
    uncut: dict[str, set[str]] = {}
    for name, (array, axes) in _uncut(cfg, mesh_shape).items():
        for axis in axes:
            uncut.setdefault(axis, set()).add(f"{re.sub(r'[.][0-9]+[.]', '.N.', name)} ({size(array)})")
    if not uncut:
        return []
    found = "; ".join(f"{axis}={mesh_shape[axis]} cuts no {', '.join(sorted(names))}" for axis, names in uncut.items())
    other = suggestion(cfg, math.prod(mesh_shape.values()))
    works = "no mesh of so many devices" if other is None else ",".join(f"{axis}={count}" for axis, count in other.items())
    return [f"mesh: expected each axis to cut every large array, found copies: {found}; use {works}"]


def _uncut(cfg: ModelConfig, mesh_shape: Mapping[str, int]) -> dict[str, tuple[int, list[str]]]:
    """Parameter larger than WHOLE_BYTES -> its bytes, and the axes of the mesh that do not cut it; without those cut by all.

    Of one layer, as which all others are.
    """
    cfg = dataclasses.replace(cfg, num_hidden_layers=1, layer_types=())
    specs, found = partition_specs(cfg, mesh_shape), {}
    for name, (shape, dtype) in layouts.parameters(cfg).items():
        nbytes, cut = math.prod(shape) * dtype.itemsize, {axis for n in range(len(shape)) for axis in mesh_axes(specs[name], n)}
        missing = [axis for axis, count in mesh_shape.items() if count > 1 and axis not in cut]
        if nbytes > WHOLE_BYTES and missing:
            found[name] = nbytes, missing
    return found


def suggestion(cfg: ModelConfig, devices: int) -> dict[str, int] | None:
    """A mesh of so many devices that cuts every large array by each of its axes: as much `fsdp` as there can be."""
    counts = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp in reversed(counts):
        for expert in (n for n in reversed(counts) if devices // fsdp % n == 0):
            shape = {"expert": expert, "fsdp": fsdp, "tensor": devices // fsdp // expert}
            shape = {axis: count for axis, count in shape.items() if count > 1} or {"fsdp": 1}
            if not _uncut(cfg, shape):
                return shape
    return None


def check(mesh: Mesh | jax.sharding.AbstractMesh) -> None:
    faults = [
        f"mesh: expected axes named {', '.join(sorted(AXES))}, found {name!r}" for name in mesh.axis_names if name not in AXES
    ]
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        faults.append("mesh: expected axes of type Auto, found Explicit; jax.make_mesh(..., axis_types=(AxisType.Auto, ...))")
    if faults:
        raise InputError(*faults)


def annotate(model: nnx.Module, cfg: ModelConfig) -> None:
    """Note every parameter's PartitionSpec, on the mesh that is set, where `nnx.get_partition_spec` finds it."""
    mesh = jax.sharding.get_abstract_mesh()
    specs = partition_specs(cfg, None if mesh.empty else mesh.shape)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_metadata(out_sharding=specs[layouts.parameter_name(path)])


def mesh_shape() -> dict[str, int]:
    """Mesh axis -> size of the mesh that is set, axes of size 1 left out; empty if none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:  # inside a shard_map its author has cut everything
        return {}
    check(mesh)
    return {name: size for name, size in mesh.shape.items() if size > 1}


def constrain(letters: str, x: jax.Array) -> jax.Array:
    """`x` cut as the letters of its axes say, on the mesh that is set; `x` itself if none is."""
    shape = mesh_shape()
    if not shape:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, shape))


def replicated(x: jax.Array) -> jax.Array:
    """`x` whole on every device of the mesh that is set, where every process can read it."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh_shape() else x


def activation_spec(letters: str, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The cut of an activation whose axes have these letters."""
    uncut = _whole.get()
    rules = {axis: [letter for letter in letters if letter not in uncut.get(axis, "")] for axis, letters in ACTIVATIONS.items()}
    return _partition(letters, dict(zip(letters, shape, strict=True)), mesh_shape, rules)


# Mesh axis -> letters of the dimensions that it does not cut.
_whole: ContextVar[Mapping[str, str]] = ContextVar("oss_model_whole", default=MappingProxyType({}))


@contextmanager
def whole(letters: str, names: Sequence[str]) -> Iterator[None]:
    """Inside, these mesh axes do not cut dimensions of these letters."""
    token = _whole.set(dict.fromkeys(names, letters))
    try:
        yield
    finally:
        _whole.reset(token)


def slices() -> int:
    """Into how many parts the mesh that is set cuts the length."""
    return mesh_shape().get("context", 1)


def cut_rows(a: jax.Array, chunk: int) -> jax.Array:
    """[batch, length, ...] -> [chunks, batch, places, ...]: rows piece by piece, padded with zeros; see `joined_rows`.

    A piece has `chunk` places of each slice of the length, so that every device has a part of each.
    """
    a = a.reshape(a.shape[0], slices(), -1, *a.shape[2:])
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % chunk), *((0, 0),) * (a.ndim - 3)))
    a = jnp.moveaxis(a.reshape(*a.shape[:2], -1, chunk, *a.shape[3:]), 2, 0)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def joined_rows(a: jax.Array, length: int) -> jax.Array:
    """The way back from `cut_rows`."""
    a = a.reshape(*a.shape[:2], slices(), -1, *a.shape[3:])
    a = jnp.moveaxis(a, 0, 2)
    a = a.reshape(*a.shape[:2], -1, *a.shape[4:])
    return a[:, :, : length // a.shape[1]].reshape(a.shape[0], length, *a.shape[3:])


def turned_to_vocabulary(batch: int, length: int, vocab: int) -> tuple[tuple[str, ...], int]:
    """Which mesh axes that cut such rows can cut logits along the vocabulary instead; into how many parts they cut the batch.

    Whole axes only, the major ones first, as long as all together divide it: of `expert=128,fsdp=2` the first cuts 201,088
    columns, an axis of 256 cannot.
    """
    shape = mesh_shape()
    if not shape:
        return (), 1
    of_rows, columns = activation_spec("bl", (batch, length), shape), activation_spec("v", (vocab,), shape)
    cuts = [axis for n in (0, 1) for axis in mesh_axes(of_rows, n)]
    turned = tuple(itertools.takewhile(mesh_axes(columns, 0).__contains__, cuts))
    return turned, math.prod(shape[axis] for axis in turned if axis in mesh_axes(of_rows, 0))


def mesh_axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """The mesh axes that cut a dimension, the major one first."""
    cut = spec[dimension]
    return () if cut is None else (cut,) if isinstance(cut, str) else cut
