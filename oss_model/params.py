"""From a checkpoint on disk to a `Transformer`: our Orbax checkpoint, or a safetensors directory as published."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from oss_model import layouts, mxfp4
from oss_model.buckets import path_of
from oss_model.config import ModelConfig
from oss_model.errors import InputError, raise_all
from oss_model.layouts import parameter_name
from oss_model.memory import release
from oss_model.modeling import Transformer
from oss_model.placing import Rows, placed
from oss_model.restoring import not_a_checkpoint, restoring
from oss_model.sharding import shardings
from oss_model.shards import Checkpoint
from oss_model.zarr import METADATA, DamagedChunk, StoredArray, open_arrays

RELEASED = 256 << 20  # of less, what the C library keeps is not worth looking for
GROUP_BYTES = 4 << 30  # of parameters that are read at a time: less is slower, more takes more memory meanwhile


def create_model_from_checkpoint(checkpoint_path: str | os.PathLike, cfg: ModelConfig, mesh: Mesh | None = None) -> Transformer:
    """Load a model.

    Args:
      checkpoint_path: an Orbax checkpoint of `nnx.state(Transformer)`, by convert-oss or plain Orbax, here or at gs://; or a
        safetensors directory in any layout of docs/conversion.md.
      cfg: the model's configuration. `param_dtype` says how parameters are held, from either kind of checkpoint; None:
        as they are stored. The model's own `cfg.param_dtype` says which it became. They are cast to `cfg.dtype` where
        they are used.
      mesh: devices to place the parameters on, cut as `oss_model.sharding` says; JAX's default device if None.

    Raises:
      InputError: naming everything that is missing, unexpected or misshaped, or the first damage found; or if
        `cfg.param_dtype` would round what is stored (float32 to bfloat16, values to MXFP4).
      OutOfMemory: if it does not fit, on the host or on a device.
    """
    with Loader(checkpoint_path, cfg, mesh) as loader:
        model = loader.model()
        for group in loader.groups(parts(model)):
            loader.load(group, loader.source.nbytes)
    if loader.by_orbax and loader.source.nbytes > RELEASED:
        release()
    return model


def parts(model: Transformer) -> dict[str, nnx.Module]:
    """What a model can be loaded by, in the order in which it is computed: name -> module."""
    layers = {f"layers.{n}": layer for n, layer in enumerate(model.layers)}
    return {"embedding": model.embedding, **layers, "norm": model.norm, "lm_head": model.lm_head}


class Loader:
    """A checkpoint, to load a model from or a part of one. Arguments and errors: `create_model_from_checkpoint`.

    Args:
      cfg: that of its own config.json if None.

    Attributes:
      cfg: as given, `param_dtype` said.
      stored: name -> (shape, dtype) of every parameter as it is in the checkpoint.
    """

    def __init__(self, checkpoint_path: str | os.PathLike, cfg: ModelConfig | None = None, mesh: Mesh | None = None):
        path = path_of(checkpoint_path).absolute()
        if not is_orbax(path) and not any(path.glob("*.safetensors")):
            raise not_a_checkpoint(path, safetensors=True)
        cfg = cfg or ModelConfig.from_json(path / "config.json")
        self.source: _Orbax | _Safetensors = _Orbax(path, cfg, mesh) if is_orbax(path) else _Safetensors(path, cfg, mesh)
        self.cfg, self.stored, self.mesh = self.source.cfg, self.source.stored, mesh

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: Any) -> None:
        self.source.close()

    @property
    def arrays(self) -> dict[str, StoredArray] | None:
        """Those of a checkpoint that convert-oss wrote."""
        return self.source.arrays if isinstance(self.source, _Orbax) else None

    @property
    def by_orbax(self) -> bool:
        return isinstance(self.source, _Orbax) and self.arrays is None

    def model(self) -> Transformer:
        """Without values: each parameter is a `jax.ShapeDtypeStruct`, placed."""
        return nnx.merge(*abstract_model(self.cfg, self.mesh))

    def groups(self, parts: Mapping[str, nnx.Module]) -> Iterator[dict[str, nnx.Module]]:
        """Runs of parts that are worth reading together."""
        group: dict[str, nnx.Module] = {}
        size = 0
        for name, module in parts.items():
            more = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(nnx.state(module)))
            if group and size + more > GROUP_BYTES:
                yield group
                group, size = {}, 0
            group[name], size = module, size + more
        if group:
            yield group

    def load(self, parts: Mapping[str, nnx.Module], nbytes: int | None = None) -> None:
        """Give parameters their values.

        Args:
          parts: some of a model's (`parts`), by name; their parameters say shape, dtype and place.
          nbytes: of all that this is a part of, to be said where memory runs out.
        """
        states = {name: nnx.state(module) for name, module in parts.items()}
        variables = {
            f"{name}.{parameter_name(path)}": variable
            for name, state in states.items()
            for path, variable in nnx.to_flat_state(state)
        }
        wanted = {name: variable.get_value() for name, variable in variables.items()}
        for name, value in self.source.read(wanted, nbytes):
            variables[name].set_value(value)
        for name, module in parts.items():
            nnx.update(module, states[name])


def is_orbax(path: str | os.PathLike) -> bool:
    return (path_of(path) / METADATA).is_file()


def abstract_model(cfg: ModelConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and its state with a `jax.ShapeDtypeStruct` (sharded on `mesh`) a parameter."""
    graphdef, variables = _structure(cfg, mesh)
    return graphdef, nnx.from_flat_state([(path, variable.copy()) for path, variable in variables])


