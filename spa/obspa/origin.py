"""Trace an activation's entries to the output channels of the product with weights that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from spa.coupling.analysis import Analysis
from spa.model.graph import Node
from spa.model.shape_values import FOLDERS
from spa.model.traits import Trait, operators, traits
from spa.obspa.linear import Linear, linear

Array = np.ndarray
# Operators that move elements of their first operand, and that can be run on channel numbers.
_LAYOUT = FOLDERS.keys() & {
    "Identity",
    *operators(Trait.VIEW),
    *operators(Trait.PERMUTATION),
    *operators(Trait.SELECTION),
}


@dataclass(frozen=True)
class Origin:
    """The product whose output channels (on its last axis) an activation holds, up to scalar factors.

    Attributes:
        lin: the product.
        bias: the name of the constant that is added to its channels, or None.
        channels: the channel of each entry; an axis along which the channels do not differ has one index.
    """

    lin: Linear
    bias: str | None
    channels: Array


def origin(analysis: Analysis, name: str) -> Origin | None:
    """Follow an activation back to a product with constant weights, through layout, scalar factors and a bias.

    Args:
        analysis: the network.
        name: the activation.

    Returns:
        The origin; None if another operator lies between, or another node reads the channels on their way.
    """
    graph, shapes = analysis.graph, analysis.points.first.shape
    path: list[Node] = []
    carried = [name]
    lin = None
    while lin is None:  # a chain, no search: each node has one operand that it passes on
        node = graph.producer.get(carried[-1])
        if node is None or node.domain or carried[-1] in graph.outputs:
            return None
        lin = linear(graph, node)
        if lin is None:
            operand = _carrier(analysis, node)
            if operand is None:
                return None
            path.append(node)
            carried.append(node.inputs[operand])
    sums = [n for n in path if n.op == "Add"]
    if (
        lin.channel_axis != -1
        or sums not in ([], path[-1:])
        or (sums and lin.bias)
        or not (lin.added is None or lin.added.exact)
    ):
        return None
    bias = next((n for s in sums for n in s.inputs if n in graph.constants), lin.bias)
    shape = shapes[carried[-1]]
    values = {carried[-1]: np.broadcast_to(np.arange(shape[-1]), shape)}
    for node, source in zip(reversed(path), reversed(carried), strict=False):
        values |= _through(analysis, node, values[source])
    if _read_elsewhere(analysis, path, carried, values):
        return None
    channels = values[name]
    for i in range(channels.ndim - 1):
        if (channels == channels.take([0], axis=i)).all():
            channels = channels.take([0], axis=i)
    return Origin(lin, bias, channels)


def _carrier(analysis: Analysis, node: Node) -> int | None:
    """Return the operand whose channels a node passes on; None if it changes them."""
    if node.op in _LAYOUT:
        return 0
    if node.op not in ("Add", "Mul", "Div"):
        return None
    for operand, other in ((0, node.inputs[1]), (1, node.inputs[0])):
        single = prod(analysis.points.first.shape.get(other, (0,))) == 1
        if (node.op == "Add" and other in analysis.graph.constants) or (
            single and (node.op == "Mul" or (node.op == "Div" and operand == 0))
        ):
            return operand
    return None


def _through(analysis: Analysis, node: Node, value: Array) -> dict[str, Array]:
    """Return a node's outputs, by name, for a value of its first operand; the others keep theirs."""
    if node.op not in _LAYOUT:
        return {node.outputs[0]: value}
    known = analysis.points.first.value
    results = FOLDERS[node.op](node, [value, *(known.get(n) for n in node.inputs[1:])]) or []
    return dict(zip(node.outputs, results, strict=True))


def _read_elsewhere(analysis: Analysis, path: list[Node], carried: list[str], values: dict[str, Array]) -> bool:
    """Return whether nodes beside the path read channels that the path carries to the activation."""
    graph = analysis.graph
    others = [v for n, v in values.items() if n not in carried]
    for name in carried[1:]:
        if any(name in names for names in graph.captured.values()):
            return True
        for user, _ in graph.users[name]:
            if user in path or Trait.MEASURE in traits(user.key):
                continue
            others += _through(analysis, user, values[name]).values() if user.op in _LAYOUT else [values[name]]
    return len(graph.users[carried[0]]) != 1 or any(np.isin(o, values[carried[0]]).any() for o in others)
