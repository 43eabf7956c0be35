"""Before the first byte: is there room on the disk and in memory, and how long will it take?"""

import dataclasses
import math
import os
import time
from pathlib import Path

from converter.chunks import PIECE_BYTES, Reader
from converter.ends import Sink, Source
from converter.plan import Chunk, Plan, Target
from oss_model.buckets import GsPath
from oss_model.errors import InputError
from oss_model.memory import rss

SLACK_BYTES = 48 << 20  # what allocators and libraries keep, measured on 20b and 120b sizes
FILE_BYTES = 4096  # that a small file or a directory takes on the disk
DISK_RATE = 1e9  # bytes a second, for the estimate: what a usual solid-state disk writes in the long run


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a conversion will take."""

    space_needed: int  # bytes on the disk of the destination, without what is there already
    space_free: int | None  # None: nobody says, of a bucket
    memory: int  # bytes resident at the most, with `workers` threads
    workers: int


def reader_bytes(target: Target, source: Source | None = None) -> int:
    """What a `Reader` holds for a chunk of `target`: what is read at a time, and pieces of output."""
    row = target.shape[-1] * target.dtype.itemsize
    total = 6 * max(PIECE_BYTES, row)  # decoded, contiguous, stored, and what decoding takes
    for part in target.parts:
        rows = target.rows if len(target.parts) == 1 else part.to.model_shape[0]
        for entry in part.sources:
            nbytes = math.prod(entry.model_shape[1:]) * (1 if entry.packed else 4)  # of a row; float32 at the most
            whole = nbytes * min(rows, entry.model_shape[0])
            # What is read whole; and, of what is quantized or transposed, what is made of it
            together = nbytes * (source.together(entry) if source else 1)
            total += max(4 * PIECE_BYTES, together) if part.keeps_order else whole * (3 if part.is_quantized else 1)
        if not part.is_quantized and part.to.order[-1] != part.sources[0].order[-1] and not part.to.packed:
            total += 2 * math.prod(part.to.model_shape[1:]) * 4 * min(rows, part.to.model_shape[0])
    return total


def measure(source: Source, plan: Plan, sink: Sink, directory: Path, max_memory: int | None) -> Needs:
    """
    Args:
      directory: where chunks are written; it need not exist.
      max_memory: resident bytes of the process, all in.

    Raises:
      InputError: if the disk has too little room, or `max_memory` is too small for a single thread.
    """
    base = rss() + SLACK_BYTES
    each = max(reader_bytes(target, source) for target in plan.targets) + sink.held(plan)
    workers = sink.workers
    if max_memory is not None:
        if base + each > max_memory:
            least = math.ceil((base + each) / (1 << 20))
            raise InputError(f"--max-memory: expected at least {least}M for this checkpoint, found {max_memory >> 20}M")
        workers = min(sink.workers, (max_memory - base) // each)
    files, free = len(plan.chunks) * 4 + len(plan.targets) * 3, free_space(directory)  # directories and zarr.json
    needed = plan.nbytes - sink.present(plan.chunks) + (files * FILE_BYTES if free is not None else 0)
    if free is not None and needed > free:
        raise InputError(
            f"{directory.parent.parent.resolve()}: expected {needed:,} bytes of free space, found {free:,}; "
            f"make room for {needed - free:,} more, or give another disk"
        )
    return Needs(needed, free, base + workers * each, workers)


def estimate_seconds(source: Source, plan: Plan, workers: int) -> float:
    """How long converting will take: the slower of converting, by a sample, and a disk that writes DISK_RATE."""
    sample = max((target.chunks()[0] for target in plan.targets), key=lambda chunk: chunk.nbytes)
    rate = max(_rate(source, plan, sample) for _ in range(2))  # the first pays for fresh memory
    return plan.nbytes / min(rate * workers, DISK_RATE)


def _rate(source: Source, plan: Plan, chunk: Chunk) -> float:
    """Bytes a second of one thread, without writing."""
    reader, start = Reader(source, plan.form.quantizer), time.perf_counter()
    for _ in reader.pieces(chunk):
        pass
    return chunk.nbytes / (time.perf_counter() - start)


def free_space(directory: Path) -> int | None:
    """Bytes that are free on the disk of `directory`, which need not exist; None: nobody says, of a bucket."""
    if isinstance(directory, GsPath):
        return None
    while not directory.exists():
        directory = directory.parent
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
