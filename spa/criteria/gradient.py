"""Criteria that multiply the weights θ with derivatives of a loss, which any framework computes.

With g the gradient of the loss and H its Hessian, the importance of an element, to be summed over the channel, is

    snip     |θ g|                       Lee et al., ICLR 2019
    taylor   |Σ θ g| over the channel    Molchanov et al., ICLR 2017
    crop     |θ (H g)|                   Rachwan et al., ICML 2022
    grasp    θ (H g)                     Wang et al., ICLR 2020
    fisher   θ² E[g²]                    Theis et al., arXiv 1801.05787, but for a factor ½

GraSP's own score −θ (H g) is high where removal makes the gradient larger, and removes the highest: importance is its
negative, and may be below zero. E[g²] is the mean of squared gradients of single samples (or of small batches), an
estimate of the Hessian's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from spa.criteria.context import Context
from spa.criteria.parameter import Parameter, parameters, weights
from spa.criteria.registry import GRADIENTS, HESSIAN_GRADIENTS, SQUARED_GRADIENTS, Criterion, criterion
from spa.criteria.scores import combine
from spa.errors import PlanError

Array = np.ndarray
NOUNS: Mapping[str, str] = {  # of one derivative, in messages
    GRADIENTS: "gradient",
    SQUARED_GRADIENTS: "mean squared gradient",
    HESSIAN_GRADIENTS: "Hessian–gradient product",
}


@dataclass(frozen=True)
class Formula:
    """A score from weights and derivatives.

    Attributes:
        need: which derivative: ``gradients``, ``squared_gradients`` or ``hessian_gradients``.
        of_element: the score of an element from the derivative and the weight.
        summary: for help texts.
        source: the paper.
        of_channel: applied to the sum of these over a channel.
    """

    need: str
    of_element: Callable[[Array, Array], Array]
    summary: str
    source: str
    of_channel: Callable[[Array], Array] = np.positive


def _magnitude(derivative: Array, weight: Array) -> Array:
    return np.abs(derivative * weight)


FORMULAS: Mapping[str, Formula] = {
    "snip": Formula(
        need=GRADIENTS,
        of_element=_magnitude,
        summary="The absolute weight times its gradient.",
        source="Lee et al., ICLR 2019 (arXiv 1810.02340), section 4.1",
    ),
    "taylor": Formula(
        need=GRADIENTS,
        of_element=np.multiply,
        of_channel=np.abs,
        summary="The first-order change of the loss when the channel goes, as an absolute value.",
        source="Molchanov et al., ICLR 2017 (arXiv 1611.06440), section 2.2",
    ),
    "crop": Formula(
        need=HESSIAN_GRADIENTS,
        of_element=_magnitude,
        summary="The absolute weight times the Hessian–gradient product, which keeps the training dynamics.",
        source="Rachwan et al., ICML 2022 (arXiv 2206.10451)",
    ),
    "grasp": Formula(
        need=HESSIAN_GRADIENTS,
        of_element=np.multiply,
        summary="The weight times the Hessian–gradient product, which keeps the gradient flow.",
        source="Wang et al., ICLR 2020 (arXiv 2002.07376), equation 8",
    ),
    "fisher": Formula(
        need=SQUARED_GRADIENTS,
        of_element=lambda g, w: g * w * w,
        summary="The squared weight times the mean squared gradient.",
        source="Theis et al., arXiv 1801.05787, but for a factor ½",
    ),
}


def select_derivative(
    need: str, gradients: Mapping[str, Any] | None = None, hessian_gradients: Mapping[str, Any] | None = None
) -> Mapping[str, Any] | None:
    """Return the user's derivatives that answer a need.

    Args:
        need: ``gradients``, ``squared_gradients`` or ``hessian_gradients``.
        gradients: by initializer; mean squared ones for ``squared_gradients``.
        hessian_gradients: by initializer.
    """
    return hessian_gradients if need == HESSIAN_GRADIENTS else gradients


def score(context: Context, name: str) -> dict[str, Array]:
    """Score groups by weights and derivatives.

    Args:
        context: its derivatives hold what the formula needs, for all parameters with two axes or more.
        name: one of ``FORMULAS``.

    Returns:
        By group name (channels,), float64.

    Raises:
        PlanError: derivatives are missing or do not fit.
    """
    formula = FORMULAS[name]
    selected = {g.name: weights(parameters(context.analysis, g)) for g in context.groups}
    everything = [p for found in selected.values() for p in found]
    derivatives = checked(everything, name, context.derivatives.get(formula.need))

    def of_parameter(parameter: Parameter) -> Array:
        derivative = derivatives[parameter.name].astype(np.float64)
        return formula.of_channel(parameter.per_channel(partial(formula.of_element, derivative)))

    return combine(context, {name: [of_parameter(p) for p in found] for name, found in selected.items()})


def checked(parameters: Sequence[Parameter], name: str, derivatives: Mapping[str, Any] | None) -> dict[str, Array]:
    """Return the derivatives of some parameters as arrays.

    Args:
        parameters: all that are scored.
        name: one of ``FORMULAS``.
        derivatives: by initializer, of any framework that numpy understands; those of other initializers are ignored.

    Raises:
        PlanError: there are none, some are missing, or they have another shape or values that are not finite.
    """
    noun = NOUNS[FORMULAS[name].need]
    if derivatives is None:
        raise PlanError(f"criterion {name!r} multiplies with the {noun} of each parameter. Give them by initializer.")
    shapes = {p.name: p.shape for p in parameters}
    missing = [n for n in shapes if n not in derivatives]
    if missing:
        others = [n for n in derivatives if n not in shapes]
        said = f"; there are others for {_some(others)}" if others else ""
        raise PlanError(
            f"criterion {name!r}: no {noun} is given for {_some(missing)}{said}. "
            "Name them as the model's initializers are, or leave their groups out with --ignore."
        )
    arrays = {n: np.asarray(derivatives[n]) for n in shapes}
    for n, shape in shapes.items():
        if arrays[n].shape != shape:
            raise PlanError(
                f"the {noun} of {n!r} has shape {arrays[n].shape}, expected {shape}. Give it in that order."
            )
        if arrays[n].dtype.kind not in "fiu" or not np.isfinite(arrays[n]).all():
            raise PlanError(f"the {noun} of {n!r} has values that are not finite numbers. Compute it on other inputs.")
    return arrays


def _some(names: Sequence[str], most: int = 5) -> str:
    """List the first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


for _name, _formula in FORMULAS.items():
    criterion(
        Criterion(
            name=_name,
            score=partial(score, name=_name),
            summary=_formula.summary,
            source=_formula.source,
            needs=frozenset({"weights", _formula.need}),
        )
    )
