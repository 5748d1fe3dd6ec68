"""Scoring and fitting from the input rows themselves, for products with too many inputs for a matrix of moments.

With N rows X (rows, inputs) of n inputs, (XᵀX + λI)⁻¹ = (I − Xᵀ(XXᵀ + λI)⁻¹X) / λ (Woodbury's identity): a fit solves N
equations instead of n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.errors import ModelError
from spa.obspa.curves import ReaderState
from spa.obspa.moments import NOT_FINITE, at_least_single, damping_for, mean_energy

Array = np.ndarray
MAX_MOMENT_INPUTS = 6144  # the most inputs whose second moments are held: 300 MB in float64
MAX_ROWS = 2048  # about as many rows are held of larger products: their Gram matrix is then 34 MB in float64
SKETCH_OUTPUTS = 256  # random mixtures that stand for all outputs when removals are scored, see `sketch`


class Rows:
    """Input rows x and target rows t, single precision.

    Args:
        step: every step-th row is kept.

    Attributes:
        count: the number of rows kept.
    """

    def __init__(self, step: int = 1) -> None:
        self.step, self.count, self._seen = step, 0, 0
        self._x: list[Array] = []
        self._t: list[Array] = []

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs)."""
        first = -self._seen % self.step
        self._seen += x.shape[1]
        self._x.append(at_least_single(x[:, first :: self.step]))
        self._t.append(at_least_single(t[:, first :: self.step]))
        self.count += self._x[-1].shape[1]

    def centred(self, mean: bool = True) -> tuple[Array, Array]:
        """Return inputs (blocks, rows, inputs) and targets (blocks, rows, outputs); less their means if asked for."""
        x, t = np.concatenate(self._x, axis=1), np.concatenate(self._t, axis=1)
        if mean:
            x -= x.mean(axis=1, keepdims=True)
            t -= t.mean(axis=1, keepdims=True)
        return x, t

    def energy(self, rows: Array, mean: bool = True) -> Array:
        """Return what :meth:`spa.obspa.moments.Moments.energy` does."""
        outputs = self.centred(mean)[0] @ rows.transpose(0, 2, 1)
        return np.asarray(np.square(outputs).mean(axis=1))

    @property
    def mean_x(self) -> Array:
        """Mean inputs, (blocks, inputs)."""
        return np.asarray(sum(x.sum(axis=1, dtype=np.float64) for x in self._x) / self.count)

    @property
    def mean_t(self) -> Array:
        """Mean targets, (blocks, outputs)."""
        return np.asarray(sum(t.sum(axis=1, dtype=np.float64) for t in self._t) / self.count)

    @property
    def tt(self) -> Array:
        """Variance of each target, (blocks, outputs)."""
        return np.concatenate(self._t, axis=1).var(axis=1, dtype=np.float64)


def least_squares(rows: Rows, prior: Array, damping: float, mean: bool = True) -> Array:
    """Compute what :func:`spa.obspa.moments.least_squares` does, from N equations.

    Args:
        rows: inputs and targets.
        prior: the weights to stay close to, (blocks, outputs, inputs), single precision.
        damping: λ as a fraction of the mean input variance.
        mean: whether to fit about the means, which a bias takes over.

    Returns:
        W, (blocks, outputs, inputs), single precision.
    """
    x, t = rows.centred(mean)
    gram, _ = _gram(x, damping)
    missing = t - x @ prior.transpose(0, 2, 1)
    dual = np.linalg.solve(gram, missing.astype(np.float64)).astype(x.dtype)
    fitted: Array = dual.transpose(0, 2, 1) @ x
    fitted += prior
    return fitted


def _gram(x: Array, damping: float) -> tuple[Array, Array]:
    """Return XXᵀ + λI of each block, (blocks, rows, rows), and λ, (blocks,); λ is relative to the mean energy."""
    energy = np.einsum("bni,bni->bi", x, x)
    if not np.isfinite(energy).all():
        raise ModelError(NOT_FINITE)
    added = damping * mean_energy(energy).astype(np.float64)
    return (x @ x.transpose(0, 2, 1)).astype(np.float64) + added[:, None, None] * np.eye(x.shape[1]), added


