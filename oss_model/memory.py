"""What this process may use: its cores; how much memory it has taken, what is left, and how to tell that it ran out."""

import contextlib
import ctypes
import errno
import gc
import os
import re
import sys
from pathlib import Path

from oss_model.errors import InputError, system_errno

# That this process may run on; macOS has no affinity.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, option: str) -> int:
    """Bytes in "900M" or "2G", binary units.

    Raises:
      InputError: naming `option`, if it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if not found:
        raise InputError(f"{option}: expected a size like 2G or 900M, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def peak_rss() -> int:
    """Resident bytes of this process at its peak."""
    try:
        # Not getrusage: its peak includes that of the process this one was forked from.
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
    except (OSError, IndexError):  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10  # bytes on macOS, KiB everywhere else


def release() -> None:
    """Give what is free back to the system: after a restore the C library keeps a tenth of what was read."""
    gc.collect()  # Orbax leaves arrays in reference cycles
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def rss() -> int:
    """Resident bytes of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def free_memory() -> int:
    """Bytes this process can still take: what the machine has free, or less where the process has a limit (ulimit -v)."""
    import resource

    import psutil

    free, limit = psutil.virtual_memory().available, resource.getrlimit(resource.RLIMIT_AS)[0]
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - psutil.Process().memory_info().vms))


def out_of_memory(error: BaseException | None) -> str | None:
    """The line in which `error`, or what it was raised from, says that memory ran out; None if none does."""
    while error is not None:
        text = str(error) or type(error).__name__
        number = system_errno(error)
        if (
            isinstance(error, MemoryError)
            or number == errno.ENOMEM
            # XLA's. tensorstore has the same words for a full disk, but then adds the system's number.
            or (text.startswith("RESOURCE_EXHAUSTED") and number is None)
            or text == "can't start new thread"  # its stack finds no room
            or (isinstance(error, ImportError) and "failed to map segment" in text)  # of a library's file
        ):
            return text.splitlines()[0]
        error = error.__cause__
    return None


def size(nbytes: int | float) -> str:
    """Decimal, as disks are sold: 812 bytes, 3.4 MB, 13.8 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"
