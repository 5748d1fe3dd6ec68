"""The PQ index: a ratio to remove that the sparsity of the weights suggests."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import CostModel
from spa.criteria import parameters
from spa.errors import PlanError
from spa.widths.budget import Budget
from spa.widths.ladders import Ladder, widths_at

P, Q = 0.5, 1.0


def pq_index(values: np.ndarray) -> float:
    """Return the PQ index of d numbers: 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q with p = 0.5 and q = 1.

    Source: Diao et al., ICLR 2023 (arXiv 2302.05601), definition 3.1. At least d (1 − index)^(pq/(q − p)) of the
    numbers are worth keeping (their theorem 3.1 with η = 0).

    Args:
        values: the numbers, of any shape.

    Returns:
        0 where all magnitudes are equal, near 1 where few numbers are not zero.

    >>> pq_index(np.array([4.0, -4.0, 4.0, 4.0])), pq_index(np.array([0.0, 0.0, 0.0, 5.0]))
    (0.0, 0.75)
    """
    magnitudes = np.abs(values.reshape(-1)).astype(np.float64)
    total = magnitudes.sum()
    return 1 - float(np.sqrt(magnitudes).sum()) ** 2 / (magnitudes.size * float(total)) if total > 0 else 1.0


def suggested_ratio(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> float:
    """Return the fraction of a budget's unit that goes when each group keeps what the PQ index of its weights says.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        budget: the unit (``of``), and the widths that groups may have; its ratio is not read.

    Returns:
        A ratio in (0, 1), for :attr:`spa.widths.budget.Budget.ratio`.

    Raises:
        PlanError: nothing would go.
    """
    needed = [ceil(g.size * _fraction_to_keep(analysis, g)) for g in groups]
    ladders = budget.ladders(analysis, groups)
    widths = widths_at(ladders, [_lowest_rung(ladder, needed) for ladder in ladders])
    costs = CostModel(analysis, groups)
    ratio = costs.removed(widths, budget.of)
    if ratio <= 0:
        raise PlanError(
            "the weights are spread so evenly that the PQ index removes nothing. Give a ratio or a max_distortion."
        )
    return ratio


def _lowest_rung(ladder: Ladder, needed: Sequence[int]) -> int:
    """Find the lowest rung on which each of a ladder's groups has the channels that it needs."""
    return max(
        rung
        for rung, widths in enumerate(ladder.rungs)
        if all(width >= needed[m] for m, width in zip(ladder.members, widths, strict=True))
    )


def _fraction_to_keep(analysis: Analysis, group: Group) -> float:
    """Return the fraction of channels to keep: the mean over the group's weights, each weighted by its size."""
    weights = [w for w in parameters(analysis, group) if sum(n > 1 for n in w.shape) >= 2]
    sizes = [np.prod(w.shape) for w in weights]
    if not weights:
        return 1.0
    exponent = P * Q / (Q - P)
    return float(np.average([(1 - pq_index(w.load())) ** exponent for w in weights], weights=sizes))
