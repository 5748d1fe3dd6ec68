"""Every tensor's shape and every small integer value, by abstract interpretation.

The graph is walked once in topological order with concrete sizes for its dynamic inputs, and once more with other
sizes: a value that is equal in both walks is static, one that differs follows the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.shape_inference import InferenceError

from spa.errors import ModelError
from spa.model import contrib_shapes  # noqa: F401 # registers them
from spa.model.graph import Graph, Node, schema_of
from spa.model.shape_registry import Shape, noted, shape_function
from spa.model.shape_values import FOLDERS
from spa.model.traits import NUMPY_FLOATS, SIZES, Trait, traits

Found = tuple[int, "Shape | None"]  # element type and shape of an output

VALUE_LIMIT = 4096  # elements of an integer tensor that is still worth computing
FLOAT_LIMIT = 8  # elements of a float vector computed from shapes (scales, sizes)

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


@dataclass
class Walk:
    """What one walk found.

    Attributes:
        shape: each tensor's shape; a tensor that no rule could size is missing.
        dtype: each tensor's element type (``TensorProto.FLOAT`` ...).
        value: the known values of small integer tensors, and of small float tensors computed from shapes.
        computed: the names in ``value`` that a node computed (constants are not).
        open_axes: (tensor, axis) pairs whose size depends on data and was made up.
    """

    shape: dict[str, Shape] = field(default_factory=dict)
    dtype: dict[str, int] = field(default_factory=dict)
    value: dict[str, np.ndarray] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    open_axes: set[tuple[str, int]] = field(default_factory=set)


Override = Callable[[Node, Walk], Mapping[int, np.ndarray]]


class Walker:
    """Walks graphs; remembers what schema inference said, since real networks repeat their blocks."""

    def __init__(self) -> None:
        self._memo: dict[Any, list[Found] | None] = {}

    def walk(
        self, graph: Graph, inputs: Mapping[str, Shape], unknown: int = 1009, override: Override | None = None
    ) -> Walk:
        """One walk over the graph.

        Args:
            graph: the model.
            inputs: a concrete shape for every graph input.
            unknown: the size made up for axes whose size depends on data.
            override: asked before each node is inferred: (node, walk so far) → operand values to use instead.

        Raises:
            ModelError: an operator's inputs contradict its specification at these sizes.
        """
        walk = Walk()
        for info in graph.model.graph.input:
            if info.type.HasField("tensor_type") and info.name in inputs:
                walk.dtype[info.name] = info.type.tensor_type.elem_type
                walk.shape[info.name] = inputs[info.name]
        for name, tensor in graph.constants.items():
            self._constant(graph, walk, name, tensor)
        for node in graph.nodes:
            if node.op == "Constant" and node.outputs[0] in walk.shape:
                continue
            given = override(node, walk) if override else {}
            try:
                if not self._fold(node, walk, given):
                    self._infer(graph, node, walk, unknown, given)
            except ModelError as error:
                raise ModelError(f"{error} {_remedy(graph, walk)}") from error
        return walk

    @staticmethod
    def _constant(graph: Graph, walk: Walk, name: str, tensor: TensorProto) -> None:
        walk.shape[name] = tuple(tensor.dims)
        walk.dtype[name] = tensor.data_type
        size = math.prod(tensor.dims)
        if (tensor.data_type in SIZES and size <= VALUE_LIMIT) or (tensor.data_type in NUMPY_FLOATS and size <= 16):
            walk.value[name] = graph.array(name)

    def _fold(self, node: Node, walk: Walk, given: Mapping[int, np.ndarray]) -> bool:
        """Compute the node's outputs where they are small, integer (or computed from shapes) and known."""
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
            arguments = [given.get(i, walk.value[name]) if name else None for i, name in enumerate(node.inputs)]
        try:
            results = folder(node, arguments)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise ModelError(f"{node.label}: {error}.") from error
        if results is None or not all(_worth_keeping(r) for r in results):
            return False
        # Floats made from constants alone may be small weights: their value is known, but they keep their axes.
        floats = any(a is not None and a.dtype.kind == "f" for a in (*arguments, *results))
        data = floats and not any(name in walk.computed for name in node.inputs) and not measure
        for name, result in zip(node.outputs, results, strict=False):
            if name:
                walk.value[name], walk.shape[name] = result, tuple(result.shape)
                walk.dtype[name] = helper.np_dtype_to_tensor_dtype(result.dtype)
                if not data:
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
        given = [values.get(i, walk.value.get(name)) for i, name in enumerate(node.inputs)]
        found = self._memoised(node, shapes, dtypes, given, walk)
        if found is None:
            found = noted(node, shapes, dtypes) or _declared(graph, node)
        for name, (dtype, shape) in zip(node.outputs, found, strict=False):
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
    ) -> list[Found] | None:
        known = tuple(None if v is None else (v.dtype.str, v.shape, v.tobytes()) for v in values)
        attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.proto.attribute))
        key = (node.key, node.version, tuple(shapes), tuple(dtypes), known, attributes, len(node.outputs))
        if node.subgraphs:
            return _schema_outputs(node, shapes, dtypes, values, walk)
        if key not in self._memo:
            contrib = shape_function(node.key)
            if contrib is None:
                found = _schema_outputs(node, shapes, dtypes, values, walk)
            else:
                found = list(contrib(node, shapes, dtypes))
            self._memo[key] = found
        return self._memo[key]