@dataclass(frozen=True)
class RowReader:
    """A reader, described by rows of its inputs.

    Attributes:
        x: its inputs less their means, (1, rows, inputs); one block only.
        w: its weights, scaled as in :class:`spa.obspa.curves.MomentReader`, (1, outputs, inputs); see :func:`sketch`.
        columns: the inputs of each channel, (channels, inputs of a channel); −1 pads.
        rounds: the number of times that its channels may be scored.
    """

    x: Array
    w: Array
    columns: Array
    rounds: int = 16

    def state(self, damping: float) -> ReaderState:
        """Return the reader before any removal."""
        return _RowState(self, damping)


def sketch(w: Array, unit: Array, rng: np.random.Generator) -> Array:
    """Mix a matrix' outputs at random into at most 256 whose squares have the same sum on average.

    The loss of a removal is a quadratic form summed over the outputs. Its estimate has a relative standard error of at
    most (2 / 256)^(1/2) = 9 %, and much less if many outputs take part (Hutchinson 1989).

    Args:
        w: the weights, (1, outputs, inputs).
        unit: the weight of each output in the loss, its square root, (outputs,).
        rng: draws the signs of the mixtures.

    Returns:
        The mixtures, (1, at most 256, inputs).
    """
    outputs = w.shape[1]
    unit = unit.astype(w.dtype)
    if outputs <= SKETCH_OUTPUTS:
        return w * unit[:, None]
    mix = rng.choice(np.asarray([-1, 1], w.dtype), (SKETCH_OUTPUTS, outputs)) / np.sqrt(SKETCH_OUTPUTS, dtype=w.dtype)
    return np.asarray((mix * unit) @ w)


class _RowState:
    """The missing outputs and the Gram matrix of the remaining inputs, updated with each removal.

    With the removed inputs S, the remaining ones P, the missing outputs R = X_S W_Sᵀ and G = X_P X_Pᵀ + λI, the loss
    after compensation is λ tr(RᵀG⁻¹R) + λ|W_S|², and the compensated weights are W_P + RᵀG⁻¹X_P.
    """

    def __init__(self, reader: RowReader, damping: float) -> None:
        rows = reader.x.shape[1]
        x = reader.x[0] / np.sqrt(rows, dtype=reader.x.dtype)
        gram, added = _gram(x[None], damping_for(damping, x.shape[1], rows))
        self.gram, self.added = gram[0], float(added[0])
        self.x = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)  # the last input stands for all paddings
        self.w = np.concatenate([reader.w[0], np.zeros_like(reader.w[0, :, :1])], axis=1)
        self.columns = np.where(reader.columns < 0, x.shape[1], reader.columns)
        self.missing = np.zeros((rows, len(self.w)))
        self.own_loss = self.loss = 0.0

    def scores(self, alive: Array) -> Array:
        columns = self.columns[alive]
        inverse = np.linalg.inv(self.gram)
        x, w = self.x[:, columns.reshape(-1)], self.w[:, columns.reshape(-1)]
        solved = inverse.astype(x.dtype) @ x
        w = w + self.missing.T.astype(x.dtype) @ solved
        x, solved, w = (a.reshape(-1, *columns.shape).transpose(1, 0, 2) for a in (x, solved, w))
        inner = (np.eye(columns.shape[1]) - x.transpose(0, 2, 1) @ solved) / self.added
        return np.einsum("nos,nso->n", w, np.linalg.solve(inner, w.transpose(0, 2, 1)))

    def remove(self, removed: Array) -> float:
        s = np.unique(self.columns[removed])
        x, w = self.x[:, s], self.w[:, s]
        self.missing += x @ w.T
        self.gram -= x @ x.T
        self.own_loss += self.added * float(np.square(w).sum())
        before = self.loss
        self.loss = self.own_loss + self.added * float((self.missing * np.linalg.solve(self.gram, self.missing)).sum())
        return self.loss - before
