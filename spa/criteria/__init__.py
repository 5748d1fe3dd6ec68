"""Criteria: one score per channel of each group; channels with the lowest scores go first.

A criterion scores each parameter of a group (:mod:`spa.criteria.magnitude`); the scores are normalised within the
parameter (NORM) and combined over the group's parameters (AGG). Source: Structurally Prune Anything,
arXiv 2403.18955, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spa.coupling import Analysis, Group, Place
from spa.criteria.magnitude import CRITERIA, Parameter
from spa.criteria.places import channel_of
from spa.errors import PlanError

Array = np.ndarray

NORMS: Mapping[str, Callable[[Array], Array]] = {
    "none": lambda v: v,
    "sum": lambda v: v / _positive(v.sum()),
    "mean": lambda v: v / _positive(v.mean()),
    "max": lambda v: v / _positive(v.max()),
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


def names() -> list[str]:
    """The criteria that need only weights."""
    return sorted([*CRITERIA, "random"])


def check(criterion: str, norm: str, agg: str, extra: Sequence[str] = ()) -> None:
    """Refuse unknown choices; ``extra`` are criteria beyond those of this package.

    Raises:
        PlanError: the criterion, NORM or AGG is unknown.
    """
    for what, given, known in (
        ("criterion", criterion, [*extra, *names()]),
        ("norm", norm, list(NORMS)),
        ("agg", agg, list(AGGREGATES)),
    ):
        if given not in known:
            raise PlanError(f"unknown {what} {given!r}. Choose one of {', '.join(known)}.")


def score(
    analysis: Analysis,
    groups: Sequence[Group],
    criterion: str,
    norm: str = "mean",
    agg: str = "mean",
    seed: int = 0,
) -> dict[str, Array]:
    """Score every channel of some groups.

    Args:
        analysis: the model.
        groups: the groups to score.
        criterion: one of :func:`names`.
        norm: how scores are made comparable within each parameter: none, sum, mean, max or standardise.
        agg: how the scores of a group's parameters are combined: sum, mean, max, prod or l2.
        seed: of the criterion ``random``.

    Returns:
        By group name an array of shape (channels,), float64; higher is more important.

    Raises:
        PlanError: the criterion, NORM or AGG is unknown.
    """
    check(criterion, norm, agg)
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {g.name: random.random(g.size) for g in groups}
    select, evaluate = CRITERIA[criterion]
    scores = {}
    for group in groups:
        parameters = [_parameter(analysis, group, p) for p in group.places]
        rows = [NORMS[norm](evaluate(p)) for p in select(parameters)]
        scores[group.name] = AGGREGATES[agg](np.stack(rows)) if rows else np.zeros(group.size)
    return scores


def _parameter(analysis: Analysis, group: Group, place: Place) -> Parameter:
    name, index, operand = place.use
    users = analysis.graph.users[name]
    node = analysis.graph.nodes[index] if index >= 0 else users[0][0]
    position = operand if index >= 0 else users[0][1]
    return Parameter(
        load=lambda: analysis.graph.array(name),
        data_type=analysis.graph.constants[name].data_type,
        shape=tuple(e.size for e in analysis.uses[place.use]),
        axis=place.axis,
        channel=lambda: channel_of(analysis.expr(place), group.dim),
        channels=group.size,
        operator=node.key,
        operand=position,
    )
