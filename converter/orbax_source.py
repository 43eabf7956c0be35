"""An Orbax checkpoint as a source: ours, or one that training saved, with whatever lies beside the model in it."""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oss_model import layouts
from oss_model.buckets import stored_at
from oss_model.config import ModelConfig
from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json
from oss_model.layouts import BFLOAT16, BLOCK_BYTES, FLOAT32, UINT8, Entry
from oss_model.zarr import METADATA, DamagedChunk, StoredArray, open_arrays

# Keys of optimizers and trainers above a second tree of the model's own names: Adam's moments, for example.
NOT_THE_MODEL = {"mu", "nu", "moments", "opt_state", "optimizer", "optimizer_state", "ema", "grads"}
ABOVE = 3  # directories above a checkpoint, in which its config.json may be: RUN/steps/100/default
LEAF = "value"
FIRST = f"embedding.weight.{LEAF}"  # of every model


def find(path: Path) -> Path | None:
    """The directory that Orbax wrote the arrays to: `path`, an item of it, or one of its last step (`CheckpointManager`).

    None: there is none.

    Raises:
      InputError: if several have a whole model.
    """
    if (path / METADATA).is_file():
        return path
    steps = sorted((int(step.name), step) for step in path.iterdir() if step.name.isdigit()) if path.is_dir() else []
    for place in [step for _, step in steps[-1:]] or [path]:
        if (place / METADATA).is_file():
            return place
        items = sorted(found.parent for found in place.glob(f"*/{METADATA}"))
        whole = [item for item in items if len(items) == 1 or (item.name not in NOT_THE_MODEL and _above(_names(item)))]
        if len(whole) > 1:
            names = ", ".join(item.name for item in whole)
            raise InputError(f"{place}: expected one checkpoint, found several in it ({names}); give one of them")
        if items:
            return [*whole, *items][0]
    return None


class OrbaxSource:
    """All parameters of a model, in the tree of `nnx.state(Transformer)` or somewhere in a larger one.

    Layers may be stacked (`oss_model.scanned`). What convert-oss wrote is read by our own reader, whose checksums are always
    checked; anything else by tensorstore.

    Raises:
      InputError: naming everything that is missing, misshaped or of a dtype that gpt-oss has not.

    Args:
      directory: of the arrays: see `find`.
    """

    def __init__(self, directory: Path, ignore: Collection[str] = ()):
        self.directory = directory.absolute()
        config = _config_file(self.directory)
        self.cfg, self._home = ModelConfig.from_json(config, ignore), config.parent
        self._arrays = _of_the_model(self.directory, stored_arrays(self.directory))
        packed = any(name.endswith(".blocks") for name in self._arrays)
        self.layout = layouts.ORBAX_MXFP4 if packed else layouts.ORBAX
        wanted = {entry.model: entry for entry in layouts.entries(self.layout, self.cfg)}
        self._turns = _unstacked(self._arrays, wanted)
        raise_all(_mismatches(self.directory, self._arrays, self._turns, wanted))
        self._entries = list(wanted.values())

    def close(self) -> None: ...

    @property
    def home(self) -> Path:
        return self._home

    def entries(self) -> list[Entry]:
        return self._entries

    def dtype(self, entry: Entry) -> np.dtype:
        return self._arrays[self._turns[entry.model][0]].dtype

    def read(self, entry: Entry, rows: slice = slice(None), buffer: np.ndarray | None = None) -> np.ndarray:
        start, stop, _ = rows.indices(entry.model_shape[0])
        name, turn = self._turns[entry.model]
        array = self._arrays[name]
        if array.ours is None:
            opened = array.theirs
            part = opened[start:stop] if turn is None else opened[turn, start:stop]
            return np.ascontiguousarray(part.read().result())
        first, last = start // array.ours.rows, math.ceil(stop / array.ours.rows)
        whole = slice(first * array.ours.rows, min(last * array.ours.rows, array.shape[0]))
        shape = (whole.stop - whole.start, *array.shape[1:])
        nbytes = math.prod(shape) * array.dtype.itemsize
        fits = buffer is not None and len(buffer) >= nbytes
        out = (buffer[:nbytes] if fits else np.empty(nbytes, np.uint8)).view(array.dtype).reshape(shape)  # type: ignore[index]
        try:
            array.ours.read(whole, out)
        except DamagedChunk as e:
            raise InputError(f"{self.directory}: {e}; copy it again (verify-oss checks all)") from None
        return out[start - whole.start : stop - whole.start]

    def together(self, entry: Entry) -> int:
        array = self._arrays[self._turns[entry.model][0]]
        return (
            array.ours.rows
            if array.ours
            else 1 + BLOCK_BYTES // max(1, math.prod(entry.model_shape[1:]) * array.dtype.itemsize)
        )

    def files_of(self, entry: Entry) -> list[Path]:
        array = self._arrays[self._turns[entry.model][0]]
        if array.ours is None:
            return self.files
        chunks = range(math.ceil(array.shape[0] / array.ours.rows))
        return [array.ours.directory / "zarr.json", *(array.ours.chunk(index) for index in chunks)]

    @property
    def files(self) -> list[Path]:
        if all(array.ours is not None for array in self._arrays.values()):
            return sorted({file for entry in self._entries for file in self.files_of(entry)})
        return sorted(path for path in self.directory.rglob("*") if path.is_file())


