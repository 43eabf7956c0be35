"""How much memory this process has taken."""

import re
from pathlib import Path


def peak_rss() -> int:
    """Resident bytes of this process at its peak."""
    try:
        # Not getrusage: its peak includes that of the process this one was forked from.
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
    except (OSError, IndexError):  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def rss() -> int:
    """Resident bytes of this process now."""
    import psutil

    return psutil.Process().memory_info().rss
