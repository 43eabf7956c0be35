"""The conversion: plan, stream, finish, verify."""

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from converter import store as stores
from converter.chunks import Reader
from converter.destination import Destination
from converter.errors import Different
from converter.plan import Chunk, Plan, make_plan
from converter.source import companions, open_source
from converter.store import MANIFEST, Store
from converter.threads import in_threads
from converter.verify import difference
from oss_model.config import PARAM_DTYPES
from oss_model.errors import InputError
from oss_model.shards import Checkpoint

# (phase, bytes of it done, bytes of it in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Result:
    """What a conversion did; `--json` prints these fields."""

    status: str  # "complete"
    source: str
    destination: str
    source_layout: str
    dtype: str
    tensors: int
    chunks: int
    bytes_read: int  # of the source, for converting
    bytes_written: int  # of chunk files
    seconds: float
    peak_rss_bytes: int
    verified: bool


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = lambda phase, done, total: None,
) -> Result:
    """Convert the safetensors checkpoint `src` to an Orbax checkpoint at `dst`.

    Args:
      src: a directory in one of the layouts of `oss_model.layouts`, recognised by content.
      dst: a new or empty directory, or with `overwrite` a finished checkpoint, which is replaced when the new one is
        whole.
      dtype: how parameters are stored: "bfloat16", "float32", or "mxfp4" (experts packed, everything else bfloat16).
      verify: read back what was written and compare it with the source decoded anew.

    Raises:
      InputError: if the source or the destination cannot be used, naming every fault; `dst` is left as it was.
      Different: if what was written is not what was read (a broken disk, a source that changed).
    """
    start = time.perf_counter()
    if dtype not in PARAM_DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(PARAM_DTYPES)}, found {dtype!r}")
    destination = Destination(dst)
    destination.check(Path(src), overwrite)
    checkpoint = open_source(src, dtype)
    with checkpoint.shards:
        plan = make_plan(checkpoint, dtype)
        store = Store(destination.prepare())
        hashes, bytes_read = _stream(checkpoint, plan, store, progress)
        _finish(checkpoint, plan, store, hashes)
        if verify:
            _verify(checkpoint, plan, store, progress)
        destination.finish()
    return Result(
        status="complete",
        source=str(Path(src).resolve()),
        destination=str(Path(dst).resolve()),
        source_layout=checkpoint.layout.name,
        dtype=dtype,
        tensors=len(plan.targets),
        chunks=len(plan.chunks),
        bytes_read=bytes_read,
        bytes_written=plan.nbytes,
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        verified=verify,
    )


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Of one chunk, xxh3_128."""

    stored: bytes  # of the values on disk, without the checksum
    read: tuple[bytes, ...]  # of what was read for it, one a source tensor


def _stream(checkpoint: Checkpoint, plan: Plan, store: Store, progress: Progress) -> tuple[dict[str, Hashes], int]:
    """Write every chunk. Returns their hashes by path, and the bytes read."""
    for target in plan.targets:
        store.write_array(target)

    def worker():
        reader = Reader(checkpoint)

        def write(chunk: Chunk) -> tuple[Chunk, Hashes, int]:
            before = reader.bytes_read
            pieces = reader.pieces(chunk)
            stored = store.write_chunk(chunk, pieces)
            return chunk, Hashes(stored, tuple(pieces.digests)), reader.bytes_read - before

        return write

    hashes, done, bytes_read = {}, 0, 0
    for chunk, found, nbytes in in_threads(worker, plan.chunks):
        hashes[chunk.path] = found
        bytes_read += nbytes
        done += chunk.nbytes
        progress("converting", done, plan.nbytes)
    return hashes, bytes_read


def _finish(checkpoint: Checkpoint, plan: Plan, store: Store, hashes: dict[str, Hashes]) -> None:
    """Write everything that is not a chunk, what makes the checkpoint readable last, and wait for the disk."""
    for file in companions(checkpoint.directory):
        stores.copy_file(file, store.directory)
    stores.write_file(store.directory / MANIFEST, json.dumps(_manifest(checkpoint, plan, hashes), indent=1).encode())
    store.write_metadata(plan.targets)
    store.sync(plan.targets)


def _manifest(checkpoint: Checkpoint, plan: Plan, hashes: dict[str, Hashes]) -> dict:
    """conversion.json. A tensor's hash is xxh3_128 over the xxh3_128 digests of its chunks, in order."""
    from importlib.metadata import version

    def tree(digests) -> str:
        return xxhash.xxh3_128(b"".join(digests)).hexdigest()

    tensors = {}
    for target in plan.targets:
        of_chunks = [hashes[chunk.path] for chunk in target.chunks()]
        tensors[target.name] = {
            "shape": list(target.shape),
            "dtype": target.dtype.name,
            "chunk_rows": target.rows,
            "hash": tree(found.stored for found in of_chunks),
            "sources": [
                {"name": entry.checkpoint, "hash": tree(found.read[number] for found in of_chunks)}
                for number, entry in enumerate(target.sources)
            ],
        }
    return {
        "format": 1,
        "source": {"path": str(checkpoint.directory.resolve()), "layout": checkpoint.layout.name},
        "dtype": plan.dtype,
        "hash": "xxh3_128 of the xxh3_128 digests of the chunks, in order",
        "versions": {name: version(name) for name in ("convert-oss", "orbax-checkpoint", "numpy")},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tensors": tensors,
    }


def _verify(checkpoint: Checkpoint, plan: Plan, store: Store, progress: Progress) -> None:
    def worker():
        reader = Reader(checkpoint)
        return lambda chunk: (chunk, difference(store.directory, chunk, reader.pieces(chunk)))

    differences, done = [], 0
    for chunk, line in in_threads(worker, plan.chunks):
        differences += [line] if line else []
        done += chunk.nbytes
        progress("verifying", done, plan.nbytes)
    if differences:
        raise Different(sorted(differences))
