"""Upper bounds of the values that an input may hold, read from what it indexes in the graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from spa.model.functions import inlined
from spa.model.lengths import length_inputs
from spa.model.traits import Trait, traits
from spa.running.runtime import Model, TensorSpec, input_specs, load_graph

__all__ = ["Lengths", "indexed_axes", "input_ranges", "lengths_for", "ranges_for"]

_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
_SMALL_NUMBERS = (onnx.TensorProto.UINT8, onnx.TensorProto.INT16, onnx.TensorProto.FLOAT)
_LONGEST_LIST = 1 << 16  # of categories

# Carriers' operands whose values come through, where that is not the first one alone.
_CARRIED_OPERANDS = {"Concat": slice(None), "Max": slice(None), "Min": slice(None), "Where": slice(1, None)}

# com.microsoft's EmbedLayerNormalization: operand with the ids -> operand with the table.
_EMBED = {0: 2, 1: 4, 8: 3}


def input_ranges(model: onnx.ModelProto) -> dict[str, int]:
    """Return exclusive upper bounds of the inputs that index something of known size.

    1. An input that reaches the indices of a Gather (or GatherElements, GatherND, com.microsoft
       GatherBlockQuantized) stays below the length of the gathered axis.
    2. So does one that reaches an operand of com.microsoft EmbedLayerNormalization with a table of its own.
    3. One that reaches OneHot stays below its depth.
    4. One that reaches the indices of ScatterElements, ScatterND, or the images of RoiAlign's regions, likewise.
    5. One that is compared by Equal with a constant list 0, 1, 2 … stays below its length: that is a one-hot, too.

    "Reaches" means: through operators that move or copy values, and through the addition of a constant,
    which is taken off the bound. Where several bounds meet, the smallest counts.

    Args:
        model: a parsed model; weights in external files need not be loaded. It is not changed.

    Returns:
        Bounds by the input's name; an input that indexes nothing is absent.
    """
    model = inlined(model)
    tracer = _Tracer(model)
    tracer.walk(model.graph.node)
    return tracer.bounds


def indexed_axes(model: onnx.ModelProto) -> dict[str, list[tuple[str, int]]]:
    """Return the tensors that inputs index where their sizes are no constants of the file: graphs' edges index nodes.

    Args:
        model: as for ``input_ranges``, with its functions inlined.

    Returns:
        By the input's name (tensor, axis), in the order of the nodes that index.
    """
    tracer = _Tracer(model)
    tracer.walk(model.graph.node)
    return tracer.indexed


@dataclass(frozen=True)
class Lengths:
    """The inputs that state how many steps there are, of com.microsoft GroupQueryAttention with those of a cache.

    Attributes:
        more: by input what it is more than all steps.
        caches: the inputs (batch, heads, steps, size) that hold earlier steps.
    """

    more: Mapping[str, int] = field(default_factory=dict)
    caches: tuple[str, ...] = ()


def lengths_for(model: Model, specs: Iterable[TensorSpec]) -> Lengths:
    """Return the inputs that state lengths; the model is not read where no input can."""
    if all(spec.dtype is None or spec.dtype.kind not in "iu" or len(spec.shape) > 2 for spec in specs):
        return Lengths()
    graph = inlined(load_graph(model))
    if not any(node.op_type == "GroupQueryAttention" for node in graph.graph.node):
        return Lengths(dict.fromkeys(length_inputs(graph.graph), 0))
    tracer = _Tracer(graph)
    tracer.walk(graph.graph.node)
    return Lengths(tracer.lengths, tuple(tracer.caches))


def ranges_for(model: Model, specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Return the ``input_ranges`` of a model with known inputs; it is not read where they cannot be ids.

    Args:
        model: a path, the bytes of a file, or a parsed model.
        specs: its inputs.

    Returns:
        Bounds by the input's name.

    Raises:
        ModelError: the model cannot be read.
    """
    # Keras feeds ids as floats and casts them, but an id per pixel or voxel does not occur.
    if all(spec.dtype is None or (spec.dtype.kind not in "iu" and len(spec.shape) > 2) for spec in specs):
        return {}
    return input_ranges(load_graph(model))


