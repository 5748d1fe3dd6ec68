"""Operators that compute each element of the output from one element of each input."""

from __future__ import annotations

from functools import reduce

import numpy as np

from spa.model.traits import Trait, operators
from spa.zero.facts import Site
from spa.zero.known import Known
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray


@transfer(*operators(Trait.UNARY), *operators(Trait.BROADCASTING))
def elementwise(site: Site) -> KnownOutputs:
    """Evaluate the operator where all operands are known."""
    operands = [i for i in range(len(site.node.inputs)) if site.has(i)]
    return _evaluate(site, reduce(np.logical_and, (site.known(i).mask for i in operands)))


@transfer("Mul")
def multiply(site: Site) -> KnownOutputs:
    """Evaluate the product where both factors are known, or one is known to be zero."""
    a, b = site.known(0), site.known(1)
    return _evaluate(site, (a.mask & b.mask) | a.zero | b.zero)


@transfer("Where")
def where(site: Site) -> KnownOutputs:
    """Evaluate where the condition is known and so is the operand that it chooses."""
    condition, yes, no = (site.known(i) for i in range(3))
    return _evaluate(site, condition.mask & np.where(condition.value, yes.mask, no.mask))


def _evaluate(site: Site, mask: Array) -> KnownOutputs:
    """Run the operator on the known operands; the result is known where the mask says so."""
    if not mask.any():
        return None
    results = site.evaluate([site.filled(i) if site.has(i) else None for i in range(len(site.node.inputs))])
    return None if results is None else [Known(results[0], mask)]


@transfer("Dropout")
def dropout(site: Site) -> KnownOutputs:
    """Pass the input on, outside training."""
    training = site.static(2) if site.has(2) else np.zeros(())
    return None if training is None or training.any() else [site.known(0)]


@transfer("CastLike")
def cast_like(site: Site) -> KnownOutputs:
    """Convert the first operand to the type of the second."""
    return [Known(site.known(0).value.astype(site.known(1).value.dtype), site.known(0).mask)]
