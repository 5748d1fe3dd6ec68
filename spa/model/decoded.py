"""Constants as layers compute with them: floats as they are, and those that integers are decoded to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike
from onnx import TensorProto

from spa.model.graph import Graph, Node
from spa.model.traits import FLOATS

Array = np.ndarray
LIMITS = {  # the least and the largest integer, by element type
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
}


@dataclass(frozen=True)
class Constant:
    """A constant of floats.

    Attributes:
        name: the initializer.
    """

    name: str

    @property
    def exact(self) -> bool:
        """True if any float can be stored, False if only those of a grid can."""
        return True

    @property
    def decoded(self) -> str:
        """The name of the floats."""
        return self.name

    def shape(self, graph: Graph) -> tuple[int, ...]:
        """Return the shape of the floats."""
        return tuple(graph.constants[self.name].dims)

    def value(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        """Return the floats."""
        return graph.array(self.name).astype(dtype, copy=False)

    def encoded(self, graph: Graph, value: Array) -> Array:
        """Return floats as the initializer stores them: integers are rounded, and cut off where their grid ends."""
        return np.asarray(value, graph.array(self.name).dtype)


class Grid(Constant):
    """Integers that stand for floats on a grid: a scale and a zero point for all, or for a part of them each."""

    @property
    def exact(self) -> bool:
        return False

    @property
    def scale_name(self) -> str:
        """The name of the scales."""
        raise NotImplementedError

    def grid(self, graph: Graph) -> tuple[Array, Array]:
        """Return scale and zero point of each integer, in shapes that broadcast over :meth:`layout`."""
        raise NotImplementedError

    def layout(self, graph: Graph) -> tuple[int, ...]:
        """Return the shape of the integers."""
        raise NotImplementedError

    def integers(self, stored: Array) -> Array:
        """Return the integers of some rows as they are stored."""
        raise NotImplementedError

    def limits(self, graph: Graph) -> tuple[int, int]:
        """Return the least and the largest integer."""
        raise NotImplementedError

    def laid_out(self, graph: Graph, value: Array) -> Array:
        """Return floats in the layout of the integers."""
        raise NotImplementedError

    def excess(self, graph: Graph, value: Array) -> Array:
        """Return by how much each scale must grow so that floats fit on the grid, at least 1, in the scales' shape."""
        scale, zero = self.grid(graph)
        value = self.laid_out(graph, value)
        least, largest = self.limits(graph)
        span = np.where(value < 0, zero - least, largest - zero) * np.abs(scale)
        needed = np.abs(value) / np.maximum(span, np.finfo(np.float64).tiny)
        axes = tuple(i for i in range(value.ndim) if scale.ndim == 0 or scale.shape[i] == 1)
        return np.maximum(needed.max(axis=axes).reshape(scale.shape), 1.0)


