"""From scores to widths: which channels go so that a budget is met.

The channels of a group go in the order of their scores, in chunks that keep its width a multiple of what the runtime
likes. A ranking puts the chunks of all groups into one sequence, which does not depend on the ratio; the budget is a
prefix of it. So a larger ratio never keeps more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm
from typing import TYPE_CHECKING

import numpy as np

from spa.axes import Dim, Expr, Prod, Sum
from spa.cost import Cost, CostModel
from spa.coupling import Analysis, Group
from spa.errors import OutOfReachError, PlanError

if TYPE_CHECKING:
    from spa.latency import LatencyModel

RANKINGS = ("global", "uniform", "isomorphic")
UNITS = ("macs", "params", "channels", "latency")
TOLERANCE = 0.01  # a budget counts as met within this fraction of the dense cost


@dataclass(frozen=True)
class Budget:
    """What shall be removed.

    Attributes:
        ratio: the fraction to remove, in (0, 1).
        of: ``macs``, ``params``, ``channels`` or ``latency``.
        ranking: ``global`` (scores of all groups compared), ``uniform`` (the same ratio in every group) or
            ``isomorphic`` (scores compared among groups of the same structure, the same ratio in each such set;
            Fang et al., ECCV 2024).
        round_to: widths become multiples of this.
        min_width: no group becomes narrower than this.
    """

    ratio: float = 0.5
    of: str = "macs"
    ranking: str = "global"
    round_to: int = 8
    min_width: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise PlanError(
                f"ratio is {self.ratio:g}, the fraction to remove. Choose one between 0 and 1, ends excluded."
            )
        for what, given, known in (("of", self.of, UNITS), ("ranking", self.ranking, RANKINGS)):
            if given not in known:
                raise PlanError(f"unknown {what} {given!r}. Choose one of {', '.join(known)}.")
        for name in ("round_to", "min_width"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}. Choose 1 or more.")


@dataclass(frozen=True)
class Choice:
    """The widths that a budget led to.

    Attributes:
        kept: sorted kept indices by group name.
        dense: the cost before.
        pruned: the cost after.
        reached: the fraction of the budget's unit that is removed.
        notes: what the user should know.
    """

    kept: Mapping[str, np.ndarray]
    dense: Cost
    pruned: Cost
    reached: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Chunk:
    """Channels of one group that go together; ``group`` is its position, ``width`` what is left after them."""

    key: float
    group: int
    width: int


def choose(
    analysis: Analysis,
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    budget: Budget,
    latency: LatencyModel | None = None,
) -> Choice:
    """Choose the channels to keep.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        scores: by group name one score per channel; the lowest go first.
        budget: what to remove.
        latency: where the budget is one of latency.

    Raises:
        PlanError: the ratio cannot be reached; the message says what can.
    """
    costs = CostModel(analysis, [g.dim for g in groups], latency)
    order = [np.argsort(scores[g.name], kind="stable") for g in groups]
    steps = alignment(analysis, groups, budget.round_to)
    chunks = _sequence(groups, scores, order, steps, budget)

    def removed_by(taken: Sequence[_Chunk]) -> float:
        return costs.removed(_widths(costs.sizes, taken), budget.of)

    taken = _nearest(removed_by, chunks, budget.ratio)
    reached = removed_by(taken)
    notes = check(budget, reached, removed_by(chunks))
    widths = _widths(costs.sizes, taken)
    kept = {g.name: np.sort(o[g.size - w :]) for g, o, w in zip(groups, order, widths, strict=True) if w != g.size}
    return Choice(kept, costs.evaluate(costs.sizes), costs.evaluate(widths), reached, notes)


def _nearest(removed: Callable[[Sequence[_Chunk]], float], chunks: Sequence[_Chunk], ratio: float) -> Sequence[_Chunk]:
    """The prefix whose removal is nearest to the ratio, by bisection.

    Where chunks are so coarse that both neighbours miss it, one later chunk is taken out of turn, whichever comes
    nearest. What is removed stays between the two neighbours, so it still grows with the ratio.
    """
    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high) // 2
        if removed(chunks[:middle]) < ratio:
            low = middle + 1
        else:
            high = middle
    below = chunks[: max(low - 1, 0)]
    candidates = [below, chunks[:low]]

    def miss(taken: Sequence[_Chunk]) -> float:
        return abs(removed(taken) - ratio)

    if min(map(miss, candidates)) > TOLERANCE:
        following = {c.group: c for c in reversed(chunks[len(below) :])}
        candidates += [[*below, c] for _, c in sorted(following.items())]
    return min(candidates, key=miss)


def check(budget: Budget, reached: float, most: float) -> tuple[str, ...]:
    """Notes on a budget that is met only nearly; ``most`` is the largest fraction that can go.

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


