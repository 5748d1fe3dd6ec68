"""Two walks over a graph, at two sizes of its dynamic inputs.

A value that is equal in both walks is static, one that differs follows the input: that tells which entries of a shape
may be written as constants. The sizes of the second walk are therefore far from those of the first: at batches of 2 and
3, the greater of the batch and a width of 7 would pass for a constant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, TensorProto

from spa.errors import ModelError
from spa.model.extents import guesses
from spa.model.graph import Graph
from spa.model.shape_registry import Shape
from spa.model.shapes import Override, Walk, Walker
from spa.model.sizes import Guess, OpenInput, batch_axes, resolve, widened

# Sizes made up for axes whose size depends on data, at either point: primes that are unlikely sizes.
_UNKNOWN = (1009, 2003)

# What grows from the first walk to the second, and by which factor, until the graph accepts it: everything, far or
# less far, else a part of it. The batch comes first, since it must not be taken for a constant.
_STEPS = ("sequence", "series", "past")
_GROWTH = (
    (("batch", *_STEPS, "image"), 4),
    (("batch", *_STEPS, "image"), 2),
    (("batch", "image"), 4),
    (("batch", *_STEPS), 4),
    (("batch", "sequence"), 4),
    (("batch", "series"), 4),
    (("batch", "past"), 4),
    (("batch",), 4),
    (("batch",), 2),
    ((*_STEPS, "image"), 4),
    (("image",), 2),
    (_STEPS, 4),
    (("sequence",), 4),
    (("series",), 4),
    (("past",), 4),
)


def open_inputs(model: ModelProto) -> tuple[OpenInput, ...]:
    """Return the inputs that a caller must feed, with the sizes that they leave open; those that are no tensors not."""
    weights = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    found = []
    for info in model.graph.input:
        if info.name in weights or not info.type.HasField("tensor_type"):
            continue
        tensor = info.type.tensor_type
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None
            for dim in tensor.shape.dim
        )
        integers = "INT" in TensorProto.DataType.Name(tensor.elem_type)
        found.append(OpenInput(info.name, shape, integers))
    return tuple(found)


@dataclass
class TwoPoints:
    """Two walks at different input sizes.

    Attributes:
        first: the walk at the first sizes.
        second: the walk at the second sizes; the same object as ``first`` for a model without open sizes.
        sizes: the input shapes at each point.
        walker: the walker, with its memory.
        batch: the number of samples at the first point.
        chosen: the sizes at the first point of the open axes that do not count samples, by ``input[axis]``.
    """

    first: Walk
    second: Walk
    sizes: tuple[dict[str, Shape], dict[str, Shape]]
    walker: Walker
    batch: int
    chosen: dict[str, int]

    def again(self, graph: Graph, overrides: Sequence[Override]) -> list[Walk]:
        """Walk another graph of the same interface (the pruned one) at the same points, with an override at each."""
        known = ((), self.second.value)
        return [
            self.walker.walk(graph, self.sizes[i], _UNKNOWN[i], override, known[i])
            for i, override in enumerate(overrides)
        ]

    @property
    def walks(self) -> list[Walk]:
        """The distinct walks: one for a model without open sizes."""
        return [self.first] if self.second is self.first else [self.first, self.second]


def two_points(graph: Graph, sizes: Mapping[str, int] | None = None) -> TwoPoints:
    """Walk the graph at two input sizes that it accepts.

    Args:
        graph: the model.
        sizes: sizes of open axes at the first point, by name or by ``input[axis]``; they stay open in what is made of
            the graph.

    Raises:
        ModelError: the graph accepts none of the sizes tried; the first contradiction is quoted.
        SizeError: ``sizes`` names no open axis.
        PlanError: a size is not positive.
    """
    walker = Walker()
    inputs = open_inputs(graph.model)
    resolve(inputs, Guess(), sizes)  # refuses sizes that name nothing
    first, guess, shapes = _first(graph, walker, inputs, sizes)
    second, far = first, shapes
    if shapes and any(not isinstance(dim, int) for each in inputs for dim in each.shape):
        second, far = _second(graph, walker, _farther(inputs, guess, sizes), first.value) or (first, shapes)
    if second is first and first.open_axes:
        second = walker.walk(graph, shapes, unknown=_UNKNOWN[1], known=first.value)
    _forget_data(first, second)
    axes = batch_axes(inputs)
    counted = ((each.name, axes[each.name]) for each in inputs)
    return TwoPoints(
        first=first,
        second=second,
        sizes=(shapes, far),
        walker=walker,
        batch=next((shapes[n][a] for n, a in counted if a is not None and not _is_fixed(inputs, n, a)), 1),
        chosen={
            f"{each.name}[{axis}]": shapes[each.name][axis]
            for each in inputs
            for axis, dim in enumerate(each.shape)
            if not isinstance(dim, int) and axis != axes[each.name]
        },
    )


def _is_fixed(inputs: Sequence[OpenInput], name: str, axis: int) -> bool:
    return any(each.name == name and isinstance(each.shape[axis], int) for each in inputs)


def _shapes(inputs: Sequence[OpenInput], sizes: Mapping[str, int]) -> dict[str, Shape]:
    return {
        each.name: tuple(
            dim if isinstance(dim, int) else sizes[f"{each.name}[{axis}]"] for axis, dim in enumerate(each.shape)
        )
        for each in inputs
    }


def _first(
    graph: Graph, walker: Walker, inputs: Sequence[OpenInput], sizes: Mapping[str, int] | None
) -> tuple[Walk, Guess, dict[str, Shape]]:
    """Walk at the first sizes that the graph accepts; return the walk, where they came from, and the inputs' shapes."""
    error: ModelError | None = None
    tried: list[dict[str, Shape]] = []
    for guess in guesses(graph.model):
        shapes = _shapes(inputs, resolve(inputs, guess, sizes))
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            return walker.walk(graph, shapes, unknown=_UNKNOWN[0]), guess, shapes
        except ModelError as failure:
            error = error or failure
    raise error or ModelError("the model has inputs that are not tensors. Export it with tensor inputs.")


def _farther(inputs: Sequence[OpenInput], guess: Guess, sizes: Mapping[str, int] | None) -> Iterator[dict[str, Shape]]:
    """Yield shapes far from the first ones, each once, those that differ the most first."""
    seen = [_shapes(inputs, resolve(inputs, guess, sizes))]
    for kinds, factor in _GROWTH:
        shapes = _shapes(inputs, widened(inputs, guess, sizes, kinds=kinds, factor=factor))
        if shapes not in seen:
            seen.append(shapes)
            yield shapes


def _second(
    graph: Graph, walker: Walker, candidates: Iterator[dict[str, Shape]], known: Collection[str]
) -> tuple[Walk, dict[str, Shape]] | None:
    """Walk at the first of the candidates that the graph accepts."""
    for shapes in candidates:
        try:
            return walker.walk(graph, shapes, unknown=_UNKNOWN[1], known=known), shapes
        except ModelError:
            continue
    return None


def _forget_data(first: Walk, second: Walk) -> None:
    """Drop the values that are known at one size only, being too large at the other: they are data, not sizes."""
    for name in first.computed ^ second.computed:
        for walk in (first, second):
            walk.computed.discard(name)
            walk.value.pop(name, None)
