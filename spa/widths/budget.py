"""Budgets: how much to remove, and the channels to keep so that the budget is met.

A ranking (:mod:`spa.widths.ranking`) puts all channels into one sequence, which does not depend on the ratio; the
budget takes a prefix of it. So a larger ratio never keeps more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import Cost, CostModel, LatencyTerms
from spa.errors import OptionError, OutOfReachError
from spa.widths.ladders import Ladder, ladders_of, widths_at
from spa.widths.ranking import RANKINGS, Chunk, ranked_chunks, rungs_after

UNITS = ("macs", "params", "bytes", "channels", "memory", "latency")
TOLERANCE = 0.01  # a budget counts as met within this fraction of the dense cost


@dataclass(frozen=True)
class Budget:
    """The fraction of a network's cost to remove, and the widths that are allowed.

    Attributes:
        ratio: the fraction to remove, in (0, 1).
        of: ``macs``, ``params``, ``bytes`` (of weights), ``channels``, ``memory`` (of activations) or ``latency``.
        ranking: ``global`` (scores of all groups compared), ``uniform`` (the same ratio in every group) or
            ``isomorphic`` (scores compared among groups of the same structure, the same ratio in each such set;
            Fang et al., ECCV 2024).
        round_to: widths become multiples of this.
        min_width: no group becomes narrower than this.
        equal: sets of names of groups that keep the same fraction of their channels; where one of a set may not be
            pruned, none of it is.
        fixed: by group name the width that it must have.
        floors: by group name the width that it does not fall below.
    """

    ratio: float = 0.5
    of: str = "macs"
    ranking: str = "global"
    round_to: int = 8
    min_width: int = 1
    equal: tuple[frozenset[str], ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise OptionError(
                f"ratio is {self.ratio:g}, the fraction to remove. Choose one between 0 and 1, ends excluded."
            )
        for name, known in (("of", UNITS), ("ranking", RANKINGS)):
            if (value := getattr(self, name)) not in known:
                raise OptionError(f"unknown {name} {value!r}. Choose one of {', '.join(known)}.")
        for name in ("round_to", "min_width"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}. Choose 1 or more.")

    def ladders(self, analysis: Analysis, groups: Sequence[Group]) -> list[Ladder]:
        """Return the widths that this budget allows the groups, as :func:`spa.widths.ladders.ladders_of` does."""
        return ladders_of(
            analysis,
            groups,
            round_to=self.round_to,
            min_width=self.min_width,
            equal=self.equal,
            fixed=self.fixed,
            floors=self.floors,
        )


@dataclass(frozen=True)
class Choice:
    """The channels to keep that a budget led to.

    Attributes:
        kept: sorted kept indices by group name; groups that keep everything are left out.
        dense: the cost before pruning.
        pruned: the cost after pruning.
        reached: the fraction of the budget's unit that is removed.
        notes: sentences for the user, about a budget that is met only nearly.
    """

    kept: Mapping[str, np.ndarray]
    dense: Cost
    pruned: Cost
    reached: float
    notes: tuple[str, ...]


def choose(
    analysis: Analysis,
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    budget: Budget,
    latency: LatencyTerms | None = None,
) -> Choice:
    """Choose the channels to keep.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        scores: by group name one score per channel, of shape (size,); the lowest go first.
        budget: what to remove.
        latency: the model's latency, for a budget in latency.

    Raises:
        PlanError: the ratio cannot be reached; the message says what can.
    """
    costs = CostModel(analysis, groups, latency)
    orders = [np.argsort(scores[g.name], kind="stable") for g in groups]
    ladders = budget.ladders(analysis, groups)
    ascending = [scores[g.name][order] for g, order in zip(groups, orders, strict=True)]
    chunks = ranked_chunks(groups, ascending, ladders, budget.ranking)

    def removed_by(taken: Sequence[Chunk]) -> float:
        return costs.removed(widths_at(ladders, rungs_after(ladders, taken)), budget.of)

    taken = _nearest(removed_by, chunks, budget.ratio)
    reached = removed_by(taken)
    notes = check(budget, reached, removed_by(chunks))
    widths = widths_at(ladders, rungs_after(ladders, taken))
    return Choice(
        kept=kept_channels(groups, orders, widths),
        dense=costs.evaluate(costs.sizes),
        pruned=costs.evaluate(widths),
        reached=reached,
        notes=notes,
    )


def kept_channels(
    groups: Sequence[Group], orders: Sequence[np.ndarray], widths: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return the sorted kept indices by group name; groups that keep their whole width are left out.

    Args:
        groups: the groups that may be pruned.
        orders: for each group its channels in the order in which they go, of shape (size,).
        widths: for each group how many of its channels stay.
    """
    return {
        group.name: np.sort(order[group.size - width :])
        for group, order, width in zip(groups, orders, widths, strict=True)
        if width != group.size
    }