def _widths(sizes: Sequence[int], chunks: Sequence[_Chunk]) -> list[int]:
    widths = list(sizes)
    for chunk in chunks:
        widths[chunk.group] = min(widths[chunk.group], chunk.width)
    return widths


def _sequence(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    order: Sequence[np.ndarray],
    steps: Sequence[int],
    budget: Budget,
) -> list[_Chunk]:
    """All chunks in the order in which they go; within a group that order is by shrinking width."""
    chunks: list[_Chunk] = []
    for position, (group, indices, step) in enumerate(zip(groups, order, steps, strict=True)):
        sorted_scores = scores[group.name][indices]
        highest = -np.inf
        for width, smaller in pairwise(allowed_widths(group.size, step, budget.min_width)):
            removed = slice(group.size - width, group.size - smaller)
            highest = max(highest, float(sorted_scores[removed].mean()))
            key = highest if budget.ranking != "uniform" else 1 - smaller / group.size
            chunks.append(_Chunk(key, position, smaller))
    if budget.ranking == "isomorphic":
        chunks = _by_quantile(groups, chunks)
    return sorted(chunks, key=lambda c: (c.key, c.group, -c.width))


def allowed_widths(size: int, step: int, least: int) -> list[int]:
    """The widths that a group may have, from the whole down."""
    widths = [size]
    while (smaller := (widths[-1] - 1) // step * step) >= max(least, 1):
        widths.append(smaller)
    return widths


def _by_quantile(groups: Sequence[Group], chunks: Sequence[_Chunk]) -> list[_Chunk]:
    """Replace each chunk's key by the fraction of its isomorphic set's channels that has gone with it."""
    sets: dict[object, list[_Chunk]] = {}
    for chunk in chunks:
        sets.setdefault(structure(groups[chunk.group]), []).append(chunk)
    result = []
    for members in sets.values():
        total = sum(groups[g].size for g in {c.group for c in members})
        width = {c.group: groups[c.group].size for c in members}
        gone = 0
        for chunk in sorted(members, key=lambda c: (c.key, c.group, -c.width)):
            gone += width[chunk.group] - chunk.width
            width[chunk.group] = chunk.width
            result.append(_Chunk(gone / total, chunk.group, chunk.width))
    return result


def structure(group: Group) -> object:
    """What makes two groups isomorphic: the same axes of the same operands, whatever the sizes."""
    return tuple(sorted((p.axis, p.use[2]) for p in group.places)), len(group.readers), len(group.writers)


def alignment(analysis: Analysis, groups: Sequence[Group], multiple: int) -> list[int]:
    """The step in which each group may shrink so that the axes it lies on stay multiples of a number.

    In a product the innermost factor that can shrink bears the alignment; the factors outside it are free.
    A group narrower than its step keeps its width.
    """
    steps = {g.dim: 1 for g in groups}

    def align(expr: Expr) -> None:
        if isinstance(expr, Dim):
            if expr in steps:
                steps[expr] = lcm(steps[expr], multiple)
        elif isinstance(expr, Sum):
            for term in expr.terms:
                align(term)
        elif isinstance(expr, Prod):
            open_ = multiple
            for factor in reversed(expr.factors):
                if isinstance(factor, Dim) and factor in steps and factor.size > open_:
                    steps[factor] = lcm(steps[factor], open_)
                    return
                open_ //= gcd(open_, factor.size)

    for group in groups:
        for place in group.places:
            align(analysis.expr(place))
    return [steps[g.dim] for g in groups]