@functools.lru_cache(maxsize=8)
def _structure(cfg: ModelConfig, mesh: Mesh | None) -> tuple[nnx.GraphDef, list[tuple[tuple, nnx.Variable]]]:
    placed = {} if mesh is None else shardings(cfg, mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
    variables = list(nnx.to_flat_state(state))
    for path, variable in variables:
        value = variable.get_value()
        variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed.get(parameter_name(path))))
    return graphdef, variables


def stored_parameters(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every parameter of an Orbax checkpoint, from its metadata.

    Raises:
      InputError: if it is none, cannot be read, or its tree is not that of a model state.
      OutOfMemory: if memory ran out.
    """
    path = path_of(path).absolute()
    if not is_orbax(path):
        raise not_a_checkpoint(path)
    if (arrays := open_arrays(path)) is not None:
        return _without_leaf(path, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    with restoring(path):
        # Not a Checkpointer, which logs what is wrong and goes on without metadata.
        tree: Any = ocp.PyTreeCheckpointHandler().metadata(path).tree  # type: ignore[arg-type]
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    named = {".".join(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in leaves}
    raise_all([f"{path}: {name}: expected an array, found none" for name, leaf in named.items() if not hasattr(leaf, "shape")])
    return _without_leaf(path, {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in named.items()})


def _without_leaf(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Names as the model has them: without the last key of `nnx.state`."""
    for name in found:
        if not name.endswith(".value"):
            raise InputError(f"{path}: expected the tree of nnx.state(Transformer), found a leaf {name}")
    return {name.removesuffix(".value"): of for name, of in found.items()}


def stored_config(path: str | os.PathLike, cfg: ModelConfig) -> tuple[ModelConfig, dict[str, np.dtype]]:
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


class _Orbax:
    def __init__(self, path: Path, cfg: ModelConfig, mesh: Mesh | None):
        self.path, self.arrays = path, open_arrays(path)
        stored, self.dtypes = stored_config(path, cfg)
        self.stored = {name: (shape, self.dtypes[name]) for name, (shape, _) in layouts.parameters(stored).items()}
        self.cfg = dataclasses.replace(cfg, param_dtype=_held(path, cfg.param_dtype, self.dtypes))
        self.packed = shardings(stored, mesh) if mesh is not None else {}
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layouts.parameters(self.cfg).values())

    def close(self) -> None: ...

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct], nbytes: int | None = None) -> Iterator[tuple[str, jax.Array]]:
        if self.arrays is None:
            yield from self._read_with_orbax(wanted, nbytes)
        else:
            with restoring(self.path, nbytes or _nbytes(wanted)):
                yield from placed(wanted, {name: self._rows(name, self.arrays) for name in wanted})

    def _rows(self, name: str, arrays: Mapping[str, StoredArray]) -> Rows:
        stem = name.removesuffix("weight")
        parts = [name] if name in self.dtypes else [f"{stem}blocks", f"{stem}scales"]
        stored = [arrays[f"{part}.value"] for part in parts]
        return Rows(math.lcm(*(array.rows for array in stored)), functools.partial(self._fill, stored))

    def _fill(self, stored: list[StoredArray], rows: slice, out: np.ndarray) -> None:
        """`Rows.read`: of a parameter as it is stored, or of values from blocks and scales."""
        try:
            if len(stored) == 1:
                stored[0].read(rows, out)
            else:
                packed = [np.empty((rows.stop - rows.start, *array.shape[1:]), array.dtype) for array in stored]
                for array, into in zip(stored, packed, strict=True):
                    array.read(rows, into)
                mxfp4.decode_into(packed[0], packed[1], out)
        except DamagedChunk as e:
            raise InputError(f"{self.path}: {e}; copy it again, or convert again (verify-oss checks all)") from None

    def _read_with_orbax(
        self, wanted: Mapping[str, jax.ShapeDtypeStruct], nbytes: int | None
    ) -> Iterator[tuple[str, jax.Array]]:
        """What plain Orbax wrote. Packed experts become values where these are wanted, a map at a time."""
        reading = {}
        for name, like in wanted.items():
            if name in self.dtypes:
                # Orbax widens what it reads; where inner axes are cut, packed experts' biases may be cut otherwise.
                wide = like.dtype == layouts.FLOAT32 and self.dtypes[name] != layouts.UINT8
                reading[name] = (
                    like.shape,
                    layouts.FLOAT32 if wide else self.dtypes[name],
                    self.packed.get(name, like.sharding),
                )
            else:
                for kind in ("blocks", "scales"):
                    packed = name.removesuffix("weight") + kind
                    shape, dtype = self.stored[packed]
                    reading[packed] = (shape, dtype, self.packed.get(packed))
        arrays = restore_arrays(self.path, reading, nbytes)
        for name, like in wanted.items():
            if name in arrays:
                value = arrays.pop(name)
                yield name, value if like.sharding is None else jax.device_put(value, like.sharding)
            else:
                pair = [arrays.pop(name.removesuffix("weight") + kind) for kind in ("blocks", "scales")]
                dequantize = jax.jit(mxfp4.dequantize, static_argnums=2, out_shardings=like.sharding)
                yield name, jax.block_until_ready(dequantize(*pair, like.dtype))


