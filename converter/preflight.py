"""Before the first byte: is there room on the disk and in memory, and how long will it take?"""

import dataclasses
import math
import os
import time
from pathlib import Path

from converter.chunks import PIECE_BYTES, Reader
from converter.plan import Chunk, Plan, Target
from converter.store import Store
from converter.threads import WORKERS
from oss_model.errors import InputError
from oss_model.memory import rss
from oss_model.shards import Checkpoint

SLACK_BYTES = 48 << 20  # what allocators and libraries keep, measured on 20b and 120b sizes
FILE_BYTES = 4096  # that a small file or a directory takes on the disk
DISK_RATE = 1e9  # bytes a second, for the estimate: what a usual solid-state disk writes in the long run


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a conversion will take."""

    space_needed: int  # bytes on the disk of the destination, without what is there already
    space_free: int
    memory: int  # bytes resident at the most, with `workers` threads
    workers: int


def reader_bytes(target: Target) -> int:
    """What a `Reader` holds for a chunk of `target`: what is read at a time, and pieces of output."""
    row = target.shape[-1] * target.dtype.itemsize
    total = 6 * max(PIECE_BYTES, row)  # decoded, contiguous, stored, and what decoding takes
    for entry in target.sources:
        count, *rest = entry.checkpoint_shape
        nbytes = math.prod(rest) * (1 if entry.packed else 4)  # of a row; float32 at the most
        if len(target.sources) == 1 and entry.keeps_order:
            total += max(4 * PIECE_BYTES, nbytes)
        else:
            total += nbytes * (count if target.rows == target.shape[0] else target.rows)
    return total


def measure(checkpoint: Checkpoint, plan: Plan, directory: Path, max_memory: int | None) -> Needs:
    """
    Args:
      directory: where chunks are written; it need not exist.
      max_memory: resident bytes of the process, all in.

    Raises:
      InputError: if the disk has too little room, or `max_memory` is too small for a single thread.
    """
    base = rss() + SLACK_BYTES
    each = max(reader_bytes(target) for target in plan.targets)
    workers = WORKERS
    if max_memory is not None:
        if base + each > max_memory:
            least = math.ceil((base + each) / (1 << 20))
            raise InputError(f"--max-memory: expected at least {least}M for this checkpoint, found {max_memory >> 20}M")
        workers = min(WORKERS, (max_memory - base) // each)
    files = len(plan.chunks) * 4 + len(plan.targets) * 3  # directories and zarr.json
    store = Store(directory)
    present = sum(chunk.nbytes for chunk in plan.chunks if store.is_whole(chunk))
    needed = plan.nbytes - present + files * FILE_BYTES
    free = free_space(directory)
    if needed > free:
        raise InputError(
            f"{directory.parent.parent.resolve()}: expected {needed:,} bytes of free space, found {free:,}; "
            f"make room for {needed - free:,} more, or give another disk"
        )
    return Needs(needed, free, base + workers * each, workers)


def estimate_seconds(checkpoint: Checkpoint, plan: Plan, workers: int) -> float:
    """How long converting will take: the slower of converting, by a sample, and a disk that writes DISK_RATE."""
    sample = max((target.chunks()[0] for target in plan.targets), key=lambda chunk: chunk.nbytes)
    rate = max(_rate(checkpoint, sample) for _ in range(2))  # the first pays for fresh memory
    return plan.nbytes / min(rate * workers, DISK_RATE)


def _rate(checkpoint: Checkpoint, chunk: Chunk) -> float:
    """Bytes a second of one thread, without writing."""
    reader, start = Reader(checkpoint), time.perf_counter()
    for _ in reader.pieces(chunk):
        pass
    return chunk.nbytes / (time.perf_counter() - start)


def free_space(directory: Path) -> int:
    """Bytes that are free on the disk of `directory`, which need not exist."""
    while not directory.exists():
        directory = directory.parent
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