@dataclass(frozen=True)
class Decoded(Grid):
    """Integers behind a DequantizeLinear.

    Spec: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.

    Attributes:
        decoder: the DequantizeLinear.
    """

    decoder: Node

    @property
    def scale_name(self) -> str:
        return self.decoder.inputs[1]

    @property
    def decoded(self) -> str:
        return self.decoder.outputs[0]

    def value(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        scale, zero = self.grid(graph)
        return np.asarray((graph.array(self.name).astype(np.float64) - zero) * scale, dtype)

    def encoded(self, graph: Graph, value: Array) -> Array:
        scale, zero = self.grid(graph)
        return np.clip(np.rint(value / scale) + zero, *self.limits(graph)).astype(graph.array(self.name).dtype)

    def grid(self, graph: Graph) -> tuple[Array, Array]:
        axis, size = (self.decoder.attributes.get(a, d) for a, d in (("axis", 1), ("block_size", 0)))
        operands = [graph.array(n).astype(np.float64) for n in self.decoder.inputs[1:] if n]
        scale, zero = operands if len(operands) == 2 else (operands[0], np.zeros(()))
        return _spread(scale, self.shape(graph), axis, size), _spread(zero, self.shape(graph), axis, size)

    def layout(self, graph: Graph) -> tuple[int, ...]:
        return self.shape(graph)

    def integers(self, stored: Array) -> Array:
        return stored

    def limits(self, graph: Graph) -> tuple[int, int]:
        return LIMITS[graph.constants[self.name].data_type]

    def laid_out(self, graph: Graph, value: Array) -> Array:
        return value


def _spread(value: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Return one number, one for each index of an axis, or one for each block along it, so that they broadcast."""
    if value.size == 1:
        return value.reshape(())
    if not block:
        return value.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return value.repeat(block, axis=axis).take(np.arange(shape[axis]), axis=axis)


@dataclass(frozen=True)
class Packed(Grid):
    """The weights of a MatMulNBits: integers of a few bits, in blocks that have a scale and a zero point each.

    Spec: ContribOperators.md#com.microsoft.MatMulNBits.

    Attributes:
        node: the MatMulNBits.
    """

    node: Node

    @property
    def scale_name(self) -> str:
        return self.node.inputs[2]

    def shape(self, graph: Graph) -> tuple[int, ...]:
        return self.node.attributes["N"], self.node.attributes["K"]

    def value(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        scale, zero = self.grid(graph)
        rows, columns = self.shape(graph)
        found = (self.integers(graph.array(self.name)) - zero) * scale
        return np.asarray(found.reshape(rows, -1)[:, :columns], dtype)

    def encoded(self, graph: Graph, value: Array) -> Array:
        scale, zero = self.grid(graph)
        codes = np.clip(np.rint(self.laid_out(graph, value) / scale) + zero, *self.limits(graph))
        shifts = np.arange(0, 8, self._bits, dtype=np.uint8)
        parts = codes.astype(np.uint8).reshape(*codes.shape[:2], -1, len(shifts)) << shifts
        return np.asarray(np.bitwise_or.reduce(parts, axis=-1)).reshape(graph.constants[self.name].dims)

    def laid_out(self, graph: Graph, value: Array) -> Array:
        rows, blocks, size = self.layout(graph)
        padded = np.zeros((rows, blocks * size))
        padded[:, : value.shape[1]] = value
        return padded.reshape(rows, blocks, size)

    def limits(self, graph: Graph) -> tuple[int, int]:
        return 0, 2**self._bits - 1

    def grid(self, graph: Graph) -> tuple[Array, Array]:
        rows, blocks, _ = self.layout(graph)
        scale = graph.array(self.node.inputs[2]).astype(np.float64).reshape(rows, blocks, 1)
        name = self.node.inputs[3] if len(self.node.inputs) > 3 else ""
        if not name:
            return scale, np.full((1, 1, 1), 2.0 ** (self._bits - 1))
        zero = graph.array(name)
        if graph.constants[name].data_type == TensorProto.UINT8:
            zero = self.integers(zero.reshape(rows, -1))[:, :blocks]
        return scale, zero.astype(np.float64).reshape(rows, blocks, 1)

    def layout(self, graph: Graph) -> tuple[int, ...]:
        return (*graph.constants[self.name].dims[:2], self.node.attributes["block_size"])

    def integers(self, stored: Array) -> Array:
        shifts = np.arange(0, 8, self._bits, dtype=np.uint8)  # the lowest bits are the first
        found = stored[..., None] >> shifts & np.uint8(2**self._bits - 1)
        return np.asarray(found.reshape(*stored.shape[:-1], -1))

    @property
    def _bits(self) -> int:
        return int(self.node.attributes.get("bits", 4))


def constant_behind(graph: Graph, operand: str) -> Constant | None:
    """Return the constant that an operand is, or that it is decoded from; None if it is computed otherwise."""
    if operand in graph.constants:
        return Constant(operand) if graph.constants[operand].data_type in FLOATS else None
    node = graph.producer.get(operand)
    found = None if node is None else decoded_by(graph, node, 0)
    return found if operand not in graph.outputs and len(graph.users.get(operand, ())) == 1 else None


def decoded_by(graph: Graph, node: Node, operand: int) -> Grid | None:
    """Return the integers that a node decodes as an operand; None where it does not, or where they are computed."""
    if operand >= len(node.inputs) or node.inputs[operand] not in graph.constants:
        return None
    if node.op == "DequantizeLinear" and operand == 0:
        fixed = all(n in graph.constants for n in node.inputs[1:] if n)
        return Decoded(node.inputs[0], node) if fixed and _has_limits(graph, node.inputs[0]) else None
    if node.key == "com.microsoft::MatMulNBits" and operand == 1:
        fixed = all(n in graph.constants for n in node.inputs[2:4] if n) and not any(node.inputs[4:5])
        plain = node.attributes.get("bits", 4) in (2, 4, 8) and not node.attributes.get("weight_prepacked", 0)
        return Packed(node.inputs[1], node) if fixed and plain else None
    return None


def _has_limits(graph: Graph, name: str) -> bool:
    return graph.constants[name].data_type in LIMITS
