"""Strides and receptive fields, read from the graph: lengths of open axes at which a network sees something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.model.halves import ELSE, THEN, is_separated
from spa.model.sizes import FALLBACKS, Guess, OpenInput, is_state
from spa.model.stated import stated_guesses

__all__ = ["Extent", "extent_of", "guesses"]

CELLS = 7  # rows and columns that an image has at the deepest stride, at least
STEPS = 64  # and steps of a series
_SMALLEST_IMAGE, _LARGEST_IMAGE = 64, 1024
# Networks that read a line step down its height, to a single row, and hardly along it.
_LINE_STRIDES = 4  # of rows, for one of columns, from which on an image is a line
_LOWEST_LINE, _HIGHEST_LINE, _LINE_LENGTH = 32, 64, 4  # the last in heights
_SHORTEST_SERIES, _LONGEST_SERIES = 64, 1 << 16

_WINDOWS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv", "MaxPool", "AveragePool", "QLinearAveragePool", "LpPool")
_KERNEL_OPERAND = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}
_ENDS = ("Shape", "Size", "ConstantOfShape", "Range")


@dataclass(frozen=True)
class Extent:
    """The scale on which a network looks at an input.

    Attributes:
        stride: how many places of the input one place of the coarsest tensor stands for.
        rows: the same along the height of images.
        columns: along their width.
        field: how many places of the input one place of any tensor sees, through convolutions and pools.
    """

    stride: int = 1
    rows: int = 1
    columns: int = 1
    field: int = 1


def guesses(model: ModelProto) -> tuple[Guess, ...]:
    """Return the sizes to try for a model's open axes: realistic ones first.

    Images get at least seven cells at the deepest stride, series fill the receptive field, tokens are 128. An image
    whose height shrinks far more than its width is a line of text, one cell high. A series that comes in pieces, with a
    state between them, is one stride long. Where none of the usual sizes fits, those follow that constants state.

    Args:
        model: a parsed model; weights in external files need not be loaded.
    """
    inputs = list(model.graph.input)
    extent = extent_of(model.graph)
    first = _guess(extent, inputs)
    if is_separated(model):
        halves = {tag: [i for i in inputs if i.name.endswith(tag)] for tag in (THEN, ELSE)}
        own = tuple((tag, _guess(extent_of(model.graph, half), half)) for tag, half in halves.items())
        first = replace(first, halves=own)
    *others, smallest = FALLBACKS[5:]  # which broadcasts to whatever the graph states
    stated = stated_guesses(model.graph, first, extent.stride)
    return (first, *FALLBACKS[:5], replace(first, batch=1), *others, *stated, smallest)


def _guess(extent: Extent, inputs: Iterable[ValueInfoProto]) -> Guess:
    cells = 8 if extent.stride < 32 else CELLS  # a power of two, where the images stay small
    image = min(max(cells * extent.stride, _SMALLEST_IMAGE), _LARGEST_IMAGE)
    length = max(extent.field, STEPS * extent.stride)
    if any(is_state(OpenInput(i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim))) for i in inputs):
        length = extent.stride
    length = -(-max(length, _SHORTEST_SERIES) // extent.stride) * extent.stride
    columns = None
    if extent.rows >= _LINE_STRIDES * extent.columns:
        image = min(max(extent.rows, _LOWEST_LINE), _HIGHEST_LINE)
        columns = _LINE_LENGTH * image
    return Guess(image=image, columns=columns, series=min(length, _LONGEST_SERIES))


def extent_of(graph: GraphProto, inputs: Iterable[ValueInfoProto] | None = None) -> Extent:
    """Follow inputs through windows and steps; return the deepest stride and the largest receptive field.

    Args:
        graph: the main graph.
        inputs: those to follow; all unless given.
    """
    tracer = _Tracer()
    tracer.reached = {i.name: _Reach() for i in (graph.input if inputs is None else inputs)}
    tracer.walk(graph)
    return Extent(max(tracer.rows, tracer.columns), tracer.rows, tracer.columns, tracer.widest)


@dataclass(frozen=True)
class _Reach:
    """Strides along the last two axes, and the receptive field of one place along the longer."""

    rows: int = 1
    columns: int = 1
    field: int = 1


@dataclass
class _Tracer:
    """A walk that follows inputs forward.

    Attributes:
        reached: by tensor what one place of it stands for.
        shapes: of initializers.
        stored: small constants.
        rows: the largest stride so far along the last axis but one.
        columns: along the last.
        widest: the largest receptive field so far.
    """

    reached: dict[str, _Reach] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: dict[str, TensorProto] = field(default_factory=dict)
    rows: int = 1
    columns: int = 1
    widest: int = 1

    def walk(self, graph: GraphProto) -> None:
        """Go through nodes in their order, those of subgraphs included."""
        for tensor in graph.initializer:
            self.shapes[tensor.name] = tuple(tensor.dims)
            self.reached.pop(tensor.name, None)
            if len(tensor.dims) <= 1:
                self.stored[tensor.name] = tensor
        for node in graph.node:
            if node.op_type == "Constant":
                self.stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
                continue
            inner = [a.g for a in node.attribute if a.HasField("g")]
            for subgraph in inner:
                self.walk(subgraph)
            ends = [o.name for subgraph in inner for o in subgraph.output]
            sources = [self.reached[name] for name in (*node.input, *ends) if name in self.reached]
            if sources and node.op_type not in _ENDS:
                self.reached |= dict.fromkeys(node.output, self._step(node, sources))

    def _step(self, node: NodeProto, sources: Sequence[_Reach]) -> _Reach:
        rows, columns, seen = (max(getattr(s, part) for s in sources) for part in ("rows", "columns", "field"))
        try:
            kernel, steps = _window(node, self.shapes, self.stored)
        except (KeyError, TypeError, ValueError):  # attributes missing or of a wrong kind, which is told later
            kernel, steps = 1, [1]
        seen += (kernel - 1) * max(rows, columns)
        rows, columns = rows * steps[0], columns * steps[-1]
        if node.op_type in ("ConvTranspose", "Resize", "Upsample", "DepthToSpace"):
            rows, columns = max(1, rows // 2), max(1, columns // 2)
        self.rows, self.columns = max(self.rows, rows), max(self.columns, columns)
        self.widest = max(self.widest, seen)
        return _Reach(rows, columns, seen)


def _window(
    node: NodeProto, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, TensorProto]
) -> tuple[int, Sequence[int]]:
    """Return the extent of a node's window along its longer side, and its steps along the last two axes or one."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}
    if node.op_type in _WINDOWS:
        operand = _KERNEL_OPERAND.get(node.op_type)
        weight = shapes.get(node.input[operand], ()) if operand is not None and operand < len(node.input) else ()
        kernel = list(attributes.get("kernel_shape") or weight[2:]) or [1]
        dilations = attributes.get("dilations") or [1] * len(kernel)
        sizes = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=False)]
        return max(sizes), list(attributes.get("strides") or [1])[-2:]
    if node.op_type == "SpaceToDepth":
        return int(attributes["blocksize"]), [int(attributes["blocksize"])]
    if node.op_type == "STFT":
        return max(_integers(node, (3,), stored), default=1), [max(_integers(node, (1,), stored), default=1)]
    if node.op_type == "Slice":
        steps = list(attributes.get("steps", ())) or _integers(node, (4,), stored)
        return 1, [max([s for s in steps if 0 < s <= 16], default=1)]
    return 1, [1]


def _integers(node: NodeProto, operands: Iterable[int], stored: Mapping[str, TensorProto]) -> list[int]:
    """Return the integers of small constant operands."""
    found: list[int] = []
    for operand in operands:
        tensor: Any = stored.get(node.input[operand]) if operand < len(node.input) else None
        if tensor is not None and tensor.data_location != TensorProto.EXTERNAL:
            found += [int(v) for v in numpy_helper.to_array(tensor).reshape(-1)]
    return found
