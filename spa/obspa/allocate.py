"""Widths of all groups together, so that the estimated distortion is least for what is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from spa.budget import TOLERANCE, Budget, Choice, alignment, allowed_widths, check
from spa.cost import CostModel
from spa.coupling import Analysis, Group
from spa.obspa.curves import Curve

if TYPE_CHECKING:
    from spa.latency import LatencyModel

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

    def removed(widths: Sequence[int]) -> float:
        return costs.removed(widths, budget.of)

    steps = alignment(analysis, groups, budget.round_to)
    ladders = [allowed_widths(g.size, s, budget.min_width) for g, s in zip(groups, steps, strict=True)]
    losses = [curves[g.name].loss[g.size - np.asarray(r)] for g, r in zip(groups, ladders, strict=True)]
    most = removed([r[-1] for r in ladders])
    rung = [0] * len(groups)
    for step in range(1, STEPS + 1):
        before = list(rung)
        _descend(rung, ladders, losses, removed, budget.ratio * step / STEPS)
    rung = _nearest(before, rung, ladders, losses, removed, budget.ratio)
    widths = [r[i] for r, i in zip(ladders, rung, strict=True)]
    reached = removed(widths)
    notes = check(budget, reached, most)
    kept = {
        g.name: np.sort(curves[g.name].order[g.size - w :]) for g, w in zip(groups, widths, strict=True) if w != g.size
    }
    return Choice(kept, costs.evaluate(costs.sizes), costs.evaluate(widths), reached, notes)


def _nearest(
    before: Sequence[int],
    rung: Sequence[int],
    ladders: Sequence[Sequence[int]],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    ratio: float,
) -> list[int]:
    """The rungs reached with some of the last moves taken back; where that misses the ratio, single groups move.

    Of the moves that meet the ratio the one with the least loss is made, otherwise the one that comes nearest.
    """

    def miss(rung: Sequence[int]) -> float:
        return abs(removed([r[i] for r, i in zip(ladders, rung, strict=True)]) - ratio)

    def loss(rung: Sequence[int]) -> float:
        return float(sum(values[i] for values, i in zip(losses, rung, strict=True)))

    best = list(rung)
    for g in range(len(best)):
        best = min([best, *([*best[:g], i, *best[g + 1 :]] for i in range(before[g], rung[g]))], key=miss)
    while miss(best) > TOLERANCE:
        others = [[*best[:g], i, *best[g + 1 :]] for g, r in enumerate(ladders) for i in range(len(r)) if i != best[g]]
        met = [o for o in others if miss(o) <= TOLERANCE]
        if met:
            return min(met, key=loss)
        nearest = min(others, key=miss, default=best)
        if miss(nearest) >= miss(best):
            break
        best = nearest
    return best


def _descend(
    rung: list[int],
    ladders: Sequence[Sequence[int]],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    goal: float,
) -> None:
    """Go down the ladders, cheapest loss per cost first, until the goal is met; changes ``rung``."""
    now = [r[i] for r, i in zip(ladders, rung, strict=True)]
    before = removed(now)
    if before >= goal:
        return
    moves: list[tuple[float, int, int]] = []
    for g, (ladder, loss) in enumerate(zip(ladders, losses, strict=True)):
        at = rung[g]
        if at + 1 >= len(ladder):
            continue
        probe = list(now)
        probe[g] = ladder[at + 1]
        unit = (removed(probe) - before) / (now[g] - ladder[at + 1])
        if unit > 0:
            moves += [(slope / unit, g, to) for slope, to in _hull(np.asarray(ladder[at:]), loss[at:], at)]
    low = 0
    moves.sort()
    # Moves of one group come in order of growing slope, so any prefix is a valid state.
    high = len(moves)
    while low < high:
        middle = (low + high) // 2
        if removed(_after(rung, ladders, moves[:middle])) < goal:
            low = middle + 1
        else:
            high = middle
    for _, g, to in moves[:low]:
        rung[g] = max(rung[g], to)


def _after(rung: Sequence[int], ladders: Sequence[Sequence[int]], moves: Sequence[tuple[float, int, int]]) -> list[int]:
    state = list(rung)
    for _, g, to in moves:
        state[g] = max(state[g], to)
    return [r[i] for r, i in zip(ladders, state, strict=True)]


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
