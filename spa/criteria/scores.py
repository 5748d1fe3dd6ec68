"""From scores of single parameters to scores of groups: normalise within each (NORM), combine over all (AGG).

Source: Structurally Prune Anything, arXiv 2403.18955, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spa.criteria.context import Context
from spa.criteria.parameter import Parameter, parameters, weights
from spa.errors import OptionError

Array = np.ndarray
Select = Callable[[Sequence[Parameter]], list[Parameter]]

NORMS: Mapping[str, Callable[[Array], Array]] = {  # scores of grasp have signs, all others none
    "none": lambda v: v,
    "sum": lambda v: v / _positive(np.abs(v).sum()),
    "mean": lambda v: v / _positive(np.abs(v).mean()),
    "max": lambda v: v / _positive(np.abs(v).max()),
    "standardise": lambda v: (v - v.mean()) / _positive(v.std()),
}

AGGREGATES: Mapping[str, Callable[[Array], Array]] = {
    "sum": lambda m: m.sum(axis=0),
    "mean": lambda m: m.mean(axis=0),
    "max": lambda m: m.max(axis=0),
    "prod": lambda m: m.prod(axis=0),
    "l2": lambda m: np.sqrt((m**2).sum(axis=0)),
}


def _positive(value: float) -> float:
    return value if value > 0 else 1.0


def check(norm: str, agg: str) -> None:
    """Refuse unknown names.

    Raises:
        OptionError: NORM or AGG is unknown.
    """
    for option, chosen, known in (("norm", norm, NORMS), ("agg", agg, AGGREGATES)):
        if chosen not in known:
            raise OptionError(f"unknown {option} {chosen!r}. Choose one of {', '.join(known)}.")


def combine(context: Context, rows: Mapping[str, Sequence[Array]], norm: str | None = None) -> dict[str, Array]:
    """Normalise and combine the scores of single parameters.

    Args:
        context: its groups, NORM and AGG.
        rows: by group name the scores in each parameter, each (channels,).
        norm: the NORM of a criterion that has one of its own.

    Returns:
        By group name (channels,), float64; zeros for a group without parameters.
    """
    normalise, aggregate = NORMS[norm or context.norm], AGGREGATES[context.agg]
    scores = {}
    for group in context.groups:
        found = [normalise(r) for r in rows[group.name]]
        scores[group.name] = aggregate(np.stack(found)) if found else np.zeros(group.size)
    return scores


def by_parameter(
    function: Callable[[Parameter], Array], select: Select = weights
) -> Callable[[Context], dict[str, Array]]:
    """Make a criterion's ``score`` of a function that scores one parameter.

    Args:
        function: from a parameter to an array (channels,), higher where a channel matters more.
        select: which of a group's parameters count.
    """

    def score(context: Context) -> dict[str, Array]:
        selected = ((g.name, select(parameters(context.analysis, g))) for g in context.groups)
        return combine(context, {name: [function(p) for p in found] for name, found in selected})

    return score
