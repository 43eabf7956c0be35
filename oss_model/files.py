"""Whole reads and whole writes, and what the disk is known to have: the system may do either in parts."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from oss_model import buckets
from oss_model.buckets import GsPath

WRITE_BYTES = 1 << 18  # a call; of 1 MiB and more, the kernel (Linux 6.18, ext4) took 3 times the CPU time a byte
READ_BYTES = 1 << 30  # a call; Linux reads no more than 2 GB


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, of text from strangers.

    Raises:
      ValueError: if it is not JSON, or nested so deeply that Python gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


class OpenFile:
    """A file, or an object of a bucket, whose bytes are read into memory that is there already. Any thread may read.

    Args:
      span: (offset, nbytes) of what will be read in several pieces: of an object it is fetched in one request, now.

    Attributes:
      size: in bytes; of an object that has all of `span` and is not known to be longer, that of its end.

    Raises:
      FileNotFoundError: if there is none.
    """

    def __init__(self, path: Path, span: tuple[int, int] | None = None):
        self._path, self._fd, self._start, self._ahead = path, -1, 0, b""
        self._generation: int | None = None
        if not isinstance(path, GsPath):
            self._fd = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._fd).st_size
        elif span is None:
            about = path.stat()
            self.size, self._generation = about.st_size, about.st_mtime_ns
        else:
            self._start, nbytes = span
            self._ahead = buckets.read(path, self._start, nbytes + 1)  # of a longer one that is seen by the byte too many
            self.size = self._start + nbytes if len(self._ahead) == nbytes else path.stat().st_size

    def fill(self, out: np.ndarray, offset: int) -> None:
        """Fill `out` (uint8, flat) from `offset` of the file on.

        Raises:
          EOFError: if it ends before; see `read_all`.
        """
        if self._fd >= 0:
            read_all(self._fd, out, offset)
            return
        start = offset - self._start
        if start >= 0 and start + len(out) <= len(self._ahead):
            data = memoryview(self._ahead)[start : start + len(out)]
        else:
            data = self._fetched(offset, len(out))
        if len(data) < len(out):
            raise EOFError(f"ended at byte {offset + len(data)}, {len(out) - len(data)} bytes early")
        out[...] = np.frombuffer(data, np.uint8)

    def _fetched(self, offset: int, nbytes: int) -> bytes:
        assert isinstance(self._path, GsPath)
        try:
            return buckets.read(self._path, offset, nbytes, self._generation)
        except FileNotFoundError:
            raise EOFError("is gone, or is another now") from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def read_each(paths: Iterable[Path]) -> list[bytes]:
    """Small files, whole, in their order; objects of a bucket many at a time, since each takes its while to come.

    Raises:
      FileNotFoundError: if one is missing.
    """
    return list(_each(lambda path: path.read_bytes(), paths))


def hashed_each(paths: Iterable[Path]) -> list[str | None]:
    """The xxh3_128 of each of these small files; None of one that is missing."""

    def hashed(path: Path) -> str | None:
        try:
            return xxhash.xxh3_128(path.read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    return list(_each(hashed, paths))


def _each(function: Callable[[Path], Any], paths: Iterable[Path]) -> Iterator[Any]:
    wanted = list(paths)
    if not any(isinstance(path, GsPath) for path in wanted):
        yield from map(function, wanted)
        return
    with ThreadPoolExecutor(buckets.STREAMS) as pool:
        yield from pool.map(function, wanted)


def sizes_and_times(paths: Iterable[Path], directory: Path) -> dict[Path, tuple[int, int]]:
    """File -> its size, and when it was written (ns); of an object its generation.

    Args:
      directory: that most of them are in: of a bucket it is listed once.

    Raises:
      FileNotFoundError: if one is missing.
    """
    found: dict[Path, tuple[int, int]] = {}
    if isinstance(directory, GsPath):
        found = {directory / name: (of.size, of.generation) for name, of in buckets.listed(directory).items()}
    stats = {path: path.stat() for path in paths if path not in found}
    return {path: found.get(path) or (stats[path].st_size, stats[path].st_mtime_ns) for path in paths}


def read_all(fd: int, out: np.ndarray, offset: int) -> None:
    """Fill `out` (uint8, flat) from `offset` of a file on.

    Raises:
      EOFError: if the file ends before; it has the number of bytes read so far and of those missing.
    """
    view = memoryview(out.data)
    while view:
        count = os.preadv(fd, [view[:READ_BYTES]], offset)
        if not count:
            raise EOFError(f"ended at byte {offset}, {len(view)} bytes early")
        view, offset = view[count:], offset + count


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Append, or write where the file stands."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[:WRITE_BYTES]) :]


def write_file(path: Path, data: bytes, durable: bool = False) -> None:
    """Write a small file. `durable`: in one step, and wait for the disk."""
    if not durable:
        path.write_bytes(data)
        return
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(data)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def file_size(path: Path) -> int:
    """-1 where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def advise(fd: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    """Tell the kernel what is to come of a file's pages, or a part's; nothing where it takes no such hints (macOS)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, getattr(os, f"POSIX_FADV_{advice}"))


def read_anew(path: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Have a part of a file come from the disk and not from memory, ahead of time. Of an object nothing is in memory."""
    if isinstance(path, GsPath):
        return
    with contextlib.suppress(OSError):  # a missing file is for who reads it to report
        fd = os.open(path, os.O_RDONLY)
        advise(fd, "DONTNEED", offset, nbytes)  # forgets what is in memory and on the disk
        advise(fd, "WILLNEED", offset, nbytes)  # starts reading
        os.close(fd)


def sync(path: Path) -> None:
    """fsync one file or directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def crc32c(crc: int, data: np.ndarray) -> int:
    """Go on from `crc` with `data` (uint8, flat)."""
    # Declared for bytes, but any array is taken, without a copy; a memoryview is not.
    return google_crc32c.extend(crc, data)  # type: ignore[arg-type]