class Array(NamedTuple):
    """Of `ours` or `theirs`, a tensorstore, there is one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    ours: StoredArray | None = None
    theirs: Any = None

    def read(self) -> np.ndarray:
        """All of it."""
        if self.theirs is not None:
            return self.theirs.read().result()
        assert self.ours is not None
        out = np.empty(self.shape, self.dtype)
        self.ours.read(slice(0, self.shape[0]), out)
        return out


def stored_arrays(directory: Path) -> dict[str, Array]:
    """Every array of a checkpoint, by its name in the tree.

    Raises:
      InputError: if it is none.
    """
    if not (directory / METADATA).is_file():
        raise InputError(f"{directory}: expected a checkpoint of Orbax ({METADATA}), found none")
    ours = open_arrays(directory)
    return _ours(ours) if ours is not None else _theirs(directory)


def _ours(found: dict[str, StoredArray]) -> dict[str, Array]:
    return {name: Array(array.shape, array.dtype, ours=array) for name, array in found.items()}


def _theirs(directory: Path) -> dict[str, Array]:
    """Every array that tensorstore finds where the metadata has one: name -> array."""
    found = {}
    for name in _names(directory):
        try:
            opened = _open(directory, name)
        except Exception:  # strings, None and empty trees have no array; what of the model is missing is told by name
            continue
        found[name] = Array(tuple(opened.shape), np.dtype(opened.dtype.numpy_dtype), theirs=opened)
    return found


def _names(directory: Path) -> list[str]:
    """Of the leaves of its tree."""
    try:
        entries = parse_json((directory / METADATA).read_bytes())["tree_metadata"].values()
        return [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{directory / METADATA}: expected Orbax's metadata, found something else ({e!r})") from None


def _open(directory: Path, key: str) -> Any:
    """The tensorstore of an array."""
    import tensorstore

    about = parse_json((directory / METADATA).read_bytes())
    kvstore = stored_at(directory / key)
    if about.get("use_ocdbt", True):
        kvstore = {"driver": "ocdbt", "base": stored_at(directory), "path": f"{key}/"}
    spec = {"driver": "zarr3" if about.get("use_zarr3") else "zarr", "kvstore": kvstore}
    return tensorstore.open(spec, read=True, open=True).result()


def _of_the_model(directory: Path, arrays: dict[str, Array]) -> dict[str, Array]:
    """Those of the model, by its own names."""
    above = _above(arrays)
    if len(above) != 1:
        what = f"several ({', '.join(prefix or 'the whole' for prefix in above)})" if above else "none"
        some = ", ".join(sorted(arrays)[:3])
        raise InputError(
            f"{directory}: expected one tree of a whole model's parameters ({FIRST}), found {what}; it has {some or 'none'}. "
            "LoRA updates alone are merged into a checkpoint: --merge"
        )
    names = {name.removeprefix(above[0]): array for name, array in arrays.items() if name.startswith(above[0])}
    return {name.removesuffix(f".{LEAF}"): array for name, array in names.items() if name.endswith(f".{LEAF}")}


def _above(names: Iterable[str]) -> list[str]:
    """What stands before the names of a model, for each that is in a tree."""
    above = [name.removesuffix(FIRST) for name in names if name.endswith(FIRST)]
    return [prefix for prefix in above if not NOT_THE_MODEL & set(prefix.split("."))]


def _unstacked(arrays: dict[str, Array], wanted: dict[str, Entry]) -> dict[str, tuple[str, int | None]]:
    """Parameter -> the array that it is in, and which of its first axis it is, where layers are stacked; None: all of it."""
    norm = "layers.0.attn.norm.scale"
    if norm not in arrays or len(arrays[norm].shape) != len(wanted[norm].model_shape) + 1:
        return {name: (name, None) for name in wanted}
    turn = len({name.split(".")[1] for name in arrays if name.startswith("layers.")})
    found = {}
    for name in wanted:
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            found[name] = (f"layers.{int(number) % turn}.{rest}", int(number) // turn)
        else:
            found[name] = (name, None)
    return found


def _mismatches(
    directory: Path, arrays: dict[str, Array], turns: dict[str, tuple[str, int | None]], wanted: dict[str, Entry]
) -> list[str]:
    faults = []
    for name, entry in wanted.items():
        stored, turn = turns[name]
        if stored not in arrays:
            faults.append(f"{directory}: {stored}: missing; config.json says that the model has it")
            continue
        array = arrays[stored]
        shape = array.shape if turn is None else array.shape[1:]
        kinds = (UINT8,) if entry.packed else (BFLOAT16, FLOAT32)
        if shape != entry.model_shape or (turn is not None and turn >= array.shape[0]):
            faults.append(
                f"{directory}: {stored}: expected shape {list(entry.model_shape)} by config.json, found {list(shape)}"
            )
        if array.dtype not in kinds:
            faults.append(f"{directory}: {stored}: expected {' or '.join(k.name for k in kinds)}, found {array.dtype}")
    known = {stored for stored, _ in turns.values()}
    for name in sorted(arrays.keys() - known):
        more = "; merge LoRA updates first (oss_model.merge_lora), or save them apart and --merge" if ".lora." in name else ""
        faults.append(f"{directory}: {name}: unexpected; the model has no such parameter{more}")
    return faults


def _config_file(directory: Path) -> Path:
    """config.json, which training does not save: beside the arrays, or above them, or in the checkpoint it began with."""
    for place in [directory, *directory.parents][: ABOVE + 1]:
        for file in (place / "config.json", place / "base" / "config.json"):
            if file.is_file():
                return file
    raise InputError(f"{directory / 'config.json'}: missing, and in the directories above; copy the model's there")
