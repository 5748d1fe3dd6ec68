"""Two walks over a graph, at two sizes of its dynamic inputs.

A value that is equal in both walks is static, one that differs follows the input: that tells which entries of a shape
may be written as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto

from spa.errors import ModelError
from spa.model.graph import Graph
from spa.model.shape_registry import Shape
from spa.model.shapes import Override, Walk, Walker

# Sizes made up for axes whose size depends on data, at either point: primes that are unlikely sizes.
_UNKNOWN = (1009, 2003)

# (batch and unnamed sizes, sequence-like sizes, image sizes) to try, in order, until two walks succeed.
_SIZES = (
    (2, 16, 224),
    (3, 24, 256),
    (2, 16, 64),
    (3, 32, 96),
    (1, 8, 32),
    (2, 7, 640),
    (1, 512, 512),
    (4, 64, 128),
)


def input_shapes(model: ModelProto, batch: int, sequence: int, image: int) -> dict[str, Shape]:
    """Return concrete shapes of all inputs; equal symbolic names get equal sizes.

    Args:
        model: the model.
        batch: the size of an open first axis.
        sequence: the size of other open axes.
        image: the size of open axes from the third on, in inputs of four axes or more.
    """
    size_of_name: dict[str, int] = {}
    shapes = {}
    weights = {t.name for t in model.graph.initializer}
    for info in model.graph.input:
        if info.name in weights:
            continue
        tensor = info.type.tensor_type
        dims = tensor.shape.dim
        shape = []
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                shape.append(dim.dim_value)
                continue
            guess = batch if axis == 0 else image if len(dims) >= 4 and axis >= 2 else sequence
            shape.append(size_of_name.setdefault(dim.dim_param, guess) if dim.dim_param else guess)
        shapes[info.name] = tuple(shape)
    return shapes


def is_dynamic(model: ModelProto) -> bool:
    """Tell whether any input has an axis whose size the model leaves open."""
    return any(
        not (d.HasField("dim_value") and d.dim_value > 0)
        for i in model.graph.input
        for d in i.type.tensor_type.shape.dim
    )


@dataclass
class TwoPoints:
    """Two walks at different input sizes.

    Attributes:
        first: the walk at the first sizes.
        second: the walk at the second sizes; the same object as ``first`` for a model without open sizes.
        sizes: the input shapes at each point.
        walker: the walker, with its memory.
    """

    first: Walk
    second: Walk
    sizes: tuple[dict[str, Shape], dict[str, Shape]]
    walker: Walker

    def again(self, graph: Graph, overrides: Sequence[Override]) -> list[Walk]:
        """Walk another graph of the same interface (the pruned one) at the same points, with an override at each."""
        return [self.walker.walk(graph, self.sizes[i], _UNKNOWN[i], override) for i, override in enumerate(overrides)]

    @property
    def walks(self) -> list[Walk]:
        """The distinct walks: one for a model without open sizes."""
        return [self.first] if self.second is self.first else [self.first, self.second]


def two_points(graph: Graph) -> TwoPoints:
    """Walk the graph at two input sizes that it accepts.

    Raises:
        ModelError: the graph accepts none of the sizes tried; the first contradiction is quoted.
    """
    walker = Walker()
    model = graph.model
    walks: list[Walk] = []
    sizes: list[dict[str, Shape]] = []
    error: ModelError | None = None
    for candidate in _SIZES:
        shapes = input_shapes(model, *candidate)
        if shapes in sizes:
            continue
        try:
            walks.append(walker.walk(graph, shapes, unknown=_UNKNOWN[1] if walks else _UNKNOWN[0]))
            sizes.append(shapes)
        except ModelError as failure:
            error = error or failure
            if not is_dynamic(model):
                break
        if len(walks) == 2 or (walks and not is_dynamic(model) and not walks[0].open_axes):
            break
    if not walks:
        raise error or ModelError("the model has inputs that are not tensors. Export it with tensor inputs.")
    if len(walks) == 1 and walks[0].open_axes:
        walks.append(walker.walk(graph, sizes[0], unknown=_UNKNOWN[1]))
    second = walks[1] if len(walks) == 2 else walks[0]
    _forget_data(walks[0], second)
    return TwoPoints(first=walks[0], second=second, sizes=(sizes[0], sizes[-1]), walker=walker)


def _forget_data(first: Walk, second: Walk) -> None:
    """Drop the values that are known at one size only, being too large at the other: they are data, not sizes."""
    for name in first.computed ^ second.computed:
        for walk in (first, second):
            walk.computed.discard(name)
            walk.value.pop(name, None)
