"""Operators that move, repeat or select elements, or make them from a constant."""

from __future__ import annotations

import numpy as np

from spa.model.graph import tensor_array
from spa.model.traits import Trait, operators
from spa.zero.facts import Site
from spa.zero.known import Known, constant, uniform_along
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray


@transfer(*operators(Trait.VIEW))
def view(site: Site) -> KnownOutputs:
    """Return the same elements, in row-major order."""
    known = site.full(0, site.known(0))
    if not known.mask.any():
        return None
    return [Known(known.value.reshape(site.out_shape()), known.mask.reshape(site.out_shape()))]


@transfer("Transpose")
def transpose(site: Site) -> KnownOutputs:
    """Permute the axes."""
    value, mask = np.broadcast_arrays(site.known(0).value, site.known(0).mask)
    perm = site.attr("perm")
    return [Known(value.transpose(perm), mask.transpose(perm))]


@transfer("Concat")
def concat(site: Site) -> KnownOutputs:
    """Join the operands along an axis."""
    operands = range(len(site.node.inputs))
    if not any(site.known(i).mask.any() for i in operands):
        return None
    axis = site.attr("axis", 1) % len(site.shape(0))
    pieces = []
    for operand in operands:
        value, mask = np.broadcast_arrays(site.known(operand).value, site.known(operand).mask)
        shape = list(value.shape)
        shape[axis] = site.shape(operand)[axis]
        pieces.append((np.broadcast_to(value, shape), np.broadcast_to(mask, shape)))
    sizes = np.max([[v.shape[i] for i in range(v.ndim)] for v, _ in pieces], axis=0)

    def spread(array: Array) -> Array:
        return np.broadcast_to(array, [array.shape[i] if i == axis else n for i, n in enumerate(sizes)])

    return [Known(*(np.concatenate([spread(p[k]) for p in pieces], axis=axis) for k in (0, 1)))]


@transfer("Split")
def split(site: Site) -> KnownOutputs:
    """Cut the axis into consecutive pieces."""
    known = site.known(0)
    axis = site.attr("axis", 0) % known.value.ndim
    value, mask = np.broadcast_arrays(known.value, known.mask)
    if value.shape[axis] == 1:
        return [known] * len(site.node.outputs)
    if not all(site.node.outputs):
        return None
    ends = np.cumsum([site.out_shape(i)[axis] for i in range(len(site.node.outputs))])[:-1]
    return [Known(v, m) for v, m in zip(np.split(value, ends, axis), np.split(mask, ends, axis), strict=True)]


@transfer("Slice", "Tile", "Pad", "DepthToSpace", "SpaceToDepth")
def move(site: Site) -> KnownOutputs:
    """Move the elements, and what is known of them, as the operator does; padding is known."""
    known = site.known(0)
    optional = range(1, len(site.node.inputs))
    controls = [site.static(i) if site.has(i) else None for i in optional]
    if not known.mask.any() or any(site.has(i) and c is None for i, c in zip(optional, controls, strict=True)):
        return [uniform_along(known, range(known.value.ndim))] if site.node.op == "Slice" else None
    # The operator is run twice: on the values, and on the mask of what is not known.
    full = site.full(0, known)
    values = site.evaluate([np.where(full.mask, full.value, 1).astype(full.value.dtype), *controls])
    blanks = [np.zeros_like(c, np.float32) if c is not None and c.dtype.kind == "f" else c for c in controls]
    unknown = site.evaluate([(~full.mask).astype(np.float32), *blanks])
    return None if values is None or unknown is None else [Known(values[0], unknown[0] == 0)]


@transfer("Expand")
def expand(site: Site) -> KnownOutputs:
    """Add axes before the first; axes of one index stand for any size (see :class:`Known`)."""
    known = site.known(0)
    value, mask = np.broadcast_arrays(known.value, known.mask)
    before = (1,) * (len(site.out_shape()) - value.ndim)
    return [Known(value.reshape(before + value.shape), mask.reshape(before + mask.shape))]


@transfer("ConstantOfShape")
def constant_of_shape(site: Site) -> KnownOutputs:
    """Return the value that all elements have, whatever the size."""
    attribute = site.attr("value")
    value = np.zeros(1, np.float32) if attribute is None else tensor_array(attribute)
    return [constant(value.reshape((1,) * len(site.out_shape())))]


@transfer("Gather")
def gather(site: Site) -> KnownOutputs:
    """Pick indices of an axis; if the indices depend on the input (an embedding), keep what is the same along it."""
    known, picks = site.known(0), site.static(1)
    if not known.mask.any():
        return None
    axis, rank = site.attr("axis", 0) % known.value.ndim, len(site.shape(1))
    value, mask = np.broadcast_arrays(known.value, known.mask)
    if value.shape[axis] > 1 and picks is not None:
        return [Known(value.take(picks, axis), mask.take(picks, axis))]
    same = uniform_along(known, [axis])
    shape = same.mask.shape[:axis] + (1,) * rank + same.mask.shape[axis + 1 :]
    return [Known(same.value.reshape(shape), same.mask.reshape(shape))]
