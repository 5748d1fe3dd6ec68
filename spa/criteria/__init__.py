"""Criteria: one score per channel of each group; channels with the lowest scores go first.

A criterion is an entry of the registry (:mod:`spa.criteria.registry`). Those of this package score each parameter of a
group, by the weights alone (:mod:`spa.criteria.magnitude`), by what is multiplied with them, too
(:mod:`spa.criteria.activation`), or by a loss's derivatives (:mod:`spa.criteria.gradient`); or the whole group, by
running the model with gates (:mod:`spa.criteria.gates`). Scores of parameters are normalised within each (NORM) and
combined over the group's parameters (AGG). :mod:`spa.obspa` and :mod:`spa.zero` have entries, too, which
:mod:`spa.job` registers.

Arrows: depends on :mod:`spa.coupling`, :mod:`spa.running` and :mod:`spa.model`; knows nothing of widths or surgery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spa.coupling.analysis import Analysis, Group
from spa.criteria import activation, gates, gradient, magnitude
from spa.criteria.answers import Answer, Array, Curve, Curves, Removal, checked_answer
from spa.criteria.context import Context, Inputs
from spa.criteria.parameter import Parameter, parameters
from spa.criteria.registry import Criterion, ParameterScore, criterion, get, names, registered
from spa.criteria.scores import AGGREGATES, NORMS, check
from spa.errors import PlanError

__all__ = [
    "AGGREGATES",
    "NORMS",
    "Answer",
    "Context",
    "Criterion",
    "Curve",
    "Curves",
    "Inputs",
    "Parameter",
    "ParameterScore",
    "Removal",
    "activation",
    "check",
    "checked_answer",
    "criterion",
    "gates",
    "get",
    "gradient",
    "magnitude",
    "names",
    "parameters",
    "registered",
    "score",
]


def score(
    analysis: Analysis,
    groups: Sequence[Group],
    criterion: str | Criterion | ParameterScore,
    norm: str = "mean",
    agg: str = "mean",
    seed: int = 0,
    inputs: Inputs | None = None,
    derivatives: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Score every channel of some groups.

    Args:
        analysis: the model.
        groups: the groups to score.
        criterion: the name of one that is registered, the criterion itself, or a function that scores one parameter.
        norm: how scores are made comparable within each parameter: none, sum, mean, max or standardise, which
            ``flap`` always does.
        agg: how the scores of a group's parameters are combined: sum, mean, max, prod or l2.
        seed: of everything random.
        inputs: the model with inputs, for criteria that run it.
        derivatives: by initializer, what the criterion's ``needs`` ask for; of the parameters with two axes or more.

    Returns:
        By group name an array of shape (channels,), float64; higher is more important; groups that the
        criterion leaves out are not in it.

    Raises:
        PlanError: the criterion, NORM or AGG is unknown, the criterion gives no scores, needs inputs, or its
            derivatives do not fit.
        ModelError: onnxruntime cannot run the model on the inputs.
    """
    chosen = get(criterion)
    check(norm, agg)
    given = dict.fromkeys(chosen.derivatives, derivatives)
    context = Context(analysis, groups, norm, agg, seed, inputs, given)
    answer = checked_answer(chosen.score(context), groups, chosen.name)
    if isinstance(answer, Removal):
        raise PlanError(
            f"criterion {chosen.name!r} gives no scores: it names the channels to remove. Choose another one."
        )
    if isinstance(answer, Curves):
        return {name: curve.scores() for name, curve in answer.candidates[0].items()}
    return dict(answer)
