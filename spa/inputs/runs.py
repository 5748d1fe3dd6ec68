"""Runs of a model that may fail, and what then can be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spa.errors import ModelError

WITHOUT_RUNS = "Criteria that look at the weights alone (l2, say) need no run where no data is given."


@contextmanager
def running() -> Iterator[None]:
    """Add to each refusal of a model that does not run which criteria need no run."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error} {WITHOUT_RUNS}") from error
