"""Allocation: the widths of all groups together that meet a budget at the least estimated distortion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from spa.coupling.analysis import Analysis, Group, Part
from spa.coupling.cost import CostModel, LatencyTerms
from spa.criteria.answers import Curve
from spa.widths.budget import TOLERANCE, Budget, Choice, check, kept_channels
from spa.widths.ladders import Ladder, widths_at

Array = np.ndarray
Move = tuple[float, int, int]  # (loss per cost, ladder, rung to go down to)
STEPS = 24  # how often costs are linearised again on the way to the budget


def allocate(
    analysis: Analysis,
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    budget: Budget,
    latency: LatencyTerms | None = None,
) -> Choice:
    """Choose widths by a Lagrangian search over the groups' loss curves.

    Distortions are assumed to add up. Costs of coupled groups are products of widths, so they are linearised about
    the current widths and the search goes in steps (RD, ICCV 2023; SPDY, arXiv 2201.13096).

    Args:
        analysis: the model.
        groups: the groups that may be pruned, branches among them; those without a curve keep everything.
        curves: by group name the loss at each number of removed channels, and the order in which they go.
        budget: what to remove; ``ranking`` is not used.
        latency: the model's latency, for a budget in latency.

    Raises:
        PlanError: the ratio cannot be reached.
    """
    groups = [g for g in groups if g.name in curves]
    costs = CostModel(analysis, groups, latency)
    ladders = budget.ladders(analysis, groups)

    def removed(rungs: Sequence[int]) -> float:
        return costs.removed(widths_at(ladders, rungs), budget.of)

    def approached(rungs: Sequence[int], goal: float) -> float:
        return costs.approach(widths_at(ladders, rungs), budget.of, goal)

    sizes = [np.array([sum(widths) for widths in ladder.rungs]) for ladder in ladders]
    losses = [_losses(ladder, groups, curves) for ladder in ladders]
    most = removed([len(s) - 1 for s in sizes])
    held = held_by_branches(ladders, groups)
    rungs = [0] * len(ladders)
    for step in range(1, STEPS + 1):
        before = list(rungs)
        goal = budget.ratio * step / STEPS
        approach = partial(approached, goal=goal)
        usable = _less_held(rungs, losses, held)
        if budget.of == "memory":
            usable = [u[: _last_useful(rungs, k, len(u) - 1, approach) + 1] for k, u in enumerate(usable)]
        _descend(rungs, sizes, usable, removed, approach, goal)
    rungs = _nearest(before, rungs, losses, removed, budget.ratio)
    widths = widths_at(ladders, _whole_in_branches(rungs, ladders, held))
    reached = costs.removed(widths, budget.of)
    notes = check(budget, reached, most)
    return Choice(
        kept=kept_channels(groups, [curves[g.name].order for g in groups], widths),
        dense=costs.evaluate(costs.sizes),
        pruned=costs.evaluate(widths),
        reached=reached,
        notes=notes,
    )


def held_by_branches(ladders: Sequence[Ladder], groups: Sequence[Group]) -> dict[int, list[int]]:
    """Return by the ladder of a branch the ladders of the groups that go with it."""
    return {
        k: [i for i, other in enumerate(ladders) if i != k and all(branch.holds(groups[m]) for m in other.members)]
        for k, ladder in enumerate(ladders)
        if isinstance(branch := groups[ladder.members[0]], Part)
    }


def _whole_in_branches(rungs: Sequence[int], ladders: Sequence[Ladder], held: Mapping[int, list[int]]) -> list[int]:
    """Return rungs with all groups whole that lie in branches that go."""
    gone = [k for k in held if rungs[k] or not ladders[k].rungs[0][0]]
    inner = {k for branch in gone for k in held[branch]}
    return [0 if k in inner else rung for k, rung in enumerate(rungs)]


def _less_held(rungs: Sequence[int], losses: Sequence[Array], held: Mapping[int, Sequence[int]]) -> list[Array]:
    """Return the losses of all ladders, those of branches without what the cuts inside of them cost already."""
    result = list(losses)
    for branch, inner in held.items():
        saved = sum(losses[i][rungs[i]] for i in inner)
        result[branch] = np.maximum(losses[branch] - np.minimum(np.arange(len(losses[branch])), 1) * saved, 0)
    return result


def _losses(ladder: Ladder, groups: Sequence[Group], curves: Mapping[str, Curve]) -> Array:
    """Return the loss of each rung, summed over the ladder's groups: shape (rungs,)."""
    removed = [
        groups[m].size - np.array(widths)
        for m, widths in zip(ladder.members, zip(*ladder.rungs, strict=True), strict=True)
    ]
    return np.sum([curves[groups[m].name].loss[n] for m, n in zip(ladder.members, removed, strict=True)], axis=0)


