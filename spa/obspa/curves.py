"""Greedy optimal brain surgery on groups: in which order channels go, and what each prefix of the order costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spa.algebra.axes import Dim, Expr
from spa.coupling.places import channel_of
from spa.criteria.answers import Curve
from spa.obspa.moments import cautious, damped, motionless

Array = np.ndarray
SPARSE = 0.8  # share of live inputs below which a reader's matrices are made smaller


class State(Protocol):
    """A reader while channels go."""

    def scores(self, alive: Array) -> Array:
        """What the removal of each of some channels would cost after compensation by the others."""

    def remove(self, gone: Array) -> float:
        """Remove channels together; what that costs."""


class AnyReader(Protocol):
    """One reader of a group, as optimal brain surgery sees it."""

    @property
    def rounds(self) -> int:
        """How often it affords to be scored."""

    def state(self, damping: float) -> State:
        """Its state with every channel there; the damping is a fraction of the mean second moment of its inputs."""


@dataclass(frozen=True)
class Reader:
    """A reader that is known by the second moments of its inputs.

    Attributes:
        h: second moments of its inputs, (blocks, inputs, inputs).
        w: its weights, rows scaled by what an output is worth, (blocks, outputs, inputs).
        columns: the inputs of each channel, (channels, inputs of a channel); the same in each block; −1 pads.
        rows: how many rows the moments were taken over; damping grows where they are few. None: damping stays.
        rounds: how often it affords to be scored.
    """

    h: Array
    w: Array
    columns: Array
    rows: int | None = None
    rounds: int = 64

    def state(self, damping: float) -> State:
        """The reader with every channel there."""
        return _State(self, damping)


@dataclass(frozen=True)
class Seen:
    """A reader before it is known which of its inputs belong to a group.

    Attributes:
        of: the reader from the inputs of each channel.
        inputs: the axis of the inputs, as an expression.
        blocks: how many products share that axis between them.
        taps: how many inputs of the matrix each index of the axis has.
    """

    of: Callable[[Array], AnyReader]
    inputs: Expr
    blocks: int = 1
    taps: int = 1

    def columns(self, dim: Dim, size: int) -> Array | None:
        """The inputs of each channel of a group, (channels, inputs of a channel), −1 pads; None where there are none.

        They must be the same in each block.
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


def greedy(readers: Sequence[AnyReader], channels: int, damping: float = 1e-3) -> Curve:
    """Remove the channels that cost least, after compensation by all others, and score again.

    The loss of removing columns S is Σ W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ, summed over the readers (ZipLM, arXiv 2302.04089,
    equations 2 and 3). The last channel's loss is what the readers lose when nothing is left.

    Args:
        readers: the group's readers.
        channels: how many there are.
        damping: of H, as a fraction of its mean diagonal.

    Channels go in as many rounds as the readers afford; all that go in one round go together.
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
        gone = alive[ranked]
        cost = sum(s.remove(gone) for s in states)
        share = np.maximum(scores[ranked], 0)
        total = share.sum()
        parts = np.cumsum(share) / total if total > 0 else np.arange(1, gone.size + 1) / gone.size
        loss.extend((loss[-1] + max(cost, 0.0) * parts).tolist())
        order.append(gone)
        alive = np.delete(alive, ranked)
    return Curve(np.concatenate(order) if order else np.zeros(0, int), np.maximum.accumulate(loss))


class _State:
    """A reader's inverse and weights while channels go; what has gone is dropped from both now and then."""

    def __init__(self, reader: Reader, damping: float) -> None:
        blocks, size, _ = reader.h.shape
        pad = int((reader.columns < 0).any())  # one input that is never used stands for all paddings
        h = np.zeros((blocks, size + pad, size + pad))
        if reader.rows is not None:
            damping = cautious(damping, size, reader.rows)
        h[:, :size, :size] = damped(reader.h, damping)[0]
        if pad:
            h[:, size, size] = 1.0
        self.inverse = np.linalg.inv(h)
        moving = ~motionless(np.diagonal(reader.h, axis1=1, axis2=2))  # the others cost nothing
        w = np.where(moving[:, None], reader.w, 0.0)
        self.w = np.concatenate([w, np.zeros((*w.shape[:2], pad))], axis=2)
        self.columns = np.where(reader.columns < 0, size, reader.columns)
        self.live = np.ones(size + pad, bool)
        self.pad = pad

    def _blocks(self, columns: Array) -> Array:
        """The inverse's diagonal blocks, (blocks, channels, s, s)."""
        part = self.inverse[:, columns[:, :, None], columns[:, None, :]]
        if self.pad:  # repeated paddings would be singular
            width = columns.shape[1]
            padded = columns == self.inverse.shape[1] - 1
            either = padded[:, :, None] | padded[:, None, :]
            part = np.where(either, np.eye(width), part)
        return part

    def scores(self, alive: Array) -> Array:
        columns = self.columns[alive]
        inner = np.linalg.inv(self._blocks(columns))
        w = self.w[:, :, columns]
        return np.einsum("gons,gnst,gont->n", w, inner, w, optimize=True)

    def remove(self, gone: Array) -> float:
        s = np.unique(self.columns[gone])
        s = s[s < self.inverse.shape[1] - self.pad]
        if not s.size:
            return 0.0
        rows = self.inverse[:, s, :]
        w = self.w[:, :, s]
        solved = np.linalg.solve(rows[:, :, s], np.concatenate([rows, w.transpose(0, 2, 1)], axis=2))
        width = rows.shape[2]
        cost = float(np.einsum("gos,gso->", w, solved[:, :, width:]))
        self.w -= w @ solved[:, :, :width]
        self.inverse -= rows.transpose(0, 2, 1) @ solved[:, :, :width]
        self.live[s] = False
        if self.live.sum() < SPARSE * self.live.size:
            self._compact()
        return cost

    def _compact(self) -> None:
        """Drop the inputs that have gone."""
        live = np.flatnonzero(self.live)
        self.inverse, self.w = self.inverse[:, live[:, None], live], self.w[:, :, live]
        place = np.full(self.live.size, -1)
        place[live] = np.arange(live.size)
        self.columns = place[self.columns]
        self.live = np.ones(live.size, bool)
