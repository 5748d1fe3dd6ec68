"""The way in which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(stage: str, fraction: float) -> None:
    """Display no progress."""
