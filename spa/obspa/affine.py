"""What follows a linear node before its output meets another branch: constant scales, and the addend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spa.model.graph import Graph, Node

Array = np.ndarray


@dataclass(frozen=True)
class Tail:
    """What a linear node's output channels go through.

    Attributes:
        scale: what each output channel is multiplied with, (channels,).
        addend: the other operand of the residual sum that the output goes into, or None.
        mean: the running mean of the BatchNormalization that follows at once, or None.
        bias: the constant vector that is added at once, or None.
        order: the addend's axes as those of the layer's output, where transpositions lie between the two; it is the
            addend before transpositions that come after the layer.
    """

    scale: Array
    addend: str | None = None
    mean: str | None = None
    bias: str | None = None
    order: tuple[int, ...] | None = None

    def aligned(self, addend: Array) -> Array:
        """The addend with its axes in the order of the layer's output."""
        return (
            addend if self.order is None or len(self.order) != addend.ndim else addend.transpose(np.argsort(self.order))
        )


def tail(graph: Graph, node: Node, channels: int, channel_axis: int | None) -> Tail:
    """Follow a node's output through constant scales and shifts to a residual sum.

    Args:
        graph: the network.
        node: a linear node.
        channels: of its output.
        channel_axis: where they are: 1, or counted from the end; None where they are spread over several axes.
    """
    scale = np.ones(channels)
    if channel_axis is None:
        return Tail(scale)
    mean: str | None = None
    bias: str | None = None
    addend: str | None = None
    order: tuple[int, ...] | None = None
    rank = len(graph.constants[node.inputs[1]].dims) if channel_axis == 1 else 2 if node.op == "Gemm" else None
    from_right = rank - 1 if channel_axis == 1 and rank is not None else -channel_axis
    name, first = node.outputs[0], True
    while name not in graph.outputs and len(users := list(graph.users.get(name, ()))) == 1:
        user, operand = users[0]
        if (perm := _permutation(user)) is not None:
            rank = len(perm)
            from_right = rank - perm.index(rank - from_right)
            order = tuple(perm) if order is None else tuple(order[p] for p in perm)
            name = user.outputs[0]
            continue
        if user.op == "BatchNormalization" and operand == 0 and rank is not None and from_right == rank - 1:
            if any(n not in graph.constants for n in user.inputs[1:]):
                break
            gamma, variance = (graph.array(user.inputs[i]).astype(np.float64) for i in (1, 4))
            scale = scale * gamma / np.sqrt(variance + user.attributes.get("epsilon", 1e-5))
            if first and len(graph.users[user.inputs[3]]) == 1:
                mean = user.inputs[3]
        elif user.op in ("Add", "Mul") and not user.domain:
            other = user.inputs[1 - operand]
            if other not in graph.constants:
                addend = other if user.op == "Add" else None
                break
            vector = _per_channel(graph.array(other), channels, from_right)
            if vector is None:
                break
            if user.op == "Mul":
                scale = scale * vector
            elif first and graph.array(other).size == channels and len(graph.users[other]) == 1:
                bias = other
        else:
            break
        name, first = user.outputs[0], False
    return _early(graph, Tail(scale, addend, mean, bias, order), node.index)


def _early(graph: Graph, found: Tail, index: int) -> Tail:
    """The tail with its addend as it is before transpositions that come after a node: what is there by then."""
    while (maker := graph.producer.get(found.addend or "")) is not None and maker.index > index:
        if (perm := _permutation(maker)) is None:
            break
        order = tuple((found.order or range(len(perm)))[i] for i in np.argsort(perm))
        found = replace(found, addend=maker.inputs[0], order=order)
    return found


def before_transpose(graph: Graph, name: str) -> str:
    """What a tensor is a transposition of, or the tensor itself."""
    while (maker := graph.producer.get(name)) is not None and maker.op == "Transpose" and not maker.domain:
        name = maker.inputs[0]
    return name


def _permutation(node: Node) -> list[int] | None:
    """How a Transpose permutes axes; None for other nodes, and where it only turns them around."""
    return node.attributes.get("perm") if node.op == "Transpose" and not node.domain else None


def _per_channel(value: Array, channels: int, from_right: int) -> Array | None:
    """A constant that broadcasts as one number per channel, as a vector; channels are counted from the last axis."""
    if value.size == 1:
        return np.full(channels, float(value.reshape(-1)[0]))
    if value.size != channels or value.ndim < from_right or value.shape[-from_right] != channels:
        return None
    return value.reshape(-1).astype(np.float64)
