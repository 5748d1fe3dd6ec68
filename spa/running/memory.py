"""The peak memory of the process."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


def peak_resident() -> int | None:
    """Return the most bytes that were resident, or None where the platform does not say.

    psutil knows the peak on Windows alone. Elsewhere the platform is asked; on Linux not by ``ru_maxrss``, which a
    child process inherits from its parent, however large that was.
    """
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # Not Linux.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def total() -> int | None:
    """Return the bytes that the machine has, or None where the platform does not say."""
    if not hasattr(os, "sysconf"):
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def available() -> int | None:
    """Return the bytes that this process can still take without swapping, or None where the platform does not say."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")  # a container's limit
    with suppress(OSError, ValueError):
        most, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(max(0, int(most) - int(used)))
    return min(found, default=None)


def give_back() -> None:
    """Return freed memory to the system where the C library would keep it (glibc): arrays of many sizes leave gaps."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
