"""First and second moments of a layer's inputs x and targets t, and the damped least squares that they determine."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spa.errors import InvariantError, ModelError

Array = np.ndarray
MIN_ROWS = 4096  # rows are collected until there are as many: a product of fewer costs mostly moving memory
MAX_WAITING = 8_000_000  # the most values that wait: 32 MB in float32
SOLVED_ROWS = 4096  # of outputs that are fitted at a time
OUTER_ROWS = 512  # rows of a large matrix that change at a time, so that nothing of its size is made beside it
NOT_FINITE = (
    "the model's activations hold values that are not finite, so that no layer can be fitted to them. Give other "
    "inputs with --data, or use a criterion that looks at the weights alone (l2, say)."
)


class Moments:
    """Centred moments of input rows x and target rows t, accumulated in float64.

    Rows are collected until there are enough for one product, so that many small batches cost what one large one does.
    It is taken in float32 (in float64 if the rows are) about the mean of the first, so that a large mean costs no
    digits.

    Args:
        cross: whether to accumulate products of targets and inputs.

    Attributes:
        count: the number of rows added.
    """

    def __init__(self, cross: bool = True) -> None:
        self.count, self.cross = 0, cross
        self._shift_x = self._shift_t = self._x = self._t = self._xx = self._tx = self._tt = np.zeros(())
        self._waiting: list[tuple[Array, Array]] = []

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs); views of them are held."""
        x, t = at_least_single(x), at_least_single(t)
        self.count += x.shape[1]
        self._waiting.append((x, t))
        rows = sum(x.shape[1] for x, _ in self._waiting)
        if rows >= max(MIN_ROWS, x.shape[2] // 2) or rows * (x.shape[2] + t.shape[2]) >= MAX_WAITING:
            self._accumulate()

    def _accumulate(self) -> None:
        """Add the products of the rows that wait."""
        if not self._waiting:
            return
        x, t = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if not self._x.ndim:
            self._start(x, t)
        x -= self._shift_x
        t -= self._shift_t
        ones = np.ones((1, x.shape[1]), x.dtype)
        self._x += (ones @ x)[:, 0]
        self._t += (ones.astype(t.dtype) @ t)[:, 0]
        self._xx += np.matmul(x.transpose(0, 2, 1), x)
        if self.cross:
            self._tx += np.matmul(t.transpose(0, 2, 1), x)
        self._tt += np.einsum("bnt,bnt->bt", t, t)

    def _start(self, x: Array, t: Array) -> None:
        """Settle the means about which products are taken, by the first rows."""
        self._shift_x, self._shift_t = x.mean(axis=1, keepdims=True), t.mean(axis=1, keepdims=True)
        blocks, inputs, outputs = len(x), x.shape[2], t.shape[2]
        self._x, self._t, self._tt = (
            np.zeros((blocks, inputs)),
            np.zeros((blocks, outputs)),
            np.zeros((blocks, outputs)),
        )
        self._xx = np.zeros((blocks, inputs, inputs))
        if self.cross:
            self._tx = np.zeros((blocks, outputs, inputs))

    @property
    def mean_x(self) -> Array:
        """Mean inputs, (blocks, inputs)."""
        self._accumulate()
        return self._x / self.count + self._shift_x[:, 0]

    @property
    def mean_t(self) -> Array:
        """Mean targets, (blocks, outputs)."""
        self._accumulate()
        return self._t / self.count + self._shift_t[:, 0]

    @property
    def xx(self) -> Array:
        """Covariance of the inputs, (blocks, inputs, inputs), the caller's own."""
        return self.squares()

    @property
    def tt(self) -> Array:
        """Variance of each target, (blocks, outputs)."""
        self._accumulate()
        return self._tt / self.count - np.square(self._t / self.count)

    def squares(self, mean: bool = True) -> Array:
        """Return the second moments of the inputs, (blocks, inputs, inputs), the caller's own.

        Args:
            mean: whether they are about the means; else about zero, for fits that have no bias to move the mean into.
        """
        self._accumulate()
        x = self._x / self.count
        xx = self._xx / self.count
        _add_outer(xx, -x, x)
        if not mean:
            _add_outer(xx, self.mean_x, self.mean_x)
        return xx

    def products(self, mean: bool = True) -> tuple[Array, Array]:
        """Return the second moments of the inputs, and of targets and inputs; the latter can be had once.

        Args:
            mean: as for :meth:`squares`.

        Returns:
            (blocks, inputs, inputs) and (blocks, outputs, inputs), both the caller's own.
        """
        if not self.cross:
            raise InvariantError("the products of targets and inputs were not accumulated, or taken before.")
        self._accumulate()
        tx, self._tx, self.cross = self._tx, np.zeros(()), False  # a wide layer's take more than all else
        tx /= self.count
        _add_outer(tx, -self._t / self.count, self._x / self.count)
        if not mean:
            _add_outer(tx, self.mean_t, self.mean_x)
        return self.squares(mean), tx

    def energy(self, rows: Array, mean: bool = True) -> Array:
        """Return the mean square of what each row of a matrix makes of the inputs, (blocks, outputs).

        Args:
            rows: (blocks, outputs, inputs).
            mean: whether the inputs count less their means.
        """
        return np.asarray(((rows @ self.squares(mean)) * rows).sum(axis=2))

    @staticmethod
    def about_own_means(parts: Iterable[Moments]) -> Moments:
        """Return the moments of several sets of rows as one, each set about its own mean; one set is held at a time."""
        joint = Moments()
        for part in parts:
            xx, tx = part.products()
            if not joint.count:
                joint._x, joint._t = np.zeros(xx.shape[:2]), np.zeros(tx.shape[:2])
                joint._shift_x, joint._shift_t = joint._x[:, None], joint._t[:, None]
                joint._xx, joint._tx, joint._tt = np.zeros(xx.shape), np.zeros(tx.shape), np.zeros(tx.shape[:2])
            for total, own in ((joint._xx, xx), (joint._tx, tx), (joint._tt, part.tt)):
                own *= part.count
                total += own
            joint.count += part.count
        return joint


class Means:
    """Means of input rows x and target rows t, where no weights are to be fitted.

    Attributes:
        count: the number of rows added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._x = self._t = np.zeros(())

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs)."""
        self.count += x.shape[1]
        self._x = self._x + x.sum(axis=1, dtype=np.float64)
        self._t = self._t + t.sum(axis=1, dtype=np.float64)

    @property
    def mean_x(self) -> Array:
        """Mean inputs, (blocks, inputs)."""
        return self._x / self.count

    @property
    def mean_t(self) -> Array:
        """Mean targets, (blocks, outputs)."""
        return self._t / self.count


def _add_outer(matrix: Array, a: Array, b: Array) -> None:
    """Add the products of two vectors to each block of a matrix, some rows at a time."""
    for start in range(0, matrix.shape[1], OUTER_ROWS):
        part = slice(start, start + OUTER_ROWS)
        matrix[:, part] += a[:, part, None] * b[:, None, :]


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


class Damped:
    """A second-moment matrix with so much added to its diagonal that it can be factored.

    Inputs that never vary get the mean there instead of zero; the damping, a fraction of the mean, grows tenfold until
    the factorisation succeeds.

    Args:
        h: (blocks, n, n), symmetric, float64; it is overwritten.
        damping: the first fraction to try.

    Attributes:
        added: what was added to the diagonal of each block, (blocks,).

    Raises:
        ModelError: the matrix holds values that are not finite.
    """

    def __init__(self, h: Array, damping: float) -> None:
        diagonal = np.diagonal(h, axis1=1, axis2=2).copy()
        scale = mean_energy(diagonal)
        base = diagonal + np.where(unvarying(diagonal), scale[:, None], 0.0)
        every = np.arange(h.shape[-1])
        for _ in range(12):
            self.added = damping * scale
            h[:, every, every] = base + self.added[:, None]
            if _factor(h):
                self._matrix = h
                return
            damping = max(damping, 1e-9) * 10
        raise ModelError(NOT_FINITE)

    def solve(self, right: Array) -> Array:
        """Return R H⁻¹ for rows R, (blocks, rows, n), float64."""
        if len(self._matrix) > 1:
            return np.linalg.solve(self._matrix, right.transpose(0, 2, 1)).transpose(0, 2, 1)
        from scipy.linalg.lapack import dpotrs  # here: it takes longer to import than all of spa

        solved, _ = dpotrs(self._matrix[0].T, right[0].T, lower=False)
        return np.asarray(solved.T[None])

    def inverse(self) -> Array:
        """Return H⁻¹, (blocks, n, n), in the memory of the matrix, which is lost."""
        if len(self._matrix) > 1:
            return np.linalg.inv(self._matrix)
        from scipy.linalg.lapack import dpotri

        inverse, _ = dpotri(self._matrix[0].T, lower=False, overwrite_c=True)
        _mirror(inverse.T)
        return np.asarray(inverse.T[None])


def _factor(h: Array) -> bool:
    """Return whether Cholesky's factorisation of each block succeeds with pivots above rounding.

    A single block, which may be large, then holds its factor in its lower triangle; several are as they were.
    """
    if len(h) == 1:
        from scipy.linalg.lapack import dpotrf

        diagonal = np.diagonal(h[0]).copy()
        _, failed = dpotrf(h[0].T, lower=False, overwrite_a=True, clean=False)
        pivots = np.square(np.diagonal(h, axis1=1, axis2=2))
        if failed or not pivots.min() > 1e-13 * pivots.max():
            _mirror(h[0].T)
            np.fill_diagonal(h[0], diagonal)
            return False
        return True
    try:
        factor = np.linalg.cholesky(h)
    except np.linalg.LinAlgError:
        return False
    pivots = np.square(np.diagonal(factor, axis1=1, axis2=2))
    return bool((pivots.min(axis=1) > 1e-13 * pivots.max(axis=1)).all())


def _mirror(matrix: Array) -> None:
    """Copy the lower triangle of a square matrix into the upper, some rows at a time."""
    n = len(matrix)
    for start in range(0, n, OUTER_ROWS):
        stop = min(start + OUTER_ROWS, n)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        square = matrix[start:stop, start:stop]
        square[...] = np.tril(square) + np.tril(square, -1).T


def least_squares(moments: Moments, prior: Array, damping: float, mean: bool = True) -> Array:
    """Find the matrix W that minimises E|t − W x|² + λ|W − prior|².

    Args:
        moments: the moments of inputs and targets.
        prior: the weights to stay close to, (blocks, outputs, inputs).
        damping: λ as a fraction of the mean input variance.
        mean: whether to fit about the means, which a bias takes over.

    Returns:
        W, (blocks, outputs, inputs).
    """
    xx, right = moments.products(mean)
    matrix = Damped(xx, damping)
    for start in range(0, right.shape[1], SOLVED_ROWS):
        some = right[:, start : start + SOLVED_ROWS]
        some += matrix.added[:, None, None] * prior[:, start : start + SOLVED_ROWS]
        some[...] = matrix.solve(some)
    return right
