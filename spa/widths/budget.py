"""From scores to widths: which channels go so that a budget is met.

The channels of a group go in the order of their scores, in chunks that keep its width a multiple of what the runtime
likes. A ranking puts the chunks of all groups into one sequence, which does not depend on the ratio; the budget is a
prefix of it. So a larger ratio never keeps more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import TYPE_CHECKING

import numpy as np

from spa.algebra.axes import Dim, Expr, Prod, Sum
from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import Cost, CostModel
from spa.errors import OutOfReachError, PlanError

if TYPE_CHECKING:
    from spa.widths.latency import LatencyModel

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
        equal: sets of names of groups that keep the same share of their channels; where one of a set may not be pruned,
            none of it is.
    """

    ratio: float = 0.5
    of: str = "macs"
    ranking: str = "global"
    round_to: int = 8
    min_width: int = 1
    equal: tuple[frozenset[str], ...] = ()

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
class Ladder:
    """Groups that shrink together, most often one alone.

    Attributes:
        members: the groups' positions.
        rungs: the widths that they may have, from the whole down.
    """

    members: tuple[int, ...]
    rungs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Chunk:
    """Channels that go together; ``ladder`` is the position of the ladder they are on, ``rung`` what they lead to."""

    key: float
    ladder: int
    rung: int


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
    ladders = ladders_of(analysis, groups, budget)
    chunks = _sequence(groups, [scores[g.name][o] for g, o in zip(groups, order, strict=True)], ladders, budget.ranking)

    def removed_by(taken: Sequence[_Chunk]) -> float:
        return costs.removed(widths_at(ladders, _rungs(ladders, taken)), budget.of)

    taken = _nearest(removed_by, chunks, budget.ratio)
    reached = removed_by(taken)
    notes = check(budget, reached, removed_by(chunks))
    widths = widths_at(ladders, _rungs(ladders, taken))
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
        following = {c.ladder: c for c in reversed(chunks[len(below) :])}
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


def _rungs(ladders: Sequence[Ladder], chunks: Sequence[_Chunk]) -> list[int]:
    rungs = [0] * len(ladders)
    for chunk in chunks:
        rungs[chunk.ladder] = max(rungs[chunk.ladder], chunk.rung)
    return rungs


def widths_at(ladders: Sequence[Ladder], rungs: Sequence[int]) -> list[int]:
    """The width of each group, where each ladder stands on one of its rungs."""
    widths = {m: w for c, at in zip(ladders, rungs, strict=True) for m, w in zip(c.members, c.rungs[at], strict=True)}
    return [widths[i] for i in range(len(widths))]


def _sequence(
    groups: Sequence[Group], ascending: Sequence[np.ndarray], ladders: Sequence[Ladder], ranking: str
) -> list[_Chunk]:
    """All chunks in the order in which they go; within a ladder that order is down its rungs.

    Args:
        groups: those that may be pruned.
        ascending: by group its channels' scores, sorted.
        ladders: the groups' ladders.
        ranking: see :class:`Budget`.
    """
    chunks: list[_Chunk] = []
    for position, ladder in enumerate(ladders):
        members = [(groups[m].size, ascending[m]) for m in ladder.members]
        highest = -np.inf
        for rung, (widths, smaller) in enumerate(pairwise(ladder.rungs), 1):
            removed = [s[n - w : n - v] for (n, s), w, v in zip(members, widths, smaller, strict=True)]
            highest = max(highest, float(np.concatenate(removed).mean()))
            key = highest if ranking != "uniform" else 1 - smaller[0] / members[0][0]
            chunks.append(_Chunk(key, position, rung))
    if ranking == "isomorphic":
        chunks = _by_quantile(groups, ladders, chunks)
    return sorted(chunks, key=lambda c: (c.key, c.ladder, c.rung))


def ladders_of(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> list[Ladder]:
    """Which groups shrink together, and through which widths; in the order of the groups."""
    steps = alignment(analysis, groups, budget.round_to)
    alone = [allowed_widths(g.size, s, budget.min_width) for g, s in zip(groups, steps, strict=True)]
    sets = {name: names for names in budget.equal for name in names}
    places = {g.name: i for i, g in enumerate(groups)}
    found: dict[int, Ladder] = {}
    for group in groups:
        names = sets.get(group.name, frozenset((group.name,)))
        members = tuple(sorted(places[n] for n in names if n in places))
        rungs = tuple(zip(*_same_shares([alone[m] for m in members]), strict=True))
        found.setdefault(members[0], Ladder(members, rungs if len(members) == len(names) else rungs[:1]))
    return list(found.values())


def _same_shares(alone: Sequence[Sequence[int]]) -> list[list[int]]:
    """The widths that are the same share of the whole in all of several lists; each starts with the whole.

    >>> _same_shares([[16, 12, 8, 4], [8, 7, 6, 5, 4, 3]])
    [[16, 12, 8], [8, 6, 4]]
    """
    shares = set.intersection(*({Fraction(w, widths[0]) for w in widths} for widths in alone))
    return [[w for w in widths if Fraction(w, widths[0]) in shares] for widths in alone]


def allowed_widths(size: int, step: int, least: int) -> list[int]:
    """The widths that a group may have, from the whole down."""
    widths = [size]
    while (smaller := (widths[-1] - 1) // step * step) >= max(least, 1):
        widths.append(smaller)
    return widths


def _by_quantile(groups: Sequence[Group], ladders: Sequence[Ladder], chunks: Sequence[_Chunk]) -> list[_Chunk]:
    """Replace each chunk's key by the fraction of its isomorphic set's channels that has gone with it."""
    sets: dict[object, list[_Chunk]] = {}
    for chunk in chunks:
        sets.setdefault(tuple(structure(groups[m]) for m in ladders[chunk.ladder].members), []).append(chunk)
    result = []
    for members in sets.values():
        left = {c.ladder: sum(ladders[c.ladder].rungs[0]) for c in members}
        total, gone = sum(left.values()), 0
        for chunk in sorted(members, key=lambda c: (c.key, c.ladder, c.rung)):
            now = sum(ladders[chunk.ladder].rungs[chunk.rung])
            gone += left[chunk.ladder] - now
            left[chunk.ladder] = now
            result.append(_Chunk(gone / total, chunk.ladder, chunk.rung))
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
