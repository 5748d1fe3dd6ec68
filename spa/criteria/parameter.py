"""A parameter as criteria see it: values, the axis of the channels, and the channel of each index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spa.coupling.analysis import Analysis, Group, Place
from spa.coupling.places import channel_of
from spa.model.stored import blocks, split

Array = np.ndarray


@dataclass(frozen=True)
class Parameter:
    """One parameter of a group, along one of its axes.

    Attributes:
        name: of the initializer.
        load: returns the values.
        data_type: the ONNX element type.
        shape: of the values.
        axis: along which the channels lie.
        channel: returns the channel of each index of that axis, −1 where it belongs to none of the group.
        channels: how many channels the group has.
        operator: the operator that uses the parameter.
        operand: as which operand.
        blocks: yields the values by blocks of rows, with these as a slice (see :func:`spa.model.stored.blocks`); where
            it is None, those that are loaded are split.
    """

    name: str
    load: Callable[[], Array]
    data_type: int
    shape: tuple[int, ...]
    axis: int
    channel: Callable[[], Array]
    channels: int
    operator: str
    operand: int
    blocks: Callable[[], Iterator[tuple[slice, Array]]] | None = None

    def per_channel(self, of_elements: Callable[[Array], Array]) -> Array:
        """Sum a score of each element over each channel.

        Args:
            of_elements: from values, in floating point (halves as singles), to scores of the same shape. It is called
                with some of the values at a time.

        Returns:
            (channels,), float64.
        """
        along = np.zeros(self.shape[self.axis])
        for rows, values in split(self.load()) if self.blocks is None else self.blocks():
            joined = len(self.shape) - values.ndim + 1  # axes that lie along the rows
            elements = of_elements(_as_floats(values))
            if self.axis >= joined:
                position = self.axis - joined + 1
                others = tuple(i for i in range(values.ndim) if i != position)
                along += elements.sum(axis=others, dtype=np.float64)
            else:
                sums = elements.sum(axis=tuple(range(1, values.ndim)), dtype=np.float64)
                index = np.unravel_index(np.arange(rows.start, rows.stop), self.shape[:joined])[self.axis]
                along += np.bincount(index, weights=sums, minlength=len(along))
        channel = self.channel()
        inside = channel >= 0
        return np.bincount(channel[inside], weights=along[inside], minlength=self.channels)

    def rows(self) -> Array:
        """Return the values as one row per channel, (channels, elements of a channel), float64."""
        channel = self.channel()
        order = np.argsort(np.where(channel < 0, self.channels, channel), kind="stable")
        order = order[: np.count_nonzero(channel >= 0)]
        values = np.moveaxis(self.load(), self.axis, 0)[order].astype(np.float64)
        return values.reshape(self.channels, -1)


def parameters(analysis: Analysis, group: Group) -> list[Parameter]:
    """Return the parameters that a group lies on, one for each place."""
    return [_parameter(analysis, group, p) for p in group.places]


def weights(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Select the parameters with at least two axes longer than 1 (kernels, matrices), or all where there are none."""
    matrices = [p for p in parameters if sum(n > 1 for n in p.shape) >= 2]
    return matrices or list(parameters)


def _parameter(analysis: Analysis, group: Group, place: Place) -> Parameter:
    name, index, operand = place.use
    users = analysis.graph.users[name]
    node = analysis.graph.nodes[index] if index >= 0 else users[0][0]
    position = operand if index >= 0 else users[0][1]
    return Parameter(
        name=name,
        load=lambda: analysis.graph.array(name),
        blocks=lambda: blocks(analysis.graph, name),
        data_type=analysis.graph.constants[name].data_type,
        shape=tuple(e.size for e in analysis.uses[place.use]),
        axis=place.axis,
        channel=lambda: channel_of(analysis.expr(place), group.dim),
        channels=group.size,
        operator=node.key,
        operand=position,
    )


def _as_floats(values: Array) -> Array:
    """Return values in floating point: halves and what is none as singles."""
    if values.dtype == np.float16:
        return _as_singles(values)
    return values if values.dtype.kind == "f" else values.astype(np.float32)


def _as_singles(halves: Array) -> Array:
    """Convert halves exactly, five times as fast as numpy does.

    Bits of a half's magnitude in the place of a single's are the number over 2^112, subnormal ones included.
    """
    bits = halves.view(np.uint16)
    magnitude = bits & np.uint16(0x7FFF)
    if magnitude.max(initial=0) >= 0x7C00:  # infinite, or no number
        return halves.astype(np.float32)
    wide = magnitude.astype(np.uint32)
    wide <<= 13
    singles = wide.view(np.float32)
    singles *= np.float32(2.0**112)
    sign = (bits & np.uint16(0x8000)).astype(np.uint32)
    sign <<= 16
    wide |= sign
    return singles
