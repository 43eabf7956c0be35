"""How much memory this process has taken."""

import contextlib
import ctypes
import gc
import re
from pathlib import Path

from oss_model.errors import InputError

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

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def release() -> None:
    """Give what is free back to the system: after a restore the C library keeps a tenth of what was read."""
    gc.collect()  # Orbax leaves arrays in reference cycles
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def rss() -> int:
    """Resident bytes of this process now."""
    import psutil

    return psutil.Process().memory_info().rss
