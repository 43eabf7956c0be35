"""From rows in files to arrays on devices: what each device holds is read once, in threads, into the memory that becomes it.

On a CPU an array of JAX's is the memory that was read into: nothing is copied. Whole chunks are read, where a device holds a
part of one too, since a part has no checksum.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oss_model.errors import InputError, raise_all
from oss_model.memory import CORES

WORKERS = max(2, min(4, CORES))  # of 16 cores, 4 read faster than 8 or 16: they wait for each other's page faults
LARGE = 1 << 20  # bytes, of memory that is worth pages of its own


class Rows(NamedTuple):
    """Where a parameter comes from.

    Attributes:
      step: how many rows of its first axis are read at a time.
      read: given some of them (whole steps, as far as there are any), fills an array: contiguous, of the dtype wanted.
    """

    step: int
    read: Callable[[slice, np.ndarray], None]


Cut = tuple[tuple[int, int], ...]  # first and last + 1 along each axis: what a device holds


class _Assembly:
    """One parameter that is being read: a piece of memory for each part that differs, whatever number of devices hold it."""

    def __init__(self, like: jax.ShapeDtypeStruct, rows: Rows):
        self.shape, self.dtype, self.rows = like.shape, like.dtype, rows
        self.sharding = like.sharding or jax.sharding.SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
        held = self.sharding.addressable_devices_indices_map(like.shape)
        self.cuts: dict[Any, Cut] = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index or (), like.shape, strict=True))
            for device, index in held.items()
        }
        self.parts = {cut: _empty([stop - start for start, stop in cut], like.dtype) for cut in set(self.cuts.values())}

    def steps(self) -> list[slice]:
        """The rows that are read at a time, where this process holds any of them."""
        found = []
        for start in range(0, self.shape[0], self.rows.step):
            stop = min(start + self.rows.step, self.shape[0])
            if any(first < stop and start < last for (first, last), *_ in self.parts):
                found.append(slice(start, stop))
        return found

    def read(self, rows: slice) -> None:
        """One step, straight to where it is whole, if it is so anywhere; from there to wherever there is some of it."""
        inner, owner = tuple((0, size) for size in self.shape[1:]), None
        values = np.empty(0, self.dtype)
        for cut, part in self.parts.items():
            (first, last), *rest = cut
            if owner is None and first <= rows.start and rows.stop <= last and tuple(rest) == inner:
                values, owner = part[rows.start - first : rows.stop - first], cut
        if owner is None:
            values = np.empty((rows.stop - rows.start, *self.shape[1:]), self.dtype)
        self.rows.read(rows, values)
        for cut, part in self.parts.items():
            (first, last), *rest = cut
            start, stop = max(first, rows.start), min(last, rows.stop)
            if start < stop and cut != owner:
                mine = (slice(start - rows.start, stop - rows.start), *(slice(*of) for of in rest))
                part[start - first : stop - first] = values[mine]

    def array(self) -> jax.Array:
        """Once every step is read."""
        pieces = [jax.device_put(self.parts[cut], device) for device, cut in self.cuts.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, pieces)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Aligned as JAX wants it, to take it over without a copy; in huge pages, to be touched a hundred times less often."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < LARGE:
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages only
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def placed(wanted: Mapping[str, jax.ShapeDtypeStruct], sources: Mapping[str, Rows]) -> Iterator[tuple[str, jax.Array]]:
    """(name, array) of all that is wanted, in its order.

    Args:
      wanted: shape, dtype and sharding (JAX's default device if None) of each.
      sources: where each comes from.

    Raises:
      InputError: when all else is read: what `Rows.read` has raised as such, the first line a parameter.
    """
    pool, running, faults = ThreadPoolExecutor(WORKERS, thread_name_prefix="reading"), [], []
    try:
        for name, like in wanted.items():
            assembly = _Assembly(like, sources[name])
            running.append((name, assembly, [pool.submit(assembly.read, rows) for rows in assembly.steps()]))
        running.reverse()
        while running:
            name, assembly, steps = running.pop()
            wrong = _wait(steps)
            faults += _first(wrong)
            if not wrong:
                yield name, assembly.array()
            del assembly, steps
        raise_all(faults)
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(steps: Iterable[Future]) -> list[str]:
    """What was wrong with the input of these."""
    found = []
    for step in steps:
        try:
            step.result()
        except InputError as e:
            found += e.faults
    return found


def _first(faults: list[str]) -> list[str]:
    """Of one parameter: a damaged disk damages all its chunks."""
    return [faults[0] + (f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else "")] if faults else []