class _Tracer:
    """A walk that follows inputs forward to what they index.

    Attributes:
        bounds: exclusive upper bounds found so far, by input.
        reach: by tensor the inputs that it stems from, each with what was added on the way.
        shapes: of initializers, and of tables that operators move.
        constants: the integers of a single element.
        counts: of constants that list 0, 1, 2 …, their lengths.
        indexed: by input the (tensor, axis) of unknown size that it indexes.
        lengths: by input what it is more than the number of all steps.
        caches: inputs that hold earlier steps.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.bounds: dict[str, int] = {}
        self.reach: dict[str, dict[str, int]] = {spec.name: {spec.name: 0} for spec in input_specs(model)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.indexed: dict[str, list[tuple[str, int]]] = {}
        self.lengths: dict[str, int] = {}
        self.caches: dict[str, None] = {}
        self._read(model.graph)

    def walk(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Go through nodes in their order, those of subgraphs included."""
        for node in nodes:
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    self._read(graph)
                    self.walk(graph.node)
            self._constant(node)
            self._bound(node)
            self._carry(node)

    def _read(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._record(tensor.name, tensor)

    def _record(self, name: str, tensor: onnx.TensorProto) -> None:
        self.shapes[name] = tuple(tensor.dims)
        size = math.prod(tensor.dims)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or not 0 < size <= _LONGEST_LIST:
            return
        if size == 1 and tensor.data_type in _INTEGERS:
            self.constants[name] = int(onnx.numpy_helper.to_array(tensor).item())
        elif size > 1 and size == max(tensor.dims) and tensor.data_type in (*_INTEGERS, *_SMALL_NUMBERS):
            values = onnx.numpy_helper.to_array(tensor).reshape(-1)
            if np.array_equal(values, np.arange(size)):
                self.counts[name] = size

    def _constant(self, node: onnx.NodeProto) -> None:
        """Record constants, and tables behind an operator that keeps or permutes their axes."""
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    self._record(node.output[0], attribute.t)
                elif attribute.name == "value_int":
                    self.constants[node.output[0]] = attribute.i
            return
        shape = self.shapes.get(node.input[0]) if node.input else None
        if shape is None or not node.output:
            return
        if node.op_type in ("Identity", "Cast", "DequantizeLinear"):
            self.shapes[node.output[0]] = shape
            for known in (self.constants, self.counts) if node.op_type != "DequantizeLinear" else ():
                if node.input[0] in known:
                    known[node.output[0]] = known[node.input[0]]
        elif node.op_type in ("Unsqueeze", "Reshape") and node.input[0] in self.counts:
            self.counts[node.output[0]] = self.counts[node.input[0]]
        elif node.op_type == "Transpose":
            perm = _attribute(node, "perm") or range(len(shape))[::-1]
            self.shapes[node.output[0]] = tuple(shape[axis] for axis in perm)

    def _bound(self, node: onnx.NodeProto) -> None:
        inputs = node.input
        if node.op_type in ("Gather", "GatherElements", "GatherBlockQuantized"):
            name = "gather_axis" if node.op_type == "GatherBlockQuantized" else "axis"
            self._index(inputs[1], inputs[0], _attribute(node, name) or 0)
        elif node.op_type == "GatherND":
            self._index(inputs[1], inputs[0], _attribute(node, "batch_dims") or 0)
        elif node.op_type in ("ScatterElements", "ScatterND"):
            self._index(inputs[1], inputs[0], _attribute(node, "axis") or 0)
        elif node.op_type == "RoiAlign":  # the image of each region
            self._index(inputs[2], inputs[0], 0)
        elif node.op_type == "OneHot":
            self._limit(inputs[0], self.constants.get(inputs[1]))
        elif node.op_type == "Equal":
            for here, other in ((0, 1), (1, 0)):
                self._limit(inputs[here], self.counts.get(inputs[other]))
        elif node.op_type == "GroupQueryAttention":
            self.caches |= dict.fromkeys(name for operand in inputs[3:4] for name in self.reach.get(operand, ()))
            for operand, more in zip(inputs[5:7], (-1, 0), strict=False):
                self.lengths |= {name: more - added for name, added in self.reach.get(operand, {}).items()}
        elif node.op_type == "EmbedLayerNormalization":
            for ids, table in _EMBED.items():
                if max(ids, table) < len(inputs):
                    self._limit(inputs[ids], self._size(inputs[table], 0))

    def _index(self, indices: str, table: str, axis: int) -> None:
        size = self._size(table, axis)
        self._limit(indices, size)
        for name in self.reach.get(indices, {}) if size is None else ():
            self.indexed.setdefault(name, []).append((table, axis))

    def _size(self, table: str, axis: int) -> int | None:
        shape = self.shapes.get(table)
        return shape[axis] if shape and -len(shape) <= axis < len(shape) else None

    def _limit(self, tensor: str, size: int | None) -> None:
        for name, added in self.reach.get(tensor, {}).items() if size is not None else ():
            bound = (size or 0) - max(added, 0)
            # Not positive: the addition wraps negative indices (`i + rows`) in a form that is not recognised.
            if bound > 0:
                self.bounds[name] = min(bound, self.bounds.get(name, bound))

    def _carry(self, node: onnx.NodeProto) -> None:
        sources: dict[str, int] = {}
        if node.op_type in ("Add", "Sub"):
            sign = 1 if node.op_type == "Add" else -1
            for here, other in ((0, 1), (1, 0)) if sign > 0 else ((0, 1),):
                constant = self.constants.get(node.input[other])
                for name, added in self.reach.get(node.input[here], {}).items() if constant is not None else ():
                    sources[name] = added + sign * (constant or 0)
        elif Trait.CARRIER in traits(node.op_type):
            # Where wraps negative indices, `Where(i < 0, i + rows, i)`: the branch that adds less is the one
            # taken.
            worse = min if node.op_type == "Where" else max
            for tensor in node.input[_CARRIED_OPERANDS.get(node.op_type, slice(1))]:
                for name, added in self.reach.get(tensor, {}).items():
                    sources[name] = worse(added, sources.get(name, added))
        if sources:
            for output in node.output:
                self.reach[output] = sources


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return None
