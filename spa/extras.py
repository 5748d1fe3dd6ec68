"""Optional packages, which only some uses need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
