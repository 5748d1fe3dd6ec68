"""The record of what made a Keras model narrower, which the model carries along.

The record is one string of JSON, an attribute of the model. It lists the variables in the order of the layers: Keras
numbers the names of layers as they are made, so that a fresh model's paths are seldom those of the pruned one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.errors import ModelError, UnsupportedError
from spa.frameworks.keras import keras_variables

if TYPE_CHECKING:
    from spa.exporters.tensorflow import Pruned

ATTRIBUTE = "spa_narrowing"
NO_PLACE = "The model that was pruned is another one: give one that the same code makes."


@dataclass(frozen=True)
class Entry:
    """The record of one variable of a model.

    Attributes:
        path: in the model that was pruned.
        shape: as the code makes it.
        kept: by axis, the kept indices.
        groups: of the convolution that reads it, None where none does.
        biased: whether its layer has a bias that the code does not make.
    """

    path: str
    shape: tuple[int, ...]
    kept: Mapping[int, list[int]]
    groups: int | None
    biased: bool


def entries_of(text: str) -> list[Entry]:
    """Read a record from JSON.

    Raises:
        ModelError: it is none.
    """
    try:
        return [
            Entry(
                path=str(e["path"]),
                shape=tuple(int(n) for n in e["shape"]),
                kept={int(axis): [int(i) for i in indices] for axis, indices in e["kept"].items()},
                groups=None if e["groups"] is None else int(e["groups"]),
                biased=bool(e["biased"]),
            )
            for e in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the record of the pruning cannot be read: {error!r}. Save the model again.") from error


def remember(dense: Any, small: Any, pruned: Pruned) -> None:
    """Let a pruned model carry along what makes it narrower than a fresh one.

    Args:
        dense: what was pruned, fresh or pruned before.
        small: what came of it.
        pruned: what is left of its variables.
    """
    variables = keras_variables(dense)
    # Biases that an earlier pruning made are among these, and not among what it recorded.
    carried = getattr(dense, ATTRIBUTE, None)
    if carried is None:
        before = [Entry(path, tuple(v.shape), {}, None, False) for path, v in variables.items()]
    else:
        before = entries_of(carried)
        if any(entry.path not in variables for entry in before):
            return  # the record is of another model
    setattr(small, ATTRIBUTE, json.dumps([asdict(_further(e, variables[e.path], pruned)) for e in before]))


def _further(before: Entry, variable: Any, pruned: Pruned) -> Entry:
    """Return the record of a variable after a pruning of what it was."""
    kept = {}
    for axis, own in enumerate(pruned.kept[id(variable)]):
        indices = np.asarray(before.kept.get(axis, range(before.shape[axis])))[own]
        if len(indices) < before.shape[axis]:
            kept[axis] = [int(i) for i in indices]
    return Entry(
        path=before.path,
        shape=before.shape,
        kept=kept,
        groups=pruned.groups.get(id(variable), before.groups),
        biased=before.biased or id(variable) in pruned.biases,
    )


def record_of(model: Any) -> list[Entry]:
    """Return what a pruned model carries along.

    Raises:
        UnsupportedError: it carries nothing.
    """
    text = getattr(model, ATTRIBUTE, None)
    if text is None:
        raise UnsupportedError(
            f"Keras model {model.name!r} carries no record of a pruning. Give what spa.prune(...).pruned is, or its "
            "file of spa.save: Keras' own ways to copy and to save a model leave the record behind."
        )
    return entries_of(text)
