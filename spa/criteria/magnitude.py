"""Criteria that look at the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Parameter:
    """One parameter of a group, as criteria see it.

    Attributes:
        name: of the initializer.
        load: gives the value.
        data_type: the ONNX element type.
        shape: of the value.
        axis: along which the channels lie.
        channel: gives for each index of that axis the channel that it belongs to, or -1.
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

    def per_channel(self, elements: Callable[[Array], Array]) -> Array:
        """Sum of an element score over each channel: shape (channels,), float64."""
        others = tuple(i for i in range(len(self.shape)) if i != self.axis)
        values = self.load()
        if values.dtype.kind not in "f":
            values = values.astype(np.float32)
        along = elements(values).sum(axis=others, dtype=np.float64)
        channel = self.channel()
        inside = channel >= 0
        return np.bincount(channel[inside], weights=along[inside], minlength=self.channels)

    def rows(self) -> Array:
        """The value as one row per channel: shape (channels, elements of a channel), float64."""
        channel = self.channel()
        order = np.argsort(np.where(channel < 0, self.channels, channel), kind="stable")
        order = order[: np.count_nonzero(channel >= 0)]
        values = np.moveaxis(self.load(), self.axis, 0)[order].astype(np.float64)
        return values.reshape(self.channels, -1)


def weights(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The parameters with at least two real axes (kernels and matrices), or all where a group has none."""
    matrices = [p for p in parameters if sum(n > 1 for n in p.shape) >= 2]
    return matrices or list(parameters)


def _scales(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The scales of BatchNormalization, or the weights where a group has none."""
    scales = [p for p in parameters if p.operator == "BatchNormalization" and p.operand == 1]
    return scales or weights(parameters)


def l1(parameter: Parameter) -> Array:
    """Sum of absolute values."""
    return parameter.per_channel(np.abs)


def l2(parameter: Parameter) -> Array:
    """Sum of squares."""
    return parameter.per_channel(np.square)


def fpgm(parameter: Parameter) -> Array:
    """Sum of distances to all other channels of the parameter.

    The channel nearest to the geometric median is the most replaceable (He et al., CVPR 2019, equation 6).
    """
    rows = parameter.rows()
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    np.fill_diagonal(distances, 0.0)
    return np.sqrt(np.maximum(distances, 0)).sum(axis=1)


def lamp(parameter: Parameter) -> Array:
    """A channel's squares over those of all channels at least as large (Lee et al., ICLR 2021, equation 3)."""
    squares = l2(parameter)
    order = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.where(remaining > 0, remaining, 1.0)
    return scores


Select = Callable[[Sequence[Parameter]], list[Parameter]]
CRITERIA: Mapping[str, tuple[Select, Callable[[Parameter], Array]]] = {
    "l1": (weights, l1),
    "l2": (weights, l2),
    "bn_scale": (_scales, l1),
    "fpgm": (weights, fpgm),
    "lamp": (weights, lamp),
}
