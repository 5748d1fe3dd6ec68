"""The best of several networks: the Pareto front of cost and loss, and its knee."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the networks that no other one is at least as good as in both, and better in one; cheapest first.

    Args:
        costs: of each network, such as MACs.
        losses: of each network, such as the drop of a metric.

    >>> front([3, 2, 1, 2], [0.1, 0.2, 0.9, 0.5])
    [2, 1, 0]
    """
    best = np.inf
    found = []
    for i in np.lexsort((losses, costs)):
        if losses[i] < best:
            best = losses[i]
            found.append(int(i))
    return found


def knee(costs: Sequence[float], losses: Sequence[float]) -> int | None:
    """Return the network of a front at its knee: the farthest below the straight line between its ends.

    Both axes are scaled to 0..1 (Satopää et al., "Finding a Kneedle in a Haystack", ICDCS Workshops 2011).

    Args:
        costs: of the front's networks.
        losses: of the same.

    Returns:
        Its position; None where fewer than three leave no choice, or none lies below the line.

    >>> knee([1, 2, 3, 4], [10, 1, 0.5, 0])
    1
    """
    if len(costs) < 3:
        return None
    x, y = (_scaled(np.asarray(values, float)) for values in (costs, losses))
    below = 1 - x - y  # the ends are (0, 1) and (1, 0)
    best = int(below.argmax())
    return best if below[best] > 1e-9 else None


def _scaled(values: np.ndarray) -> np.ndarray:
    spread = float(np.ptp(values))
    return (values - values.min()) / spread if spread else np.zeros_like(values)
