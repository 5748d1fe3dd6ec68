"""A node with constant weights as one matrix product: rows of inputs, rows of outputs, a matrix between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from onnx import TensorProto

from spa.graph import Graph, Node

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """How a node's operands are seen as ``y = W x + b``.

    Attributes:
        node: the node.
        weight: the name of the weights.
        bias: the name of the constant that is added to each output channel, or None.
        blocks: how many independent products (the groups of a convolution).
        channel_axis: the axis of the output that carries the channels.
        by_rows: whether a matrix product's weights have a row, not a column, for each output.
    """

    node: Node
    weight: str
    bias: str | None
    blocks: int
    channel_axis: int
    by_rows: bool = True

    @property
    def is_convolution(self) -> bool:
        """Whether inputs are unfolded."""
        return self.node.op == "Conv"

    def matrix(self, graph: Graph) -> Array:
        """The weights as (blocks, outputs, inputs), float64; inputs are ordered as channel, then kernel place."""
        w = graph.array(self.weight).astype(np.float64)
        if self.is_convolution:
            return w.reshape(self.blocks, w.shape[0] // self.blocks, -1)
        return (w if self.by_rows else w.T)[None]

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        """The inverse of :meth:`matrix`, in the weights' own shape and type."""
        old = graph.array(self.weight)
        if self.is_convolution:
            return matrix.reshape(old.shape).astype(old.dtype)
        flat = matrix[0]
        return np.ascontiguousarray(flat if self.by_rows else flat.T, dtype=old.dtype)

    def kernel_places(self, graph: Graph) -> int:
        """How many inputs of the matrix each input channel has."""
        return prod(graph.constants[self.weight].dims[2:]) if self.is_convolution else 1

    def places(self, shape: tuple[int, ...]) -> int:
        """How many products one sample (one index of the first axis) has, from the output's shape."""
        return prod(shape[2:]) if self.is_convolution else prod(shape[1:-1])

    def outputs(self, y: Array, chosen: Array) -> Array:
        """Output rows (blocks, samples · chosen, outputs) at the chosen places of every sample."""
        if self.is_convolution:
            flat = y.reshape(y.shape[0], self.blocks, y.shape[1] // self.blocks, -1)[..., chosen]
            return flat.transpose(1, 0, 3, 2).reshape(self.blocks, -1, flat.shape[2])
        return y.reshape(y.shape[0], -1, y.shape[-1])[:, chosen].reshape(1, -1, y.shape[-1])

    def inputs(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        """Input rows (blocks, samples · chosen, inputs) that make the output's chosen places.

        Args:
            x: the input.
            shape: the output's shape.
            graph: for the kernel's size.
            chosen: flat indices of output places.
        """
        if not self.is_convolution:
            return x.reshape(x.shape[0], -1, x.shape[-1])[:, chosen].reshape(1, -1, x.shape[-1])
        kernel = graph.constants[self.weight].dims[2:]
        index, pads = _unfolding(self.node, tuple(kernel), x.shape[2:], shape[2:], chosen)
        if any(map(any, pads)):
            x = np.pad(x, [(0, 0), (0, 0), *pads])
        rows = x.reshape(x.shape[0], self.blocks, x.shape[1] // self.blocks, -1)[..., index]
        rows = rows.transpose(1, 0, 3, 2, 4)  # blocks, samples, places, channels, kernel
        return rows.reshape(self.blocks, rows.shape[1] * rows.shape[2], -1)


def _unfolding(
    node: Node, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...], chosen: Array
) -> tuple[Array, list[tuple[int, int]]]:
    """Flat indices (chosen, kernel places) into the padded input, and the pads of each axis."""
    rank = len(kernel)
    strides = node.attributes.get("strides") or [1] * rank
    dilations = node.attributes.get("dilations") or [1] * rank
    given = node.attributes.get("pads") or [0] * 2 * rank
    auto = node.attributes.get("auto_pad", "NOTSET")
    pads = []
    for i in range(rank):
        reach = (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max(reach - space[i], 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
        else:
            pads.append((given[i], given[rank + i]) if auto == "NOTSET" else (0, 0))
    padded = [s + a + b for s, (a, b) in zip(space, pads, strict=True)]
    steps = [prod(padded[i + 1 :]) for i in range(rank)]
    at = np.unravel_index(chosen, out)
    start = sum(p * stride * step for p, stride, step in zip(at, strides, steps, strict=True))
    offsets = [
        sum(k * d * s for k, d, s in zip(place, dilations, steps, strict=True))
        for place in product(*map(range, kernel))
    ]
    return np.asarray(start)[:, None] + np.asarray(offsets)[None], pads


def linear(graph: Graph, node: Node) -> Linear | None:
    """The node as a matrix product, or None where it is none that can be refitted.

    It must be a Conv, a Gemm (alpha and beta 1, no transA) or a MatMul with a matrix on its right, with float weights
    that no other node reads; a Transpose may stand before a matrix.
    """
    if node.domain or node.op not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
        return None
    weight, turned = _untransposed(graph, node.inputs[1])
    tensor = graph.constants.get(weight)
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(graph.users[weight]) != 1:
        return None
    if weight in graph.outputs or node.inputs[0] in graph.constants:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None
    if node.op == "Conv":
        return None if turned else Linear(node, weight, bias, node.attributes.get("group", 1), 1)
    if len(tensor.dims) != 2:
        return None
    a = node.attributes
    if node.op == "Gemm" and (a.get("alpha", 1.0) != 1 or a.get("beta", 1.0) != 1 or a.get("transA", 0)):
        return None
    by_rows = bool(node.op == "Gemm" and a.get("transB", 0)) != turned
    return Linear(node, weight, bias, 1, -1, by_rows)


def _untransposed(graph: Graph, name: str) -> tuple[str, bool]:
    """The constant behind a Transpose of a matrix that one node reads, and whether there was one."""
    before = graph.producer.get(name)
    if before is None or before.op != "Transpose" or before.domain or name in graph.outputs:
        return name, False
    source = before.inputs[0]
    if len(graph.users[name]) != 1 or source not in graph.constants or len(graph.constants[source].dims) != 2:
        return name, False
    if before.attributes.get("perm", [1, 0]) != [1, 0]:
        return name, False
    return source, True
