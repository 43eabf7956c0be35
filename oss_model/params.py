"""From a checkpoint on disk to a `Transformer`: our Orbax checkpoint, or a safetensors directory as published."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from oss_model import layouts, mxfp4
from oss_model.config import ModelConfig
from oss_model.errors import InputError, raise_all
from oss_model.layouts import parameter_name
from oss_model.memory import release
from oss_model.modeling import Transformer
from oss_model.restoring import METADATA, not_a_checkpoint, restoring
from oss_model.sharding import shardings
from oss_model.shards import Checkpoint


def create_model_from_checkpoint(checkpoint_path: str | os.PathLike, cfg: ModelConfig, mesh: Mesh | None = None) -> Transformer:
    """Load a model.

    Args:
      checkpoint_path: an Orbax checkpoint written by convert-oss, or a safetensors directory in any of the three
        layouts.
      cfg: the model's configuration. `param_dtype` says how parameters are held, from either kind of checkpoint; None:
        as they are stored. The model's own `cfg.param_dtype` says which it became. They are cast to `cfg.dtype` where
        they are used.
      mesh: devices to place the parameters on, cut as `oss_model.sharding` says; this process's first device if None.

    Raises:
      InputError: naming everything that is missing, unexpected or misshaped, or the first damage found; or if
        `cfg.param_dtype` would round what is stored (float32 to bfloat16, values to MXFP4).
      OutOfMemory: if it does not fit, on the host or on a device.
    """
    path = Path(checkpoint_path).absolute()
    if is_orbax(path):
        return _from_orbax(path, cfg, mesh)
    if not any(path.glob("*.safetensors")):
        raise not_a_checkpoint(path, safetensors=True)
    return _from_safetensors(Checkpoint(path), cfg, mesh)


def is_orbax(path: str | os.PathLike) -> bool:
    return (Path(path) / METADATA).is_file()


def abstract_model(cfg: ModelConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its state with a `jax.ShapeDtypeStruct` (sharded on `mesh`) a parameter."""
    placed = {} if mesh is None else shardings(cfg, mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed.get(parameter_name(path))))
    return graphdef, state


