"""Whole reads and whole writes, and what the disk is known to have: the system may do either in parts."""

import json
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

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
