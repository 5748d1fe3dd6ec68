"""How much memory the process has taken."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_resident() -> int | None:
    """The most bytes that were resident, or None where the platform does not say.

    On Linux not `ru_maxrss`: a child process inherits it from its parent, however large that was.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # Not Linux.
    try:
        import resource
    except ImportError:
        return None  # Windows.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
