"""The interface of nodes that are seen as one matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from spa.errors import InvariantError
from spa.model.decoded import Constant
from spa.model.graph import Graph, Node

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """A node seen as ``y = W x + b``, for rows x (blocks, rows, inputs) and y (blocks, rows, outputs).

    A row is one product: of one sample at one *position* (a pixel, a token). The node makes the rows of a sample at all
    positions; fits look at some of them.

    Attributes:
        node: the node.
        source: the name of the inputs.
        weights: the weights; other nodes may read them, too (see :func:`spa.obspa.linear.uses`).
        added: what is added to each output channel, or None.
        blocks: the number of independent products (the groups of a convolution).
        input_axes: the axes of the inputs that are summed over, in the order of the matrix' columns.
        channel_axis: the axis of the output that carries the channels; None if there are several.
        scale: the factor of the weights (a Gemm's alpha).
        bias_scale: the factor of the bias (a Gemm's beta).
    """

    node: Node
    source: str
    weights: Constant
    added: Constant | None
    blocks: int
    input_axes: tuple[int, ...]
    channel_axis: int | None
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    def orientation(self) -> tuple[int, ...] | None:
        """The order in which the matrix has the axes of the weights; None if the kind of product settles it."""
        return None

    @property
    def weight(self) -> str:
        """The name of the initializer with the weights."""
        return self.weights.name

    @property
    def bias(self) -> str | None:
        """The name of the initializer or tensor that is the bias, or None."""
        return None if self.added is None else self.added.name

    def size(self, graph: Graph) -> tuple[int, int, int]:
        """Return the matrix' shape: blocks, outputs, inputs."""
        raise NotImplementedError

    def matrix(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        """Return the weights as (blocks, outputs, inputs); inputs are ordered by channel, then kernel tap."""
        return self.as_matrix(self.weights.value(graph, dtype), graph)

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        """Return a matrix in the weights' own shape and type; the inverse of :meth:`matrix`."""
        return self.weights.encoded(graph, self.laid_out(matrix, graph))

    def as_matrix(self, weights: Array, graph: Graph) -> Array:
        """Return an array of the weights' shape as (blocks, outputs, inputs)."""
        raise NotImplementedError

    def laid_out(self, matrix: Array, graph: Graph) -> Array:
        """Return a matrix in the weights' own shape; the inverse of :meth:`as_matrix`."""
        raise NotImplementedError

    def taps(self, graph: Graph) -> int:
        """Return the number of matrix columns of each input channel (the size of a kernel)."""
        return 1

    def samples(self, shape: tuple[int, ...]) -> int:
        """Return the number of samples (indices of the first axis that counts rows) in an output of a shape."""
        raise NotImplementedError

    def positions(self, shape: tuple[int, ...]) -> int:
        """Return the number of positions of one sample, from the output's shape."""
        raise NotImplementedError

    def samples_first(self, before: int, after: int) -> bool:
        """Return whether samples lie along the first axis of both the input and the output, from their ranks."""
        return True

    def other_axes(self, rank: int) -> tuple[int, ...]:
        """Return the axes of an output of a rank that do not carry its channels.

        Raises:
            InvariantError: the channels lie along several axes.
        """
        if self.channel_axis is None:
            raise InvariantError(f"the channels of {self.node.label} lie along several axes.")
        return tuple(a for a in range(rank) if a != self.channel_axis % rank)

    def output_rows(self, y: Array, chosen: Array) -> Array:
        """Return output rows (blocks, samples · chosen, outputs) at the chosen positions of every sample."""
        raise NotImplementedError

    def real_rows(self, real: Array | None, shape: tuple[int, ...], chosen: Array) -> Array | slice:
        """Return which of the rows at the chosen positions of every sample are of no padding: an index of rows.

        Args:
            real: which positions of sequences are no padding, (samples, positions); None where all are.
            shape: the output's shape.
            chosen: flat indices of positions.
        """
        if real is None:
            return slice(None)
        if shape[: real.ndim] == real.shape and len(shape) > real.ndim:
            marks = real.reshape(*real.shape, *[1] * (len(shape) - real.ndim))
        elif len(shape) == 2 and shape[0] == real.size:  # samples and positions are one axis
            marks = real.reshape(-1, 1)
        else:
            return slice(None)
        return np.asarray(self.output_rows(np.broadcast_to(marks, shape), chosen)[0, :, 0])

    def output_from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """Return the output of a shape from its rows at all positions; the inverse of :meth:`output_rows`."""
        raise NotImplementedError

    def input_gradient(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        """Return the gradient of the input from that of the output: the transposed layer.

        Args:
            y: the gradient of the output.
            matrix: (blocks, outputs, inputs).
            shape: the input's shape.
            graph: the network, for the size of the kernel.
        """
        raise NotImplementedError

    def input_rows(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        """Return the input rows (blocks, samples · chosen, inputs) of the chosen positions.

        Args:
            x: the input.
            shape: the output's shape.
            graph: the network, for the size of the kernel.
            chosen: flat indices of positions.
        """
        raise NotImplementedError


def take(value: Array, chosen: Array, axis: int) -> Array:
    """Return the chosen positions along an axis; the array itself, not a copy, if they are all, in order."""
    whole = len(chosen) == value.shape[axis] and np.array_equal(chosen, np.arange(len(chosen)))
    return value if whole else value.take(chosen, axis=axis)
