"""First and second moments of a layer's inputs x and targets t, and the damped least squares that they determine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.errors import InvariantError

Array = np.ndarray
NOT_FINITE = "the activation statistics cannot be factored: they hold values that are not finite."


class Moments:
    """Centred moments of input rows x and target rows t, accumulated batch by batch in float64.

    Products are taken in float32 (in float64 if the rows are) about the first batch's mean, so that a large mean costs
    no digits.

    Args:
        cross: whether to accumulate products of targets and inputs.

    Attributes:
        count: the number of rows added.
    """

    def __init__(self, cross: bool = True) -> None:
        self.count, self.cross = 0, cross
        self._shift_x = self._shift_t = self._x = self._t = self._xx = self._tx = self._tt = np.zeros(())

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs)."""
        x, t = at_least_single(x), at_least_single(t)
        if not self.count:
            self._shift_x, self._shift_t = x.mean(axis=1, keepdims=True), t.mean(axis=1, keepdims=True)
        x, t = x - self._shift_x, t - self._shift_t
        self.count += x.shape[1]
        self._x = self._x + x.sum(axis=1, dtype=np.float64)
        self._t = self._t + t.sum(axis=1, dtype=np.float64)
        self._xx = self._xx + np.matmul(x.transpose(0, 2, 1), x).astype(np.float64)
        if self.cross:
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
        """Return the same moments about zero, for fits that have no bias to move the mean into."""
        x, t = self.mean_x, self.mean_t
        raw = Moments()
        raw.count = self.count
        raw._set(self.xx + x[:, :, None] * x[:, None, :], self.tx + t[:, :, None] * x[:, None, :], self.tt + t**2)
        return raw

    @staticmethod
    def about_own_means(parts: Sequence[Moments]) -> Moments:
        """Return the moments of several sets of rows as one, each set about its own mean."""
        joint = Moments()
        joint.count = sum(p.count for p in parts)
        fractions = [p.count / joint.count for p in parts]
        xx, tx, tt = (
            sum(s * getattr(p, name) for s, p in zip(fractions, parts, strict=True)) for name in ("xx", "tx", "tt")
        )
        joint._set(xx, tx, tt)
        return joint

    def _set(self, xx: Array, tx: Array, tt: Array) -> None:
        """Set the second moments, with means of zero."""
        self._xx, self._tx, self._tt = xx * self.count, tx * self.count, tt * self.count
        self._x, self._t = np.zeros(xx.shape[:2]), np.zeros(tt.shape)
        self._shift_x, self._shift_t = self._x[:, None], self._t[:, None]


def at_least_single(value: Array) -> Array:
    """Return half-precision values as float32, others as they are."""
    return value if value.dtype in (np.float32, np.float64) else value.astype(np.float32)


def damping_for(damping: float, inputs: int, rows: int) -> float:
    """Return a damping that grows with the ratio of unknowns to rows: fits to few rows learn noise."""
    return damping * (1 + 10 * inputs / max(rows, 1))


def unvarying(energy: Array) -> Array:
    """Return which inputs never vary, from the second moment of each, (blocks, inputs)."""
    return np.asarray(energy <= 1e-12 * np.maximum(energy.max(axis=1, keepdims=True), 1e-30))


def mean_energy(energy: Array) -> Array:
    """Return the mean second moment of the inputs that vary, (blocks,); one if none does."""
    moving = ~unvarying(energy)
    mean = np.where(moving, energy, 0.0).sum(axis=1) / np.maximum(moving.sum(axis=1), 1)
    return np.where(mean > 0, mean, 1.0)


def damped(h: Array, damping: float) -> tuple[Array, Array]:
    """Add to the diagonal of a second-moment matrix until it can be factored.

    Inputs that never vary get the mean there instead of zero; the damping, a fraction of the mean, grows tenfold until
    Cholesky succeeds.

    Args:
        h: (blocks, n, n), symmetric.
        damping: the first fraction to try.

    Returns:
        The damped matrix, (blocks, n, n), and what was added to the diagonal of each block, (blocks,).

    Raises:
        InvariantError: the matrix holds values that are not finite.
    """
    eye = np.eye(h.shape[-1])
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    constant = unvarying(diagonal)
    scale = mean_energy(diagonal)
    base = h + np.where(constant, scale[:, None], 0.0)[:, :, None] * eye
    for _ in range(12):
        matrix = base + (damping * scale)[:, None, None] * eye
        if _factors(matrix):
            return matrix, damping * scale
        damping = max(damping, 1e-9) * 10
    raise InvariantError(NOT_FINITE)


def _factors(matrix: Array) -> bool:
    """Return whether Cholesky succeeds with pivots above rounding."""
    try:
        pivots = np.square(np.diagonal(np.linalg.cholesky(matrix), axis1=1, axis2=2))
    except np.linalg.LinAlgError:
        return False
    return bool((pivots.min(axis=1) > 1e-13 * pivots.max(axis=1)).all())


def least_squares(moments: Moments, prior: Array, damping: float) -> Array:
    """Find the matrix W that minimises E|t − W x|² + λ|W − prior|², about the means.

    Args:
        moments: the moments of inputs and targets.
        prior: the weights to stay close to, (blocks, outputs, inputs).
        damping: λ as a fraction of the mean input variance.

    Returns:
        W, (blocks, outputs, inputs).
    """
    matrix, weight = damped(moments.xx, damping)
    right = moments.tx + weight[:, None, None] * prior
    return np.linalg.solve(matrix, right.transpose(0, 2, 1)).transpose(0, 2, 1)
