"""Pooling, resizing and statistics: equal values keep their value."""

from __future__ import annotations

import numpy as np

from spa.model.traits import Trait, operators
from spa.zero.facts import Site
from spa.zero.known import Known, uniform_along
from spa.zero.transfer.products import padded
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray
_SUMS = operators(Trait.SUM)


@transfer(*operators(Trait.POOLING, Trait.MEAN))
def pool(site: Site) -> KnownOutputs:
    """Keep what is the same at all positions; of that, zeros alone if a mean counts padding."""
    same = uniform_along(site.known(0), range(2, site.known(0).value.ndim))
    counted = site.attr("count_include_pad", 0) and (padded(site) or site.attr("ceil_mode", 0))
    return [same.restricted_to(same.value == 0) if counted else same]


@transfer("Resize", "Upsample")
def resize(site: Site) -> KnownOutputs:
    """Keep what is the same at all positions."""
    if site.attr("coordinate_transformation_mode") == "tf_crop_and_resize" or site.shape(0)[:2] != site.out_shape()[:2]:
        return None
    return [uniform_along(site.known(0), range(2, site.known(0).value.ndim))]


@transfer(*operators(Trait.STATISTIC, Trait.MEAN), *_SUMS)
def reduce(site: Site) -> KnownOutputs:
    """Keep what is the same along the reduced axes; of that, zeros alone if the operator sums."""
    known = site.known(0)
    rank = known.value.ndim
    axes = site.static(1) if site.has(1) else site.attr("axes")
    if (site.has(1) and axes is None) or site.node.op == "ReduceLogSum":
        return None
    if axes is None or not len(np.ravel(axes)):
        if site.attr("noop_with_empty_axes", 0):
            return None
        axes = range(rank)
    reduced = {int(a) % rank for a in np.ravel(axes)}
    same = uniform_along(known, reduced)
    if site.node.op in _SUMS:
        same = same.restricted_to(same.value == 0)
    if site.attr("keepdims", 1):
        return [same]
    shape = [n for i, n in enumerate(same.mask.shape) if i not in reduced]
    return [Known(same.value.reshape(shape), same.mask.reshape(shape))]
