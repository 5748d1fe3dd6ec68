"""The search for the largest ratio that a metric tolerates: a bracket, narrowed on the estimated loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spa.errors import OutOfReachError

NARROW = 0.01  # a bracket of ratios that is not worth another evaluation
NEAR = 0.1  # of the tolerance: a candidate that leaves less is as good as any
HALVINGS = 7  # on the way to the ratio of an estimated loss
EDGE = 0.15  # of the bracket, which a candidate keeps away from both ends
FIRST = 0.5


@dataclass(frozen=True)
class Tool:
    """The steps of a pruning that the search takes; ratios are fractions to remove.

    Attributes:
        loss: the estimated loss at a ratio, nondecreasing; any unit.
        same: whether two ratios lead to the same network.
        attempt: prunes, repairs and evaluates; returns by how much the metric misses what is asked for, met where it is
            0 or less.
    """

    loss: Callable[[float], float]
    same: Callable[[float, float], bool]
    attempt: Callable[[float], float]


@dataclass(frozen=True)
class _End:
    """An end of the bracket; the shortfall is None where nothing was evaluated."""

    ratio: float
    shortfall: float | None


def search(tool: Tool, dense: float, evaluations: int) -> float | None:
    """Find the largest ratio that meets what is asked for.

    The shortfall is taken to grow with the estimated loss, about in proportion, so the next ratio is the one whose
    loss a straight line between the ends gives. Where the same end moved twice, the bracket is halved instead.

    Args:
        tool: prunes and evaluates.
        dense: the dense model's shortfall; above 0 where the metric's noise alone is more than what is tolerated.
        evaluations: the most that may be made.

    Returns:
        The ratio; None where no ratio that was tried met it.

    Raises:
        OutOfReachError: nothing can be removed at all.
    """
    low, high = _End(0.0, dense), _End(1.0, None)
    best: float | None = None
    moved: list[bool] = []  # whether the low end did, by attempt
    ratio, refusal, left = FIRST, None, evaluations
    while left and high.ratio - low.ratio > NARROW:
        try:
            if best is not None and tool.same(ratio, low.ratio):
                low = _End(ratio, low.shortfall)
            elif high.shortfall is not None and tool.same(ratio, high.ratio):
                high = _End(ratio, high.shortfall)
            else:
                shortfall = tool.attempt(ratio)
                left -= 1
                if shortfall <= 0:
                    low, best = _End(ratio, shortfall), ratio
                    if shortfall >= NEAR * dense:
                        break
                else:
                    high = _End(ratio, shortfall)
                moved.append(shortfall <= 0)
        except OutOfReachError as error:
            high, refusal = _End(ratio, None), error
        ratio = _next(tool, low, high, moved)
    if best is None and not moved and refusal is not None:
        raise refusal
    return best


def _next(tool: Tool, low: _End, high: _End, moved: list[bool]) -> float:
    """Return the ratio to try next, inside the bracket."""
    middle = (low.ratio + high.ratio) / 2
    if low.shortfall is None or high.shortfall is None or moved[-2:] in ([True] * 2, [False] * 2):
        return middle
    if not low.shortfall < 0 < high.shortfall:  # the metric's noise alone is more than what is tolerated
        return middle
    least, most = tool.loss(low.ratio), tool.loss(high.ratio)
    goal = least + (most - least) * low.shortfall / (low.shortfall - high.shortfall)
    below, above = low.ratio, high.ratio
    for _ in range(HALVINGS):
        ratio = (below + above) / 2
        below, above = (ratio, above) if tool.loss(ratio) < goal else (below, ratio)
    room = EDGE * (high.ratio - low.ratio)
    return min(max((below + above) / 2, low.ratio + room), high.ratio - room)
