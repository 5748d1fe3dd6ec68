"""Convolutions as matrix products: input rows are unfolded (im2col)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from spa.model.graph import Graph, Node
from spa.obspa.linear.base import Linear, take

Array = np.ndarray


@dataclass(frozen=True)
class Convolution(Linear):
    """A Conv; the inputs of a row are the window of its position."""

    def size(self, graph: Graph) -> tuple[int, int, int]:
        outputs, inputs, *kernel = self.weights.shape(graph)
        return self.blocks, outputs // self.blocks, inputs * prod(kernel)

    def as_matrix(self, weights: Array, graph: Graph) -> Array:
        return weights.reshape(self.size(graph))

    def laid_out(self, matrix: Array, graph: Graph) -> Array:
        return matrix.reshape(self.weights.shape(graph))

    def taps(self, graph: Graph) -> int:
        return prod(self.weights.shape(graph)[2:])

    def samples(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def positions(self, shape: tuple[int, ...]) -> int:
        return prod(shape[2:])

    def output_rows(self, y: Array, chosen: Array) -> Array:
        flat = take(self._flat(y), chosen, 3)
        return flat.transpose(1, 2, 0, 3).reshape(self.blocks, flat.shape[2], -1).transpose(0, 2, 1)

    def output_from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        flat = rows.transpose(0, 2, 1).reshape(self.blocks, rows.shape[2], shape[0], -1)
        return flat.transpose(2, 0, 1, 3).reshape(shape)

    def input_gradient(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        kernel = tuple(self.weights.shape(graph)[2:])
        space, out, rank = shape[2:], y.shape[2:], len(kernel)
        pads = self._pads(kernel, space, out)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        parts = self._parts(y, matrix).reshape(*shape[:2], -1, *out)
        whole = np.zeros((*shape[:2], *(s + a + b for s, (a, b) in zip(space, pads, strict=True))), parts.dtype)
        both = [slice(None)] * 2
        for tap, offset in enumerate(product(*map(range, kernel))):
            starts = [k * d for k, d in zip(offset, dilations, strict=True)]
            seen = [slice(k, k + (o - 1) * s + 1, s) for k, o, s in zip(starts, out, strides, strict=True)]
            whole[tuple(both + seen)] += parts[:, :, tap]
        return whole[tuple(both + [slice(a, a + s) for s, (a, _) in zip(space, pads, strict=True)])]

    def input_rows(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        kernel = tuple(self.weights.shape(graph)[2:])
        index, pads = self._unfolding(kernel, x.shape[2:], shape[2:], chosen)
        if any(map(any, pads)):
            x = np.pad(x, [(0, 0), (0, 0), *pads])
        return _unfold(self._flat(x), index)

    def _flat(self, x: Array) -> Array:
        """Return a tensor as (samples, blocks, channels, positions)."""
        return x.reshape(x.shape[0], self.blocks, x.shape[1] // self.blocks, -1)

    def _parts(self, y: Array, matrix: Array) -> Array:
        """Return what each tap adds to the input's gradient, (samples, blocks, channels · taps, positions)."""
        return np.matmul(matrix.transpose(0, 2, 1), self._flat(y))

    def _pads(self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the pads of each axis."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        explicit = self.node.attributes.get("pads") or [0] * 2 * rank
        auto = self.node.attributes.get("auto_pad", "NOTSET")
        pads = []
        for i in range(rank):
            reach = (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            if auto in ("SAME_UPPER", "SAME_LOWER"):
                total = max(reach - space[i], 0)
                small, large = total // 2, total - total // 2
                pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
            else:
                pads.append((explicit[i], explicit[rank + i]) if auto == "NOTSET" else (0, 0))
        return pads

    def _unfolding(
        self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...], chosen: Array
    ) -> tuple[Array, list[tuple[int, int]]]:
        """Return flat indices (chosen, taps) into the padded input, and the pads of each axis."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        pads = self._pads(kernel, space, out)
        padded = [s + a + b for s, (a, b) in zip(space, pads, strict=True)]
        steps = [prod(padded[i + 1 :]) for i in range(rank)]
        at = np.unravel_index(chosen, out)
        start = sum(p * stride * step for p, stride, step in zip(at, strides, steps, strict=True))
        offsets = [
            sum(k * d * s for k, d, s in zip(offset, dilations, steps, strict=True))
            for offset in product(*map(range, kernel))
        ]
        return np.asarray(start)[:, None] + np.asarray(offsets)[None], pads


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A ConvTranspose; the inputs of a row are those that a kernel tap carries to its position, and zeros."""

    def size(self, graph: Graph) -> tuple[int, int, int]:
        inputs, outputs, *kernel = self.weights.shape(graph)
        return self.blocks, outputs, inputs // self.blocks * prod(kernel)

    def as_matrix(self, weights: Array, graph: Graph) -> Array:
        blocks, outputs, inputs = self.size(graph)
        taps = self.taps(graph)
        w = weights.reshape(blocks, inputs // taps, outputs, taps)
        return w.transpose(0, 2, 1, 3).reshape(blocks, outputs, inputs)

    def laid_out(self, matrix: Array, graph: Graph) -> Array:
        blocks, outputs, inputs = matrix.shape
        taps = self.taps(graph)
        w = matrix.reshape(blocks, outputs, inputs // taps, taps).transpose(0, 2, 1, 3)
        return w.reshape(self.weights.shape(graph))

    def input_rows(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        kernel = tuple(self.weights.shape(graph)[2:])
        index = self._source_indices(kernel, x.shape[2:], shape[2:], chosen)
        flat = self._flat(x)
        flat = np.concatenate([flat, np.zeros_like(flat[..., :1])], axis=3)  # read by the index −1
        return _unfold(flat, index)

    def input_gradient(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        kernel = tuple(self.weights.shape(graph)[2:])
        index = self._source_indices(kernel, shape[2:], y.shape[2:], np.arange(prod(y.shape[2:])))
        parts = self._parts(y, matrix).reshape(*shape[:2], *index.T.shape)
        flat = np.zeros((*shape[:2], prod(shape[2:]) + 1), parts.dtype)
        for tap in range(index.shape[1]):  # += needs distinct indices: a tap reads each position once
            flat[:, :, index[:, tap]] += parts[:, :, tap]
        return flat[..., :-1].reshape(shape)

    def _source_indices(
        self, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...], chosen: Array
    ) -> Array:
        """Return flat indices (chosen, taps) into the input; −1 if a tap carries nothing to a position."""
        rank = len(kernel)
        strides, dilations = _steps(self.node, "strides", rank), _steps(self.node, "dilations", rank)
        at = np.unravel_index(chosen, out)
        taps = np.unravel_index(np.arange(prod(kernel)), kernel)
        indices = np.zeros((len(chosen), prod(kernel)), np.int64)
        reached = np.ones(indices.shape, bool)
        for i in range(rank):
            first = self._pad(i, rank, (kernel[i] - 1) * dilations[i] + (space[i] - 1) * strides[i] + 1 - out[i])
            coordinate, rest = np.divmod(at[i][:, None] + first - taps[i] * dilations[i], strides[i])
            reached &= (rest == 0) & (coordinate >= 0) & (coordinate < space[i])
            indices = indices * space[i] + coordinate
        return np.where(reached, indices, -1)

    def _pad(self, axis: int, rank: int, cut: int) -> int:
        """Return the number of entries cut off the front of a spatial axis.

        Args:
            axis: the number of the axis.
            rank: the number of spatial axes.
            cut: the length of the full output less that of the output.
        """
        a = self.node.attributes
        auto = a.get("auto_pad", "NOTSET")
        if auto == "VALID" or (auto == "NOTSET" and not a.get("output_shape")):
            return int((a.get("pads") or [0] * rank)[axis]) if auto == "NOTSET" else 0
        total = max(cut + _steps(self.node, "output_padding", rank, 0)[axis], 0)
        return total // 2 if auto == "SAME_UPPER" else total - total // 2


def _unfold(flat: Array, index: Array) -> Array:
    """Gather rows (blocks, samples · positions, channels · taps) from flat (samples, blocks, channels, positions).

    They lie in memory column by column, as the entries of a channel do. ``index`` is (positions, taps).
    """
    samples, blocks, channels, _ = flat.shape
    rows = np.empty((blocks, channels, index.shape[1], samples, len(index)), flat.dtype)
    for tap in range(index.shape[1]):
        rows[:, :, tap] = flat.take(index[:, tap], axis=3).transpose(1, 2, 0, 3)
    return rows.reshape(blocks, channels * index.shape[1], -1).transpose(0, 2, 1)


def _steps(node: Node, name: str, rank: int, default: int = 1) -> list[int]:
    """Return an attribute of one number per spatial axis."""
    return node.attributes.get(name) or [default] * rank
