"""The Orbax checkpoint in a bucket: the objects that `converter.store` would write as files, each under a precondition.

An object is written only where there is none, or in place of one of ours that was seen and found wrong. So nothing of anybody
else is ever written over, and several processes that write the same checkpoint write the same bytes, once. What the journal is
on a disk is noted with each chunk's object, in the one step that stores it: a list of the objects says which chunks are there.

A chunk ends in the CRC-32C of its values, so the CRC-32C of the whole, which the service makes and lists, is the same number
for every chunk that is whole (`WHOLE`). Which values they are, and of what, is for the hash noted with it to say.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from converter.chunks import Pieces
from converter.journal import Hashes, line_of, of_line
from converter.plan import Chunk, Plan
from converter.store import MANIFEST, METADATA, description, metadata
from converter.verify import AGAIN, check_chunk
from oss_model import buckets
from oss_model.buckets import Conflict, GsPath, Object
from oss_model.errors import InputError
from oss_model.files import crc32c, read_each
from oss_model.zarr import CHECKSUM_BYTES

COMMIT = "commit_success.txt"  # without which Orbax takes a prefix for one that is being written
NOTE = "convert-oss"  # the key of what is noted with a chunk
WHOLE = crc32c(0, np.zeros(CHECKSUM_BYTES, np.uint8))  # of no values and their checksum: as of any values and theirs
WORKERS = 8  # uploads at a time; a single one gets a small part of what the service and the network give


class BucketStore:
    """A `converter.ends.Sink`."""

    workers = WORKERS

    def __init__(self, directory: GsPath):
        self.directory = directory
        self._there: dict[str, Object] | None = None

    @property
    def there(self) -> dict[str, Object]:
        """Every object below the prefix, when it was looked at last, and what was written since."""
        return self.look() if self._there is None else self._there

    def look(self) -> dict[str, Object]:
        self._there = buckets.listed(self.directory)
        return self._there

    def held(self, plan: Plan) -> int:
        return 2 * max(chunk.nbytes for target in plan.targets for chunk in target.chunks()[:1])

    def load(self) -> None:
        import orbax.checkpoint  # noqa: F401

        buckets.need(self.directory)

    def write_chunk(self, chunk: Chunk, pieces: Pieces) -> bytes:
        crc, digest, parts = 0, xxhash.xxh3_128(), []
        for piece in pieces:
            data = piece.reshape(-1).view(np.uint8)
            crc = crc32c(crc, data)
            digest.update(data.data)
            parts.append(data.tobytes())
        whole = b"".join([*parts, crc.to_bytes(CHECKSUM_BYTES, "little")])
        del parts
        note = {NOTE: line_of(Hashes(digest.digest(), pieces.digests, pieces.lost))}
        seen = self.there.get(chunk.path)
        if seen is not None and NOTE not in seen.metadata:
            raise self._by_somebody_else(chunk.path)
        try:
            self.there[chunk.path] = buckets.write(
                self.directory / chunk.path, whole, generation=seen.generation if seen else 0, metadata=note
            )
        except Conflict:
            raise self._by_somebody_else(chunk.path) from None
        return digest.digest()

    def _by_somebody_else(self, name: str) -> InputError:
        return InputError(
            f"{self.directory / name}: expected nothing but what this conversion writes, found that somebody else writes here"
            " too, and something else; end that, or give another prefix"
        )

    def is_whole(self, chunk: Chunk) -> bool:
        found = self.there.get(chunk.path)
        return found is not None and (found.size, found.crc32c) == (chunk.nbytes, WHOLE)

    def noted(self, plan: Plan) -> dict[str, Hashes]:
        """Path of each chunk that is whole -> what is noted with it."""
        whole = {chunk.path: self.there[chunk.path] for chunk in plan.chunks if self.is_whole(chunk)}
        found = {path: of_line(there.metadata.get(NOTE, "")) for path, there in whole.items()}
        return {path: hashes for path, hashes in found.items() if hashes is not None}

    def present(self, chunks: Iterable[Chunk]) -> int:
        return sum(chunk.nbytes for chunk in chunks if self.is_whole(chunk))

    def settle(self, chunk: Chunk) -> None: ...

    def settle_names(self, chunks: Iterable[Chunk]) -> None: ...

    def check(self, chunk: Chunk, pieces: Pieces | None, buffer: np.ndarray) -> tuple[bytes, str | None]:
        """By the size and the CRC-32C that the service has made of what it stored, and the hash noted with that: nothing is
        downloaded. `verify-oss` does that."""
        where, found = f"{self.directory}: {chunk.target.name}: {chunk.path}", self.there.get(chunk.path)
        if found is None:
            return b"", f"{where}: missing; {AGAIN}"
        if not self.is_whole(chunk):
            what = f"expected {chunk.nbytes} bytes with the CRC-32C {WHOLE:08x}, found {found.size} with {found.crc32c:08x}"
            return b"", f"{where}: {what}; {AGAIN}"
        hashes = of_line(found.metadata.get(NOTE, ""))
        if hashes is None:  # copied there by something that leaves out what is noted
            return check_chunk(self.directory, chunk, pieces, buffer)
        if pieces is not None:
            digest = xxhash.xxh3_128()
            for piece in pieces:
                digest.update(piece.reshape(-1).view(np.uint8).data)
            if digest.digest() != hashes.stored:
                return b"", f"{where}: differs from the source; {AGAIN}"
        return hashes.stored, None

    def ahead(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        return iter(chunks)

    def discard(self, chunk: Chunk) -> None:
        if (found := self.there.pop(chunk.path, None)) is not None:
            buckets.delete(self.directory / chunk.path, found.generation)

    def describe(self, plan: Plan, companions: Iterable[Path], config: bytes | None) -> None:
        files = list(companions)
        small = {f"{target.directory}/zarr.json": description(target) for target in plan.targets}
        small |= {file.name: data for file, data in zip(files, read_each(files), strict=True)}
        small |= {} if config is None else {"config.json": config}
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(lambda item: self._write_once(*item), small.items()))

    def complete(self, plan: Plan, manifest: Callable[[], bytes]) -> None:
        for name, data in metadata(plan.targets).items():
            self._write_once(name, data, has_times=name != METADATA[0])
        self._write_once(COMMIT, f"Checkpoint commit was successful to {self.directory}".encode())
        self._write_once(MANIFEST, manifest(), has_times=True)

    def _write_once(self, name: str, data: bytes, has_times: bool = False) -> None:
        """A small object, where it is not there yet.

        Args:
          has_times: of two processes that finish at once each has another: the first one's is kept.
        """
        found = self.there.get(name)
        if found is not None and (has_times or (found.size, found.crc32c) == (len(data), buckets.crc32c(data))):
            return
        try:
            self.there[name] = buckets.write(self.directory / name, data)
        except Conflict:
            if not has_times:
                raise self._by_somebody_else(name) from None
