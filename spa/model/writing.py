"""Writing files: all of them or none, and never over what another model needs.

Every file that this package writes for a user goes this way. It is made in a draft folder beside its target and moved
when all is done. Before that, three things are refused: a target that is no regular file, a target whose content
another model refers to (its external data), and a data file that comes with the target but belongs to nobody known.

A draft folder holds a lock while its process lives, and a journal while files move. The next run that writes to the
same place removes folders whose process was killed, and takes back a move that was cut short.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from spa.errors import SpaError
from spa.model.files import data_file
from spa.model.graph import stored_tensors

if sys.platform != "win32":
    import fcntl

PREFIX = ".spa-draft-"
LOCK, JOURNAL, REPLACED = "lock", "journal.json", "replaced"
LARGEST_MODEL = 2**31  # bytes; no message of protobuf is larger
FRESH = 60  # seconds; a younger folder without a lock is one that is being made


# -- what may be replaced --------------------------------------------------------------------------------------------


def check_target(target: Path, *, main: Path | None = None, models: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot or must not be written.

    Args:
        target: the file.
        main: the file that it comes with, where the user named that one and not the target itself.
        models: further models whose data must stay.

    Raises:
        SpaError: the folder is missing or not writable; the target is a folder, a link or a special file; or it
            holds data of another model.
    """
    folder = target.parent
    if not folder.is_dir():
        raise _refusal(target, "its folder does not exist", "Choose another place.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(target, "its folder is not writable", "Choose another place.")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _refusal(target, str(getattr(error, "strerror", None) or error), "Choose another place.") from error
    if stat.S_ISLNK(mode):
        raise _refusal(target, f"it is a symbolic link to {os.readlink(target)!r}", "Name the file itself, or another.")
    if stat.S_ISDIR(mode):
        raise _refusal(target, "it is a folder", "Name a file in it.")
    if not stat.S_ISREG(mode):
        raise _refusal(target, "it is a pipe, a device or a socket", "Name a regular file.")
    owner = reader_of(target, (*models, *_models_around(target)), but=main or target)
    if owner is not None:
        raise _refusal(target, f"{str(owner)!r} keeps its weights there", "Choose another name.")
    if main is not None and not _belongs(target, main):
        raise _refusal(target, f"it exists and is none of {str(main)!r}", "Move it away, or choose another name.")


def check_data_target(target: Path, source: Path) -> None:
    """Refuse a target whose data file must not be written, where the source keeps weights outside and so will it."""
    if os.path.lexists(data_file(target)) and data_files(source):
        check_target(data_file(target), main=target, models=[source])


def _refusal(target: Path, fact: str, remedy: str) -> SpaError:
    return SpaError(f"cannot write {str(target)!r}: {fact}. {remedy}")


def _belongs(target: Path, main: Path) -> bool:
    """Return whether an existing file is part of what the main file already is; other formats do not say."""
    if not main.is_file():
        return False
    return not _may_be_model(main) or reader_of(target, [main]) is not None


def reader_of(file: Path, models: Iterable[Path], but: Path | None = None) -> Path | None:
    """Return the first of some models whose external data lie in a file, or None."""
    for model in models:
        if but is not None and _same(model, but):
            continue
        if any(_same(data, file) for data in data_files(model)):
            return model
    return None


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


def data_files(path: Path) -> set[Path]:
    """Return the files that a model file refers to; none where it is no model."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= LARGEST_MODEL:
            return set()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # the key of an entry, without which there is none to parse for
                return set()
            model = ModelProto.FromString(content[:])
    except (OSError, ValueError, DecodeError):
        return set()
    outside = (t for t in stored_tensors(model) if t.data_location == TensorProto.EXTERNAL)
    return {path.parent / e.value for t in outside for e in t.external_data if e.key == "location" and e.value}


def _models_around(target: Path) -> Iterator[Path]:
    """Yield the files beside a target that may be models, and models by name in the folders above."""
    folder = Path(os.path.realpath(target)).parent  # Path.resolve fails on links in a circle
    for level, place in enumerate((folder, *folder.parents)):
        try:
            names = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in names:
            if entry.name.lower().endswith(".onnx") or (level == 0 and _may_be_model(Path(entry.path))):
                yield Path(entry.path)


def _may_be_model(path: Path) -> bool:
    """Return whether a regular file begins as messages of ONNX do, with the field of the IR version."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(1) == b"\x08"
    except OSError:
        return False


# -- drafts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A folder in which files are made.

    Attributes:
        root: the folder with lock and journal.
        folder: where to work.
        target: the file that the user named.
        models: further models whose data must stay.
    """

    root: Path
    folder: Path
    target: Path
    models: tuple[Path, ...] = ()

    def publish_one(self, made: Path) -> None:
        """Give one file, or a whole folder, the target's name in one step; raise as :meth:`publish`."""
        check_target(self.target, models=self.models)
        os.replace(made, self.target)

    def publish(self, folder: Path) -> None:
        """Move all files of a folder in the draft beside the target, or none, replacing those of the same names.

        Raises:
            SpaError: one of them must not be replaced (:func:`check_target`).
        """
        place, main = self.target.parent, self.target
        names = sorted((f.name for f in folder.iterdir() if f.is_file()), key=lambda name: (name == main.name, name))
        for name in names:
            check_target(place / name, main=None if name == main.name else main, models=self.models)
        if names == [main.name]:
            self.publish_one(folder / main.name)
            return
        (self.root / REPLACED).mkdir()
        moving = {name: (folder / name).stat().st_ino for name in names}
        (self.root / JOURNAL).write_text(json.dumps(moving), encoding="utf-8")
        try:
            for name in reversed(names):  # away first, so that no old file ever refers to a new one
                if (place / name).exists():
                    os.replace(place / name, self.root / REPLACED / name)
            for name in names:
                os.replace(folder / name, place / name)
        except BaseException:
            _take_back(self.root, place)
            raise
        (self.root / JOURNAL).unlink()  # from here on the move counts


def _take_back(root: Path, place: Path) -> None:
    """Undo a move that was cut short, by its journal: new files go, old ones come back."""
    try:
        moving = json.loads((root / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for name, number in moving.items():
        file = place / name
        with contextlib.suppress(OSError):
            if file.lstat().st_ino == number:
                file.unlink()
        old = root / REPLACED / name
        if old.exists() and not file.exists():
            os.replace(old, file)


@contextlib.contextmanager
def drafts(target: Path, models: Iterable[Path] = ()) -> Iterator[Draft]:
    """Open a draft folder beside a file to write, and remove it in the end, and those that killed runs left.

    Args:
        target: the file that will be written.
        models: further models whose data must stay.

    Raises:
        SpaError: the target cannot or must not be written, or the operating system refuses to write.
    """
    models = tuple(models)
    check_target(target, models=models)
    try:
        with draft_folder(target.parent) as root:
            folder = root / "draft"
            folder.mkdir()
            yield Draft(root=root, folder=folder, target=target, models=models)
    except OSError as error:
        raise _refusal(target, f"{error.strerror or error}", "Choose another place.") from error


@contextlib.contextmanager
def draft_folder(place: Path) -> Iterator[Path]:
    """Make a temporary folder that a later run removes where this one is killed."""
    clean(place)
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with _locked(root):
            yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold a draft folder's lock, which the operating system lets go when the process dies."""
    making = root / LOCK if sys.platform == "win32" else root / "making"
    with open(making, "wb") as lock:
        if sys.platform != "win32":  # there an open file cannot be removed, which is lock enough
            fcntl.flock(lock, fcntl.LOCK_EX)
            making.rename(root / LOCK)  # so that no other run sees it unlocked
        yield


def clean(place: Path) -> None:
    """Remove what killed runs left in a folder, and take back moves that were cut short."""
    for root in place.glob(f"{PREFIX}*"):
        if _is_dead(root):
            _take_back(root, place)
            shutil.rmtree(root, ignore_errors=True)


def _is_dead(root: Path) -> bool:
    """Return whether the process that made a draft folder is gone."""
    lock = root / LOCK
    try:
        if not lock.exists():
            return time.time() - root.stat().st_mtime > FRESH
        if sys.platform == "win32":
            lock.unlink()  # refused while it is open
        else:
            with open(lock, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder to write into where it is missing, and remove it where nothing came to be in it.

    Raises:
        SpaError: it cannot be made.
    """
    existed = folder.is_dir()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _refusal(folder, str(error.strerror or error), "Choose another place.") from error
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it holds what was written
                folder.rmdir()


@contextlib.contextmanager
def text_draft(target: Path, content: str | bytes) -> Iterator[Draft]:
    """Write a text, or an image, into a draft; publish it with ``draft.publish(draft.folder)``.

    Raises:
        SpaError: it cannot be written there.
    """
    with drafts(target) as draft:
        (draft.folder / target.name).write_bytes(content.encode() if isinstance(content, str) else content)
        yield draft
