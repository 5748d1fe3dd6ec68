"""Progress of long work: a callback for how far it has come, and a stopwatch for its stages."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(stage: str, fraction: float) -> None:
    """Report nothing."""


class Clock:
    """A stopwatch for the stages of a pruning.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def __call__(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        self.add(stage, time.perf_counter() - self._last)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage, and count from now on."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 4)
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._last = time.perf_counter()
