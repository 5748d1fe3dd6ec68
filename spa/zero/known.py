"""What is known of a tensor's elements: a value, or that it varies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Known:
    """The elements of a tensor that have the same value for every input.

    Both arrays have the tensor's rank; an axis of one index stands for an axis of any size along which all is alike.

    Attributes:
        value: of the elements, where ``mask`` says that they have one; anything elsewhere.
        mask: True where an element is known.
    """

    value: Array
    mask: Array

    @property
    def zero(self) -> Array:
        """True where an element is known to be zero."""
        return self.mask & (self.value == 0)

    @property
    def other(self) -> Array:
        """True where an element is known not to be zero."""
        return self.mask & (self.value != 0)

    def only(self, mask: Array) -> Known:
        """The same, but nothing is known where ``mask`` is False."""
        return Known(self.value, self.mask & mask)

    def axis(self, axis: int, size: int) -> Array:
        """Of an axis' indices, whether all elements are known, (size,)."""
        return flat(self.mask, axis, size)


def constant(value: Array) -> Known:
    """All of a tensor is known."""
    return Known(value, np.ones((1,) * value.ndim, dtype=bool))


def flat(mask: Array, axis: int, size: int) -> Array:
    """Of an axis' indices, whether the mask is True all over, (size,)."""
    others = tuple(i for i in range(mask.ndim) if i != axis % mask.ndim)
    return np.broadcast_to(mask.all(axis=others), (size,))


def uniform(known: Known, axes: Iterable[int]) -> Known:
    """What is known, and the same all along some axes; these have one index then."""
    value, mask = np.broadcast_arrays(known.value, known.mask)
    long = tuple(a % value.ndim for a in axes if value.shape[a] > 1)
    if not long:
        return Known(value, mask)
    first = value[tuple(slice(0, 1) if i in long else slice(None) for i in range(value.ndim))]
    return Known(first, (mask & (value == first)).all(axis=long, keepdims=True))


def shrunk(known: Known) -> Known:
    """The same in the least room: axes along which nothing changes have one index."""
    value, mask = np.broadcast_arrays(known.value, known.mask)
    for axis in range(value.ndim):
        first = (slice(None),) * axis + (slice(0, 1),)
        if value.shape[axis] > 1 and (mask == mask[first]).all() and ((value == value[first]) | ~mask).all():
            value, mask = value[first], mask[first]
    return Known(value, mask)
