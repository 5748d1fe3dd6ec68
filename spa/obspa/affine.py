"""What follows a linear node before its output meets another branch: constant scales, and the addend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.graph import Graph, Node

Array = np.ndarray


@dataclass(frozen=True)
class Tail:
    """What a linear node's output channels go through.

    Attributes:
        scale: what each output channel is multiplied with, (channels,).
        addend: the other operand of the residual sum that the output goes into, or None.
        mean: the running mean of the BatchNormalization that follows at once, or None.
        bias: the constant vector that is added at once, or None.
    """

    scale: Array
    addend: str | None
    mean: str | None
    bias: str | None


def tail(graph: Graph, node: Node, channels: int, channel_axis: int | None) -> Tail:
    """Follow a node's output through constant scales and shifts to a residual sum.

    Args:
        graph: the network.
        node: a linear node.
        channels: of its output.
        channel_axis: where they are: 1, or counted from the end; None where they are spread over several axes.
    """
    scale = np.ones(channels)
    mean = bias = None
    if channel_axis is None:
        return Tail(scale, None, mean, bias)
    name, first = node.outputs[0], True
    from_right = len(graph.constants[node.inputs[1]].dims) - 1 if channel_axis == 1 else -channel_axis
    while True:
        users = graph.users.get(name, ())
        if len(users) != 1 or name in graph.outputs:
            return Tail(scale, None, mean, bias)
        user, operand = users[0]
        if user.op == "BatchNormalization" and operand == 0 and channel_axis == 1:
            if any(n not in graph.constants for n in user.inputs[1:]):
                return Tail(scale, None, mean, bias)
            gamma, variance = (graph.array(user.inputs[i]).astype(np.float64) for i in (1, 4))
            scale = scale * gamma / np.sqrt(variance + user.attributes.get("epsilon", 1e-5))
            if first and len(graph.users[user.inputs[3]]) == 1:
                mean = user.inputs[3]
        elif user.op in ("Add", "Mul") and not user.domain:
            other = user.inputs[1 - operand]
            if other not in graph.constants:
                return Tail(scale, other if user.op == "Add" else None, mean, bias)
            vector = _per_channel(graph.array(other), channels, from_right)
            if vector is None:
                return Tail(scale, None, mean, bias)
            if user.op == "Mul":
                scale = scale * vector
            elif first and graph.array(other).size == channels and len(graph.users[other]) == 1:
                bias = other
        else:
            return Tail(scale, None, mean, bias)
        name, first = user.outputs[0], False


def _per_channel(value: Array, channels: int, from_right: int) -> Array | None:
    """A constant that broadcasts as one number per channel, as a vector; channels are counted from the last axis."""
    if value.size == 1:
        return np.full(channels, float(value.reshape(-1)[0]))
    if value.size != channels or value.ndim < from_right or value.shape[-from_right] != channels:
        return None
    return value.reshape(-1).astype(np.float64)
