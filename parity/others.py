"""A checkpoint as others read it: by plain Orbax, and tensorstore below it. What they find is compared with the reference."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore

from oss_model.buckets import stored_at
from oss_model.params import restore_arrays
from oss_model.restoring import restoring
from oss_model.zarr import StoredArray
from parity.protocols import Arrays


def with_a_chunk_each(arrays: dict[str, StoredArray], found: Arrays) -> Arrays:
    """`found`, which our reader read, with one chunk of each parameter as tensorstore reads it; which one goes by its name.

    Where both read the same, and they should, nothing is copied.
    """
    return {name: _with_a_chunk(name, arrays[f"{name}.value"], value) for name, value in found.items()}


def _with_a_chunk(name: str, array: StoredArray, value: np.ndarray) -> np.ndarray:
    start = zlib.crc32(name.encode()) % -(-array.shape[0] // array.rows) * array.rows
    spec = {"driver": "zarr3", "kvstore": stored_at(array.directory)}
    with restoring(array.directory.parent, value.nbytes):
        opened = tensorstore.open(spec, read=True, open=True).result()
        theirs = np.asarray(opened[start : min(start + array.rows, array.shape[0])].read().result())
    ours = value[start : start + array.rows]
    if ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes():
        return value
    seen = np.array(value)
    seen[start : start + array.rows] = theirs
    return seen


def whole(path: Path, stored: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Arrays:
    """All of these parameters, of shapes and dtypes as stored, as plain Orbax reads them."""
    found = restore_arrays(path, {name: (*of, None) for name, of in stored.items()})
    return {name: np.asarray(value) for name, value in found.items()}
