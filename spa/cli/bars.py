"""Progress: bars on the terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spa.progress import silent

if TYPE_CHECKING:
    from rich.progress import TaskID


SECONDS_PER_LINE = 15.0


def _lines() -> Callable[[str, float], None]:
    """Return a function that writes a stage and how much of it is done, but no more than a line in 15 seconds."""
    start = last = time.monotonic()

    def show(stage: str, share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_PER_LINE:
            last = now
            sys.stderr.write(f"spa: {stage} {share:.0%}, after {now - start:.0f} s\n")
            sys.stderr.flush()

    return show


@contextmanager
def progress_bars(shown: bool, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """Show a bar for each stage with the time left, on standard error; where that is no terminal, a line now and then.

    Args:
        shown: whether to show bars on a terminal; lines in a log are written in any case.
        quiet: whether to show neither.
    """
    if quiet:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    if not shown:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:12}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=share)

        yield show
