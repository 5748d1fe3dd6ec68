"""The map from the indices of an axis to the channels of a group."""

from __future__ import annotations

import numpy as np

from spa.algebra.axes import Dim, Expr, Sum


def channel_of(expr: Expr, dim: Dim) -> np.ndarray:
    """Return for each index of an axis the channel that it belongs to.

    Args:
        expr: the axis, resolved.
        dim: the group's dimension.

    Returns:
        An integer array of shape (expr.size,): indices of ``dim``, or -1 for an index that belongs to none.

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
