"""Gemm, MatMul and Einsum as matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from spa.model.graph import Graph
from spa.obspa.linear.base import Linear, take

Array = np.ndarray


@dataclass(frozen=True)
class Product(Linear):
    """A Gemm, MatMul or Einsum.

    Attributes:
        output_axes: the output's axes that come from the weights.
        weight_axes: the weights' axes: those of the outputs, then those of the inputs.
        row_axes: the output's other axes, in the order in which the inputs have them; None if that is their own.
    """

    output_axes: tuple[int, ...] = (-1,)
    weight_axes: tuple[int, ...] = (1, 0)
    row_axes: tuple[int, ...] | None = None

    @property
    def orientation(self) -> tuple[int, ...] | None:
        return self.weight_axes

    def size(self, graph: Graph) -> tuple[int, int, int]:
        dims = [self.weights.shape(graph)[a] for a in self.weight_axes]
        return 1, prod(dims[: len(self.output_axes)]), prod(dims[len(self.output_axes) :])

    def as_matrix(self, weights: Array, graph: Graph) -> Array:
        w = weights.transpose(self.weight_axes).reshape(self.size(graph))
        return w if self.scale == 1 else w * np.asarray(self.scale, w.dtype)

    def laid_out(self, matrix: Array, graph: Graph) -> Array:
        w = matrix[0] if self.scale == 1 else matrix[0] / self.scale
        dims = self.weights.shape(graph)
        w = w.reshape([dims[a] for a in self.weight_axes]).transpose(np.argsort(self.weight_axes))
        return np.ascontiguousarray(w)

    def samples(self, shape: tuple[int, ...]) -> int:
        return next(iter(self._rows(shape)), 1)

    def positions(self, shape: tuple[int, ...]) -> int:
        return prod(self._rows(shape)[1:])

    def samples_first(self, before: int, after: int) -> bool:
        return (
            _other_axes(self.input_axes, before, None)[:1]
            == _other_axes(self.output_axes, after, self.row_axes)[:1]
            == [0]
        )

    def _rows(self, shape: tuple[int, ...]) -> list[int]:
        return [shape[a] for a in _other_axes(self.output_axes, len(shape), self.row_axes)]

    def output_rows(self, y: Array, chosen: Array) -> Array:
        return _to_rows(y, self.output_axes, chosen, self.row_axes)

    def output_from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        return _from_rows(rows, self.output_axes, shape, self.row_axes)

    def input_gradient(self, y: Array, matrix: Array, shape: tuple[int, ...], graph: Graph) -> Array:
        rows = self.output_rows(y, np.arange(self.positions(y.shape))) @ matrix
        return _from_rows(rows, self.input_axes, shape, None)

    def input_rows(self, x: Array, shape: tuple[int, ...], graph: Graph, chosen: Array) -> Array:
        return _to_rows(x, self.input_axes, chosen, None)


def _other_axes(axes: tuple[int, ...], rank: int, order: tuple[int, ...] | None) -> list[int]:
    """Return ``order`` if there is one; else the axes of a rank that are not among ``axes``."""
    if order is not None:
        return list(order)
    taken = {a % rank for a in axes}
    return [a for a in range(rank) if a not in taken]


def _to_rows(value: Array, axes: tuple[int, ...], chosen: Array, order: tuple[int, ...] | None) -> Array:
    """Return the rows of a tensor at chosen positions, (1, samples · chosen, size of ``axes``)."""
    rows = _other_axes(axes, value.ndim, order)
    value = value.transpose(*rows, *(a % value.ndim for a in axes))
    width = prod(value.shape[len(rows) :])
    return take(value.reshape(value.shape[0] if rows else 1, -1, width), chosen, 1).reshape(1, -1, width)


def _from_rows(table: Array, axes: tuple[int, ...], shape: tuple[int, ...], order: tuple[int, ...] | None) -> Array:
    """Return the tensor of a shape from its rows at all positions; the inverse of :func:`_to_rows`."""
    rank = len(shape)
    every = [*_other_axes(axes, rank, order), *(a % rank for a in axes)]
    return table.reshape([shape[a] for a in every]).transpose(np.argsort(every))
