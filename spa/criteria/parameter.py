"""A parameter as criteria see it: values, the axis of the channels, and the channel of each index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spa.coupling.analysis import Analysis, Group, Place
from spa.coupling.places import channel_of

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

    def per_channel(self, of_elements: Callable[[Array], Array]) -> Array:
        """Sum a score of each element over each channel.

        Args:
            of_elements: from the values, in floating point, to scores of the same shape.

        Returns:
            (channels,), float64.
        """
        others = tuple(i for i in range(len(self.shape)) if i != self.axis)
        values = self.load()
        if values.dtype.kind not in "f":
            values = values.astype(np.float32)
        along = of_elements(values).sum(axis=others, dtype=np.float64)
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
        data_type=analysis.graph.constants[name].data_type,
        shape=tuple(e.size for e in analysis.uses[place.use]),
        axis=place.axis,
        channel=lambda: channel_of(analysis.expr(place), group.dim),
        channels=group.size,
        operator=node.key,
        operand=position,
    )
