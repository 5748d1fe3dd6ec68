"""Greedy optimal brain surgery on groups: find the order in which channels are removed, and the loss of each width.

With the second moments H = E[x xᵀ] of a reader's inputs and its weights W (outputs, inputs), removing the inputs S has
this loss after the best change of the remaining weights (ZipLM, arXiv 2302.04089, equations 2 and 3):

    loss(S) = Σ_i W_iS ((H⁻¹)_SS)⁻¹ W_iSᵀ
    W   ← W   − W_:S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S:
    H⁻¹ ← H⁻¹ − (H⁻¹)_:S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S:
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from spa.algebra.axes import Dim, Expr
from spa.coupling.places import channel_of
from spa.criteria.answers import Curve
from spa.obspa.moments import OUTER_ROWS, Damped, damping_for, unvarying

Array = np.ndarray
COMPACT_BELOW = 0.8  # fraction of remaining inputs below which removed ones are dropped from a reader's matrices


class ReaderState(Protocol):
    """A reader while its channels are removed one after the other."""

    def scores(self, alive: Array) -> Array:
        """Return the loss of removing each of the remaining channels ``alive`` alone, after compensation, (alive,)."""

    def remove(self, removed: Array) -> float:
        """Remove channels together; return the loss that this adds."""


class Reader(Protocol):
    """One reader of a group, as optimal brain surgery sees it."""

    @property
    def rounds(self) -> int:
        """The number of times that its channels may be scored: scoring is the expensive part."""

    def state(self, damping: float) -> ReaderState:
        """Return its state before any removal; the damping is a fraction of the mean second moment of its inputs."""


@dataclass(frozen=True)
class MomentReader:
    """A reader, described by the second moments of its inputs.

    Attributes:
        h: H, the second moments of its inputs, (blocks, inputs, inputs).
        w: W, each row scaled by the weight of its output in the loss, (blocks, outputs, inputs).
        columns: the inputs of each channel, (channels, inputs of a channel); the same in each block; −1 pads.
        rows: the number of rows that H was averaged over; few rows raise the damping. None leaves it as it is.
        rounds: the number of times that its channels may be scored.
    """

    h: Array
    w: Array
    columns: Array
    rows: int | None = None
    rounds: int = 64

    def state(self, damping: float) -> ReaderState:
        """Return the reader before any removal."""
        return _MomentState(self, damping)

    def regression(self, gone: Array, damping: float) -> tuple[Array, Array, Array]:
        """Return how the inputs of removed channels follow from all others.

        Args:
            gone: the removed channels.
            damping: added to the diagonal of H, as a fraction of its mean.

        Returns:
            The inputs of the removed channels, the other inputs, and the matrix B of (blocks, removed, others) with
            which B x is nearest to the removed inputs, for centred inputs x.
        """
        removed = np.unique(self.columns[gone])
        removed = removed[removed >= 0]
        others = np.setdiff1d(np.arange(self.h.shape[1]), removed)
        if self.rows is not None:
            damping = damping_for(damping, self.h.shape[1], self.rows)
        matrix = Damped(self.h[:, others[:, None], others].astype(np.float64), damping)
        return removed, others, matrix.solve(self.h[:, removed[:, None], others].astype(np.float64))

    def with_use(self, other: MomentReader) -> MomentReader:
        """Return one reader for this and another use of the same weights, which one fit serves.

        The loss is the sum of theirs. Where the outputs of the two have weights that are not in proportion, the other's
        are taken to have this one's, and the same sum of squares.

        Args:
            other: the other use, with the same columns.
        """
        size = float(np.square(self.w).sum())
        share = float(np.square(other.w).sum()) / size if size else 1.0
        rows = None if self.rows is None or other.rows is None else self.rows + other.rows
        return replace(self, h=self.h + share * other.h, rows=rows)


@dataclass(frozen=True)
class Observation:
    """The statistics of a reader, before it is known which of its inputs belong to a group.

    Attributes:
        make_reader: builds the reader from the inputs of each channel (see :meth:`columns`).
        inputs: the expression of the axis of the inputs.
        blocks: the number of independent products that the axis is divided among (the groups of a convolution).
        taps: the number of matrix columns for each index of the axis (the size of a kernel).
        weights: the name of the weights, if other nodes read them, too.
        mean: the mean of the inputs, (blocks, matrix columns); None if it is not known.
    """

    make_reader: Callable[[Array], Reader]
    inputs: Expr
    blocks: int = 1
    taps: int = 1
    weights: str | None = None
    mean: Array | None = None

    def columns(self, dim: Dim, size: int) -> Array | None:
        """Return the inputs of each channel of a group.

        Args:
            dim: the group's dimension.
            size: the number of its channels.

        Returns:
            (channels, inputs of a channel), −1 pads; None if no input belongs to the group, or if the blocks differ.
        """
        blocks = channel_of(self.inputs, dim).reshape(self.blocks, -1)
        channel = blocks[0]
        counts = np.bincount(channel[channel >= 0], minlength=size)
        if not counts.any() or not (blocks == channel).all():
            return None
        order = np.argsort(np.where(channel < 0, size, channel), kind="stable")[: counts.sum()]
        columns = np.full((size, counts.max()), -1)
        rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        columns[np.repeat(np.arange(size), counts), rank] = order
        spread = columns[:, :, None] * self.taps + np.arange(self.taps)
        return np.where(columns[:, :, None] < 0, -1, spread).reshape(size, -1)


def greedy(readers: Sequence[Reader], channels: int, damping: float = 1e-3) -> Curve:
    """Remove the channels of the least loss, summed over the readers, then score the others again.

    Each round removes an equal number of channels together, in as many rounds as the readers allow.

    Args:
        readers: the group's readers.
        channels: the number of the group's channels.
        damping: added to the diagonal of H, as a fraction of its mean.

    Returns:
        The order of removal, and the loss of each prefix of it; the last is the loss if nothing is left.
    """
    states = [r.state(damping) for r in readers]
    rounds = min(r.rounds for r in readers)
    alive = np.arange(channels)
    order: list[Array] = []
    loss = [0.0]
    step = max(1, channels // rounds)
    while alive.size:
        scores = np.sum([s.scores(alive) for s in states], axis=0)
        ranked = np.argsort(scores, kind="stable")[:step]
        removed = alive[ranked]
        cost = sum(s.remove(removed) for s in states)
        single = np.maximum(scores[ranked], 0)  # the joint loss is divided among the channels in proportion
        total = single.sum()
        fractions = np.cumsum(single) / total if total > 0 else np.arange(1, removed.size + 1) / removed.size
        loss.extend((loss[-1] + max(cost, 0.0) * fractions).tolist())
        order.append(removed)
        alive = np.delete(alive, ranked)
    return Curve(np.concatenate(order) if order else np.zeros(0, int), np.maximum.accumulate(loss))


class _MomentState:
    """H⁻¹ and W of a reader, updated with each removal; removed inputs are dropped from both now and then."""

    def __init__(self, reader: MomentReader, damping: float) -> None:
        blocks, size, _ = reader.h.shape
        pad = int((reader.columns < 0).any())  # one unused input stands for all paddings
        if reader.rows is not None:
            damping = damping_for(damping, size, reader.rows)
        self.inverse = Damped(reader.h.astype(np.float64), damping).inverse()
        if pad:
            padded = np.zeros((blocks, size + 1, size + 1))
            padded[:, :size, :size], padded[:, size, size] = self.inverse, 1.0
            self.inverse = padded
        moving = ~unvarying(
            np.diagonal(reader.h, axis1=1, axis2=2)
        )  # inputs that never vary cost nothing: a bias takes them over
        w = np.where(moving[:, None], reader.w, 0.0)
        self.w = np.concatenate([w, np.zeros((*w.shape[:2], pad))], axis=2)
        self.columns = np.where(reader.columns < 0, size, reader.columns)
        self.live = np.ones(size + pad, bool)
        self.pad = pad

    def _diagonal_blocks(self, columns: Array) -> Array:
        """Return (H⁻¹)_SS of each channel, (blocks, channels, s, s)."""
        part = self.inverse[:, columns[:, :, None], columns[:, None, :]]
        if self.pad:  # repeated paddings would be singular
            width = columns.shape[1]
            padded = columns == self.inverse.shape[1] - 1
            either = padded[:, :, None] | padded[:, None, :]
            part = np.where(either, np.eye(width), part)
        return part

    def scores(self, alive: Array) -> Array:
        columns = self.columns[alive]
        inner = np.linalg.inv(self._diagonal_blocks(columns))
        w = self.w[:, :, columns]
        return np.einsum("gons,gnst,gont->n", w, inner, w, optimize=True)

    def remove(self, removed: Array) -> float:
        s = np.unique(self.columns[removed])
        s = s[s < self.inverse.shape[1] - self.pad]
        if not s.size:
            return 0.0
        rows = self.inverse[:, s, :]
        w = self.w[:, :, s]
        solved = np.linalg.solve(rows[:, :, s], np.concatenate([rows, w.transpose(0, 2, 1)], axis=2))
        width = rows.shape[2]
        cost = float(np.einsum("gos,gso->", w, solved[:, :, width:]))
        self.w -= w @ solved[:, :, :width]
        for some in _row_ranges(width):
            self.inverse[:, some] -= rows[:, :, some].transpose(0, 2, 1) @ solved[:, :, :width]
        self.live[s] = False
        if self.live.sum() < COMPACT_BELOW * self.live.size:
            self._compact()
        return cost

    def _compact(self) -> None:
        """Drop the removed inputs from the matrices."""
        live = np.flatnonzero(self.live)
        for some in _row_ranges(live.size):  # rows move up, to where no later one is read
            self.inverse[:, some, : live.size] = self.inverse[:, live[some, None], live]
        self.inverse, self.w = self.inverse[:, : live.size, : live.size], self.w[:, :, live]
        position = np.full(self.live.size, -1)
        position[live] = np.arange(live.size)
        self.columns = position[self.columns]
        self.live = np.ones(live.size, bool)


def _row_ranges(size: int) -> Iterator[slice]:
    """Yield ranges of rows of a matrix that change at a time, so that nothing of its size is made beside it."""
    for start in range(0, size, OUTER_ROWS):
        yield slice(start, min(start + OUTER_ROWS, size))
