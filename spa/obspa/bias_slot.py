"""Where the constant of a refitted layer goes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from spa.model.traits import Trait, traits
from spa.obspa.affine import Tail
from spa.obspa.linear import Linear
from spa.running.stream import Bias, Stream

Array = np.ndarray


class Shift:
    """Where a layer's constant goes: its bias, the mean of the BatchNormalization behind it, or a new bias.

    Attributes:
        stream: the network.
        name: of the constant vector.
        factor: a change of it per change of the layer's output.
        base: what it is where the layer's own constant is zero.
    """

    def __init__(self, stream: Stream, name: str, factor: float, base: Array) -> None:
        self.stream, self.name, self.factor, self.base = stream, name, factor, base

    @classmethod
    def place(cls, stream: Stream, lin: Linear, after: Tail, everyone: Sequence[Linear]) -> Shift | None:
        """Find the place, or make it; None where there is none. ``everyone`` may share the layer's bias."""
        graph, width = stream.graph, after.scale.size
        if lin.bias is not None:
            if lin.bias not in graph.constants:
                return None
            dims = list(graph.constants[lin.bias].dims)
            readers = {n.index for n, _ in graph.users[lin.bias]}
            shared = readers not in ({lin.node.index}, {u.node.index for u in everyone})
            if shared or dims[-1:] != [width] or prod(dims) != width:
                return None
            return cls(stream, lin.bias, 1 / lin.bias_scale, np.zeros(()))
        if after.mean is not None:
            return cls(stream, after.mean, -1.0, graph.array(after.mean))
        if after.bias is not None:
            return cls(stream, after.bias, 1.0, graph.array(after.bias).reshape(-1))
        if Trait.BIASED in traits(lin.node.key):
            name = stream.add_bias(lin.node, Bias((width,), lin.weight))
            return cls(stream, name, 1 / lin.bias_scale, np.zeros(()))
        return None

    def set(self, constant: Array) -> None:
        """Store the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (self.base + self.factor * constant).reshape(old.shape).astype(old.dtype))

    def move(self, change: Array) -> None:
        """Add to the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (old + self.factor * change.reshape(old.shape)).astype(old.dtype))
