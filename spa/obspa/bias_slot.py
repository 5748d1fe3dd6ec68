"""The constant vector that takes over the mean of a refitted layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from spa.model.decoded import Constant
from spa.model.traits import Trait, traits
from spa.obspa.affine import Tail
from spa.obspa.linear import Linear, readers_of, replace
from spa.running.stream import Bias, Stream

Array = np.ndarray


class BiasSlot:
    """The vector that holds a layer's constant b in y = W x + b.

    It is the layer's bias, the running mean of the BatchNormalization behind it (with a negative sign), the constant
    that is added behind it, or a new bias.

    Attributes:
        stream: the network.
        vector: the vector.
        factor: the change of the vector for a unit change of b.
        base: the vector's value for b = 0.
    """

    def __init__(self, stream: Stream, vector: Constant, factor: float, base: Array) -> None:
        self.stream, self.vector, self.factor, self.base = stream, vector, factor, base

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
        if lin.added is not None and lin.bias is not None:
            if lin.bias not in graph.constants:
                return None
            dims = list(graph.constants[lin.bias].dims)
            readers = {n.index for n in readers_of(graph, lin.bias)}
            read_by_others = readers not in ({lin.node.index}, {layer.node.index for layer in sharing})
            if read_by_others or dims[-1:] != [width] or prod(dims) != width:
                return None
            return cls(stream, lin.added, 1 / lin.bias_scale, np.zeros(()))
        if after.mean is not None:
            return cls(stream, Constant(after.mean), -1.0, graph.array(after.mean))
        if after.bias is not None:
            return cls(stream, Constant(after.bias), 1.0, graph.array(after.bias).reshape(-1))
        if Trait.BIASED in traits(lin.node.key) and lin.weights.exact:  # runtimes want no float beside integers
            name = stream.add_bias(lin.node, Bias((width,), lin.weight))
            return cls(stream, Constant(name), 1 / lin.bias_scale, np.zeros(()))
        return None

    def set(self, constant: Array) -> None:
        """Set b, (channels,)."""
        dims = self.stream.graph.constants[self.vector.name].dims
        replace(self.stream, self.vector, (self.base + self.factor * constant).reshape(dims))

    def move(self, change: Array) -> None:
        """Add to b, (channels,)."""
        old = self.vector.value(self.stream.graph)
        replace(self.stream, self.vector, old + self.factor * change.reshape(old.shape))
