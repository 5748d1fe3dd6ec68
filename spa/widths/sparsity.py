"""How much a network's own weights say can go: the PQ index."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import CostModel
from spa.criteria import parameters
from spa.errors import PlanError
from spa.widths.budget import Budget, ladders_of, widths_at

P, Q = 0.5, 1.0


def pq_index(values: np.ndarray) -> float:
    """1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q with p = 0.5 and q = 1: 0 where all are alike, near 1 where few are not zero.

    Diao et al., ICLR 2023 (arXiv 2302.05601), definition 3.1. At least d (1 − index)^(pq/(q − p)) of d numbers are then
    worth keeping (their theorem 3.1 with η = 0).
    """
    size = np.abs(values.reshape(-1)).astype(np.float64)
    total = size.sum()
    return 1 - float(np.sqrt(size).sum()) ** 2 / (size.size * float(total)) if total > 0 else 1.0


def suggested_ratio(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> float:
    """The share of a budget's unit that goes when each group keeps what the PQ index of its weights says.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        budget: its unit, and which widths groups may have.

    Raises:
        PlanError: nothing would go.
    """
    needed = [ceil(g.size * _kept(analysis, g)) for g in groups]
    ladders = ladders_of(analysis, groups, budget)
    rungs = [
        max(
            i for i, widths in enumerate(x.rungs) if all(w >= needed[m] for m, w in zip(x.members, widths, strict=True))
        )
        for x in ladders
    ]
    widths = widths_at(ladders, rungs)
    costs = CostModel(analysis, [g.dim for g in groups])
    ratio = costs.removed(widths, budget.of)
    if ratio <= 0:
        raise PlanError(
            "the weights are spread so evenly that the PQ index removes nothing. Give a ratio or a max_distortion."
        )
    return ratio


def _kept(analysis: Analysis, group: Group) -> float:
    """The mean over a group's weights, by their sizes, of the share that each should keep."""
    weights = [w for w in parameters(analysis, group) if sum(n > 1 for n in w.shape) >= 2]
    sizes = [np.prod(w.shape) for w in weights]
    if not weights:
        return 1.0
    exponent = P * Q / (Q - P)
    return float(np.average([(1 - pq_index(w.load())) ** exponent for w in weights], weights=sizes))
