"""Keras: the order of gates in recurrent weights, and variables by path. The exporter undoes what the importer did."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import chain, count
from typing import Any

OPERATORS = {1: "RNN", 3: "GRU", 4: "LSTM"}  # by the number of gates
# Keras' order of gates is i, f, c, o in LSTMs; ONNX' is i, o, f, c. Those of GRUs are the same.
ORDER = {1: [0], 3: [0, 1, 2], 4: [0, 3, 1, 2]}


def keras_variables(model: Any) -> dict[str, Any]:
    """Return the float32 variables of a Keras model by path."""
    return by_path((v.path, v) for v in model.variables if v.dtype == "float32")


def by_path(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return variables by path; a path that occurs again gets a number.

    >>> by_path([("dense/kernel", 1), ("dense/kernel", 2)])
    {'dense/kernel': 1, 'dense/kernel_2': 2}
    """
    variables: dict[str, Any] = {}
    for path, variable in pairs:
        variables[fresh(path, variables)] = variable
    return variables


def fresh(name: str, taken: Container[str]) -> str:
    """Return the name, with a number behind it where it is taken."""
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
