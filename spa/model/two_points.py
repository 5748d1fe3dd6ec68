"""Two walks over a graph, at two sizes of its dynamic inputs.

A value that is equal in both walks is static, one that differs follows the input: that tells which entries of a shape
may be written as constants. The sizes of the second walk are therefore far from those of the first: at batches of 2 and
3, the greater of the batch and a width of 7 would pass for a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from onnx import ModelProto, TensorProto

from spa.errors import ModelError
from spa.model.extents import guesses
from spa.model.graph import Graph
from spa.model.shape_registry import Shape
from spa.model.shapes import Override, Walk, Walker
from spa.model.sizes import Guess, OpenInput, axis_name, batch_axes, free_axes, resolve, widened

# Sizes made up for axes whose size depends on data, at either point: primes that are unlikely sizes.
_UNKNOWN = (1009, 2003)
# By which axes grow from one point to the other, tried in this order; a table of positions may end where they began.
_FACTORS = (4, 2, 0.5, 0.25)
_MOST_ATTEMPTS = 8  # of axes of one kind that grow alone, where they cannot grow together


def open_inputs(model: ModelProto) -> tuple[OpenInput, ...]:
    """Return the inputs that a caller must feed, with the sizes that they leave open; those that are no tensors not."""
    weights = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    found = []
    for info in model.graph.input:
        if info.name in weights or not info.type.HasField("tensor_type"):
            continue
        tensor = info.type.tensor_type
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else axis_name(dim.dim_param)
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

    def walked(self, graph: Graph, inputs: Sequence[OpenInput], sizes: Mapping[str, int]) -> Walk | None:
        """Walk the graph at other sizes, by ``input[axis]``; return None where it refuses them."""
        try:
            return self.walker.walk(graph, _shapes(inputs, sizes), _UNKNOWN[0], known=self.first.value)
        except ModelError:
            return None

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
    start = _first(graph, walker, inputs, sizes)
    first, shapes = start.walk, start.shapes
    second, far = first, shapes
    if start.free:
        widen = partial(widened, inputs, start.guess, sizes)
        second, far = _second(graph, walker, inputs, widen, start) or (first, shapes)
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


@dataclass(frozen=True)
class _First:
    """The first walk.

    Attributes:
        walk: what it found.
        guess: where its sizes came from.
        shapes: of the inputs.
        free: by name what open axes count, and their sizes.
    """

    walk: Walk
    guess: Guess
    shapes: dict[str, Shape]
    free: dict[str, tuple[str, int]]


def _is_fixed(inputs: Sequence[OpenInput], name: str, axis: int) -> bool:
    return any(each.name == name and isinstance(each.shape[axis], int) for each in inputs)


def _shapes(inputs: Sequence[OpenInput], sizes: Mapping[str, int]) -> dict[str, Shape]:
    return {
        each.name: tuple(
            dim if isinstance(dim, int) else sizes[f"{each.name}[{axis}]"] for axis, dim in enumerate(each.shape)
        )
        for each in inputs
    }


def _first(graph: Graph, walker: Walker, inputs: Sequence[OpenInput], sizes: Mapping[str, int] | None) -> _First:
    """Walk at the first sizes that the graph accepts."""
    error: ModelError | None = None
    tried: list[dict[str, Shape]] = []
    for guess in guesses(graph.model):
        shapes = _shapes(inputs, resolve(inputs, guess, sizes))
        if shapes in tried:
            continue
        tried.append(shapes)
        try:
            walk = walker.walk(graph, shapes, unknown=_UNKNOWN[0])
            return _First(walk, guess, shapes, free_axes(inputs, guess, sizes))
        except ModelError as failure:
            error = error or failure
    raise error or ModelError("the model has inputs that are not tensors. Export it with tensor inputs.")


def _second(
    graph: Graph, walker: Walker, inputs: Sequence[OpenInput], widen: Callable[..., dict[str, int]], first: _First
) -> tuple[Walk, dict[str, Shape]] | None:
    """Walk at sizes far from the first ones: of all open axes, else of as many as the graph accepts, the batch first.

    Args:
        graph: the model.
        walker: walks.
        inputs: the inputs.
        widen: returns sizes, given the ``factors`` by which axes grow.
        first: the walk at the first sizes.

    Returns:
        The walk and the inputs' shapes; None where no axis can grow or shrink.
    """
    tried = [first.shapes]

    def walk(factors: Mapping[str, float]) -> tuple[Walk, dict[str, Shape]] | None:
        shapes = _shapes(inputs, widen(factors=factors))
        if shapes in tried:
            return None
        tried.append(shapes)
        try:
            return walker.walk(graph, shapes, unknown=_UNKNOWN[1], known=first.walk.value), shapes
        except ModelError:
            return None

    for factor in _FACTORS:
        if found := walk(dict.fromkeys(first.free, factor)):
            return found
    kinds: dict[str, list[str]] = {}
    for name, (kind, _) in first.free.items():
        kinds.setdefault(kind, []).append(name)
    grown: dict[str, float] = {}
    best = None
    for kind in sorted(kinds, key=lambda k: k != "batch"):
        groups = [kinds[kind], *([n] for n in kinds[kind] if len(kinds[kind]) > 1)]
        for names in groups[:_MOST_ATTEMPTS]:
            for factor in _FACTORS if not set(names) <= grown.keys() else ():
                factors = grown | dict.fromkeys(names, factor)
                if found := walk(factors):
                    grown, best = factors, found
                    break
    return best


def _forget_data(first: Walk, second: Walk) -> None:
    """Drop the values that are known at one size only, being too large at the other: they are data, not sizes."""
    for name in first.computed ^ second.computed:
        for walk in (first, second):
            walk.computed.discard(name)
            walk.value.pop(name, None)