def _nearest(
    before: Sequence[int],
    rungs: Sequence[int],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    ratio: float,
) -> list[int]:
    """Take back some of the last moves so that the rungs come nearest to the ratio; then move single ladders.

    Ladders move only where the result still misses the ratio. Of the moves that meet the ratio the one with the least
    loss is made, otherwise the one that comes nearest.
    """

    def miss(rungs: Sequence[int]) -> float:
        return abs(removed(rungs) - ratio)

    def loss(rungs: Sequence[int]) -> float:
        return float(sum(values[i] for values, i in zip(losses, rungs, strict=True)))

    best = list(rungs)
    for k in range(len(best)):
        best = min([best, *(_moved(best, k, rung) for rung in range(before[k], rungs[k]))], key=miss)
    while miss(best) > TOLERANCE:
        others = [_moved(best, k, i) for k, values in enumerate(losses) for i in range(len(values)) if i != best[k]]
        meeting = [o for o in others if miss(o) <= TOLERANCE]
        if meeting:
            return min(meeting, key=loss)
        nearest = min(others, key=miss, default=best)
        if miss(nearest) >= miss(best):
            break
        best = nearest
    return best


def _moved(rungs: Sequence[int], ladder: int, rung: int) -> list[int]:
    return [*rungs[:ladder], rung, *rungs[ladder + 1 :]]


def _descend(
    rungs: list[int],
    sizes: Sequence[Array],
    losses: Sequence[Array],
    removed: Callable[[Sequence[int]], float],
    approach: Callable[[Sequence[int]], float],
    goal: float,
) -> None:
    """Go down the ladders as far as losses are given, cheapest loss per cost first, until the goal is met.

    Changes ``rungs``.
    """
    if removed(rungs) >= goal:
        return
    before = approach(rungs)
    moves: list[Move] = []
    for ladder, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        rung = rungs[ladder]
        if rung + 1 >= len(loss):
            continue
        cost_per_channel = (approach(_moved(rungs, ladder, rung + 1)) - before) / (size[rung] - size[rung + 1])
        if cost_per_channel > 0:
            segments = _hull(size[rung : len(loss)], loss[rung:], rung)
            moves += [(slope / cost_per_channel, ladder, end) for slope, end in segments]
    # Moves of one ladder come in order of growing slope, so any prefix is a valid state.
    moves.sort()
    low, high = 0, len(moves)
    while low < high:
        middle = (low + high) // 2
        if removed(_after(rungs, moves[:middle])) < goal:
            low = middle + 1
        else:
            high = middle
    rungs[:] = _after(rungs, moves[:low])


def _last_useful(rungs: Sequence[int], ladder: int, last: int, approach: Callable[[Sequence[int]], float]) -> int:
    """Return the first rung of a ladder from which on going down further comes no nearer to the goal."""
    low, high = rungs[ladder], last
    most = approach(_moved(rungs, ladder, last))
    while low < high:
        middle = (low + high) // 2
        if approach(_moved(rungs, ladder, middle)) < most:
            low = middle + 1
        else:
            high = middle
    return low


def _after(rungs: Sequence[int], moves: Sequence[Move]) -> list[int]:
    result = list(rungs)
    for _, ladder, rung in moves:
        result[ladder] = max(result[ladder], rung)
    return result


def _hull(widths: Array, loss: Array, base: int) -> list[tuple[float, int]]:
    """Return the segments of a loss curve's lower convex hull: (loss per channel, rung at the segment's end).

    Args:
        widths: channels at each rung, falling, of shape (rungs,).
        loss: at each rung, of shape (rungs,).
        base: the number of the first rung.
    """
    removed = widths[0] - widths
    points = [0]
    for i in range(1, len(widths)):
        while len(points) > 1:
            a, b = points[-2], points[-1]
            if (loss[b] - loss[a]) * (removed[i] - removed[b]) >= (loss[i] - loss[b]) * (removed[b] - removed[a]):
                points.pop()
            else:
                break
        points.append(i)
    return [(float((loss[b] - loss[a]) / (removed[b] - removed[a])), base + b) for a, b in pairwise(points)]
