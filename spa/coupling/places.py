"""Which channel of a group each index of an axis belongs to."""

from __future__ import annotations

import numpy as np

from spa.algebra.axes import Dim, Expr, Sum


def channel_of(expr: Expr, dim: Dim) -> np.ndarray:
    """For each index of an axis the index of ``dim`` that it belongs to, or -1.

    Args:
        expr: the axis, resolved.
        dim: the group's dimension.

    Returns:
        Integer array of shape (expr.size,).

    >>> from spa.algebra.axes import product
    >>> h = Dim(2)
    >>> channel_of(product(h, Dim(3)), h)
    array([0, 0, 0, 1, 1, 1])
    """
    if isinstance(expr, Dim):
        return np.arange(expr.size) if expr is dim else np.full(expr.size, -1)
    if isinstance(expr, Sum):
        return np.concatenate([channel_of(t, dim) for t in expr.terms])
    result = np.full(1, -1)
    for factor in expr.factors:
        inner = channel_of(factor, dim)
        outer = np.repeat(result, inner.size)
        result = np.where(outer >= 0, outer, np.tile(inner, result.size))
    return result
