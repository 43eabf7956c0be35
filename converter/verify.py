"""What is on disk: against the source decoded anew, and against the hashes of conversion.json."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from converter.chunks import PIECE_BYTES, Pieces
from converter.plan import Chunk
from converter.threads import still_wanted
from oss_model.files import read_anew
from oss_model.zarr import ChunkFile, DamagedChunk

AGAIN = "convert again"


def check_chunk(directory: Path, chunk: Chunk, pieces: Pieces | None, buffer: np.ndarray) -> tuple[bytes, str | None]:
    """Read the file of `chunk` back, and compare it with its checksum and with what the source says it should hold.

    Args:
      pieces: of the same chunk, read anew from the source; None to check the checksum only.
      buffer: from `check_buffer`, reused from chunk to chunk.

    Returns:
      The xxh3_128 of the values on disk, and a line if something is wrong.
    """
    where = f"{directory}: {chunk.target.name}: {chunk.path}"
    try:
        with ChunkFile(directory / chunk.file, chunk.values_nbytes, chunk.offset) as file:
            digest, offset = xxhash.xxh3_128(), 0
            for piece, nbytes in _expected(chunk, pieces):
                still_wanted()
                stored = buffer[:nbytes]
                file.read(stored)
                if piece is not None and not np.array_equal(_words(stored), _words(piece)):
                    byte = offset + int(np.argmax(stored != piece))
                    return b"", f"{where}: differs from the source, first in byte {byte}; {AGAIN}"
                digest.update(stored.data)
                offset += nbytes
            file.check()
            return digest.digest(), None
    except DamagedChunk as e:
        return b"", f"{where}: {e}; {AGAIN}"


def a_line_a_tensor(directory: Path, wrong: list[tuple[Chunk, str]]) -> list[str]:
    """What `check_chunk` says of many chunks: of each tensor the first one, and how many more there are."""
    by_tensor: dict[str, list[tuple[Chunk, str]]] = {}
    for chunk, line in sorted(wrong, key=lambda found: found[0].index):
        by_tensor.setdefault(chunk.target.name, []).append((chunk, line))
    lines = []
    for name, found in by_tensor.items():
        chunk, line = found[0]
        if len(found) > 1:
            where = f"{directory}: {name}: "
            line = f"{where}{len(found)} of {len(chunk.target.chunks())} chunks, the first {line.removeprefix(where)}"
        lines.append(line)
    return sorted(lines)


def from_disk(directory: Path, chunks: list[Chunk], ahead: int = 2) -> Iterator[Chunk]:
    """Yield `chunks`, for `check_chunk`, so that they are read from the disk and not from memory, and ahead of time."""
    for number in range(len(chunks) + ahead):
        if number < len(chunks):
            chunk = chunks[number]
            read_anew(directory / chunk.file, chunk.offset or 0, chunk.nbytes)
        if number >= ahead:
            yield chunks[number - ahead]


def check_buffer() -> np.ndarray:
    """A buffer for `check_chunk`."""
    return np.empty(PIECE_BYTES, np.uint8)


def _expected(chunk: Chunk, pieces: Pieces | None) -> Iterator[tuple[np.ndarray | None, int]]:
    """What the file should hold (uint8, flat; None where only the length is known), piece by piece."""
    if pieces is None:
        for offset in range(0, chunk.values_nbytes, PIECE_BYTES):
            yield None, min(PIECE_BYTES, chunk.values_nbytes - offset)
        return
    for piece in pieces:
        flat = piece.reshape(-1).view(np.uint8)
        for offset in range(0, len(flat), PIECE_BYTES):
            part = flat[offset : offset + PIECE_BYTES]
            yield part, len(part)


def _words(data: np.ndarray) -> np.ndarray:
    """The same bytes, eight at a time where their number allows: they compare faster."""
    return data.view(np.uint64) if len(data) % 8 == 0 else data
