"""Samples one by one, out of data that holds many of them: tables, lists of different lengths, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa.calibration.interface import Interface
from spa.errors import PlanError

__all__ = ["is_table", "rows_of", "samples_of"]


def is_table(data: Any) -> bool:
    """Tell whether data has rows of named columns, as datasets of Hugging Face have."""
    return hasattr(data, "column_names") and hasattr(data, "__iter__") and not isinstance(data, Mapping)


def rows_of(subject: str, data: Mapping[str, Any], interface: Interface) -> list[dict[str, Any]] | None:
    """Return the samples of named lists whose entries differ in length; None where arrays hold all of them.

    So does it split arrays for a model that takes one sample at a time, and has no axis for several.

    Args:
        subject: the data's name in messages.
        data: by name an array, or a list with one entry per sample.
        interface: the model's inputs.

    Raises:
        PlanError: the lists differ in length.
    """
    ranks = {spec.name: len(spec.shape) for spec in interface.specs}
    ragged = {name for name, value in data.items() if _is_ragged(value)}
    if not interface.batched:
        whole = {name: rank for name, rank in ranks.items() if name in data and name not in ragged}
        ragged |= {name for name, rank in whole.items() if np.ndim(data[name]) == rank + 1}
    if not ragged:
        return None
    columns: dict[str, Sequence[Any] | np.ndarray] = {}
    shared: dict[str, Any] = {}
    for name, value in data.items():
        axis = interface.axes.get(name, 0)
        if name in ragged:
            columns[name] = value
        elif axis is None:
            shared[name] = value
        else:
            array = np.asarray(value)
            # One entry per sample, or an array as the model takes it.
            columns[name] = (
                np.moveaxis(array, axis, 0) if array.ndim == ranks.get(name) and array.ndim > axis else array
            )
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise PlanError(f"The lists of {subject} differ in the number of samples ({listed}). Give each as many.")
    return [{n: c[i] for n, c in columns.items()} | shared for i in range(next(iter(counts.values())))]


def _is_ragged(value: Any) -> bool:
    """Tell whether a list, or an array of objects, has entries of different shapes."""
    if not isinstance(value, list | tuple) and getattr(getattr(value, "dtype", None), "kind", "") != "O":
        return False
    return len(value) > 0 and len({np.shape(entry) for entry in value}) > 1


def samples_of(subject: str, data: Any) -> list[Any]:
    """Return the samples along the first axis of an array, or of named arrays, for a function that takes one.

    Raises:
        PlanError: named arrays differ in length.
    """
    if not isinstance(data, Mapping):
        return list(np.asarray(data))
    counts = {name: len(value) for name, value in data.items() if np.ndim(value) or isinstance(value, list)}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise PlanError(f"The arrays of {subject} differ in the number of samples ({listed}). Give each as many.")
    count = next(iter(counts.values()), 0)
    return [{name: value[i] if name in counts else value for name, value in data.items()} for i in range(count)]
