"""Every tensor's shape and every small integer value, by abstract interpretation.

A walk goes through the graph once, in topological order, with concrete sizes for its dynamic inputs. Shapes come from
ONNX's schemas, from shape functions of operators without a schema, or from the file; values are computed by
:mod:`spa.model.shape_values`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from spa.errors import ModelError
from spa.model import contrib_shapes, marks  # noqa: F401 # register them
from spa.model.graph import Graph, Node, schema_of
from spa.model.lengths import length_inputs, steps_of
from spa.model.shape_registry import Shape, has_notation, noted, shape_function
from spa.model.shape_values import FOLDERS, LARGEST_VALUE, is_larger
from spa.model.traits import INDICES, NUMPY_FLOATS, SIZES, Trait, traits

OutputType = tuple[int, "Shape | None"]  # element type and shape of an output

CONSTANT_LIMIT = 4096  # elements of an integer constant whose value is still looked at
VALUE_LIMIT = 1 << 15  # elements of an integer tensor that is still worth computing
FLOAT_LIMIT = 8  # elements of a float vector computed from shapes (scales, sizes)


@dataclass
class Walk:
    """The shapes and values that one walk found, by tensor name.

    Attributes:
        shape: each tensor's shape; a tensor whose shape nothing tells is missing.
        dtype: each tensor's element type (``TensorProto.FLOAT`` ...).
        value: the known values of small integer tensors, and of small float tensors computed from shapes.
        computed: the names in ``value`` that a node computed (constants are not).
        open_axes: (tensor, axis) pairs whose size depends on data and was made up.
        given: the names in ``value`` that follow an input that states a length: they are what a caller should give,
            and nothing that may be relied on.
    """

    shape: dict[str, Shape] = field(default_factory=dict)
    dtype: dict[str, int] = field(default_factory=dict)
    value: dict[str, np.ndarray] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    open_axes: set[tuple[str, int]] = field(default_factory=set)
    given: set[str] = field(default_factory=set)


Override = Callable[[Node, Walk], Mapping[int, np.ndarray]]


class Walker:
    """A walker of graphs; it remembers the results of schema inference, since real networks repeat their blocks."""

    def __init__(self) -> None:
        self._memo: dict[Any, list[OutputType] | None] = {}

    def walk(
        self,
        graph: Graph,
        inputs: Mapping[str, Shape],
        unknown: int = 1009,
        override: Override | None = None,
        known: Collection[str] = (),
    ) -> Walk:
        """Walk over the graph once.

        Args:
            graph: the model.
            inputs: a concrete shape for every graph input.
            unknown: the size made up for axes whose size depends on data.
            override: called before each node is inferred: (node, walk so far) → values by operand, to use instead of
                those that the walk found.
            known: names of values that another walk has found small; they are computed here though they be larger.

        Raises:
            ModelError: an operator's inputs contradict its specification at these sizes.
        """
        walk = Walk()
        for info in graph.model.graph.input:
            if info.type.HasField("tensor_type") and info.name in inputs:
                walk.dtype[info.name] = info.type.tensor_type.elem_type
                walk.shape[info.name] = inputs[info.name]
        steps = steps_of(inputs)
        for name in length_inputs(graph.model.graph) if steps is not None else ():
            walk.value[name] = np.full(inputs[name], steps, helper.tensor_dtype_to_np_dtype(walk.dtype[name]))
            walk.computed.add(name)
            walk.given.add(name)
        for name, tensor in graph.constants.items():
            self._constant(graph, walk, name, tensor)
        for node in graph.nodes:
            if node.op == "Constant" and node.outputs[0] in walk.shape:
                continue
            values = override(node, walk) if override else {}
            try:
                limit = LARGEST_VALUE if node.outputs and node.outputs[0] in known else VALUE_LIMIT
                if not self._fold(node, walk, values, limit):
                    self._infer(graph, node, walk, unknown, values)
            except ModelError as error:
                raise ModelError(f"{error} {_remedy(graph, walk)}") from error
            if node.key == "Reshape" and not walk.open_axes:
                _refuse_another_size(node, walk)
            if node.key == "Gemm" and override is None:
                _refuse_other_rows(node, walk)
            if node.key == "Gather" and override is None and not walk.open_axes:
                _refuse_missing_entries(node, walk)
        return walk

    @staticmethod
    def _constant(graph: Graph, walk: Walk, name: str, tensor: TensorProto) -> None:
        walk.shape[name] = tuple(tensor.dims)
        walk.dtype[name] = tensor.data_type
        size = math.prod(tensor.dims)
        if (tensor.data_type in SIZES and size <= CONSTANT_LIMIT) or (tensor.data_type in NUMPY_FLOATS and size <= 16):
            walk.value[name] = graph.array(name)

    def _fold(self, node: Node, walk: Walk, values: Mapping[int, np.ndarray], limit: int) -> bool:
        """Compute the node's outputs where they are small, integer (or computed from shapes) and known.

        Args:
            node: the node.
            walk: the walk so far; takes in the outputs.
            values: by operand, to use instead of those that the walk found.
            limit: the most elements of an output.

        Returns:
            Whether the outputs were computed.
        """
        folder = FOLDERS.get(node.op) if not node.domain else None
        if folder is None:
            return False
        measure = Trait.MEASURE in traits(node.key)
        if measure:
            if node.inputs[0] not in walk.shape:
                return False
            arguments: list[np.ndarray | None] = [np.asarray(walk.shape[node.inputs[0]], dtype=np.int64)]
        else:
            if any(name and name not in walk.value for name in node.inputs):
                return False
            arguments = [values.get(i, walk.value[name]) if name else None for i, name in enumerate(node.inputs)]
        try:
            if is_larger(node, arguments, max(limit, LARGEST_VALUE)):
                return False
            results = folder(node, arguments)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise ModelError(f"{node.label}: {error}.") from error
        except KeyError as error:
            raise ModelError(f"{node.label}: its attribute {error} is missing.") from error
        if results is None or not all(_worth_keeping(r, limit) for r in results):
            return False
        # What is made from constants alone may be small weights, or masks and zero points of one value per channel
        # where its type is not that of sizes and indices: its value is known, but it keeps its axes.
        data = any(a is not None and a.dtype.kind == "f" for a in (*arguments, *results))
        data = data or all(_is_per_channel(r) for r in results)
        is_data = data and not any(n in walk.computed for n in node.inputs) and not measure
        if not measure and not walk.given.isdisjoint(node.inputs):
            walk.given.update(node.outputs)
        for name, result in zip(node.outputs, results, strict=False):
            if name:
                walk.value[name], walk.shape[name] = result, tuple(result.shape)
                walk.dtype[name] = helper.np_dtype_to_tensor_dtype(result.dtype)
                if not is_data:
                    walk.computed.add(name)
        return True

    def _infer(self, graph: Graph, node: Node, walk: Walk, unknown: int, values: Mapping[int, np.ndarray]) -> None:
        shapes = [
            tuple(values[i].shape) if i in values else walk.shape.get(name) if name else None
            for i, name in enumerate(node.inputs)
        ]
        if any(name and name not in walk.shape for name in node.inputs):
            return
        dtypes = [walk.dtype.get(name, 0) if name else 0 for name in node.inputs]
        operands = [values.get(i, walk.value.get(name)) for i, name in enumerate(node.inputs)]
        outputs = self._memoised(node, shapes, dtypes, operands, walk)
        if outputs is None:
            outputs = noted(node, shapes, dtypes) or _declared(graph, node)
        for name, (dtype, shape) in zip(node.outputs, outputs, strict=False):
            if name and shape is not None:
                walk.dtype[name] = dtype
                walk.open_axes.update((name, i) for i, size in enumerate(shape) if size < 0)
                walk.shape[name] = tuple(unknown if size < 0 else size for size in shape)

    def _memoised(
        self,
        node: Node,
        shapes: list[Shape | None],
        dtypes: list[int],
        values: list[np.ndarray | None],
        walk: Walk,
    ) -> list[OutputType] | None:
        value_keys = tuple(None if v is None else (v.dtype.str, v.shape, v.tobytes()) for v in values)
        attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.proto.attribute))
        key = (node.key, node.version, tuple(shapes), tuple(dtypes), value_keys, attributes, len(node.outputs))
        if node.subgraphs:
            try:
                return _schema_outputs(node, shapes, dtypes, values, walk)
            except ModelError:
                return None  # a branch that does not run at these sizes may well contradict itself
        if key not in self._memo:
            function = shape_function(node.key)
            if function is None:
                self._memo[key] = _schema_outputs(node, shapes, dtypes, values, walk)
            else:
                try:
                    self._memo[key] = list(function(node, shapes, dtypes, values))
                except (ValueError, LookupError, TypeError, ZeroDivisionError) as error:
                    raise ModelError(f"{node.label}: its operands do not fit together ({error!r}).") from error
        return self._memo[key]


def _refuse_another_size(node: Node, walk: Walk) -> None:
    """Refuse a Reshape to another number of elements, which ONNX's inference takes where all sizes are constants.

    Raises:
        ModelError: sizes of its input are written into the graph.
    """
    given, made = (walk.shape.get(name) for name in (node.inputs[0], node.outputs[0]))
    if given is not None and made is not None and math.prod(given) != math.prod(made):
        raise ModelError(
            f"{node.label} makes {list(made)} of {list(given)}: sizes are written into the graph. Export it with open "
            "sizes, or give those that it takes (--size)."
        )


def _refuse_other_rows(node: Node, walk: Walk) -> None:
    """Refuse a product of matrices that do not fit, which the inference of old versions of onnx takes.

    Raises:
        ModelError: sizes of its input are written into the graph.
    """
    left, right = (walk.shape.get(name) for name in node.inputs[:2])
    turn_left, turn_right = (bool(node.attributes.get(name, 0)) for name in ("transA", "transB"))
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return
    summed = left[0 if turn_left else 1], right[1 if turn_right else 0]
    if summed[0] != summed[1]:
        raise ModelError(
            f"{node.label} multiplies {list(left)} by {list(right)}: sizes are written into the graph. Export it with "
            "open sizes, or give those that it takes (--size)."
        )


def _refuse_missing_entries(node: Node, walk: Walk) -> None:
    """Refuse to look up entries that a table lacks: positions beyond its end, at sizes that the model does not take.

    Raises:
        ModelError: an index that follows sizes is out of bounds.
    """
    shape, indices = walk.shape.get(node.inputs[0]), walk.value.get(node.inputs[1])
    if not shape or indices is None or not indices.size:
        return
    count = shape[node.attributes.get("axis", 0)]
    beyond = indices[(indices >= count) | (indices < -count)]
    if beyond.size:
        raise ModelError(
            f"{node.label} looks up entry {int(beyond[0])} of {count}: the model takes no sizes as large. Give those "
            "that it takes (--size)."
        )


def _remedy(graph: Graph, walk: Walk) -> str:
    """Return the remedy for a contradiction, which sizes that were made up may have caused."""
    made_up = {name for name, _ in walk.open_axes}
    node = next((n for n in graph.nodes if made_up.intersection(n.outputs)), None)
    if node is None:
        told = next((n for n in graph.nodes if has_notation(n.key) and walk.shape.keys() & set(n.outputs)), None)
        if told is not None:
            return f"The output shape of {told.label} is what its rule's line says. Check that line."
        return "Check the model with onnx.checker."
    return f"The output shape of {node.label} was made up, since its operands decide it. Make them constants."


def _is_per_channel(result: np.ndarray) -> bool:
    return max(result.shape, default=0) == result.size and helper.np_dtype_to_tensor_dtype(result.dtype) not in INDICES


def _worth_keeping(result: np.ndarray, limit: int) -> bool:
    if result.dtype.kind == "f":
        return result.ndim <= 1 and result.size <= FLOAT_LIMIT
    return result.size <= limit


def _tensor_type(dtype: int, shape: Shape) -> TypeProto:
    return helper.make_tensor_type_proto(dtype, list(shape))


def _schema_outputs(
    node: Node, shapes: list[Shape | None], dtypes: list[int], values: list[np.ndarray | None], walk: Walk
) -> list[OutputType] | None:
    """Infer the node's outputs from ONNX's own schema; return None where there is no schema."""
    schema = schema_of(node)
    if schema is None:
        return None
    types = {
        name: _tensor_type(dtype, shape)
        for name, dtype, shape in zip(node.inputs, dtypes, shapes, strict=True)
        if name and shape is not None
    }
    if node.subgraphs:
        types |= {name: _tensor_type(walk.dtype[name], shape) for name, shape in walk.shape.items()}
    data = {
        name: numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, value in zip(node.inputs, values, strict=True)
        if value is not None
    }
    opsets = [helper.make_opsetid(node.domain, node.version)]
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, _bare(node), types, data, opset_imports=opsets, ir_version=10
        )
    except (InferenceError, ValidationError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise ModelError(f"{node.label}: {reason}.") from error
    outputs: list[OutputType] = []
    for name in node.outputs:
        tensor = inferred[name].tensor_type if name in inferred else None
        if tensor is None or not tensor.HasField("shape"):
            outputs.append((tensor.elem_type if tensor is not None else 0, None))
            continue
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        if node.op == "TopK" and not node.domain and len(values) > 1 and values[1] is None and shapes[0] is not None:
            # Where data decide how many there are, inference forgets the sizes of the other axes, too.
            dims = tuple(-1 if axis == _axis(node, len(dims)) else size for axis, size in enumerate(shapes[0]))
        outputs.append((tensor.elem_type, dims))
    return outputs


def _axis(node: Node, rank: int) -> int:
    return int(node.attributes.get("axis", -1)) % max(1, rank)


def _bare(node: Node) -> onnx.NodeProto:
    """Copy the node without metadata and documentation, which inference would parse in vain."""
    bare = onnx.NodeProto(op_type=node.op, domain=node.domain, input=node.inputs, output=node.outputs)
    bare.attribute.extend(node.proto.attribute)
    return bare


def _declared(graph: Graph, node: Node) -> list[OutputType]:
    """Return the types that the file declares for the outputs of an operator that has no other shape inference.

    Sizes that are not static are -1.
    """
    infos = {i.name: i for i in (*graph.model.graph.value_info, *graph.model.graph.output)}
    outputs: list[OutputType] = []
    for name in node.outputs:
        tensor = infos[name].type.tensor_type if name in infos else None
        if tensor is None or not tensor.HasField("shape"):
            outputs.append((0, None))
            continue
        outputs.append((tensor.elem_type, tuple(d.dim_value or -1 for d in tensor.shape.dim)))
    return outputs
