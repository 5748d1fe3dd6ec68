"""Greedy optimal brain surgery on groups: in which order channels go, and what each prefix of the order costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spa.obspa.moments import damped

Array = np.ndarray


@dataclass(frozen=True)
class Reader:
    """One reader of a group, as optimal brain surgery sees it.

    Attributes:
        h: second moments of its inputs, (blocks, inputs, inputs).
        w: its weights, rows scaled by what an output is worth, (blocks, outputs, inputs).
        columns: the inputs of each channel, (channels, inputs of a channel); the same in each block; −1 pads.
    """

    h: Array
    w: Array
    columns: Array


@dataclass(frozen=True)
class Curve:
    """What removing channels costs.

    Attributes:
        order: channels in the order in which they go.
        loss: the loss once the first i of them are gone, (channels + 1,); nondecreasing, loss[0] = 0.
    """

    order: Array
    loss: Array


def greedy(readers: Sequence[Reader], channels: int, rounds: int = 64, damping: float = 1e-3) -> Curve:
    """Remove the channels that cost least, after compensation by all others, and score again.

    The loss of removing columns S is Σ W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ, summed over the readers (ZipLM, arXiv 2302.04089,
    equations 2 and 3). The last channel's loss is what the readers lose when nothing is left.

    Args:
        readers: the group's readers.
        channels: how many there are.
        rounds: how often the remaining channels are scored again; all that go in one round go together.
        damping: of H, as a fraction of its mean diagonal.
    """
    states = [_State(r, damping) for r in readers]
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
    """A reader's inverse and weights while channels go."""

    def __init__(self, reader: Reader, damping: float) -> None:
        blocks, size, _ = reader.h.shape
        pad = int((reader.columns < 0).any())  # one input that is never used stands for all paddings
        h = np.zeros((blocks, size + pad, size + pad))
        h[:, :size, :size] = damped(reader.h, damping)[0]
        if pad:
            h[:, size, size] = 1.0
        self.inverse = np.linalg.inv(h)
        self.w = np.concatenate([reader.w, np.zeros((*reader.w.shape[:2], pad))], axis=2)
        self.columns = np.where(reader.columns < 0, size, reader.columns)
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
        self.w = self.w - w @ solved[:, :, :width]
        self.inverse = self.inverse - rows.transpose(0, 2, 1) @ solved[:, :, :width]
        return cost