def stored_parameters(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every parameter of an Orbax checkpoint, from its metadata.

    Raises:
      InputError: if it is none, cannot be read, or its tree is not that of a model state.
      OutOfMemory: if memory ran out.
    """
    path = Path(path).absolute()
    if not is_orbax(path):
        raise not_a_checkpoint(path)
    with restoring(path):
        # Not a Checkpointer, which logs what is wrong and goes on without metadata.
        tree: Any = ocp.PyTreeCheckpointHandler().metadata(path).tree  # type: ignore[arg-type]
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    found = {}
    for keys, leaf in leaves:
        *name, last = (str(getattr(key, "key", key)) for key in keys)
        if last != "value":
            raise InputError(f"{path}: expected the tree of nnx.state(Transformer), found a leaf {'.'.join([*name, last])}")
        found[".".join(name)] = (tuple(leaf.shape), np.dtype(leaf.dtype))
    return found


def as_stored(path: str | os.PathLike, cfg: ModelConfig) -> tuple[ModelConfig, dict[str, np.dtype]]:
    """`cfg` with the `param_dtype` of an Orbax checkpoint, and each parameter's stored dtype.

    Raises:
      InputError: naming every parameter that `cfg` needs and the checkpoint lacks, or the other way, or misshaped.
    """
    found = stored_parameters(path)
    dtypes = {name: dtype for name, (_, dtype) in found.items()}
    cfg = dataclasses.replace(cfg, param_dtype=_param_dtype(dtypes.values()))
    expected = layouts.parameters(cfg)
    faults = _mismatches(path, expected, found)
    for name in found.keys() & expected.keys():
        if (dtypes[name] == layouts.UINT8) != (expected[name][1] == layouts.UINT8):
            faults.append(f"{path}: {name}: expected dtype {expected[name][1]}, found {dtypes[name]}")
    raise_all(faults)
    return cfg, dtypes


def _param_dtype(stored: Iterable[np.dtype]) -> str:
    """What `ModelConfig.param_dtype` calls parameters of these dtypes. Of a mixture the most are bfloat16."""
    kinds = set(stored)
    return "mxfp4" if layouts.UINT8 in kinds else "float32" if kinds == {layouts.FLOAT32} else "bfloat16"


def _held(path: Path, asked: str | None, dtypes: Mapping[str, np.dtype]) -> str:
    """The `param_dtype` to hold parameters in that are stored as `dtypes`."""
    stored, choice = _param_dtype(dtypes.values()), "leave param_dtype out, for parameters as they are stored"
    wide = [name for name, dtype in dtypes.items() if dtype == layouts.FLOAT32]
    if asked == "mxfp4" != stored:
        raise InputError(f"{path}: param_dtype: expected packed experts for 'mxfp4', found values; {choice}")
    if asked == "bfloat16" and wide:
        raise InputError(
            f"{path}: param_dtype: expected no float32 parameters for 'bfloat16', which would round them, found {len(wide)},"
            f" the first {wide[0]}; {choice}, or convert with --dtype bfloat16"
        )
    return asked or stored


def _mismatches(path: str | os.PathLike, expected: dict, found: dict) -> list[str]:
    """Compare two dicts of name -> (shape, dtype), by name and shape; one line a difference."""
    ask = "is cfg that of this checkpoint?"
    faults = [f"{path}: {name}: missing; cfg needs it: {ask}" for name in expected if name not in found]
    for name, (shape, _) in found.items():
        if name not in expected:
            faults.append(f"{path}: {name}: unexpected; cfg has no such parameter: {ask}")
        elif shape != expected[name][0]:
            faults.append(f"{path}: {name}: expected shape {list(expected[name][0])} by cfg, found {list(shape)}")
    return faults


def _from_orbax(path: Path, cfg: ModelConfig, mesh: Mesh | None) -> Transformer:
    stored, dtypes = as_stored(path, cfg)
    cfg = dataclasses.replace(cfg, param_dtype=_held(path, cfg.param_dtype, dtypes))
    packed = stored.param_dtype == "mxfp4" != cfg.param_dtype  # and values are asked for
    graphdef, state = abstract_model(stored if packed else cfg, mesh)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for keys, variable in nnx.to_flat_state(state):
        value, dtype = variable.get_value(), dtypes[parameter_name(keys)]
        if cfg.param_dtype == "float32" and dtype != layouts.UINT8:
            dtype = layouts.FLOAT32  # Orbax widens what it reads
        variable.set_value(jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding or device))
    # At most so much on the way to the devices at a time; without it Orbax reads everything at once, and the peak doubles.
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(state)]
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(2, math.ceil(max(sizes) / 1e9)))
    wanted = ocp.args.PyTreeRestore(item=state, restore_args=ocp.checkpoint_utils.construct_restore_args(state))
    with restoring(path, sum(sizes)):
        with ocp.Checkpointer(handler) as checkpointer:
            state = checkpointer.restore(path, args=wanted)
        jax.block_until_ready(state)  # copies to the devices go on after Orbax returns, and hold what they copy
        if packed:
            parameters = {parameter_name(keys): variable.get_value() for keys, variable in nnx.to_flat_state(state)}
            del state
            graphdef, state = abstract_model(cfg, mesh)
            _unpack(parameters, state)
    release()
    return nnx.merge(graphdef, state)


def _unpack(parameters: dict[str, jax.Array], state: nnx.State) -> None:
    """Fill the state of a model of values from that of a packed one, which is emptied, a map at a time, as it goes."""
    for keys, variable in nnx.to_flat_state(state):
        name, value = parameter_name(keys), variable.get_value()
        if name not in parameters:
            packed = [parameters.pop(name.removesuffix("weight") + kind) for kind in ("blocks", "scales")]
            dequantize = jax.jit(mxfp4.dequantize, static_argnums=2, out_shardings=value.sharding)
            parameters[name] = jax.block_until_ready(dequantize(*packed, value.dtype))
        held = parameters.pop(name)  # where inner axes are cut, packed experts' biases may be cut otherwise
        variable.set_value(held if value.sharding is None else jax.device_put(held, value.sharding))


def _from_safetensors(source: Checkpoint, cfg: ModelConfig, mesh: Mesh | None) -> Transformer:
    dtypes = {entry.model: source.dtype(entry) for entry in source.entries()}
    cfg = dataclasses.replace(cfg, param_dtype=_held(source.directory, cfg.param_dtype, dtypes))
    graphdef, state = abstract_model(cfg, mesh)
    variables = {parameter_name(path): variable for path, variable in nnx.to_flat_state(state)}
    held = dataclasses.replace(source.cfg, param_dtype=cfg.param_dtype)
    raise_all(_mismatches(source.directory, layouts.parameters(cfg), layouts.parameters(held)))
    with source.shards:
        for name, value in _values(source, cfg.param_dtype):
            where = variables[name].get_value().sharding
            on_device = (
                jnp.asarray(value) if where is None else jax.make_array_from_callback(value.shape, where, value.__getitem__)
            )
            variables[name].set_value(on_device)
    return nnx.merge(graphdef, state)


def _values(source: Checkpoint, param_dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every parameter, one at a time."""
    floating = layouts.FLOAT32 if param_dtype == "float32" else layouts.BFLOAT16
    blocks: dict[str, np.ndarray] = {}
    for entry in source.entries():
        value = entry.to_model(source.read(entry))
        stem, _, kind = entry.model.rpartition(".")
        if kind == "scales":
            raise_all(mxfp4.scale_faults(value, f"{source.directory}: {entry.checkpoint}"))
        if not entry.packed:
            yield entry.model, mxfp4.widen(value) if value.dtype != floating == layouts.FLOAT32 else value
        elif param_dtype == "mxfp4":
            yield entry.model, value
        elif kind == "blocks":
            blocks[stem] = value
        else:
            yield f"{stem}.weight", mxfp4.decode(blocks.pop(stem), value, floating)