def _remedy(graph: Graph, walk: Walk) -> str:
    """What to do about a contradiction, which sizes that were made up may have caused."""
    made_up = {name for name, _ in walk.open_axes}
    node = next((n for n in graph.nodes if made_up.intersection(n.outputs)), None)
    if node is None:
        return "Check the model with onnx.checker."
    return f"The shape of what {node.label} returns was made up, since its operands decide it. Make them constants."


def _worth_keeping(result: np.ndarray) -> bool:
    if result.dtype.kind == "f":
        return result.ndim <= 1 and result.size <= FLOAT_LIMIT
    return result.size <= VALUE_LIMIT


def _tensor_type(dtype: int, shape: Shape) -> TypeProto:
    return helper.make_tensor_type_proto(dtype, list(shape))


def _schema_outputs(
    node: Node, shapes: list[Shape | None], dtypes: list[int], values: list[np.ndarray | None], walk: Walk
) -> list[Found] | None:
    """What ONNX's own schema says of the node's outputs; None where there is no schema."""
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
        found = onnx.shape_inference.infer_node_outputs(
            schema, _bare(node), types, data, opset_imports=opsets, ir_version=10
        )
    except (InferenceError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"{node.label}: {reason}.") from error
    outputs: list[Found] = []
    for name in node.outputs:
        tensor = found[name].tensor_type if name in found else None
        if tensor is None or not tensor.HasField("shape"):
            outputs.append((tensor.elem_type if tensor is not None else 0, None))
            continue
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        outputs.append((tensor.elem_type, dims))
    return outputs


def _bare(node: Node) -> onnx.NodeProto:
    """The node without metadata and documentation, which inference would parse in vain."""
    bare = onnx.NodeProto(op_type=node.op, domain=node.domain, input=node.inputs, output=node.outputs)
    bare.attribute.extend(node.proto.attribute)
    return bare


def _declared(graph: Graph, node: Node) -> list[Found]:
    """What the file itself declares of an operator's outputs that nobody else knows; only if all static."""
    infos = {i.name: i for i in (*graph.model.graph.value_info, *graph.model.graph.output)}
    found: list[Found] = []
    for name in node.outputs:
        tensor = infos[name].type.tensor_type if name in infos else None
        if tensor is None or not tensor.HasField("shape"):
            found.append((0, None))
            continue
        found.append((tensor.elem_type, tuple(d.dim_value or -1 for d in tensor.shape.dim)))
    return found


# -- the two points -------------------------------------------------------------------------------------------------


def input_shapes(model: ModelProto, batch: int, sequence: int, image: int) -> dict[str, Shape]:
    """Concrete shapes of all inputs; equal symbolic names get equal sizes."""
    named: dict[str, int] = {}
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
            shape.append(named.setdefault(dim.dim_param, guess) if dim.dim_param else guess)
        shapes[info.name] = tuple(shape)
    return shapes


def is_dynamic(model: ModelProto) -> bool:
    """Whether any input has an axis whose size the model leaves open."""
    return any(
        not (d.HasField("dim_value") and d.dim_value > 0)
        for i in model.graph.input
        for d in i.type.tensor_type.shape.dim
    )


@dataclass
class TwoPoints:
    """Two walks at different input sizes (the same walk twice for a model without open sizes)."""

    first: Walk
    second: Walk
    sizes: tuple[dict[str, Shape], dict[str, Shape]]
    walker: Walker

    def again(self, graph: Graph, overrides: Sequence[Override]) -> list[Walk]:
        """Walk another graph of the same interface (the pruned one) at the same points."""
        unknown = (1009, 2003)
        return [self.walker.walk(graph, self.sizes[i], unknown[i], override) for i, override in enumerate(overrides)]

    @property
    def walks(self) -> list[Walk]:
        """The distinct walks: one for a model without open sizes."""
        return [self.first] if self.second is self.first else [self.first, self.second]


def two_points(graph: Graph) -> TwoPoints:
    """Walk the graph at two input sizes that it accepts.

    Raises:
        ModelError: it accepts none of the sizes tried; the first contradiction is quoted.
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
            walks.append(walker.walk(graph, shapes, unknown=2003 if walks else 1009))
            sizes.append(shapes)
        except ModelError as failure:
            error = error or failure
            if not is_dynamic(model):
                break
        if len(walks) == 2 or (walks and not is_dynamic(model) and not walks[0].open_axes):
            break
    if not walks:
        raise error or ModelError("the model has inputs that are no tensors. Export it with tensor inputs.")
    if len(walks) == 1 and walks[0].open_axes:
        walks.append(walker.walk(graph, sizes[0], unknown=2003))
    second = walks[1] if len(walks) == 2 else walks[0]
    for name in walks[0].computed ^ second.computed:  # known at one size only, being too large at the other: data
        for walk in (walks[0], second):
            walk.computed.discard(name)
            walk.value.pop(name, None)
    return TwoPoints(walks[0], second, (sizes[0], sizes[-1]), walker)
