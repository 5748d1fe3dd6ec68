"""Operators that pick elements by index, and those that write some: Gather and Scatter in their variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spa.algebra.axes import Expr, Kept, concat
from spa.algebra.op import Op
from spa.rules import rule
from spa.rules.layout import view


@rule("Gather")
def gather(op: Op) -> None:
    """Pick indices of one axis: known ones are traced where they form runs, computed ones freeze the axis.

    Spec: https://onnx.ai/onnx/operators/onnx__Gather.html.
    """
    data, picks = op.axes(0), op.axes(1)
    axis = op.positive(op.attr("axis", 0), len(data))
    value = op.values[1]
    expr = data[axis]
    runs = _runs(np.where(value < 0, value + expr.size, value).reshape(-1)) if value is not None else None
    traced = op.constant[1] or all(_is_view(v) for v in (value, op.second[1]))
    if value is None or runs is None or not traced or op.space.is_frozen(expr):
        op.freeze(expr, "looks it up by index")
        op.set(0, [*data[:axis], *picks, *data[axis + 1 :]])
        return
    pieces = []
    for first, count in runs:
        _, rest = op.space.cut(expr, first)
        pieces.append(op.space.cut(rest, count)[0])
    taken = view(op, [concat(*(op.space.resolve(p) for p in pieces))], value.shape)
    op.set(0, [*data[:axis], *taken, *data[axis + 1 :]])
    op.tie(_restate_picks(expr, taken), operand=1)


def _is_view(picks: np.ndarray | None) -> bool:
    """Return whether picks take everything in order: a reshaping in disguise (`as_strided`)."""
    return picks is not None and np.array_equal(picks.reshape(-1), np.arange(picks.size))


def _runs(indices: np.ndarray, most: int = 64) -> list[tuple[int, int]] | None:
    """Return the indices as runs of consecutive ones: (first, count); None for too many."""
    if not indices.size:
        return None
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    if len(breaks) >= most:
        return None
    return [(int(r[0]), len(r)) for r in np.split(indices, breaks)]


def _restate_picks(expr: Expr, taken: Sequence[Expr]) -> Any:
    def restate(kept: Kept, old: Any) -> Any:
        if kept.size(expr) == expr.size:
            return old
        if _is_view(old):
            shape = [n * kept.size(e) // e.size for n, e in zip(old.shape, taken, strict=True)]
            return np.arange(np.prod(shape), dtype=old.dtype).reshape(shape)
        mask = kept.mask(expr)
        places = np.where(old < 0, np.asarray(old) + expr.size, old)
        rank = np.cumsum(mask) - 1
        return rank[places[mask[places]]].reshape([kept.size(e) for e in taken]).astype(np.asarray(old).dtype)

    return restate


@rule("GatherElements")
def gather_elements(op: Op) -> None:
    """Pick by an index tensor of the output's shape; axes of full size but `axis` are the same in both.

    Spec: https://onnx.ai/onnx/operators/onnx__GatherElements.html.
    """
    _elementwise_picks(op, op.axes(0), op.axes(1))
    op.set(0, op.axes(1))


@rule("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> None:
    """Replace some elements of the data. Spec: https://onnx.ai/onnx/operators/onnx__ScatterElements.html."""
    for a, b in zip(op.axes(1), op.axes(2), strict=True):
        op.unify(a, b)
    _elementwise_picks(op, op.axes(0), op.axes(1))
    op.set(0, op.axes(0))


def _elementwise_picks(op: Op, data: Sequence[Expr], picks: Sequence[Expr]) -> None:
    axis = op.positive(op.attr("axis", 0), len(data))
    for i, (a, b) in enumerate(zip(data, picks, strict=True)):
        if i != axis and a.size == b.size:
            op.unify(a, b)
        else:
            op.freeze(a, "indexes it")
            op.freeze(b, "holds indices along it")


@rule("GatherND")
def gather_nd(op: Op) -> None:
    """Pick by index vectors: the batch axes are the same, the indexed ones freeze, the rest pass through.

    Spec: https://onnx.ai/onnx/operators/onnx__GatherND.html.
    """
    data, picks = op.axes(0), op.axes(1)
    batch = op.attr("batch_dims", 0)
    depth = picks[-1].size
    for a, b in zip(data[:batch], picks[:batch], strict=True):
        op.unify(a, b)
    for e in data[batch : batch + depth]:
        op.freeze(e, "indexes it")
    op.freeze(picks[-1], "holds index vectors along it")
    op.set(0, [*picks[:-1], *data[batch + depth :]])


@rule("ScatterND")
def scatter_nd(op: Op) -> None:
    """Replace slices of the data at index vectors: the indexed axes freeze, the rest is the updates' rest.

    Spec: https://onnx.ai/onnx/operators/onnx__ScatterND.html.
    """
    data, picks, updates = op.axes(0), op.axes(1), op.axes(2)
    depth = picks[-1].size
    for e in data[:depth]:
        op.freeze(e, "indexes it")
    op.freeze(picks[-1], "holds index vectors along it")
    for a, b in zip(updates, [*picks[:-1], *data[depth:]], strict=True):
        op.unify(a, b)
    op.set(0, data)


@rule("TensorScatter")
def tensor_scatter(op: Op) -> None:
    """Update a cache in place along `axis`; the other axes are the same in cache and update.

    Spec: https://onnx.ai/onnx/operators/onnx__TensorScatter.html.
    """
    cache, update = op.axes(0), op.axes(1)
    axis = op.positive(op.attr("axis", -2), len(cache))
    for i, (a, b) in enumerate(zip(cache, update, strict=True)):
        if i == axis:
            op.freeze(a, "writes to it")
            op.freeze(b, "writes from it")
        else:
            op.unify(a, b)
    if op.has(2):
        op.unify(op.axes(2)[0], cache[0])
    op.set(0, cache)
