"""The constant vector that takes over the mean of a refitted layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from spa.model.traits import Trait, traits
from spa.obspa.affine import Tail
from spa.obspa.linear import Linear
from spa.running.stream import Bias, Stream

Array = np.ndarray


class BiasSlot:
    """The vector that holds a layer's constant b in y = W x + b.

    It is the layer's bias, the running mean of the BatchNormalization behind it (with a negative sign), the constant
    that is added behind it, or a new bias.

    Attributes:
        stream: the network.
        name: the name of the vector.
        factor: the change of the vector for a unit change of b.
        base: the vector's value for b = 0.
    """

    def __init__(self, stream: Stream, name: str, factor: float, base: Array) -> None:
        self.stream, self.name, self.factor, self.base = stream, name, factor, base

    @classmethod
    def find(cls, stream: Stream, lin: Linear, after: Tail, sharing: Sequence[Linear]) -> BiasSlot | None:
        """Find the vector of a layer, or add a bias.

        Args:
            stream: the network.
            lin: the layer.
            after: what follows it.
            sharing: the layers that may share its bias.

        Returns:
            The vector; None if there is none that may change.
        """
        graph, width = stream.graph, after.scale.size
        if lin.bias is not None:
            if lin.bias not in graph.constants:
                return None
            dims = list(graph.constants[lin.bias].dims)
            readers = {n.index for n, _ in graph.users[lin.bias]}
            read_by_others = readers not in ({lin.node.index}, {layer.node.index for layer in sharing})
            if read_by_others or dims[-1:] != [width] or prod(dims) != width:
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
        """Set b, (channels,)."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (self.base + self.factor * constant).reshape(old.shape).astype(old.dtype))

    def move(self, change: Array) -> None:
        """Add to b, (channels,)."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (old + self.factor * change.reshape(old.shape)).astype(old.dtype))
