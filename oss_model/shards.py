"""Directories of safetensors: checked when opened, then read lazily by tensor name.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data).
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from oss_model import layouts
from oss_model.buckets import FETCH_BYTES, GsPath, path_of
from oss_model.config import ModelConfig
from oss_model.errors import GGUF, InputError, nothing_at, raise_all
from oss_model.files import OpenFile, parse_json
from oss_model.lora_note import NOTE

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32), "U8": np.dtype(np.uint8)}


_HEADER_BYTES = 100_000_000  # that safetensors allows at the most


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    nbytes: int


class Shards:
    """The tensors of a safetensors directory, by name.

    Opening reads headers only. Data is read with `pread`, so no pages of the source stay mapped into the process.

    Raises:
      InputError: naming every file that is missing, truncated or outside the directory, and every tensor that is
        duplicated, or that the index and the shards disagree about.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = path_of(directory)
        self.tensors: dict[str, Tensor] = {}
        self._open: dict[Path, OpenFile] = {}
        faults: list[str] = []
        weight_map = _read_index(self.directory / INDEX, faults)
        if weight_map is None:
            files = sorted(self.directory.glob("*.safetensors"))
        else:
            files = sorted({self.directory / name for name in weight_map.values() if _is_beside(self.directory, name)})
            for stray in sorted(set(self.directory.glob("*.safetensors")) - set(files)):
                faults.append(f"{stray}: not named by {INDEX}; move it away, or rebuild the index")
        seen: dict[str, Path] = {}
        whole: set[str] = set()
        for file in files:
            header = _read_header(file, faults)
            if header is None:
                continue
            whole.add(file.name)
            for name, tensor in header.items():
                if name in seen:
                    faults.append(f"{file}: {name}: duplicate; {seen[name].name} has it too")
                elif weight_map is not None and name not in weight_map:
                    faults.append(f"{file}: {name}: in the shard but not in {INDEX}; rebuild the index")
                elif weight_map is not None and weight_map[name] != file.name:
                    faults.append(f"{file}: {name}: found here, but {INDEX} says {weight_map[name]}")
                seen[name] = file
                self.tensors[name] = tensor
        for name, file in (weight_map or {}).items():
            if name not in seen and file in whole:
                faults.append(f"{self.directory / file}: {name}: missing; {INDEX} says it is here")
        raise_all(faults)
        if not files:
            raise InputError(f"{self.directory}: expected *.safetensors files, found none; {_look_elsewhere(self.directory)}")

    def signature(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, safetensors dtype), as `layouts.check` takes it."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice = slice(None), buffer: np.ndarray | None = None) -> np.ndarray:
        """Read one tensor, or a run of rows along its first axis, in the stored dtype.

        `buffer` (uint8, flat, large enough) is read into where one is given: a stream that reuses one does not pay
        for fresh pages at every read. Otherwise the array is new.
        """
        tensor = self.tensors[name]
        start, stop, _ = rows.indices(tensor.shape[0])
        stop = max(start, stop)
        row_bytes = tensor.nbytes // tensor.shape[0]
        nbytes = (stop - start) * row_bytes
        out = np.empty(nbytes, np.uint8) if buffer is None else buffer[:nbytes]
        self._pread(tensor.file, out, tensor.offset + start * row_bytes)
        return out.view(_DTYPES[tensor.dtype]).reshape(stop - start, *tensor.shape[1:])

    def _pread(self, file: Path, out: np.ndarray, offset: int) -> None:
        opened = self._open.get(file)
        if opened is None:
            try:
                mine = OpenFile(file)
            except OSError as e:
                raise InputError(f"{file}: cannot be opened any more ({e.strerror}); it changed while it was read") from None
            opened = self._open.setdefault(file, mine)
            if opened is not mine:  # another thread was faster
                mine.close()
        try:
            opened.fill(out, offset)
        except EOFError as e:
            raise InputError(f"{file}: {e}; it changed while it was read") from None

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Checkpoint:
    """A safetensors directory that is known to be a complete gpt-oss model: its tensors, layout and configuration."""

    def __init__(self, directory: str | os.PathLike, ignore: Collection[str] | None = ()):
        """Open and check everything but the values.

        Args:
          ignore: see `ModelConfig.from_json`.

        Raises:
          InputError: naming every fault of config.json, the files, and the tensors' names, shapes and dtypes.
        """
        self.directory = path_of(directory)
        if not self.directory.is_dir():
            found = nothing_at(self.directory)
            raise InputError(f"{self.directory}: expected a directory of safetensors files, found {found}")
        updates = [name for name in ("adapter_config.json", NOTE) if (self.directory / name).is_file()]
        if updates and not (self.directory / "config.json").exists():
            raise InputError(
                f"{self.directory}: expected a whole model, found LoRA updates ({updates[0]}): give the model, and these with"
                " convert-oss --merge; inspect-oss says what else can be done"
            )
        faults: list[str] = []
        try:
            self.shards = Shards(self.directory)
            self.layout = _recognise(self.shards)
        except InputError as e:
            if not any(self.directory.glob("*.safetensors")):
                raise  # nothing here to say more about
            faults += e.faults
        try:
            self.cfg = ModelConfig.from_json(self.directory / "config.json", ignore)
        except InputError as e:
            faults += e.faults
        raise_all(faults)
        raise_all(layouts.check(self.shards.signature(), self.layout, self.cfg, str(self.directory)))
        raise_all(
            [
                f"{self.directory}: {entry.checkpoint}: expected one dtype, found {' and '.join(sorted(kinds))}"
                for entry in self.entries()
                if len(kinds := {self.shards.tensors[name].dtype for name in entry.tensors}) > 1
            ]
        )

    def close(self) -> None:
        self.shards.close()

    @property
    def home(self) -> Path:
        """The directory of config.json, and of what else belongs to the model."""
        return self.directory

    def entries(self) -> list[layouts.Entry]:
        return layouts.entries(self.layout, self.cfg)

    def together(self, entry: layouts.Entry) -> int:
        """How many rows of its tensor's first axis are read at once, whether they are asked for or not."""
        if not isinstance(self.directory, GsPath):
            return 1
        row = math.prod(entry.checkpoint_shape[1:]) * self.dtype(entry).itemsize
        return max(1, min(entry.checkpoint_shape[0], FETCH_BYTES // row))

    def files_of(self, entry: layouts.Entry) -> list[Path]:
        """Those that the parameter of `entry` is in."""
        return sorted({self.shards.tensors[name].file for name in entry.tensors})

    @property
    def files(self) -> list[Path]:
        """Those with tensors."""
        return sorted({tensor.file for tensor in self.shards.tensors.values()})

    def dtype(self, entry: layouts.Entry) -> np.dtype:
        """As the parameter of `entry` is stored."""
        return _DTYPES[self.shards.tensors[entry.tensors[0]].dtype]

    def read(self, entry: layouts.Entry, rows: slice = slice(None), buffer: np.ndarray | None = None) -> np.ndarray:
        """The parameter of `entry` (or a run along its first axis) in the checkpoint's shape and dtype."""
        start, stop, _ = rows.indices(entry.checkpoint_shape[0])
        if entry.spread:
            return self._read_spread(entry, slice(start, stop))
        return self.shards.read(entry.checkpoint, slice(entry.start + start, entry.start + stop), buffer)

    def _read_spread(self, entry: layouts.Entry, rows: slice) -> np.ndarray:
        axis = entry.order.index(entry.spread)
        if axis == 0:
            return np.stack([self.shards.read(name) for name in entry.tensors[rows]])
        return np.stack([self.shards.read(name, rows) for name in entry.tensors], axis)


def _recognise(shards: Shards) -> layouts.Layout:
    layout = layouts.recognise(shards.signature())
    if layout is None:
        raise layouts.not_a_checkpoint(str(shards.directory), shards.tensors)
    return layout


def _read_index(path: Path, faults: list[str]) -> dict[str, str] | None:
    """Tensor name -> file name; None where there is no index. Files outside the directory are faults."""
    if not path.exists():
        return None
    try:
        weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: expected an index with a weight_map object, found something else ({e!r})") from None
    for file in sorted(set(names.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            faults.append(f"{path}: names {file!r}, outside its own directory; an index may only name files beside it")
        elif not _is_beside(path.parent, file):
            faults.append(f"{path.parent / file}: missing; {INDEX} names it. Download it again")
    return names


def _is_beside(directory: Path, file: str) -> bool:
    return Path(file).name == file and (directory / file).is_file()


def _read_header(file: Path, faults: list[str]) -> dict[str, Tensor] | None:
    try:
        with _here(file) as here:
            with safe_open(here, framework="numpy"):
                pass  # the library checks the header against itself and against the file's length
            with open(here, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = parse_json(f.read(length))
    except (SafetensorError, OSError, ValueError) as e:
        faults.append(f"{file}: expected a whole safetensors file, found a truncated or damaged one ({e}). Download it again")
        return None
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        tensors[name] = Tensor(file, info["dtype"], tuple(info["shape"]), 8 + length + begin, end - begin)
    return tensors


@contextlib.contextmanager
def _here(file: Path) -> Iterator[Path]:
    """The file; of an object a stand-in on the disk, of the same length, which is a hole but for the header."""
    if not isinstance(file, GsPath):
        yield file
        return
    opened, length = OpenFile(file), np.zeros(8, np.uint8)
    opened.fill(length[: min(8, opened.size)], 0)
    start = np.empty(min(opened.size, 8 + min(int.from_bytes(length.tobytes(), "little"), _HEADER_BYTES)), np.uint8)
    opened.fill(start, 0)
    with tempfile.TemporaryDirectory(prefix="convert-oss-") as scratch:
        stand_in = Path(scratch) / file.name
        with open(stand_in, "wb") as f:
            f.write(start.data)
            f.truncate(opened.size)
        yield stand_in


def _look_elsewhere(directory: Path) -> str:
    """What to do about a directory that has no safetensors of its own."""
    if (directory / "conversion.json").exists() or (directory / "_METADATA").exists():
        return "it is an Orbax checkpoint already"
    if (directory / "model.bin").exists():
        return "model.bin is in OpenAI's Metal format, which is not read: give the directory above metal/, or original/"
    if any(directory.glob("*.gguf")):
        return GGUF
    below = sorted({file.parent.name for file in directory.glob("*/*.safetensors")})
    if below:
        return f"there are some in {', '.join(below)}: give that directory"
    if any(directory.iterdir()):
        return "give the directory that config.json and the shards are in"
    return "it is empty"


def shard_header(tensors: dict[str, tuple[tuple[int, ...], str]]) -> bytes:
    """The first bytes of a safetensors file of these tensors (name -> shape, safetensors dtype), which follow in this order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: dict[str, tuple[tuple[int, ...], str]], pieces) -> None:
    """Write one safetensors file as a stream.

    Args:
      path: the file.
      tensors: name -> (shape, safetensors dtype), in the order of `pieces`.
      pieces: an iterable of arrays: the data of all tensors one after the other, each in any number of pieces.
    """
    header, nbytes = shard_header(tensors), sum(math.prod(shape) * _DTYPES[dtype].itemsize for shape, dtype in tensors.values())
    with open(path, "wb") as f:
        f.write(header)
        for piece in pieces:
            f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if f.tell() != len(header) + nbytes:
            raise ValueError(f"{path}: the pieces hold {f.tell() - len(header)} bytes, the header {nbytes}")
