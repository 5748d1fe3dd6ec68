"""From scores of single parameters to scores of groups: normalise within each (NORM), combine over all (AGG).

Source: Structurally Prune Anything, arXiv 2403.18955, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import prod
from threading import Lock

import numpy as np

from spa.criteria.context import Context
from spa.criteria.parameter import Parameter, parameters, weights
from spa.errors import OptionError
from spa.model.workers import in_threads

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


def _locked(lock: AbstractContextManager[object], function: Callable[[], Array]) -> Array:
    with lock:
        return function()


def by_parameter(
    function: Callable[[Parameter], Array], select: Select = weights, in_parallel: bool = False
) -> Callable[[Context], dict[str, Array]]:
    """Make a criterion's ``score`` of a function that scores one parameter.

    Args:
        function: from a parameter to an array (channels,), higher where a channel matters more.
        select: which of a group's parameters count.
        in_parallel: whether several parameters may be scored at once, in threads.
    """

    def score(context: Context) -> dict[str, Array]:
        selected = {g.name: select(parameters(context.analysis, g)) for g in context.groups}
        found = [parameter for chosen in selected.values() for parameter in chosen]
        lock = Lock()
        if in_parallel:  # the algebra remembers what it has resolved, one thread at a time
            found = [replace(p, channel=partial(_locked, lock, p.channel)) for p in found]
        size = sum(prod(p.shape) for p in found) if in_parallel else 0
        scores = iter(in_threads(function, found, size))
        return combine(context, {name: [next(scores) for _ in chosen] for name, chosen in selected.items()})

    return score
