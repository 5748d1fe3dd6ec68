"""Sizes that a graph's constants state: exporters write those of their example into Reshapes and tables of positions.

Axes may be declared open and yet take one size alone. It is none that anybody would guess, but it stands in the
graph: as an entry of a Reshape's target, as the length of a table that is added, as a product of that and a layer's
channels, as the rows of a matrix behind a flattened image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from spa.model.sizes import Guess
from spa.model.traits import INDICES

__all__ = ["stated_guesses"]

MOST_SIZES = 8  # of a kind that are tried
_MOST_BATCHES = 2
_TARGETS = {"Reshape": 1, "Expand": 1}  # the operand that is a shape
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Where")
_PRODUCTS = ("Gemm", "MatMul")


def stated_guesses(graph: GraphProto, default: Guess, stride: int) -> tuple[Guess, ...]:
    """Return guesses by what constants state, the likeliest first: a handful of sizes, with each of a few batches.

    Args:
        graph: the main graph.
        default: the sizes of kinds of which the graph states none.
        stride: how many places of an image or a series one place of the coarsest tensor stands for.
    """
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    targets = list(_targets(graph))
    channels = sorted({n for shape in shapes.values() if len(shape) > 1 for n in shape if n > 1}, reverse=True)
    entries = [n for target in targets for n in target[:-1] if n > 1]  # the last are channels
    tables = [n for node in graph.node for n in _lengths(node, shapes) if n > 1]
    rows = [shapes[node.input[1]][_rows(node)] for node in graph.node if _is_matrix(node, shapes)]
    flat = [target[-1] for target in targets if target]
    cells = [n // c for n in (*entries, *flat, *rows) for c in channels if n % c == 0 and n > c]
    steps = _distinct([*tables, *entries, *cells])
    places = _distinct([*(n * stride for n in (*cells, *entries, *tables)), *tables])
    sides = _distinct([math.isqrt(n) * stride for n in (*cells, *entries) if n > 1 and math.isqrt(n) ** 2 == n])
    batches = [*dict.fromkeys(t[0] for t in targets if len(t) > 1 and t[0] > 0)][:_MOST_BATCHES]
    found = [replace(default, batch=batch) for batch in batches]
    for i, batch in product(range(max(map(len, (steps, places, sides)))), dict.fromkeys((*batches, 2, 1))):
        step, place, side = (each[min(i, len(each) - 1)] if each else None for each in (steps, places, sides))
        found.append(
            replace(
                default,
                batch=batch,
                sequence=step or default.sequence,
                series=place or default.series,
                past=step or default.past,
                image=side or default.image,
            )
        )
    return tuple(found)


def _distinct(sizes: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(sizes))[:MOST_SIZES]


def _targets(graph: GraphProto) -> Iterable[list[int]]:
    """Yield the shapes that constants state, in the order of the nodes."""
    stored = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
            continue
        operand = _TARGETS.get(node.op_type)
        tensor = stored.get(node.input[operand]) if operand is not None and operand < len(node.input) else None
        if tensor is not None and len(tensor.dims) == 1 and _is_held(tensor):
            yield [int(n) for n in np.ravel(numpy_helper.to_array(tensor))]


def _is_held(tensor: TensorProto) -> bool:
    return tensor.data_type in INDICES and tensor.data_location != TensorProto.EXTERNAL


def _lengths(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Return the axes but the last of the tables that a node adds, or scales by."""
    tables = [shapes.get(name, ()) for name in node.input] if node.op_type in _ELEMENTWISE else []
    return [n for shape in tables if len(shape) > 1 for n in shape[:-1]]


def _is_matrix(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    return node.op_type in _PRODUCTS and len(node.input) > 1 and len(shapes.get(node.input[1], ())) == 2


def _rows(node: NodeProto) -> int:
    """Return the axis of a matrix that is summed over."""
    return int(any(a.name == "transB" and a.i for a in node.attribute))
