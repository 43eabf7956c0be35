"""A directory of safetensors while it is written, or afterwards: what transformers, vLLM and others load.

Each chunk is a part of a file whose header is written first and says where all goes, so that threads, and processes, write
where they like. The directory has model.safetensors.index.json where there are several files, and config.json.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from converter.chunks import Pieces
from converter.plan import Chunk, Plan
from converter.store import MANIFEST, copy_companions, sync_small
from converter.threads import WORKERS
from converter.verify import check_chunk, from_disk
from oss_model.files import advise, file_size, sync, write_all, write_file
from oss_model.shards import INDEX

CONFIG = "config.json"
DISCARDED = "discarded"  # a line a chunk that is to be written again


class ShardStore:
    workers = WORKERS

    def __init__(self, directory: Path, plan: Plan):
        self.directory = directory
        self._shards = plan.shards()
        self._lock = threading.Lock()
        self._begun: set[str] = set()

    def held(self, plan: Plan) -> int:
        return 0

    def load(self) -> None: ...

    def write_chunk(self, chunk: Chunk, pieces: Iterable[np.ndarray]) -> bytes:
        assert chunk.offset is not None
        path, digest = self._begin(chunk.file), xxhash.xxh3_128()
        fd = os.open(path, os.O_WRONLY)
        try:
            os.lseek(fd, chunk.offset, os.SEEK_SET)
            for piece in pieces:
                data = piece.reshape(-1).view(np.uint8).data
                digest.update(data)
                write_all(fd, data)
            advise(fd, "DONTNEED", chunk.offset, chunk.nbytes)  # starts the disk on these pages
        finally:
            os.close(fd)
        if chunk.path in self._discarded():
            self._discard(self._discarded() - {chunk.path})
        return digest.digest()

    def _begin(self, file: str) -> Path:
        """The file, with its header, in its full size."""
        path = self.directory / file
        with self._lock:
            if file not in self._begun:
                header, size = self._shards[file]
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
                try:
                    write_all(fd, header)  # the same bytes, whichever process is first
                    os.ftruncate(fd, size)
                finally:
                    os.close(fd)
                self._begun.add(file)
        return path

    def is_whole(self, chunk: Chunk) -> bool:
        """Whether its file is there in its full size. What is in it the journal knows, or `check`."""
        return file_size(self.directory / chunk.file) == self._shards[chunk.file][1] and chunk.path not in self._discarded()

    def present(self, chunks: Iterable[Chunk]) -> int:
        files = [self.directory / file for file in self._shards]
        return sum(path.stat().st_blocks * 512 for path in files if path.exists())  # what is not written yet is a hole

    def settle(self, chunk: Chunk) -> None:
        sync(self.directory / chunk.file)

    def settle_names(self, chunks: Iterable[Chunk]) -> None:
        if any(True for _ in chunks):
            sync(self.directory)

    def check(self, chunk: Chunk, pieces: Pieces | None, buffer: np.ndarray) -> tuple[bytes, str | None]:
        return check_chunk(self.directory, chunk, pieces, buffer)

    def ahead(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        return from_disk(self.directory, chunks)

    def discard(self, chunk: Chunk) -> None:
        self._discard(self._discarded() | {chunk.path})

    def describe(self, plan: Plan, companions: Iterable[Path], config: bytes | None) -> None:
        copy_companions([file for file in companions if file.name != CONFIG], self.directory)
        write_file(self.directory / CONFIG, config or b"")
        if len(self._shards) > 1:
            weight_map = {target.name: target.place.file for target in plan.targets if target.place}
            index = {"metadata": {"total_size": sum(target.values_nbytes for target in plan.targets)}, "weight_map": weight_map}
            write_file(self.directory / INDEX, json.dumps(index, indent=2).encode() + b"\n")

    def complete(self, plan: Plan, manifest: Callable[[], bytes]) -> None:
        (self.directory / DISCARDED).unlink(missing_ok=True)
        for file in self._shards:
            sync(self._begin(file))
        write_file(self.directory / MANIFEST, manifest())
        sync_small(self.directory)

    def _discarded(self) -> set[str]:
        try:
            return set((self.directory / DISCARDED).read_text().splitlines())
        except FileNotFoundError:
            return set()

    def _discard(self, names: set[str]) -> None:
        with self._lock:
            write_file(self.directory / DISCARDED, "\n".join(sorted(names)).encode(), durable=True)
