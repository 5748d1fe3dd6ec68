"""The values of a tensor's elements that are the same for every input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Known:
    """The elements of a tensor that have the same value for every input.

    Both arrays have the tensor's rank; an axis of one index stands for any size if all elements along it are
    alike.

    Attributes:
        value: the elements' values where ``mask`` is True; anything elsewhere.
        mask: True where an element is known.
    """

    value: Array
    mask: Array

    @property
    def zero(self) -> Array:
        """A mask of the elements that are known to be zero."""
        return self.mask & (self.value == 0)

    @property
    def nonzero(self) -> Array:
        """A mask of the elements that are known not to be zero."""
        return self.mask & (self.value != 0)

    def restricted_to(self, mask: Array) -> Known:
        """Return the same values, with nothing known where ``mask`` is False."""
        return Known(self.value, self.mask & mask)

    def along(self, axis: int, size: int) -> Array:
        """Return for each index of an axis whether all its elements are known, (size,)."""
        return all_along(self.mask, axis, size)


def constant(value: Array) -> Known:
    """Return a tensor of which every element is known."""
    return Known(value, np.ones((1,) * value.ndim, dtype=bool))


def along_channels(vector: Array, rank: int) -> Array:
    """Return a vector of channels as a tensor of a rank, with the channels along axis 1."""
    return vector.reshape(1, -1, *[1] * (rank - 2))


def all_along(mask: Array, axis: int, size: int) -> Array:
    """Return for each index of an axis whether all its entries of the mask are True, (size,)."""
    others = tuple(i for i in range(mask.ndim) if i != axis % mask.ndim)
    return np.broadcast_to(mask.all(axis=others), (size,))


def uniform_along(known: Known, axes: Iterable[int]) -> Known:
    """Keep what is known and the same all along some axes, and give these axes one index."""
    value, mask = np.broadcast_arrays(known.value, known.mask)
    long = tuple(a % value.ndim for a in axes if value.shape[a] > 1)
    if not long:
        return Known(value, mask)
    first = value[tuple(slice(0, 1) if i in long else slice(None) for i in range(value.ndim))]
    return Known(first, (mask & (value == first)).all(axis=long, keepdims=True))


def compressed(known: Known) -> Known:
    """Return the same in less memory: axes along which nothing changes get one index."""
    value, mask = np.broadcast_arrays(known.value, known.mask)
    for axis in range(value.ndim):
        first = (slice(None),) * axis + (slice(0, 1),)
        if value.shape[axis] > 1 and (mask == mask[first]).all() and ((value == value[first]) | ~mask).all():
            value, mask = value[first], mask[first]
    return Known(value, mask)
