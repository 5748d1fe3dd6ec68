"""Made-up inputs that must agree with one another: edges of a graph with its nodes, regions with their image.

An edge that names a node which is not there, or a region outside of its image, is refused by the runtime, or shows the
network what it never sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TypeProto, shape_inference
from onnx.shape_inference import InferenceError

from spa.model.functions import inlined
from spa.model.traits import FLOAT_NAMES
from spa.running.feeds import MASK, POSITION, SEGMENT, Recipe, boxes
from spa.running.ranges import indexed_axes
from spa.running.runtime import TensorSpec

Axis = tuple[str, int]  # of an input
LARGE = 1 << 16  # bytes of a tensor whose values say nothing of shapes


@dataclass(frozen=True)
class Bonds:
    """The ways in which inputs must agree.

    Attributes:
        indices: by integer input what its values stay below: the size of an input's axis, or a number.
        regions: by input of boxes the images that they lie in, with the scale of the boxes' coordinates over pixels.
    """

    indices: Mapping[str, Axis | int] = field(default_factory=dict)
    regions: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.indices or self.regions)

    def fill(self, feeds: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """Replace what must agree with other inputs, in place."""
        for name, limit in self.indices.items():
            size = limit if isinstance(limit, int) else feeds[limit[0]].shape[limit[1]]
            feeds[name] = rng.integers(0, max(size, 1), feeds[name].shape).astype(feeds[name].dtype)
        for name, (image, scale) in self.regions.items():
            height, width = feeds[image].shape[2:]
            extents = np.array([width, height, width, height]) * scale
            feeds[name] = (boxes(feeds[name].shape, rng) * extents).astype(feeds[name].dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what agrees."""
        said = [
            f"{name} below {limit if isinstance(limit, int) else f'the size of {limit[0]}[{limit[1]}]'}"
            for name, limit in self.indices.items()
        ]
        said += [f"{name} are regions of {image}" for name, (image, _) in self.regions.items()]
        return (f"made-up inputs agree: {', '.join(said)}",) if said else ()


def bonds_of(model: ModelProto, recipe: Recipe) -> Bonds:
    """Find what a model's inputs must agree in.

    Args:
        model: is not changed.
        recipe: how its inputs are made.
    """
    regions = _regions(model, recipe)
    free = {s.name for s in recipe.specs if _may_index(s, recipe)}
    if not free:
        return Bonds(regions=regions)
    flat = inlined(model)
    indexed = {name: found for name, found in indexed_axes(flat).items() if name in free}
    sizes = _sizes(flat, recipe) if indexed else {}
    indices: dict[str, Axis | int] = {}
    for name, found in indexed.items():
        known = (sizes.get(tensor, ()) for tensor, _ in found)
        limits = [dims[axis] for dims, (_, axis) in zip(known, found, strict=True) if -len(dims) <= axis < len(dims)]
        numbers = [limit for limit in limits if isinstance(limit, int)]
        axes = [limit for limit in limits if isinstance(limit, tuple) and limit[0] != name]
        if numbers or axes:  # a number says more than an axis whose size is chosen
            indices[name] = min(numbers) if numbers else axes[0]
    return Bonds(indices, regions)


def _may_index(spec: TensorSpec, recipe: Recipe) -> bool:
    is_named = any(pattern.search(spec.name) for pattern in (MASK, POSITION, SEGMENT))
    is_whole = spec.dtype is not None and spec.dtype.kind in "iu" and spec.dtype.itemsize > 1
    return is_whole and bool(spec.shape) and spec.name not in recipe.ranges and not is_named


def _sizes(model: ModelProto, recipe: Recipe) -> dict[str, list[Axis | int | None]]:
    """Infer of each tensor the sizes of its axes: numbers, or axes of inputs that are open; None where unknown."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if len(tensor.raw_data) > LARGE:
            tensor.ClearField("raw_data")
    axes: dict[str, Axis] = {}
    shared: dict[str, str] = {}
    specs = {s.name: s for s in recipe.specs}
    for info in bare.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim if info.name in specs else ()):
            if not isinstance(specs[info.name].shape[axis], int):
                own = f"{info.name}[{axis}]"
                axes[own] = info.name, axis
                dim.dim_param = shared.setdefault(dim.dim_param or own, own)
    try:
        graph = shape_inference.infer_shapes(bare, data_prop=True).graph
    except (InferenceError, ValueError):  # ValueError: larger than a message can be
        return {}
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {info.name: _dims(info.type, axes) for info in values}
    return found | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def _dims(kind: TypeProto, axes: Mapping[str, Axis]) -> list[Axis | int | None]:
    return [dim.dim_value or axes.get(dim.dim_param) for dim in kind.tensor_type.shape.dim]


def _regions(model: ModelProto, recipe: Recipe) -> dict[str, tuple[str, float]]:
    """Return the inputs that are the regions of a RoiAlign, each with the image that they lie in."""
    floats = {s.name: s for s in recipe.specs if s.element in FLOAT_NAMES}
    images = [name for name, spec in floats.items() if len(spec.shape) == 4]
    found: dict[str, tuple[str, float]] = {}
    for node in model.graph.node:
        if node.op_type == "RoiAlign" and node.input[1] in floats and images:
            scale = next((a.f for a in node.attribute if a.name == "spatial_scale"), 1.0)
            # Features that are an input themselves are smaller than the image by the scale; else the image is at hand.
            own = node.input[0] in images
            found[node.input[1]] = (node.input[0], 1 / scale) if own else (images[0], 1.0)
    return found
