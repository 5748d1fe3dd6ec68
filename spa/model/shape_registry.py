"""Shape functions of operators that ONNX has no shape inference for, by ``domain::Op``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spa.model.graph import Node

Shape = tuple[int, ...]
ContribShape = Callable[[Node, Sequence["Shape | None"], Sequence[int]], list[tuple[int, Shape]]]
NotedShape = Callable[[Sequence["Shape | None"], Mapping[str, Any]], list["Shape | None"]]
_CONTRIB: dict[str, ContribShape] = {}
_NOTED: dict[str, NotedShape] = {}


def contrib_shape(*keys: str) -> Callable[[ContribShape], ContribShape]:
    """Register the shape function of operators that ONNX has no schema for, by ``domain::Op``.

    Raises:
        ValueError: one of them has a shape function already.
    """

    def register(function: ContribShape) -> ContribShape:
        for key in keys:
            if key in _CONTRIB:
                raise ValueError(f"a shape function for {key} is registered already")
            _CONTRIB[key] = function
        return function

    return register


def register_notation(key: str, function: NotedShape) -> None:
    """Register what the notation of an operator's rule says of its output shapes; asked where nobody else knows."""
    _NOTED[key] = function


def shape_function(key: str) -> ContribShape | None:
    """The shape function of an operator, or None."""
    return _CONTRIB.get(key)


def noted(node: Node, shapes: Sequence[Shape | None], dtypes: Sequence[int]) -> list[tuple[int, Shape | None]] | None:
    """What the notation of an operator's rule says of its outputs; they are taken to be of the first's type."""
    function = _NOTED.get(node.key)
    return [(dtypes[0], shape) for shape in function(shapes, node.attributes)] if function and dtypes else None
