"""Pruned Keras models in a ``.keras`` file and again from it: their widths stand in their configuration.

The record of what was pruned is one more member of the file, which Keras passes over.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, SpaError, UnsupportedError
from spa.exporters.keras_narrowing import ATTRIBUTE, NO_PLACE, Entry, entries_of, record_of
from spa.exporters.tensorflow import Builder, Pruned
from spa.frameworks.keras import keras_variables
from spa.frameworks.reasons import first_line
from spa.model.files import read_bytes
from spa.model.writing import drafts

MEMBER = f"{ATTRIBUTE}.json"


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a Keras model, trained further or not.

    Args:
        model: the model.
        path: a ``.keras`` file.

    Returns:
        The file.

    Raises:
        SpaError: the file cannot or must not be written.
    """
    target = Path(path)
    if target.suffix != ".keras":
        raise SpaError(f"cannot write {str(target)!r}: Keras wants the suffix .keras. Choose another name.")
    with drafts(target) as draft:
        model.save(draft.folder / target.name)
        if (record := getattr(model, ATTRIBUTE, None)) is not None:
            with zipfile.ZipFile(draft.folder / target.name, "a") as file:
                file.writestr(MEMBER, record)
        draft.publish_one(draft.folder / target.name)
    return target


def load(path: str | os.PathLike[str], model: Any = None) -> Any:
    """Read a Keras model.

    Args:
        path: a ``.keras`` file.
        model: one whose own classes of layers the file's layers may be of; needed where they are not Keras' own.

    Returns:
        The pruned model.

    Raises:
        UnreadableError: the file is not there.
        ModelError: Keras cannot read it.
    """
    import keras

    target = Path(path)
    read_bytes(target, "the model")
    layers = [] if model is None else model._flatten_layers()
    own = {type(layer).__name__: type(layer) for layer in layers if not type(layer).__module__.startswith("keras.")}
    try:
        again = keras.models.load_model(target, custom_objects=own)
    except Exception as error:  # of Keras' reader, of many kinds
        raise ModelError(f"Keras cannot read {str(target)!r}: {first_line(error)}") from error
    if (record := _record_in(target)) is not None:
        setattr(again, ATTRIBUTE, record)
    return again


def narrowed(model: Any, pruned: Any) -> Any:
    """Give a fresh model the widths of a pruned one; the values are its own.

    Args:
        model: as its code makes it; not changed.
        pruned: the pruned model, or its file of :func:`save`.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the model is another one than was pruned.
        UnsupportedError: there is no record of a pruning.
    """
    if not isinstance(pruned, str | os.PathLike):
        return _narrow(model, record_of(pruned))
    target = Path(pruned)
    read_bytes(target, "the model")
    record = _record_in(target)
    if record is None:
        raise UnsupportedError(
            f"{str(target)!r} has no record of a pruning. Write what spa.prune(...).pruned is with spa.save: Keras' "
            "own ways to copy and to save a model leave the record behind."
        )
    return _narrow(model, entries_of(record))


def _record_in(path: Path) -> str | None:
    """Return the record in a ``.keras`` file, None where it has none."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.read(MEMBER).decode() if MEMBER in file.namelist() else None
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ModelError(f"{str(path)!r} is no file of spa.save: {error}. Write it with spa.save.") from error


def _narrow(model: Any, entries: Sequence[Entry]) -> Any:
    """Return a copy of a fresh model with the widths of a pruned one; its values are those of the kept indices.

    Args:
        model: as its code makes it; not changed.
        entries: what the pruned one carries along.

    Raises:
        ModelError: the model is another one than was pruned.
        UnsupportedError: a layer cannot be narrowed.
    """
    variables = keras_variables(model)
    if len(variables) != len(entries):
        raise ModelError(f"the model has {len(variables)} variables, the pruned one had {len(entries)}. {NO_PLACE}")
    arrays, kept, groups = {}, {}, {}
    biases: dict[int, np.ndarray | None] = {}
    for (path, variable), entry in zip(variables.items(), entries, strict=True):
        if tuple(variable.shape) != entry.shape:
            shapes = f"{path!r} has shape {list(variable.shape)}, {entry.path!r} had {list(entry.shape)}"
            raise ModelError(f"the model's {shapes}. {NO_PLACE}")
        axes = tuple(np.asarray(entry.kept.get(axis, range(n)), np.intp) for axis, n in enumerate(entry.shape))
        array = np.asarray(variable)
        arrays[id(variable)], kept[id(variable)] = array[np.ix_(*axes)] if axes else array, axes
        if entry.groups is not None:
            groups[id(variable)] = entry.groups
        if entry.biased:
            biases[id(variable)] = None
    small = Builder(Pruned(arrays, kept, groups, biases), rescales=False).model(model)
    setattr(small, ATTRIBUTE, json.dumps([asdict(entry) for entry in entries]))
    return small