def _nearest(removed: Callable[[Sequence[Chunk]], float], chunks: Sequence[Chunk], ratio: float) -> Sequence[Chunk]:
    """Find the prefix whose removal is nearest to the ratio, by bisection.

    Where chunks are so coarse that both neighbours miss it, one later chunk is taken out of turn, or the ladder that
    overshoots is passed over and the others go on, whichever comes nearest. What is removed stays between the two
    neighbours, so it still grows with the ratio.
    """

    def miss(taken: Sequence[Chunk]) -> float:
        return abs(removed(taken) - ratio)

    low = _first_reaching(removed, (), chunks, ratio)
    below = chunks[: max(low - 1, 0)]
    candidates = [below, chunks[:low]]
    if min(map(miss, candidates)) > TOLERANCE:
        next_of_ladder = {c.ladder: c for c in reversed(chunks[len(below) :])}
        candidates += [[*below, c] for _, c in sorted(next_of_ladder.items())]
        candidates += _passing_over(removed, chunks, low, ratio)
    return min(candidates, key=miss)


def _first_reaching(
    removed: Callable[[Sequence[Chunk]], float], taken: Sequence[Chunk], chunks: Sequence[Chunk], ratio: float
) -> int:
    """Return how many chunks reach the ratio on top of some that are taken; all where they do not."""
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if removed([*taken, *chunks[:middle]]) < ratio:
            low = middle + 1
        else:
            high = middle
    return low


def _passing_over(
    removed: Callable[[Sequence[Chunk]], float], chunks: Sequence[Chunk], low: int, ratio: float
) -> list[Sequence[Chunk]]:
    """Return what comes near the ratio where each ladder in turn is given up whose next chunk overshoots it."""
    candidates: list[Sequence[Chunk]] = []
    taken: Sequence[Chunk] = ()
    rest = chunks
    while low > 0:
        taken = [*taken, *rest[: low - 1]]
        coarse = rest[low - 1].ladder
        rest = [c for c in rest[low - 1 :] if c.ladder != coarse]
        low = _first_reaching(removed, taken, rest, ratio)
        candidates += [[*taken, *rest[:low]], [*taken, *rest[: max(low - 1, 0)]]]
    return candidates


def refuse_out_of_reach(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> None:
    """Refuse a budget that even the narrowest widths do not meet, before anything is scored.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        budget: what to remove; not of latency.

    Raises:
        OutOfReachError: the budget asks for more than can go.
    """
    ladders = budget.ladders(analysis, groups)
    costs = CostModel(analysis, groups)
    most = costs.removed(widths_at(ladders, [len(ladder.rungs) - 1 for ladder in ladders]), budget.of)
    check(budget, most, most)


def check(budget: Budget, reached: float, most: float) -> tuple[str, ...]:
    """Return the notes on a budget that is met only nearly; none on one that is met.

    Args:
        budget: what was asked for.
        reached: the fraction that the choice removes.
        most: the largest fraction that can go.

    Raises:
        OutOfReachError: the budget asks for more than that.
    """
    if abs(reached - budget.ratio) <= TOLERANCE:
        return ()
    if budget.ratio > most:
        remedies = "allow --cross-norm, lower --min-width or --round-to, or ignore fewer groups"
        raise OutOfReachError(
            f"cannot remove {budget.ratio:.1%} of the {budget.of}: at most {most:.1%} can go under these constraints. "
            f"Ask for less, or {remedies}."
        )
    return (
        f"asked to remove {budget.ratio:.1%} of the {budget.of}; the nearest found with widths rounded to "
        f"{budget.round_to} is {reached:.1%}",
    )
