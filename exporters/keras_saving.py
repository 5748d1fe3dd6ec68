"""Pruned Keras models in a ``.keras`` file and again from it: their widths stand in their configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spa.errors import ModelError, SpaError
from spa.frameworks.reasons import first_line
from spa.model.files import read_bytes
from spa.model.writing import drafts


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
        return keras.models.load_model(target, custom_objects=own)
    except Exception as error:  # of Keras' reader, of many kinds
        raise ModelError(f"Keras cannot read {str(target)!r}: {first_line(error)}") from error
