"""Optional packages, which only some uses need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoints
from typing import Any

from spa.errors import UnsupportedError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of an extra in this context; where one is missing, say how to get it.

    Raises:
        UnsupportedError: one is missing, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        what = error.name or name
        raise UnsupportedError(f"{what} cannot be imported ({error}). Run  pip install 'spa-onnx[{name}]'.") from error


def entry_points(group: str) -> EntryPoints:
    """Return what installed packages have in a group of entry points."""
    found: EntryPoints = _all_entry_points().select(group=group)
    return found


@cache
def _all_entry_points() -> Any:  # of another type before Python 3.12
    return metadata.entry_points()  # looking through all packages takes some milliseconds
