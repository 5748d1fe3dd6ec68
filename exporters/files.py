"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spa.errors import SpaError


@contextlib.contextmanager
def drafts(target: Path) -> Iterator[Path]:
    """Open a temporary folder beside a file to write, and remove it in the end.

    Raises:
        SpaError: the target is a folder, or the operating system refuses to write.
    """
    if target.is_dir():
        raise SpaError(f"cannot write {str(target)!r}: it is a folder. Name a file in it.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise SpaError(f"cannot write {str(target)!r}: {error.strerror}. Choose another place.") from error


def move(source: Path, target: Path) -> None:
    """Move the files of a folder to another, replacing; NAME.data goes before NAME, which refers to it."""
    for file in sorted((f for f in source.iterdir() if f.is_file()), reverse=True):
        os.replace(file, target / file.name)
