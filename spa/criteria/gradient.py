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

from spa.criteria.magnitude import Parameter
from spa.errors import PlanError

Array = np.ndarray
GRADIENT, CURVATURE, SQUARE = "gradient", "Hessian–gradient product", "mean squared gradient"


@dataclass(frozen=True)
class Criterion:
    """How weights and derivatives make a score.

    Attributes:
        needs: which derivative: ``GRADIENT``, ``CURVATURE`` or ``SQUARE``.
        of_element: the score of an element by the derivative and the weight.
        of_channel: applied to the sum of these over a channel.
    """

    needs: str
    of_element: Callable[[Array, Array], Array]
    of_channel: Callable[[Array], Array] = np.positive


def _magnitude(slope: Array, weight: Array) -> Array:
    return np.abs(slope * weight)


CRITERIA: Mapping[str, Criterion] = {
    "snip": Criterion(GRADIENT, _magnitude),
    "taylor": Criterion(GRADIENT, np.multiply, np.abs),
    "crop": Criterion(CURVATURE, _magnitude),
    "grasp": Criterion(CURVATURE, np.multiply),
    "fisher": Criterion(SQUARE, lambda g, w: g * w * w),
}


def derivatives(
    name: str, gradients: Mapping[str, Any] | None = None, hessian_gradients: Mapping[str, Any] | None = None
) -> Mapping[str, Any] | None:
    """Which of the derivatives that users give a criterion multiplies with.

    Args:
        name: one of ``CRITERIA``.
        gradients: by initializer; mean squared ones for ``fisher``.
        hessian_gradients: by initializer, for ``crop`` and ``grasp``.
    """
    return hessian_gradients if CRITERIA[name].needs == CURVATURE else gradients


def scores(parameters: Sequence[Parameter], name: str, given: Mapping[str, Array]) -> list[Array]:
    """Score the channels of each parameter.

    Args:
        parameters: of one group.
        name: one of ``CRITERIA``.
        given: by the names of all parameters, as :func:`checked` gives them.

    Returns:
        For each parameter an array (channels,), float64.
    """
    criterion = CRITERIA[name]
    sums = [p.per_channel(partial(criterion.of_element, given[p.name].astype(np.float64))) for p in parameters]
    return [criterion.of_channel(s) for s in sums]


def checked(parameters: Sequence[Parameter], name: str, given: Mapping[str, Any] | None) -> dict[str, Array]:
    """The derivatives of some parameters, as arrays.

    Args:
        parameters: all that are scored.
        name: one of ``CRITERIA``.
        given: by initializer, of any framework that numpy understands; others than those needed are not
            looked at.

    Raises:
        PlanError: there are none, some are missing, or they have another shape or values that are not finite.
    """
    what = CRITERIA[name].needs
    if given is None:
        raise PlanError(f"criterion {name!r} multiplies with the {what} of each parameter. Give them by initializer.")
    shapes = {p.name: p.shape for p in parameters}
    missing = [n for n in shapes if n not in given]
    if missing:
        others = [n for n in given if n not in shapes]
        said = f"; there are others for {_some(others)}" if others else ""
        raise PlanError(
            f"criterion {name!r}: no {what} is given for {_some(missing)}{said}. "
            "Name them as the model's initializers are, or leave their groups out with --ignore."
        )
    arrays = {n: np.asarray(given[n]) for n in shapes}
    for n, shape in shapes.items():
        if arrays[n].shape != shape:
            raise PlanError(
                f"the {what} of {n!r} has shape {arrays[n].shape}, expected {shape}. Give it in that order."
            )
        if arrays[n].dtype.kind not in "fiu" or not np.isfinite(arrays[n]).all():
            raise PlanError(f"the {what} of {n!r} is not finite numbers. Compute it on other inputs.")
    return arrays


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
