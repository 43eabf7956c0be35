"""The Orbax checkpoint on disk: zarr3 arrays written as plain files, with Orbax's own metadata beside them.

A chunk file is zarr3's `bytes` + `crc32c`: the values in C order, little-endian, and four bytes of checksum
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/crc32c/). Writing it directly is faster than any library
between us and the file, and a file that is whole can be told from one that is not.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from converter.chunks import Pieces
from converter.plan import Chunk, Plan, Target
from converter.threads import WORKERS
from converter.verify import check_chunk, from_disk
from oss_model.files import advise, crc32c, file_size, read_each, sync, write_all, write_file
from oss_model.zarr import CHECKSUM_BYTES, describe

MANIFEST = "conversion.json"
METADATA = ("_METADATA", "_CHECKPOINT_METADATA")


class Store:
    """A checkpoint's directory while it is written, or afterwards."""

    workers = WORKERS

    def __init__(self, directory: Path):
        self.directory = directory

    def held(self, plan: Plan) -> int:
        return 0

    def load(self) -> None:
        """Orbax, which writes the metadata: it takes a second, and most of the process's memory."""
        import orbax.checkpoint  # noqa: F401

    def write_array(self, target: Target) -> None:
        """Describe an array: its directory and zarr.json."""
        directory = self.directory / target.directory
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / "zarr.json", description(target))

    def write_chunk(self, chunk: Chunk, pieces: Iterable[np.ndarray]) -> bytes:
        """Write one chunk's file, an all-zero one too: readers take a missing file for an error. Returns its xxh3_128."""
        path = self.directory / chunk.path
        path.parent.mkdir(parents=True, exist_ok=True)
        crc, digest = 0, xxhash.xxh3_128()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for piece in pieces:
                data = piece.reshape(-1).view(np.uint8)
                crc = crc32c(crc, data)
                digest.update(data.data)
                write_all(fd, data.data)
            write_all(fd, crc.to_bytes(CHECKSUM_BYTES, "little"))
            # Starts the disk on these pages, without waiting for it: the fsync at the end then finds little to do.
            advise(fd, "DONTNEED")
        finally:
            os.close(fd)
        return digest.digest()

    def write_metadata(self, targets: Iterable[Target]) -> None:
        for name, data in metadata(targets).items():
            write_file(self.directory / name, data)

    def is_whole(self, chunk: Chunk) -> bool:
        """Whether the chunk's file is there, in its full length."""
        return file_size(self.directory / chunk.path) == chunk.nbytes

    def present(self, chunks: Iterable[Chunk]) -> int:
        return sum(chunk.nbytes for chunk in chunks if self.is_whole(chunk))

    def settle(self, chunk: Chunk) -> None:
        """Wait until the disk has what is in the chunk's file."""
        sync(self.directory / chunk.path)

    def settle_names(self, chunks: Iterable[Chunk]) -> None:
        """Wait until the disk knows the files of `chunks` by name."""
        directories = {directory for chunk in chunks for directory in Path(chunk.path).parents}
        for directory in sorted(directories, key=lambda directory: -len(directory.parts)):
            sync(self.directory / directory)

    def check(self, chunk: Chunk, pieces: Pieces | None, buffer: np.ndarray) -> tuple[bytes, str | None]:
        return check_chunk(self.directory, chunk, pieces, buffer)

    def ahead(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        return from_disk(self.directory, chunks)

    def discard(self, chunk: Chunk) -> None:
        (self.directory / chunk.path).unlink(missing_ok=True)

    def describe(self, plan: Plan, companions: Iterable[Path], config: bytes | None) -> None:
        """Each array's zarr.json, and files of the source that belong beside a model."""
        for target in plan.targets:
            self.write_array(target)
        copy_companions(companions, self.directory)
        if config is not None:
            write_file(self.directory / "config.json", config)

    def complete(self, plan: Plan, manifest: Callable[[], bytes]) -> None:
        self.write_metadata(plan.targets)
        write_file(self.directory / MANIFEST, manifest())
        sync_small(self.directory)


def description(target: Target) -> bytes:
    """An array's zarr.json."""
    return json.dumps(describe(target.shape, target.dtype, target.rows), separators=(",", ":")).encode()


def metadata(targets: Iterable[Target]) -> dict[str, bytes]:
    """`_METADATA` and `_CHECKPOINT_METADATA`: taken from a small checkpoint of the same tree that Orbax saves."""
    tree: dict = {}
    for target in targets:
        *path, leaf = target.key_path
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = np.zeros(1, np.uint8)  # neither file says anything about shape or dtype
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # hundreds of tiny files that no disk should see
    with tempfile.TemporaryDirectory(prefix="convert-oss-", dir=memory) as scratch:
        _save_with_orbax(Path(scratch) / "skeleton", tree)
        return {name: (Path(scratch) / "skeleton" / name).read_bytes() for name in METADATA}


def copy_companions(files: Iterable[Path], directory: Path) -> None:
    files = list(files)
    for file, data in zip(files, read_each(files), strict=True):
        write_file(directory / file.name, data)


def sync_small(root: Path) -> None:
    """Wait until all directories, and all files but the chunks, are on the disk. Chunks are synced one by one."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files if "c" not in Path(directory).relative_to(root).parts else ():
            sync(Path(directory) / name)
        sync(Path(directory))


def _save_with_orbax(path: Path, tree: dict) -> None:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # warns that there is nothing to merge
    try:
        import orbax.checkpoint as ocp

        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, tree)
    finally:
        logger.setLevel(level)
