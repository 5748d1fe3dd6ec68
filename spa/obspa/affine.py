"""The affine operators between a linear node and the residual sum that its output goes into.

A layer's error counts in units of that sum, so scores and refits need the constant scales on the way and the other
addend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spa.model.decoded import constant_behind
from spa.model.graph import Graph, Node

Array = np.ndarray


@dataclass(frozen=True)
class Tail:
    """The affine map of a linear node's output channels, up to the next residual sum.

    Attributes:
        scale: the factor of each output channel, (channels,).
        addend: the other operand of the residual sum that the output goes into, or None.
        mean: the name of the running mean of the BatchNormalization that follows immediately, or None.
        bias: the name of the constant vector that is added immediately, or None.
        order: the permutation that takes the axes of the layer's output to those of the addend; None if they agree.
    """

    scale: Array
    addend: str | None = None
    mean: str | None = None
    bias: str | None = None
    order: tuple[int, ...] | None = None

    def aligned(self, addend: Array) -> Array:
        """Return the addend with its axes in the order of the layer's output."""
        if self.order is None or len(self.order) != addend.ndim:
            return addend
        return addend.transpose(np.argsort(self.order))


def find_tail(graph: Graph, node: Node, channels: int, channel_axis: int | None) -> Tail:
    """Follow a node's output through constant scales and shifts to a residual sum.

    Args:
        graph: the network.
        node: a linear node.
        channels: the number of its output channels.
        channel_axis: their axis, 1 or a negative one; None if they are spread over several axes.

    Returns:
        The tail; of scales of one, without an addend, if nothing can be followed.
    """
    scale = np.ones(channels)
    if channel_axis is None:
        return Tail(scale)
    mean: str | None = None
    bias: str | None = None
    addend: str | None = None
    order: tuple[int, ...] | None = None
    # Channels are counted from the last axis, as broadcasting does.
    rank = 2 if node.op == "Gemm" else None
    if channel_axis == 1 and (weights := constant_behind(graph, node.inputs[1])) is not None:
        rank = len(weights.shape(graph))
    from_right = rank - 1 if channel_axis == 1 and rank is not None else -channel_axis
    name, first = node.outputs[0], True
    while name not in graph.outputs and len(users := list(graph.users.get(name, ()))) == 1:  # a chain, no search
        user, operand = users[0]
        if user.op in ("QuantizeLinear", "DequantizeLinear") and operand == 0:  # rounding counts as nothing
            name, first = user.outputs[0], False
            continue
        if (perm := _permutation(user)) is not None:
            rank = len(perm)
            from_right = rank - perm.index(rank - from_right)
            order = tuple(perm) if order is None else tuple(order[p] for p in perm)
            name = user.outputs[0]
            continue
        if user.op == "BatchNormalization" and operand == 0 and rank is not None and from_right == rank - 1:
            if any(n not in graph.constants for n in user.inputs[1:]):
                break
            scale = _through_norm(graph, user, scale)
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
    tail = Tail(scale=scale, addend=addend, mean=mean, bias=bias, order=order)
    return _before_later_transposes(graph, tail, node.index)


def _through_norm(graph: Graph, norm: Node, scale: Array) -> Array:
    """Return scales times γ / √(σ² + ε) of a BatchNormalization, (channels,)."""
    gamma, variance = (graph.array(norm.inputs[i]).astype(np.float64) for i in (1, 4))
    return np.asarray(scale * gamma / np.sqrt(variance + norm.attributes.get("epsilon", 1e-5)))


def _before_later_transposes(graph: Graph, tail: Tail, index: int) -> Tail:
    """Return the tail with its addend replaced by what later transpositions make it from.

    Streams hold what has been computed when a node has run: a transposition behind the node has not.
    """
    while (maker := graph.producer.get(tail.addend or "")) is not None and maker.index > index:  # a chain
        if (perm := _permutation(maker)) is None:
            break
        order = tuple((tail.order or range(len(perm)))[i] for i in np.argsort(perm))
        tail = replace(tail, addend=maker.inputs[0], order=order)
    return tail


def before_transpose(graph: Graph, name: str) -> str:
    """Return the name of the tensor that a tensor is a transposition of; its own name if it is none."""
    while (maker := graph.producer.get(name)) is not None and maker.op == "Transpose" and not maker.domain:  # a chain
        name = maker.inputs[0]
    return name


def _permutation(node: Node) -> list[int] | None:
    """Return the permutation of a Transpose; None for other nodes, and if the attribute is absent."""
    return node.attributes.get("perm") if node.op == "Transpose" and not node.domain else None


def _per_channel(value: Array, channels: int, from_right: int) -> Array | None:
    """Return a constant that broadcasts as one number per channel as a vector, (channels,); None if it does not.

    The channels lie along the axis ``-from_right``.
    """
    if value.size == 1:
        return np.full(channels, float(value.reshape(-1)[0]))
    if value.size != channels or value.ndim < from_right or value.shape[-from_right] != channels:
        return None
    return value.reshape(-1).astype(np.float64)
