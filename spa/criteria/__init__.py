"""Criteria: one score per channel of each group; channels with the lowest scores go first.

A criterion scores each parameter of a group, by the weights alone (:mod:`spa.criteria.magnitude`), by what is
multiplied with them, too (:mod:`spa.criteria.activation`), or by a loss's derivatives that the caller gives
(:mod:`spa.criteria.gradient`); the scores are normalised within the parameter (NORM) and combined over the group's
parameters (AGG). Source: Structurally Prune Anything, arXiv 2403.18955, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.coupling.analysis import Analysis, Group, Place
from spa.coupling.places import channel_of
from spa.criteria import activation, gradient
from spa.criteria.magnitude import CRITERIA, Parameter, weights
from spa.errors import PlanError

if TYPE_CHECKING:
    from spa.running.stream import Stream

Array = np.ndarray

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


def names() -> list[str]:
    """The criteria that need only weights."""
    return sorted([*CRITERIA, "random"])


def activation_names() -> list[str]:
    """The criteria that need inputs to run on, too."""
    return sorted(activation.CRITERIA)


def gradient_names() -> list[str]:
    """The criteria that need a loss's derivatives, too."""
    return sorted(gradient.CRITERIA)


def check(criterion: str, norm: str, agg: str, extra: Sequence[str] = ()) -> None:
    """Refuse unknown choices; ``extra`` are criteria beyond those of this package.

    Raises:
        PlanError: the criterion, NORM or AGG is unknown.
    """
    for what, given, known in (
        ("criterion", criterion, [*extra, *names(), *activation_names(), *gradient_names()]),
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
    stream: Stream | None = None,
    progress: Callable[[str, float], None] = lambda stage, share: None,
    derivatives: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Score every channel of some groups.

    Args:
        analysis: the model.
        groups: the groups to score.
        criterion: one of :func:`names`, :func:`activation_names` or :func:`gradient_names`.
        norm: how scores are made comparable within each parameter: none, sum, mean, max or standardise, which
            ``flap`` always does.
        agg: how the scores of a group's parameters are combined: sum, mean, max, prod or l2.
        seed: of the criterion ``random``.
        stream: the model with inputs, for the criteria of :func:`activation_names`; groups that meet no activations
            are scored by ``l2``.
        progress: called with a stage and the share of it that is done, while inputs run.
        derivatives: by initializer, for the criteria of :func:`gradient_names` (see
            :func:`spa.criteria.gradient.derivatives`); of the parameters with two axes or more, as ``l2`` has it.

    Returns:
        By group name an array of shape (channels,), float64; higher is more important.

    Raises:
        PlanError: the criterion, NORM or AGG is unknown, the criterion needs inputs, or its derivatives do not fit.
        ModelError: onnxruntime cannot run the model on the inputs.
    """
    check(criterion, norm, agg)
    if criterion == "random":
        random = np.random.default_rng(seed)
        return {g.name: random.random(g.size) for g in groups}
    rows: Mapping[str, list[Array]] = {}
    if criterion in activation.CRITERIA:
        if stream is None:
            raise PlanError(f"criterion {criterion!r} looks at activations. Give it a stream of inputs.")
        rows = activation.rows(analysis, groups, criterion, stream, progress)
    elif criterion in gradient.CRITERIA:
        scored = {g.name: weights(parameters(analysis, g)) for g in groups}
        given = gradient.checked([p for found in scored.values() for p in found], criterion, derivatives)
        rows = {n: gradient.scores(found, criterion, given) for n, found in scored.items()}
    normalise = NORMS["standardise" if criterion == "flap" else norm]
    scores = {}
    for group in groups:
        found = [normalise(r) for r in rows.get(group.name) or _of_parameters(analysis, group, criterion)]
        scores[group.name] = AGGREGATES[agg](np.stack(found)) if found else np.zeros(group.size)
    return scores


def _of_parameters(analysis: Analysis, group: Group, criterion: str) -> list[Array]:
    """The scores in each parameter of a group, by the weights alone."""
    select, evaluate = CRITERIA.get(criterion, CRITERIA["l2"])
    return [evaluate(p) for p in select(parameters(analysis, group))]


def parameters(analysis: Analysis, group: Group) -> list[Parameter]:
    """The parameters that a group lies on, as criteria see them."""
    return [_parameter(analysis, group, p) for p in group.places]


def _parameter(analysis: Analysis, group: Group, place: Place) -> Parameter:
    name, index, operand = place.use
    users = analysis.graph.users[name]
    node = analysis.graph.nodes[index] if index >= 0 else users[0][0]
    position = operand if index >= 0 else users[0][1]
    return Parameter(
        name=name,
        load=lambda: analysis.graph.array(name),
        data_type=analysis.graph.constants[name].data_type,
        shape=tuple(e.size for e in analysis.uses[place.use]),
        axis=place.axis,
        channel=lambda: channel_of(analysis.expr(place), group.dim),
        channels=group.size,
        operator=node.key,
        operand=position,
    )
