"""Rankings: one sequence of all channels, in the order in which they go.

The channels of a group go in the order of their scores, in chunks that lead from one rung of its ladder to the next.
A ranking puts the chunks of all ladders into one sequence, which does not depend on the ratio to remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from spa.coupling.analysis import Group
from spa.widths.ladders import Ladder

RANKINGS = ("global", "uniform", "isomorphic")


@dataclass(frozen=True)
class Chunk:
    """Channels that go together.

    Attributes:
        key: the position in the ranking; the lowest goes first.
        ladder: the position of the ladder that the channels are on.
        rung: the rung that their removal leads to.
    """

    key: float
    ladder: int
    rung: int

    @property
    def order(self) -> tuple[float, int, int]:
        """The key, with ties broken by the order of the ladders and then by rung."""
        return self.key, self.ladder, self.rung


def ranked_chunks(
    groups: Sequence[Group], ascending: Sequence[np.ndarray], ladders: Sequence[Ladder], ranking: str
) -> list[Chunk]:
    """Return all chunks in the order in which they go; within a ladder that order is down its rungs.

    Args:
        groups: the groups that may be pruned.
        ascending: for each group its channels' scores, sorted, of shape (size,).
        ladders: the groups' ladders.
        ranking: ``global``, ``uniform`` or ``isomorphic`` (see :class:`spa.widths.budget.Budget`).
    """
    chunks: list[Chunk] = []
    for position, ladder in enumerate(ladders):
        members = [(groups[m].size, ascending[m]) for m in ladder.members]
        highest = -np.inf  # keys never fall within a ladder, or a later rung would go before an earlier one
        for rung, (wider, narrower) in enumerate(pairwise(ladder.rungs), 1):
            removed = [scores[n - w : n - v] for (n, scores), w, v in zip(members, wider, narrower, strict=True)]
            highest = max(highest, float(np.concatenate(removed).mean()))
            key = highest if ranking != "uniform" else 1 - narrower[0] / members[0][0]
            chunks.append(Chunk(key, position, rung))
    if ranking == "isomorphic":
        chunks = _by_quantile(groups, ladders, chunks)
    return sorted(chunks, key=lambda c: c.order)


def _by_quantile(groups: Sequence[Group], ladders: Sequence[Ladder], chunks: Sequence[Chunk]) -> list[Chunk]:
    """Replace each chunk's key by the fraction of its isomorphic set's channels that has gone with it."""
    isomorphic_sets: dict[object, list[Chunk]] = {}
    for chunk in chunks:
        isomorphic_sets.setdefault(tuple(structure(groups[m]) for m in ladders[chunk.ladder].members), []).append(chunk)
    result = []
    for members in isomorphic_sets.values():
        channels_left = {c.ladder: sum(ladders[c.ladder].rungs[0]) for c in members}
        total, removed = sum(channels_left.values()), 0
        for chunk in sorted(members, key=lambda c: c.order):
            channels = sum(ladders[chunk.ladder].rungs[chunk.rung])
            removed += channels_left[chunk.ladder] - channels
            channels_left[chunk.ladder] = channels
            result.append(replace(chunk, key=removed / total))
    return result


def structure(group: Group) -> object:
    """Return a value that is equal for isomorphic groups: the same axes of the same operands, whatever the sizes."""
    return tuple(sorted((p.axis, p.use[2]) for p in group.places)), len(group.readers), len(group.writers)


def rungs_after(ladders: Sequence[Ladder], chunks: Sequence[Chunk]) -> list[int]:
    """Return the rung on which each ladder stands once these chunks are removed."""
    rungs = [0] * len(ladders)
    for chunk in chunks:
        rungs[chunk.ladder] = max(rungs[chunk.ladder], chunk.rung)
    return rungs
