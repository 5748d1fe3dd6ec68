"""Widths of all groups together, so that the estimated distortion is least for what is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import CostModel
from spa.criteria.answers import Curve
from spa.widths.budget import TOLERANCE, Budget, Choice, Ladder, check, ladders_of, widths_at

if TYPE_CHECKING:
    from spa.widths.latency import LatencyModel

Array = np.ndarray
STEPS = 24  # how often costs are linearised again on the way to the budget


def allocate(
    analysis: Analysis,
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    budget: Budget,
    latency: LatencyModel | None = None,
) -> Choice:
    """Choose widths by a Lagrangian search over the groups' loss curves.

    Distortions are assumed to add up. Costs of coupled groups are products of widths, so they are linearised about
    the current widths and the search goes in steps (RD, ICCV 2023; SPDY, arXiv 2201.13096).

    Args:
        analysis: the model.
        groups: the groups that may be pruned; those without a curve keep everything.
        curves: by group name.
        budget: what to remove; ``ranking`` is not used.
        latency: where the budget is one of latency.

    Raises:
        PlanError: the ratio cannot be reached.
    """
    groups = [g for g in groups if g.name in curves]
    costs = CostModel(analysis, [g.dim for g in groups], latency)

    ladders = ladders_of(analysis, groups, budget)

    def removed(rungs: Sequence[int]) -> float:
        return costs.removed(widths_at(ladders, rungs), budget.of)

    sizes = [np.array([sum(widths) for widths in ladder.rungs]) for ladder in ladders]
    losses = [_losses(ladder, groups, curves) for ladder in ladders]
    most = removed([len(s) - 1 for s in sizes])
    rungs = [0] * len(ladders)
    for step in range(1, STEPS + 1):
        before = list(rungs)
        _descend(rungs, sizes, losses, removed, budget.ratio * step / STEPS)
    rungs = _nearest(before, rungs, losses, removed, budget.ratio)
    widths = widths_at(ladders, rungs)
    reached = removed(rungs)
    notes = check(budget, reached, most)
    kept = {
        g.name: np.sort(curves[g.name].order[g.size - w :]) for g, w in zip(groups, widths, strict=True) if w != g.size
    }
    return Choice(kept, costs.evaluate(costs.sizes), costs.evaluate(widths), reached, notes)


def _losses(ladder: Ladder, groups: Sequence[Group], curves: Mapping[str, Curve]) -> Array:
    """What each rung costs in all its groups."""
    gone = [
        groups[m].size - np.array(widths)
        for m, widths in zip(ladder.members, zip(*ladder.rungs, strict=True), strict=True)
    ]
    return np.sum([curves[groups[m].name].loss[g] for m, g in zip(ladder.members, gone, strict=True)], axis=0)


def _nearest(
    before: Sequence[int],
    rungs: Sequence[int],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    ratio: float,
) -> list[int]:
    """The rungs reached with some of the last moves taken back; where that misses the ratio, single ladders move.

    Of the moves that meet the ratio the one with the least loss is made, otherwise the one that comes nearest.
    """

    def miss(rungs: Sequence[int]) -> float:
        return abs(removed(rungs) - ratio)

    def loss(rungs: Sequence[int]) -> float:
        return float(sum(values[i] for values, i in zip(losses, rungs, strict=True)))

    best = list(rungs)
    for g in range(len(best)):
        best = min([best, *([*best[:g], i, *best[g + 1 :]] for i in range(before[g], rungs[g]))], key=miss)
    while miss(best) > TOLERANCE:
        others = [[*best[:g], i, *best[g + 1 :]] for g, r in enumerate(losses) for i in range(len(r)) if i != best[g]]
        met = [o for o in others if miss(o) <= TOLERANCE]
        if met:
            return min(met, key=loss)
        nearest = min(others, key=miss, default=best)
        if miss(nearest) >= miss(best):
            break
        best = nearest
    return best


def _descend(
    rungs: list[int],
    sizes: Sequence[Array],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    goal: float,
) -> None:
    """Go down the ladders, cheapest loss per cost first, until the goal is met; changes ``rungs``."""
    before = removed(rungs)
    if before >= goal:
        return
    moves: list[tuple[float, int, int]] = []
    for g, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        at = rungs[g]
        if at + 1 >= len(size):
            continue
        unit = (removed(_after(rungs, [(0.0, g, at + 1)])) - before) / (size[at] - size[at + 1])
        if unit > 0:
            moves += [(slope / unit, g, to) for slope, to in _hull(size[at:], loss[at:], at)]
    low = 0
    moves.sort()
    # Moves of one ladder come in order of growing slope, so any prefix is a valid state.
    high = len(moves)
    while low < high:
        middle = (low + high) // 2
        if removed(_after(rungs, moves[:middle])) < goal:
            low = middle + 1
        else:
            high = middle
    rungs[:] = _after(rungs, moves[:low])


def _after(rungs: Sequence[int], moves: Sequence[tuple[float, int, int]]) -> list[int]:
    state = list(rungs)
    for _, g, to in moves:
        state[g] = max(state[g], to)
    return state


def _hull(widths: Array, loss: Array, base: int) -> list[tuple[float, int]]:
    """The lower convex hull of a loss curve: (loss per channel, rung at the segment's end)."""
    gone = widths[0] - widths
    points = [0]
    for i in range(1, len(widths)):
        while len(points) > 1:
            a, b = points[-2], points[-1]
            if (loss[b] - loss[a]) * (gone[i] - gone[b]) >= (loss[i] - loss[b]) * (gone[b] - gone[a]):
                points.pop()
            else:
                break
        points.append(i)
    return [(float((loss[b] - loss[a]) / (gone[b] - gone[a])), base + b) for a, b in pairwise(points)]
