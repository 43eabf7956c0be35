"""What the file system can do with the place of a checkpoint."""

import ctypes
import errno
import os
import re
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT = (errno.ENOSYS, errno.EINVAL)  # the kernel, or this file system, knows no such flag


def exchange(one: Path, other: Path) -> bool:
    """Put each of two directories in the other's place, in one step (Linux's renameat2). Returns whether that can be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def can_be_renamed(directory: Path) -> bool:
    """Whether `directory`, which is there, can be renamed: it is no mount point, and its parent can be written."""
    parent = Path(os.path.abspath(directory)).parent
    return not is_mount_point(directory) and os.access(parent, os.W_OK | os.X_OK)


def is_mount_point(directory: Path) -> bool:
    """Whether another directory is mounted there, one of the same file system too, which `os.path.ismount` does not see."""
    return os.path.ismount(directory) or _mount(directory) != _mount(Path(os.path.abspath(directory)).parent)


def _mount(directory: Path) -> str | None:
    """What Linux calls the mount that `directory` is in; None elsewhere."""
    if not hasattr(os, "O_PATH"):
        return None
    fd = os.open(directory, os.O_PATH)
    try:
        found = re.search(r"mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text())
    except OSError:  # no /proc
        return None
    finally:
        os.close(fd)
    return found[1] if found else None
