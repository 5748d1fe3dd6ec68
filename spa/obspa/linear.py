"""A node with constant weights as one matrix product: rows of inputs, rows of outputs, a matrix between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from spa.errors import InvariantError
from spa.model.graph import Graph, Node
from spa.model.traits import FLOATS

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """How a node's operands are seen as ``y = W x + b``.

    Attributes:
        node: the node.
        source: the name of the inputs.
        weight: the name of the weights; other nodes may read them, too (see :func:`uses`).
        bias: the name of the constant that is added to each output channel, or None.
        blocks: how many independent products (the groups of a convolution).
        input_axes: the axes of the inputs that are summed over, in the order of the matrix' columns.
        channel_axis: the axis of the output that carries the channels; None where there are several.
        scale: what the weights are multiplied with (a Gemm's alpha).
        bias_scale: what the bias is multiplied with (a Gemm's beta).
    """

    node: Node
    source: str
    weight: str
    bias: str | None
    blocks: int
    input_axes: tuple[int, ...]
    channel_axis: int | None
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    def orientation(self) -> tuple[int, ...] | None:
        """The order in which the matrix has the axes of the weights; None where the kind of product settles it."""
        return None

    def size(self, graph: Graph) -> tuple[int, int, int]:
        """Blocks, outputs and inputs of the matrix."""
        raise NotImplementedError

    def matrix(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        """The weights as (blocks, outputs, inputs); inputs are ordered as channel, then kernel place."""
        raise NotImplementedError

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        """The inverse of :meth:`matrix`, in the weights' own shape and type."""
        raise NotImplementedError

    def kernel_places(self, graph: Graph) -> int:
        """How many inputs of the matrix each input channel has."""
        return 1

    def samples(self, shape: tuple[int, ...]) -> int:
        """How many samples (indices of the first axis that counts rows) an output of a shape has."""
        raise NotImplementedError

    def places(self, shape: tuple[int, ...]) -> int:
        """How many products one sample has, from the output's shape."""
        raise NotImplementedError

    def by_sample(self, before: int, after: int) -> bool:
        """Whether samples lie along the first axis of both the input and the output, from their ranks."""
        return True

    def other_axes(self, rank: int) -> tuple[int, ...]:
        """The axes of an output of a rank that do not carry its channels; there must be one that does."""
        if self.channel_axis is None:
            raise InvariantError(f"the channels of {self.node.label} lie along several axes.")
        return tuple(a for a in range(rank) if a != self.channel_axis % rank)

    def outputs(self, y: Array, chosen: Array) -> Array:
        """Output rows (blocks, samples · chosen, outputs) at the chosen places of every sample."""
        raise NotImplementedError

    def spread(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The output of a shape that :meth:`outputs` takes these rows from, at all its places."""
        raise NotImplementedError

    def back(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        """The transposed layer: the gradient of its input from that of its output.

        Args:
            y: the output's gradient.
            matrix: (blocks, outputs, inputs).
            shape: the input's shape.
            graph: for the kernel's size.
        """
        raise NotImplementedError

    def inputs(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        """Input rows (blocks, samples · chosen, inputs) that make the output's chosen places.

        Args:
            x: the input.
            shape: the output's shape.
            graph: for the kernel's size.
            chosen: flat indices of output places.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Convolution(Linear):
    """A Conv; the inputs of a row are unfolded."""

    def size(self, graph: Graph) -> tuple[int, int, int]:
        outputs, inputs, *kernel = graph.constants[self.weight].dims
        return self.blocks, outputs // self.blocks, inputs * prod(kernel)

    def matrix(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        return graph.array(self.weight).astype(dtype, copy=False).reshape(self.size(graph))

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        old = graph.array(self.weight)
        return matrix.reshape(old.shape).astype(old.dtype)

    def kernel_places(self, graph: Graph) -> int:
        return prod(graph.constants[self.weight].dims[2:])

    def samples(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def places(self, shape: tuple[int, ...]) -> int:
        return prod(shape[2:])

    def outputs(self, y: Array, chosen: Array) -> Array:
        flat = _taken(self._flat(y), chosen, 3)
        return flat.transpose(1, 2, 0, 3).reshape(self.blocks, flat.shape[2], -1).transpose(0, 2, 1)

    def spread(self, rows: Array, shape: tuple[int, ...]) -> Array:
        flat = rows.transpose(0, 2, 1).reshape(self.blocks, rows.shape[2], shape[0], -1)
        return flat.transpose(2, 0, 1, 3).reshape(shape)

    def back(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        kernel = tuple(graph.constants[self.weight].dims[2:])
        space, out, rank = shape[2:], y.shape[2:], len(kernel)
        pads = self._pads(kernel, space, out)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        parts = self._parts(y, matrix).reshape(*shape[:2], -1, *out)
        whole = np.zeros((*shape[:2], *(s + a + b for s, (a, b) in zip(space, pads, strict=True))), parts.dtype)
        both = [slice(None)] * 2
        for tap, place in enumerate(product(*map(range, kernel))):
            starts = [k * d for k, d in zip(place, dilations, strict=True)]
            seen = [slice(k, k + (o - 1) * s + 1, s) for k, o, s in zip(starts, out, strides, strict=True)]
            whole[tuple(both + seen)] += parts[:, :, tap]
        return whole[tuple(both + [slice(a, a + s) for s, (a, _) in zip(space, pads, strict=True)])]

    def inputs(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        kernel = tuple(graph.constants[self.weight].dims[2:])
        index, pads = self._unfolding(kernel, x.shape[2:], shape[2:], chosen)
        if any(map(any, pads)):
            x = np.pad(x, [(0, 0), (0, 0), *pads])
        return _unfolded(self._flat(x), index)

    def _flat(self, x: Array) -> Array:
        """(samples, blocks, channels, places)."""
        return x.reshape(x.shape[0], self.blocks, x.shape[1] // self.blocks, -1)

    def _parts(self, y: Array, matrix: Array) -> Array:
        """What an output's gradient is worth to each tap of each input, (samples, blocks, channels · taps, places)."""
        return np.matmul(matrix.transpose(0, 2, 1), self._flat(y))

    def _pads(self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[int, int]]:
        """The pads of each axis."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        given = self.node.attributes.get("pads") or [0] * 2 * rank
        auto = self.node.attributes.get("auto_pad", "NOTSET")
        pads = []
        for i in range(rank):
            reach = (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            if auto in ("SAME_UPPER", "SAME_LOWER"):
                total = max(reach - space[i], 0)
                small, large = total // 2, total - total // 2
                pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
            else:
                pads.append((given[i], given[rank + i]) if auto == "NOTSET" else (0, 0))
        return pads

    def _unfolding(
        self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...], chosen: Array
    ) -> tuple[Array, list[tuple[int, int]]]:
        """Flat indices (chosen, kernel places) into the padded input, and the pads of each axis."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        pads = self._pads(kernel, space, out)
        padded = [s + a + b for s, (a, b) in zip(space, pads, strict=True)]
        steps = [prod(padded[i + 1 :]) for i in range(rank)]
        at = np.unravel_index(chosen, out)
        start = sum(p * stride * step for p, stride, step in zip(at, strides, steps, strict=True))
        offsets = [
            sum(k * d * s for k, d, s in zip(place, dilations, steps, strict=True))
            for place in product(*map(range, kernel))
        ]
        return np.asarray(start)[:, None] + np.asarray(offsets)[None], pads


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A ConvTranspose; inputs of a row are those that some tap of the kernel carries there, and zeros elsewhere."""

    def size(self, graph: Graph) -> tuple[int, int, int]:
        inputs, outputs, *kernel = graph.constants[self.weight].dims
        return self.blocks, outputs, inputs // self.blocks * prod(kernel)

    def matrix(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        blocks, outputs, inputs = self.size(graph)
        taps = self.kernel_places(graph)
        w = graph.array(self.weight).astype(dtype, copy=False).reshape(blocks, inputs // taps, outputs, taps)
        return w.transpose(0, 2, 1, 3).reshape(blocks, outputs, inputs)

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        old = graph.array(self.weight)
        blocks, outputs, inputs = matrix.shape
        taps = self.kernel_places(graph)
        w = matrix.reshape(blocks, outputs, inputs // taps, taps).transpose(0, 2, 1, 3)
        return w.reshape(old.shape).astype(old.dtype)

    def inputs(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        kernel = tuple(graph.constants[self.weight].dims[2:])
        index = self._origins(kernel, x.shape[2:], shape[2:], chosen)
        flat = self._flat(x)
        flat = np.concatenate([flat, np.zeros_like(flat[..., :1])], axis=3)  # what the index −1 finds
        return _unfolded(flat, index)

    def back(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        kernel = tuple(graph.constants[self.weight].dims[2:])
        index = self._origins(kernel, shape[2:], y.shape[2:], np.arange(prod(y.shape[2:])))
        parts = self._parts(y, matrix).reshape(*shape[:2], *index.T.shape)
        flat = np.zeros((*shape[:2], prod(shape[2:]) + 1), parts.dtype)
        for tap in range(index.shape[1]):  # a tap finds each place once
            flat[:, :, index[:, tap]] += parts[:, :, tap]
        return flat[..., :-1].reshape(shape)

    def _origins(self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...], chosen: Array) -> Array:
        """Flat indices (chosen, kernel places) into the input; −1 where a tap carries nothing to a place."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        at = np.unravel_index(chosen, out)
        taps = np.unravel_index(np.arange(prod(kernel)), kernel)
        found = np.zeros((len(chosen), prod(kernel)), np.int64)
        reached = np.ones(found.shape, bool)
        for i in range(rank):
            first = self._pad(i, rank, (kernel[i] - 1) * dilations[i] + (space[i] - 1) * strides[i] + 1 - out[i])
            place, rest = np.divmod(at[i][:, None] + first - taps[i] * dilations[i], strides[i])
            reached &= (rest == 0) & (place >= 0) & (place < space[i])
            found = found * space[i] + place
        return np.where(reached, found, -1)

    def _pad(self, axis: int, rank: int, cut: int) -> int:
        """How much is cut off an axis' front.

        Args:
            axis: which.
            rank: how many.
            cut: by how much the full output is longer than the output.
        """
        a = self.node.attributes
        auto = a.get("auto_pad", "NOTSET")
        if auto == "VALID" or (auto == "NOTSET" and not a.get("output_shape")):
            return int((a.get("pads") or [0] * rank)[axis]) if auto == "NOTSET" else 0
        total = max(cut + _steps(self.node, "output_padding", rank, 0)[axis], 0)
        return total // 2 if auto == "SAME_UPPER" else total - total // 2


@dataclass(frozen=True)
class Product(Linear):
    """A Gemm, MatMul or Einsum.

    Attributes:
        output_axes: the output's axes that the weights bring.
        weight_axes: the weights' axes: those of the outputs, then those of the inputs.
        row_axes: the output's other axes, in the order in which the inputs have them; None where that is their own.
    """

    output_axes: tuple[int, ...] = (-1,)
    weight_axes: tuple[int, ...] = (1, 0)
    row_axes: tuple[int, ...] | None = None

    @property
    def orientation(self) -> tuple[int, ...] | None:
        return self.weight_axes

    def size(self, graph: Graph) -> tuple[int, int, int]:
        dims = [graph.constants[self.weight].dims[a] for a in self.weight_axes]
        return 1, prod(dims[: len(self.output_axes)]), prod(dims[len(self.output_axes) :])

    def matrix(self, graph: Graph, dtype: DTypeLike = np.float64) -> Array:
        w = graph.array(self.weight).astype(dtype, copy=False).transpose(self.weight_axes).reshape(self.size(graph))
        return w if self.scale == 1 else w * np.asarray(self.scale, w.dtype)

    def weights_from(self, matrix: Array, graph: Graph) -> Array:
        old = graph.array(self.weight)
        w = matrix[0] if self.scale == 1 else matrix[0] / self.scale
        w = w.reshape([old.shape[a] for a in self.weight_axes])
        return np.ascontiguousarray(w.transpose(np.argsort(self.weight_axes)), dtype=old.dtype)

    def samples(self, shape: tuple[int, ...]) -> int:
        return next(iter(self._rows(shape)), 1)

    def places(self, shape: tuple[int, ...]) -> int:
        return prod(self._rows(shape)[1:])

    def by_sample(self, before: int, after: int) -> bool:
        return _others(self.input_axes, before, None)[:1] == _others(self.output_axes, after, self.row_axes)[:1] == [0]

    def _rows(self, shape: tuple[int, ...]) -> list[int]:
        return [shape[a] for a in _others(self.output_axes, len(shape), self.row_axes)]

    def outputs(self, y: Array, chosen: Array) -> Array:
        return _table(y, self.output_axes, chosen, self.row_axes)

    def spread(self, rows: Array, shape: tuple[int, ...]) -> Array:
        return _untable(rows, self.output_axes, shape, self.row_axes)

    def back(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        rows = self.outputs(y, np.arange(self.places(y.shape))) @ matrix
        return _untable(rows, self.input_axes, shape, None)

    def inputs(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        return _table(x, self.input_axes, chosen, None)


def _taken(value: Array, chosen: Array, axis: int) -> Array:
    """Some places along an axis; the array itself where they are all, in order."""
    whole = len(chosen) == value.shape[axis] and np.array_equal(chosen, np.arange(len(chosen)))
    return value if whole else value.take(chosen, axis=axis)


def _unfolded(flat: Array, index: Array) -> Array:
    """Rows (blocks, samples · places, channels · taps) of (samples, blocks, channels, places), by (places, taps).

    They lie in memory column by column, as the entries of a channel do.
    """
    samples, blocks, channels, _ = flat.shape
    rows = np.empty((blocks, channels, index.shape[1], samples, len(index)), flat.dtype)
    for tap in range(index.shape[1]):
        rows[:, :, tap] = flat.take(index[:, tap], axis=3).transpose(1, 2, 0, 3)
    return rows.reshape(blocks, channels * index.shape[1], -1).transpose(0, 2, 1)


def _others(axes: tuple[int, ...], rank: int, order: tuple[int, ...] | None) -> list[int]:
    """The axes that are not given, in an order."""
    if order is not None:
        return list(order)
    taken = {a % rank for a in axes}
    return [a for a in range(rank) if a not in taken]


def _table(value: Array, axes: tuple[int, ...], chosen: Array, order: tuple[int, ...] | None) -> Array:
    """Rows of the given axes, (1, samples · chosen, their size)."""
    rows = _others(axes, value.ndim, order)
    value = value.transpose(*rows, *(a % value.ndim for a in axes))
    width = prod(value.shape[len(rows) :])
    return _taken(value.reshape(value.shape[0] if rows else 1, -1, width), chosen, 1).reshape(1, -1, width)


def _untable(table: Array, axes: tuple[int, ...], shape: tuple[int, ...], order: tuple[int, ...] | None) -> Array:
    """The inverse of :func:`_table` at all places."""
    rank = len(shape)
    every = [*_others(axes, rank, order), *(a % rank for a in axes)]
    return table.reshape([shape[a] for a in every]).transpose(np.argsort(every))


def _steps(node: Node, name: str, rank: int, default: int = 1) -> list[int]:
    return node.attributes.get(name) or [default] * rank


def linear(graph: Graph, node: Node) -> Linear | None:
    """The node as a matrix product, or None where it is none.

    It must be a Conv, a ConvTranspose, a Gemm, a MatMul with one constant matrix or an Einsum with one constant, with
    float weights; a Transpose may stand before a matrix.
    """
    if node.domain or len(node.inputs) < 2:
        return None
    match node.op:
        case "Conv" | "ConvTranspose":
            found = _convolution(graph, node)
        case "Gemm":
            found = _gemm(graph, node)
        case "MatMul":
            found = _matmul(graph, node)
        case "Einsum":
            found = _einsum(graph, node)
        case _:
            return None
    if found is None or graph.constants[found.weight].data_type not in FLOATS:
        return None
    return None if found.weight in graph.outputs or found.source in graph.constants else found


def _bias(node: Node) -> str | None:
    return node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None


def _convolution(graph: Graph, node: Node) -> Linear | None:
    if node.inputs[1] not in graph.constants:
        return None
    kind = Convolution if node.op == "Conv" else TransposedConvolution
    return kind(node, node.inputs[0], node.inputs[1], _bias(node), node.attributes.get("group", 1), (1,), 1)


def _gemm(graph: Graph, node: Node) -> Linear | None:
    weight, turned = _matrix(graph, node.inputs[1])
    a = node.attributes
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if weight is None or not alpha or not beta:
        return None
    axes = (0, 1) if bool(a.get("transB", 0)) != turned else (1, 0)
    contracted = (0,) if a.get("transA", 0) else (1,)
    return Product(node, node.inputs[0], weight, _bias(node), 1, contracted, -1, alpha, beta, weight_axes=axes)


def _matmul(graph: Graph, node: Node) -> Linear | None:
    weight, turned = _matrix(graph, node.inputs[1])
    if weight is not None:
        return Product(node, node.inputs[0], weight, None, 1, (-1,), -1, weight_axes=(0, 1) if turned else (1, 0))
    weight, turned = _matrix(graph, node.inputs[0])
    if weight is None:
        return None
    axes = (1, 0) if turned else (0, 1)
    return Product(node, node.inputs[1], weight, None, 1, (-2,), -2, output_axes=(-2,), weight_axes=axes)


def _matrix(graph: Graph, name: str) -> tuple[str | None, bool]:
    """The constant matrix that an operand is, or is the transpose of, and whether it is the transpose."""
    before = graph.producer.get(name)
    turned = before is not None and before.op == "Transpose" and not before.domain and name not in graph.constants
    if before is not None and turned:
        if name in graph.outputs or before.attributes.get("perm", [1, 0]) != [1, 0]:
            return None, True
        name = before.inputs[0]
    tensor = graph.constants.get(name)
    return (name if tensor is not None and len(tensor.dims) == 2 else None), turned


def _einsum(graph: Graph, node: Node) -> Linear | None:
    """``rows and inputs, inputs and outputs -> rows and outputs``, the letters of each in any order."""
    left, arrow, y = node.attributes["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    constant = [i for i, n in enumerate(node.inputs) if n in graph.constants]
    if not arrow or "." in left or len(terms) != 2 or len(constant) != 1:
        return None
    if any(len(set(t)) != len(t) for t in terms):
        return None
    w, x = terms[constant[0]], terms[1 - constant[0]]
    inputs = [c for c in w if c in x and c not in y]
    outputs = [c for c in w if c in y and c not in x]
    rows = [c for c in x if c in y and c not in w]
    if not inputs or sorted(inputs + outputs) != sorted(w) or sorted(rows + inputs) != sorted(x):
        return None
    return Product(
        node,
        node.inputs[1 - constant[0]],
        node.inputs[constant[0]],
        None,
        1,
        tuple(x.index(c) for c in inputs),
        y.index(outputs[0]) - len(y) if len(outputs) == 1 else None,
        output_axes=tuple(y.index(c) for c in outputs),
        weight_axes=tuple(w.index(c) for c in outputs + inputs),
        row_axes=tuple(y.index(c) for c in rows),
    )


def uses(graph: Graph, lin: Linear) -> list[Linear] | None:
    """Return all products that the weights of one take part in, itself among them; None if something else reads them.

    A product with the transposed weights is something else: no fit of one matrix serves both.
    """
    if any(lin.weight in names for names in graph.captured.values()):
        return None
    found = []
    for user, _ in graph.users[lin.weight]:
        turned = user.op == "Transpose" and not user.domain
        for node in [u for u, _ in graph.users.get(user.outputs[0], ())] if turned else [user]:
            other = linear(graph, node)
            if other is None or other.weight != lin.weight or other.orientation != lin.orientation:
                return None
            found.append(other)
    return found