def _nbytes(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(like.shape) * like.dtype.itemsize for like in wanted.values())


def restore_arrays(
    path: Path, wanted: Mapping[str, tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding | None]], nbytes: int | None = None
) -> dict[str, jax.Array]:
    """Parameters of an Orbax checkpoint, read by plain Orbax.

    Args:
      path: of the checkpoint.
      wanted: parameter -> its shape, the dtype to read it in, and where to place it; JAX's default device if None.
      nbytes: of all that this is a part of, to be said where memory runs out.

    Raises:
      InputError, OutOfMemory, Incomplete: as `oss_model.restoring.restoring` says.
    """
    here = jax.sharding.SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    tree: dict = {}
    for name, (shape, dtype, sharding) in wanted.items():
        *branches, leaf = name.split(".")
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), branches, tree)
        node[leaf] = {"value": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or here)}
    # At most so much on the way to the devices at a time; without it Orbax reads everything at once, and the peak doubles.
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype, _ in wanted.values()]
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(2, math.ceil(max(sizes) / 1e9)))
    arguments = ocp.checkpoint_utils.construct_restore_args(tree)
    request = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
    with restoring(path, nbytes or sum(sizes)):
        with ocp.Checkpointer(handler) as checkpointer:
            tree = checkpointer.restore(path, args=request)
        jax.block_until_ready(tree)  # copies to the devices go on after Orbax returns, and hold what they copy
    return {name: functools.reduce(lambda node, part: node[part], (*name.split("."), "value"), tree) for name in wanted}  # type: ignore


class _Safetensors:
    def __init__(self, path: Path, cfg: ModelConfig, mesh: Mesh | None):
        self.source = source = Checkpoint(path, ignore=None)  # `cfg` says what the model is
        dtypes = {entry.model: source.dtype(entry) for entry in source.entries()}
        self.cfg = dataclasses.replace(cfg, param_dtype=_held(source.directory, cfg.param_dtype, dtypes))
        held = dataclasses.replace(source.cfg, param_dtype=self.cfg.param_dtype)
        self.stored, self.nbytes = layouts.parameters(held), 0
        raise_all(_mismatches(source.directory, layouts.parameters(self.cfg), layouts.parameters(held)))

    def close(self) -> None:
        self.source.shards.close()

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct], nbytes: int | None = None) -> Iterator[tuple[str, jax.Array]]:
        axes, entries = layouts.parameter_axes(self.cfg), {entry.model: entry for entry in self.source.entries()}
        yield from placed(wanted, {name: self._rows(name, like, axes[name], entries) for name, like in wanted.items()})

    def _rows(self, name: str, like: jax.ShapeDtypeStruct, axes: Sequence[str], entries: Mapping[str, layouts.Entry]) -> Rows:
        """A part of the parameter, as large as the checkpoint's chunks would be."""
        stem = name.removesuffix("weight")
        parts = [name] if name in entries else [f"{stem}blocks", f"{stem}scales"]
        read = functools.partial(self._fill, [entries[part] for part in parts])
        return Rows(layouts.chunk_rows(name, axes, like.shape, like.dtype), read)

    def _fill(self, entries: list[layouts.Entry], rows: slice, out: np.ndarray) -> None:
        """`Rows.read`: of a parameter as it is stored, widened, or of values from blocks and scales."""
        values = [self._read(entry, rows) for entry in entries]
        if len(values) == 2:
            mxfp4.decode_into(values[0], values[1], out)
        elif values[0].dtype == out.dtype:
            out[...] = values[0]
        else:
            mxfp4.widen_into(values[0], out)

    def _read(self, entry: layouts.Entry, rows: slice) -> np.ndarray:
        each = entry.checkpoint_shape[0] // entry.model_shape[0]  # the first axis may be split: (heads dim)
        values = entry.to_model(self.source.read(entry, slice(rows.start * each, rows.stop * each)))
        if entry.packed and entry.model.endswith("scales"):
            raise_all(mxfp4.scale_faults(values, f"{self.source.directory}: {entry.checkpoint}"))
        return values
