"""Strides and receptive fields, read from the graph: lengths of open axes at which a network sees something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spa.model.sizes import FALLBACKS, Guess

__all__ = ["Extent", "extent_of", "guesses"]

CELLS = 7  # rows and columns that an image has at the deepest stride, at least
STEPS = 64  # and steps of a series
_SMALLEST_IMAGE, _LARGEST_IMAGE = 64, 1024
_SHORTEST_SERIES, _LONGEST_SERIES = 64, 1 << 16

_WINDOWS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv", "MaxPool", "AveragePool", "QLinearAveragePool", "LpPool")
_KERNEL_OPERAND = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}
_ENDS = ("Shape", "Size", "ConstantOfShape", "Range")


@dataclass(frozen=True)
class Extent:
    """The scale on which a network looks at an input.

    Attributes:
        stride: how many places of the input one place of the coarsest tensor stands for.
        field: how many places of the input one place of any tensor sees, through convolutions and pools.
    """

    stride: int = 1
    field: int = 1


def guesses(model: ModelProto) -> tuple[Guess, ...]:
    """Return the sizes to try for a model's open axes: realistic ones first.

    Images get at least seven cells at the deepest stride, series fill the receptive field, tokens are 128.

    Args:
        model: a parsed model; weights in external files need not be loaded.
    """
    extent = extent_of(model.graph)
    cells = 8 if extent.stride < 32 else CELLS  # a power of two, where the images stay small
    image = min(max(cells * extent.stride, _SMALLEST_IMAGE), _LARGEST_IMAGE)
    length = max(extent.field, STEPS * extent.stride, _SHORTEST_SERIES)
    first = Guess(image=image, series=min(-(-length // extent.stride) * extent.stride, _LONGEST_SERIES))
    alone = Guess(batch=1, image=first.image, series=first.series)
    return (first, *FALLBACKS[:3], alone, *FALLBACKS[3:])


def extent_of(graph: GraphProto) -> Extent:
    """Follow the inputs through windows and steps; return the deepest stride and the largest receptive field."""
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    stored = {t.name: t for t in graph.initializer if len(t.dims) <= 1}
    reached = {i.name: Extent() for i in graph.input if i.name not in shapes}
    deepest, widest = 1, 1
    for node in graph.node:
        if node.op_type == "Constant":
            stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
            continue
        sources = [reached[name] for name in node.input if name in reached]
        if not sources or node.op_type in _ENDS:
            continue
        stride, field = max(s.stride for s in sources), max(s.field for s in sources)
        kernel, step = _window(node, shapes, stored)
        field += (kernel - 1) * stride
        stride *= step
        if node.op_type in ("ConvTranspose", "Resize", "Upsample", "DepthToSpace"):
            stride = max(1, stride // 2)
        deepest, widest = max(deepest, stride), max(widest, field)
        reached |= dict.fromkeys(node.output, Extent(stride, field))
    return Extent(deepest, widest)


def _window(
    node: NodeProto, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, TensorProto]
) -> tuple[int, int]:
    """Return the extent and the step of a node's window along its longer side; (1, 1) without one."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _WINDOWS:
        operand = _KERNEL_OPERAND.get(node.op_type)
        weight = shapes.get(node.input[operand], ()) if operand is not None and operand < len(node.input) else ()
        kernel = list(attributes.get("kernel_shape") or weight[2:]) or [1]
        dilations = attributes.get("dilations") or [1] * len(kernel)
        sizes = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=False)]
        return max(sizes), max(attributes.get("strides") or [1])
    if node.op_type == "SpaceToDepth":
        return int(attributes["blocksize"]), int(attributes["blocksize"])
    if node.op_type == "STFT":
        return max(_integers(node, (3,), stored), default=1), max(_integers(node, (1,), stored), default=1)
    if node.op_type == "Slice":
        steps = list(attributes.get("steps", ())) or _integers(node, (4,), stored)
        return 1, max([s for s in steps if 0 < s <= 16], default=1)
    return 1, 1


def _integers(node: NodeProto, operands: Iterable[int], stored: Mapping[str, TensorProto]) -> list[int]:
    """Return the integers of small constant operands."""
    found: list[int] = []
    for operand in operands:
        tensor: Any = stored.get(node.input[operand]) if operand < len(node.input) else None
        if tensor is not None and tensor.data_location != TensorProto.EXTERNAL:
            found += [int(v) for v in numpy_helper.to_array(tensor).reshape(-1)]
    return found
