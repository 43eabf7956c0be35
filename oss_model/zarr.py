"""The arrays of a checkpoint that convert-oss wrote: zarr3 chunks along the first axis, of raw bytes and a checksum.

What an array is comes from its own zarr.json, never from our own grid, so that a wrong one cannot hide. Whatever is in another
form (compressed, cut otherwise, in one file a process) is Orbax's to read: `open_arrays` says which it is.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oss_model.errors import InputError
from oss_model.files import OpenFile, crc32c, parse_json, read_each
from oss_model.layouts import BFLOAT16, FLOAT32, UINT8
from oss_model.mxfp4 import widen_into

METADATA = "_METADATA"  # the file that every checkpoint saved by Orbax has
CHECKSUM_BYTES = 4  # crc32c, little-endian, at the end of each chunk
PIECE_BYTES = 2 << 20  # read at a time, and in the cache still when its checksum is made
DTYPES = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT32, UINT8)}


class DamagedChunk(Exception):
    """Its text says what is wrong with the file."""


class ChunkFile:
    """The file of a chunk, read from its start to its end: `read` as often as there are pieces, then `check`.

    Args:
      offset: of a chunk that is a part of a file, as of safetensors, and has no checksum. None: it is all of the file.

    Raises:
      DamagedChunk: if it is missing or has not the size that its values and their checksum need.
    """

    def __init__(self, path: Path, nbytes: int, offset: int | None = None):
        self._at, self._crc, self._has_checksum = offset or 0, 0, offset is None
        span = self._at, nbytes + (CHECKSUM_BYTES if offset is None else 0)
        try:
            self._file = OpenFile(path, span)
        except FileNotFoundError:
            raise DamagedChunk("missing" if offset is None else f"{path.name} is missing") from None
        size, wanted = self._file.size, sum(span)
        if size < wanted or (offset is None and size != wanted):
            self._file.close()
            raise DamagedChunk(f"expected {wanted} bytes{'' if offset is None else f' of {path.name}, or more'}, found {size}")

    def __enter__(self) -> "ChunkFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def read(self, out: np.ndarray) -> None:
        """The next values, into `out` (uint8, flat)."""
        self._fill(out)
        if self._has_checksum:
            self._crc = crc32c(self._crc, out)

    def check(self) -> None:
        """After the last value.

        Raises:
          DamagedChunk: if the checksum is that of other values.
        """
        if not self._has_checksum:
            return
        checksum = np.empty(CHECKSUM_BYTES, np.uint8)
        self._fill(checksum)
        if checksum.tobytes() != self._crc.to_bytes(CHECKSUM_BYTES, "little"):
            raise DamagedChunk("its bytes and its checksum disagree")

    def _fill(self, out: np.ndarray) -> None:
        try:
            self._file.fill(out, self._at)
        except EOFError as e:
            raise OSError(f"file {e} while it was read") from None
        self._at += len(out)


class StoredArray(NamedTuple):
    """What an array's zarr.json says of it.

    Attributes:
      rows: of the first axis, in one chunk; the other axes are whole. The last chunk is filled up.
    """

    directory: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    @property
    def chunk_nbytes(self) -> int:
        """Without the checksum."""
        return math.prod((self.rows, *self.shape[1:])) * self.dtype.itemsize

    def chunk(self, index: int) -> Path:
        """Its file, by zarr's default key encoding."""
        return self.directory.joinpath("c", str(index), *("0" for _ in self.shape[1:]))

    def read(self, rows: slice, out: np.ndarray) -> None:
        """Some rows, of whole chunks, into `out` (contiguous, as many values): as stored, or bfloat16 widened to float32.

        Raises:
          DamagedChunk: naming the file.
        """
        flat = out.reshape(-1)
        done, row = 0, math.prod(self.shape[1:])
        for index in range(rows.start // self.rows, math.ceil(rows.stop / self.rows)):
            count = (min((index + 1) * self.rows, self.shape[0]) - index * self.rows) * row
            self._read_chunk(index, flat[done : done + count])
            done += count

    def _read_chunk(self, index: int, out: np.ndarray) -> None:
        path = self.chunk(index)
        try:
            with ChunkFile(path, self.chunk_nbytes) as file:
                if out.dtype == self.dtype:
                    data = out.view(np.uint8)
                    for start in range(0, len(data), PIECE_BYTES):
                        file.read(data[start : start + PIECE_BYTES])
                else:
                    self._widen(file, out)
                filled_up = np.empty(self.chunk_nbytes - out.size * self.dtype.itemsize, np.uint8)
                if filled_up.size:
                    file.read(filled_up)
                file.check()
        except DamagedChunk as e:
            raise DamagedChunk(f"{path.relative_to(self.directory.parent)}: {e}") from None

    def _widen(self, file: ChunkFile, out: np.ndarray) -> None:
        step = PIECE_BYTES // self.dtype.itemsize
        piece = np.empty(min(step, len(out)), self.dtype)
        for start in range(0, len(out), step):
            part = out[start : start + step]
            file.read(piece[: len(part)].view(np.uint8))
            widen_into(piece[: len(part)], part)


def describe(shape: tuple[int, ...], dtype: np.dtype, rows: int) -> dict:
    """The zarr.json of an array whose chunks are `rows` of its first axis."""
    floating = dtype != UINT8
    return {
        "chunk_grid": {"configuration": {"chunk_shape": [rows, *shape[1:]]}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes"} | ({"configuration": {"endian": "little"}} if floating else {}), {"name": "crc32c"}],
        "data_type": dtype.name,
        "fill_value": 0.0 if floating else 0,
        "node_type": "array",
        "shape": list(shape),
        "zarr_format": 3,
    }


def open_arrays(path: Path) -> dict[str, StoredArray] | None:
    """Name -> array, of every array that the checkpoint says it has; None where one of them, or the whole, is in another form.

    Names are those of the tree, such as `layers.0.attn.sinks.value`.
    """
    try:
        metadata = parse_json((path / METADATA).read_bytes())
        if metadata["use_ocdbt"] or not metadata["use_zarr3"]:
            return None
        entries = metadata["tree_metadata"].values()
        if any(entry["value_metadata"]["skip_deserialize"] for entry in entries):
            return None
        names = [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
        texts = read_each(path / name / "zarr.json" for name in names)
        found = {name: _opened(path / name, text) for name, text in zip(names, texts, strict=True)}
    except InputError:  # of a bucket that may not be read
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # Orbax says what is wrong
    whole = {name: array for name, array in found.items() if array is not None}
    return whole if len(whole) == len(found) else None


def _opened(directory: Path, text: bytes) -> StoredArray | None:
    """What its zarr.json says, if that is of our form."""
    found = parse_json(text)
    shape, (rows, *_) = tuple(found["shape"]), found["chunk_grid"]["configuration"]["chunk_shape"]
    sizes = (*shape, rows)
    if not all(type(size) is int and size > 0 for size in sizes) or found["data_type"] not in DTYPES:
        return None
    array = StoredArray(directory, shape, DTYPES[found["data_type"]], rows)
    return array if found == describe(shape, array.dtype, rows) else None
