"""Optional packages, which only some uses need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def load_entries(entries: Iterable[Any]) -> None:
    """Import what entry points name, which registers rules or criteria.

    Raises:
        UnsupportedError: one cannot be imported, or registers what is registered already.
    """
    for entry in entries:
        try:
            entry.load()
        except Exception as error:  # a package of somebody's, which can raise anything
            package = getattr(getattr(entry, "dist", None), "name", None) or entry.name
            raise UnsupportedError(
                f"the package {package!r} cannot be used: {type(error).__name__}: {error} Mend or uninstall it."
            ) from error


@cache
def _all_entry_points() -> Any:  # of another type before Python 3.12
    return metadata.entry_points()  # looking through all packages takes some milliseconds
