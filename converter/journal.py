"""Which chunks have been written, and what their hashes are: a line for each. What resuming goes by.

A line says that a chunk was written, not that the disk has it: whoever goes by it checks the hash.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from oss_model.files import parse_json, write_all

SYNC_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Of one chunk: xxh3_128 digests, and what was lost in it."""

    stored: bytes  # of the values on disk, without the checksum
    read: tuple[bytes, ...]  # of what was read for it, one a source tensor
    lost: tuple[float, float] | None = None  # squared error and squares of the values, where these became MXFP4


class Journal:
    """Appends to one process's journal. A line that was cut short, by a kill or a full disk, is skipped by `read_journals`."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._lock = threading.Lock()
        self._synced = time.monotonic()

    def add(self, chunk: str, hashes: Hashes) -> None:
        """Note that the file `chunk` is written. Any thread may call this."""
        data = b"\n" + line_of(hashes, chunk=chunk).encode() + b"\n"  # the first ends a line that was cut short
        with self._lock:
            write_all(self._fd, data)
        # The journal may lag behind after a power loss: chunks it does not name are written again.
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        with self._lock:  # a thread that hung may still come to `add`, when the number is another file's
            os.close(self._fd)
            self._fd = -1


def read_journals(paths: Iterable[Path]) -> dict[str, Hashes]:
    """Chunk -> its hashes, by all whole lines of all journals; the last one counts."""
    found = {}
    for path in paths:
        for line in path.read_bytes().split(b"\n"):
            hashes = of_line(line)
            if hashes is not None:
                with contextlib.suppress(KeyError):
                    found[str(parse_json(line)["chunk"])] = hashes
    return found


def line_of(hashes: Hashes, **more: str) -> str:
    """What is noted of a chunk, as JSON."""
    line: dict = {**more, "stored": hashes.stored.hex(), "read": [digest.hex() for digest in hashes.read]}
    return json.dumps(line | ({"lost": hashes.lost} if hashes.lost else {}))


def of_line(line: str | bytes) -> Hashes | None:
    """`line_of` read back; None of anything else."""
    try:
        data = parse_json(line)
        read = tuple(bytes.fromhex(digest) for digest in data["read"])
        lost = data.get("lost")
        return Hashes(bytes.fromhex(data["stored"]), read, tuple(lost) if lost else None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
