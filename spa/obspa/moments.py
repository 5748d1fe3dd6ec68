"""First and second moments of inputs and targets, and the least squares that follow from them."""

from __future__ import annotations

import numpy as np

from spa.errors import InvariantError

Array = np.ndarray


class Moments:
    """Centred moments of input rows x and target rows t, accumulated batch by batch in float64.

    Products are taken in float32 about the first batch's mean, so that a large mean costs no digits.

    Attributes:
        count: how many rows were seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift_x = self._shift_t = self._x = self._t = self._xx = self._tx = self._tt = np.zeros(())

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs)."""
        if not self.count:
            self._shift_x, self._shift_t = x.mean(axis=1, keepdims=True), t.mean(axis=1, keepdims=True)
        x, t = x - self._shift_x, t - self._shift_t
        xt = x.transpose(0, 2, 1)
        self.count += x.shape[1]
        self._x = self._x + x.sum(axis=1, dtype=np.float64)
        self._t = self._t + t.sum(axis=1, dtype=np.float64)
        self._xx = self._xx + np.matmul(xt, x).astype(np.float64)
        self._tx = self._tx + np.matmul(t.transpose(0, 2, 1), x).astype(np.float64)
        self._tt = self._tt + np.square(t).sum(axis=1, dtype=np.float64)

    @property
    def mean_x(self) -> Array:
        """Mean inputs, (blocks, inputs)."""
        return self._x / self.count + self._shift_x[:, 0]

    @property
    def mean_t(self) -> Array:
        """Mean targets, (blocks, outputs)."""
        return self._t / self.count + self._shift_t[:, 0]

    @property
    def xx(self) -> Array:
        """Covariance of the inputs, (blocks, inputs, inputs)."""
        m = self._x / self.count
        return self._xx / self.count - m[:, :, None] * m[:, None, :]

    @property
    def tx(self) -> Array:
        """Covariance of targets and inputs, (blocks, outputs, inputs)."""
        return self._tx / self.count - (self._t / self.count)[:, :, None] * (self._x / self.count)[:, None, :]

    @property
    def tt(self) -> Array:
        """Variance of each target, (blocks, outputs)."""
        return self._tt / self.count - np.square(self._t / self.count)

    def without_mean(self) -> Moments:
        """The same moments about zero, for fits that have no bias to move the mean into."""
        raw = Moments()
        raw.count = self.count
        raw._shift_x, raw._shift_t = np.zeros_like(self._shift_x), np.zeros_like(self._shift_t)
        raw._x, raw._t = np.zeros_like(self._x), np.zeros_like(self._t)
        raw._xx = (self.xx + self.mean_x[:, :, None] * self.mean_x[:, None, :]) * self.count
        raw._tx = (self.tx + self.mean_t[:, :, None] * self.mean_x[:, None, :]) * self.count
        raw._tt = (self.tt + self.mean_t**2) * self.count
        return raw


def damped(h: Array, damping: float) -> tuple[Array, Array]:
    """A second-moment matrix made safe to factor.

    Inputs that never move (zero on the diagonal) get a one there; the damping, a fraction of the mean diagonal, grows
    tenfold until Cholesky succeeds.

    Args:
        h: (blocks, n, n), symmetric.
        damping: the first fraction to try.

    Returns:
        The damped matrix, and what was added to each block's diagonal, (blocks,).
    """
    eye = np.eye(h.shape[-1])
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    dead = diagonal <= 1e-12 * np.maximum(diagonal.max(axis=1, keepdims=True), 1e-30)
    scale = np.where(dead, 0.0, diagonal).sum(axis=1) / np.maximum((~dead).sum(axis=1), 1)
    scale = np.where(scale > 0, scale, 1.0)
    base = h + np.where(dead, scale[:, None], 0.0)[:, :, None] * eye
    for _ in range(12):
        matrix = base + (damping * scale)[:, None, None] * eye
        if _factors(matrix):
            return matrix, damping * scale
        damping = max(damping, 1e-9) * 10
    raise InvariantError("the activation statistics cannot be factored: they hold values that are not finite.")


def _factors(matrix: Array) -> bool:
    """Whether Cholesky succeeds with pivots that are not all rounding."""
    try:
        pivots = np.square(np.diagonal(np.linalg.cholesky(matrix), axis1=1, axis2=2))
    except np.linalg.LinAlgError:
        return False
    return bool((pivots.min(axis=1) > 1e-13 * pivots.max(axis=1)).all())


def least_squares(moments: Moments, prior: Array, damping: float) -> Array:
    """The matrix W that minimises E|t − W x|² + λ|W − prior|², about the means.

    Args:
        moments: of inputs and targets.
        prior: (blocks, outputs, inputs).
        damping: λ as a fraction of the mean input variance.

    Returns:
        W, (blocks, outputs, inputs).
    """
    matrix, weight = damped(moments.xx, damping)
    right = moments.tx + weight[:, None, None] * prior
    return np.linalg.solve(matrix, right.transpose(0, 2, 1)).transpose(0, 2, 1)
