"""Marks of computed values that follow the sizes of a model's inputs, element by element.

An axis has the same size in three walks, at small, ordinary and large sizes of what is open, or follows the input. A
value that is computed from sizes of the first kind alone is the same at every size; one that is merely equal in all
walks need not be (``batch == 7``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spa.model.graph import Graph, Node
from spa.model.shape_values import FOLDERS
from spa.model.shapes import Walk
from spa.model.sizes import Guess, kind_of_axis, resolve
from spa.model.traits import Trait, traits
from spa.model.two_points import TwoPoints, open_inputs

# Tried in this order: small enough that bounds on sizes come to light, large enough for what windows and strides need.
SMALL = tuple(
    Guess(batch=1, sequence=steps, series=steps, past=steps, image=side)
    for steps, side in ((1, 1), (1, 8), (1, 32), (1, 64), (1, 128), (8, 32), (8, 64), (32, 64), (64, 128), (500, 32))
)
_MOVERS = frozenset("Concat Expand Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split())


def following(graph: Graph, points: TwoPoints) -> dict[str, np.ndarray]:
    """Return by computed value an array of its shape, True where an element follows the input.

    Args:
        graph: the model.
        points: two walks over it.

    Returns:
        What can be told; a computed value that is missing may follow the input everywhere.
    """
    first = points.first
    walks = _walks(graph, points)
    found: dict[str, np.ndarray] = {}
    for node in graph.nodes if walks else ():
        if not all(name in walk.computed for walk in walks for name in node.outputs if name):
            continue
        marks = _measured(node, walks) if Trait.MEASURE in traits(node.key) else _passed(node, first, found)
        for name, mark in zip(node.outputs, marks or (), strict=False):
            if name and mark.shape == first.value[name].shape:
                found[name] = mark
    return found


def _walks(graph: Graph, points: TwoPoints) -> list[Walk]:
    """Return walks between which every open axis differs, the first of the analysis first, or none."""
    inputs = open_inputs(graph.model)
    axes = [
        (each.name, axis)
        for each in inputs
        for axis, dim in enumerate(each.shape)
        if not isinstance(dim, int) and kind_of_axis(each, axis) != "channels"  # weights tell how many there are
    ]
    if not axes:
        return points.walks
    near, far = points.sizes
    for small in SMALL:
        sizes = resolve(inputs, small)
        if any(near[n][a] == far[n][a] or sizes[f"{n}[{a}]"] >= min(near[n][a], far[n][a]) > 1 for n, a in axes):
            continue
        if (walk := points.walked(graph, inputs, sizes)) is not None:
            return [*points.walks, walk]
    return []


def _measured(node: Node, walks: Sequence[Walk]) -> list[np.ndarray] | None:
    name = node.inputs[0]
    shapes = [walk.shape.get(name) for walk in walks]
    if len({None if shape is None else len(shape) for shape in shapes}) > 1:
        return None
    differs = [len({shape[i] for shape in shapes if shape}) > 1 for i in range(len(shapes[0] or ()))]
    made_up = [any((name, i) in walk.open_axes for walk in walks) for i in range(len(differs))]
    marks = np.asarray(differs, bool) | np.asarray(made_up, bool)
    return FOLDERS["Shape"](node, [marks]) if node.op == "Shape" else [np.asarray(bool(marks.any()))]


def _passed(node: Node, first: Walk, found: Mapping[str, np.ndarray]) -> list[np.ndarray] | None:
    """Return the marks of a node's outputs: moved as its values are, or on all elements."""
    marks: list[np.ndarray | None] = []
    for name in node.inputs:
        if not name:
            marks.append(None)
        elif name in found:
            marks.append(found[name])
        elif name in first.computed or name not in first.value:
            return None
        else:
            marks.append(np.zeros(first.value[name].shape, bool))
    given = [mark for mark in marks if mark is not None]
    if not any(mark.any() for mark in given):
        return [np.zeros(first.value[name].shape, bool) for name in node.outputs if name]
    if node.op == "Cast":
        return [given[0]]
    data = len(given) if node.op == "Concat" else 1
    if node.op not in _MOVERS or any(mark.any() for mark in given[data:]):
        return [np.ones(first.value[name].shape, bool) for name in node.outputs if name]
    controls = [first.value[name] if name else None for name in node.inputs[data:]]
    return FOLDERS[node.op](node, [*marks[:data], *controls])
