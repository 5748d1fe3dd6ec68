"""Findings of long work, as files in a folder, with which the same work goes on after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa.errors import OptionError, SpaError
from spa.running.tasks import read_value, write_value

NAME, LOCK, SUFFIX = "calibration.json", "calibration.lock", ".step"


@dataclass(frozen=True)
class Journal:
    """Values by key, each in a file of its own that is there as a whole or not at all.

    Attributes:
        folder: of the files; None keeps nothing.
        prefix: of all keys.
    """

    folder: Path | None = None
    prefix: str = ""

    def get(self, *key: object) -> Any:
        """Return what was kept under a key; None if there is nothing."""
        path = self._path(key)
        return read_value(path) if path is not None and path.exists() else None

    def keep(self, value: Any, *key: object) -> None:
        """Keep a value under a key.

        Raises:
            SpaError: it cannot be written.
        """
        path = self._path(key)
        if path is None:
            return
        try:
            write_value(path, value)
        except OSError as error:
            raise SpaError(
                f"cannot keep what was calibrated in {str(self.folder)!r}: {error.strerror}. Choose another place for "
                "work, or leave it out."
            ) from error

    def part(self, *key: object) -> Journal:
        """Return the journal of a part of the work."""
        return Journal(self.folder, "/".join([self.prefix, *map(str, key)]))

    def _path(self, key: tuple[object, ...]) -> Path | None:
        if self.folder is None:
            return None
        words = "/".join([self.prefix, *map(str, key)])  # names of tensors are no names of files
        return self.folder / (hashlib.sha256(words.encode()).hexdigest()[:32] + SUFFIX)


NOTHING_KEPT = Journal()


@contextmanager
def opened(folder: Path, fingerprint: str | None) -> Iterator[Journal]:
    """Open the journal of a folder for one piece of work, and keep others out of it.

    Args:
        folder: it exists.
        fingerprint: tells the work from others; None where nothing does.

    Raises:
        OptionError: the folder holds other work, or is in use, or nothing tells the work from others.
    """
    from filelock import FileLock, Timeout

    if fingerprint is None:
        raise OptionError(
            "work is given, and whether an interrupted calibration had the same inputs cannot be told of a Python "
            "object. Give a file or arrays as data, or leave work out."
        )
    try:
        with FileLock(folder / LOCK, timeout=0):
            _begin(folder / NAME, fingerprint)
            yield Journal(folder)
    except Timeout as error:
        raise OptionError(
            f"another calibration is at work in {str(folder)!r}. Wait for it, or choose another folder."
        ) from error


def _begin(path: Path, fingerprint: str) -> None:
    """Put the fingerprint into the folder, or compare it with the one that is there."""
    if not path.exists():
        path.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != fingerprint:
        raise OptionError(
            f"{str(path.parent)!r} holds the calibration of another model, of other options or inputs or of another "
            "version. Choose another folder for work, or remove it."
        )
