"""The registry of shape functions, by ``domain::Op``, of operators that ONNX has no shape inference for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from spa.model.graph import Node

Shape = tuple[int, ...]
ContribShape = Callable[[Node, Sequence["Shape | None"], Sequence[int]], list[tuple[int, Shape]]]
NotedShape = Callable[[Sequence["Shape | None"], Mapping[str, Any]], list["Shape | None"]]
ValuedShape = Callable[
    [Node, Sequence["Shape | None"], Sequence[int], Sequence["np.ndarray | None"]], list[tuple[int, Shape]]
]
Function = TypeVar("Function", bound=Callable[..., list[tuple[int, "Shape"]]])
_CONTRIB: dict[str, ValuedShape] = {}
_NOTED: dict[str, NotedShape] = {}


def contrib_shape(*keys: str, by_value: bool = False) -> Callable[[Function], Function]:
    """Register the shape function of operators that ONNX has no schema for, by ``domain::Op``.

    The function takes the node, the operands' shapes (None for one left out) and their element types, and returns the
    element type and shape of each output; -1 is a size that depends on data.

    Args:
        keys: the operators.
        by_value: whether it takes the operands' values, too (None for one that is not known).

    Raises:
        ValueError: one of them has a shape function already.
    """

    def register(function: Function) -> Function:
        for key in keys:
            if key in _CONTRIB:
                raise ValueError(f"a shape function for {key} is registered already")
            _CONTRIB[key] = function if by_value else _without_values(function)
        return function

    return register


def _without_values(function: ContribShape) -> ValuedShape:
    return lambda node, shapes, dtypes, values: function(node, shapes, dtypes)


def register_notation(key: str, function: NotedShape) -> None:
    """Register the output shapes that the notation of an operator's rule implies; used where nothing else tells."""
    _NOTED[key] = function


def has_notation(key: str) -> bool:
    """Return whether the notation of an operator's rule tells its output shapes."""
    return key in _NOTED


def shape_function(key: str) -> ValuedShape | None:
    """Return the shape function of an operator, or None."""
    return _CONTRIB.get(key)


def noted(node: Node, shapes: Sequence[Shape | None], dtypes: Sequence[int]) -> list[tuple[int, Shape | None]] | None:
    """Return the outputs that the notation of an operator's rule implies, of the first operand's type; None without."""
    function = _NOTED.get(node.key)
    return [(dtypes[0], shape) for shape in function(shapes, node.attributes)] if function and dtypes else None
