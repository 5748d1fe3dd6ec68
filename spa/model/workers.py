"""Threads for work on many weights: numpy and files release the interpreter, and no result depends on their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 4  # threads: a disk and the memory serve no more
WORTH = 2**25  # bytes of weights below which threads cost more than they spare


def in_threads(function: Callable[[T], R], items: Sequence[T], size: int) -> list[R]:
    """Apply a function to items, in threads where that pays; the first that fails ends all.

    Args:
        function: of one item; calls must not depend on each other.
        items: what to work on.
        size: bytes of weights that all calls read together.

    Returns:
        The results in the order of the items.
    """
    count = min(MOST, cores(), len(items))
    if size < WORTH or count < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
