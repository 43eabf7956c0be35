"""What is on disk, against the source decoded anew."""

import os
from pathlib import Path

import numpy as np

from converter.chunks import Pieces
from converter.plan import CHECKSUM_BYTES, Chunk
from converter.store import crc32c


def difference(directory: Path, chunk: Chunk, pieces: Pieces) -> str | None:
    """Compare the file of `chunk` with what the source says it should hold. A line if they differ."""
    path, where = directory / chunk.path, f"{directory}: {chunk.target.name}: {chunk.path}"
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return f"{where}: missing; convert again"
    try:
        found = os.fstat(fd).st_size
        if found != chunk.nbytes:
            return f"{where}: expected {chunk.nbytes} bytes, found {found}; convert again"
        crc, offset = 0, 0
        for piece in pieces:
            data = piece.reshape(-1).view(np.uint8)
            stored = read(fd, len(data), offset)
            if not np.array_equal(stored, data):
                byte = offset + int(np.argmax(stored != data))
                return f"{where}: differs from the source, first in byte {byte}; convert again"
            crc, offset = crc32c(crc, data), offset + len(data)
        if read(fd, CHECKSUM_BYTES, offset).tobytes() != crc.to_bytes(CHECKSUM_BYTES, "little"):
            return f"{where}: its checksum is wrong; convert again"
        return None
    finally:
        os.close(fd)


def read(fd: int, nbytes: int, offset: int) -> np.ndarray:
    """uint8 [nbytes], fewer at the end of the file"""
    out = np.empty(nbytes, np.uint8)
    view = out.data
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            return out[: len(out) - len(view)]
        view, offset = view[count:], offset + count
    return out
