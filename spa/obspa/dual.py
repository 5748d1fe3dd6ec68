"""Products with more inputs than a matrix of second moments affords: everything through the rows themselves.

With N rows X of n inputs, (XᵀX + λ)⁻¹ = (1 − Xᵀ(XXᵀ + λ)⁻¹X)/λ (Woodbury), so that a fit solves N equations, not n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.errors import InvariantError
from spa.obspa.curves import State
from spa.obspa.moments import NOT_FINITE, at_least_single, cautious, live_mean

Array = np.ndarray
LARGEST = 6144  # inputs of a product whose second moments are held: 300 MB in float64
ROWS = 2048  # rows that are held of a larger one
SKETCH = 256  # outputs that stand for all when removals are scored


class Rows:
    """Input rows x and target rows t, single precision.

    Args:
        step: keep each row that is a multiple of this.

    Attributes:
        count: how many rows there are.
    """

    def __init__(self, step: int = 1) -> None:
        self.step, self.count = step, 0
        self._x: list[Array] = []
        self._t: list[Array] = []

    def add(self, x: Array, t: Array) -> None:
        """Add rows x of shape (blocks, rows, inputs) and t of shape (blocks, rows, outputs)."""
        self._x.append(at_least_single(x[:, :: self.step]))
        self._t.append(at_least_single(t[:, :: self.step]))
        self.count += self._x[-1].shape[1]

    def centred(self, mean: bool = True) -> tuple[Array, Array]:
        """Inputs (blocks, rows, inputs) and targets, about their means where these can go into a bias."""
        x, t = np.concatenate(self._x, axis=1), np.concatenate(self._t, axis=1)
        if mean:
            x -= x.mean(axis=1, keepdims=True)
            t -= t.mean(axis=1, keepdims=True)
        return x, t

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
    """The matrix that :func:`spa.obspa.moments.least_squares` finds, from N equations.

    Args:
        rows: inputs and targets.
        prior: (blocks, outputs, inputs), single precision.
        damping: λ as a fraction of the mean input variance.
        mean: whether the fit is about the means.

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
    """XXᵀ + λN of each block, and λN."""
    energy = np.einsum("bni,bni->bi", x, x)
    if not np.isfinite(energy).all():
        raise InvariantError(NOT_FINITE)
    added = damping * live_mean(energy).astype(np.float64)
    return (x @ x.transpose(0, 2, 1)).astype(np.float64) + added[:, None, None] * np.eye(x.shape[1]), added


@dataclass(frozen=True)
class RowReader:
    """A reader that is known by rows of its inputs.

    Attributes:
        x: its inputs about their mean, (1, rows, inputs); products in several blocks are not covered.
        w: its weights, scaled as in :class:`spa.obspa.curves.Reader`, (1, outputs, inputs); see :func:`sketched`.
        columns: the inputs of each channel, (channels, inputs of a channel); −1 pads.
        rounds: how often it affords to be scored.
    """

    x: Array
    w: Array
    columns: Array
    rounds: int = 16

    def state(self, damping: float) -> State:
        """The reader with every channel there."""
        return _State(self, damping)


def sketched(w: Array, unit: Array, rng: np.random.Generator) -> Array:
    """At most 256 random mixtures of a matrix' outputs whose squares sum up to the same on average.

    The loss of a removal is a quadratic form summed over the outputs. Its estimate has a relative standard error of at
    most (2 / 256)^(1/2), 9 %, and much less where many outputs take part (Hutchinson 1989).

    Args:
        w: (1, outputs, inputs).
        unit: what each output is worth, (outputs,).
        rng: where the mixtures come from.
    """
    outputs = w.shape[1]
    unit = unit.astype(w.dtype)
    if outputs <= SKETCH:
        return w * unit[:, None]
    mix = rng.choice(np.asarray([-1, 1], w.dtype), (SKETCH, outputs)) / np.sqrt(SKETCH, dtype=w.dtype)
    return np.asarray((mix * unit) @ w)


class _State:
    """Missing outputs and the Gram matrix of what remains, while channels go.

    With the outputs R = X_S W_Sᵀ that went missing and G = X_P X_Pᵀ + λ, the loss after compensation is
    λ tr(RᵀG⁻¹R) + λ|W_S|², and the compensated weights are W_P + RᵀG⁻¹X_P.
    """

    def __init__(self, reader: RowReader, damping: float) -> None:
        rows = reader.x.shape[1]
        x = reader.x[0] / np.sqrt(rows, dtype=reader.x.dtype)
        gram, added = _gram(x[None], cautious(damping, x.shape[1], rows))
        self.gram, self.added = gram[0], float(added[0])
        self.x = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)  # the last input stands for all paddings
        self.w = np.concatenate([reader.w[0], np.zeros_like(reader.w[0, :, :1])], axis=1)
        self.columns = np.where(reader.columns < 0, x.shape[1], reader.columns)
        self.missing = np.zeros((rows, len(self.w)))
        self.gone = self.loss = 0.0

    def scores(self, alive: Array) -> Array:
        columns = self.columns[alive]
        inverse = np.linalg.inv(self.gram)
        x, w = self.x[:, columns.reshape(-1)], self.w[:, columns.reshape(-1)]
        solved = inverse.astype(x.dtype) @ x
        w = w + self.missing.T.astype(x.dtype) @ solved
        x, solved, w = (a.reshape(-1, *columns.shape).transpose(1, 0, 2) for a in (x, solved, w))
        inner = (np.eye(columns.shape[1]) - x.transpose(0, 2, 1) @ solved) / self.added
        return np.einsum("nos,nso->n", w, np.linalg.solve(inner, w.transpose(0, 2, 1)))

    def remove(self, gone: Array) -> float:
        s = np.unique(self.columns[gone])
        x, w = self.x[:, s], self.w[:, s]
        self.missing += x @ w.T
        self.gram -= x @ x.T
        self.gone += self.added * float(np.square(w).sum())
        before = self.loss
        self.loss = self.gone + self.added * float((self.missing * np.linalg.solve(self.gram, self.missing)).sum())
        return self.loss - before
