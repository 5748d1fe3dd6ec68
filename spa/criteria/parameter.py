"""A parameter as criteria see it: values, the axis of the channels, and the channel of each index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spa.coupling.analysis import Analysis, Group, Place
from spa.coupling.places import channel_of
from spa.model.decoded import Grid, decoded_by
from spa.model.graph import Graph
from spa.model.stored import all_finite, blocks, split

Array = np.ndarray


@dataclass(frozen=True)
class Parameter:
    """One parameter of a group, along one of its axes.

    Attributes:
        name: of the initializer.
        load: returns the values, as floats where the operator decodes them from integers.
        data_type: the ONNX element type of the initializer.
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
                with some of the values at a time, which it must not keep.

        Returns:
            (channels,), float64.
        """
        along, as_floats = np.zeros(self.shape[self.axis]), _Floats()
        for rows, values in split(self.load()) if self.blocks is None else self.blocks():
            joined = len(self.shape) - values.ndim + 1  # axes that lie along the rows
            elements = of_elements(as_floats(values))
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
    coded = decoded_by(analysis.graph, node, position)
    return Parameter(
        name=name,
        load=lambda: analysis.graph.array(name) if coded is None else _floats(analysis.graph, coded),
        blocks=lambda: blocks(analysis.graph, name) if coded is None else _decoded_blocks(analysis.graph, coded),
        data_type=analysis.graph.constants[name].data_type,
        shape=coded.layout(analysis.graph) if coded else tuple(e.size for e in analysis.uses[place.use]),
        axis=place.axis,
        channel=lambda: channel_of(analysis.expr(place), group.dim),
        channels=group.size,
        operator=node.key,
        operand=position,
    )


def _floats(graph: Graph, coded: Grid) -> Array:
    """Return what integers are decoded to, in the shape of the integers."""
    scale, zero = coded.grid(graph)
    return np.asarray((coded.integers(graph.array(coded.name)) - zero) * scale)


def _decoded_blocks(graph: Graph, coded: Grid) -> Iterator[tuple[slice, Array]]:
    """Yield what integers are decoded to by blocks of rows, as :func:`spa.model.stored.blocks` yields the integers."""
    shape = coded.layout(graph)
    grid = [np.broadcast_to(part.astype(np.float32), shape) for part in coded.grid(graph)]
    for rows, stored in blocks(graph, coded.name):
        joined = len(shape) - stored.ndim + 1
        index = np.unravel_index(np.arange(rows.start, rows.stop), shape[:joined])
        scale, zero = (part[index] for part in grid)
        yield rows, (coded.integers(stored) - zero) * scale


class _Floats:
    """Values in floating point, by blocks: halves, which numpy converts slowly, and what is no float, as singles.

    Arrays of halves are converted into one piece of memory, over and over: new ones cost several times as much.
    """

    def __init__(self) -> None:
        self._wide = np.empty((0,), np.int32)

    def __call__(self, values: Array) -> Array:
        """Return the values of a block; those of halves are valid until the next."""
        if values.dtype == np.float16:
            return self._singles(values)
        return values if values.dtype.kind == "f" else values.astype(np.float32)

    def _singles(self, halves: Array) -> Array:
        """Convert halves exactly.

        The bits of a half's magnitude in the place of a single's are the number over 2^112, subnormal ones included.
        """
        if not all_finite(halves):
            return halves.astype(np.float32)
        if self._wide.size < halves.size:
            self._wide = np.empty(halves.size, np.int32)
        wide = self._wide[: halves.size].reshape(halves.shape)
        np.left_shift(halves.view(np.uint16), 16, out=wide, dtype=np.int32, casting="unsafe")
        wide >>= 3  # draws the sign into the three bits below it
        wide &= np.int32(-0x70000001)  # and leaves it in its own alone
        singles = wide.view(np.float32)
        singles *= np.float32(2.0**112)
        return singles
