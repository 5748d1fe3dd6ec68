"""A light, read-only view of an ONNX model: nodes, constants, uses.

The engine reads through this view and edits the protobuf message itself, so that everything it does not touch
(names, metadata, versions, value types unknown to us) stays as it was. See docs/decisions/0001.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.errors import ModelError
from spa.model.versions import FREE_INITIALIZERS

if TYPE_CHECKING:
    import networkx as nx

CACHED = 1 << 22  # bytes of a constant up to which its array is kept beside the message


def domain_of(node: NodeProto) -> str:
    """Return the node's domain; the default domain's alias ``ai.onnx`` is the empty string."""
    return "" if node.domain == "ai.onnx" else node.domain


@dataclass(slots=True, eq=False)
class Node:
    """One node, as rules see it.

    Attributes:
        proto: the message.
        index: the position in the graph.
        version: the version of the node's domain that the model imports.
        op: the operator's name, without domain.
        domain: the operator's domain, empty for ONNX's own.
        inputs: names of the operands, empty where an optional one is left out.
        outputs: names of the results.
    """

    proto: NodeProto
    index: int
    version: int
    op: str = field(init=False)
    domain: str = field(init=False)
    inputs: tuple[str, ...] = field(init=False)
    outputs: tuple[str, ...] = field(init=False)
    _attributes: dict[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.op = self.proto.op_type
        self.domain = domain_of(self.proto)
        self.inputs = tuple(self.proto.input)
        self.outputs = tuple(self.proto.output)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attribute values by name; strings decoded, tensors and graphs as protobuf messages."""
        if self._attributes is None:
            self._attributes = {a.name: _attribute_value(a) for a in self.proto.attribute}
        return self._attributes

    @property
    def subgraphs(self) -> list[GraphProto]:
        """The graphs in the node's attributes (If, Loop, Scan ...)."""
        return subgraphs_of(self.proto)

    @property
    def key(self) -> str:
        """``domain::Op``, or the bare operator in the default domain."""
        return f"{self.domain}::{self.op}" if self.domain else self.op

    @property
    def label(self) -> str:
        """The node's name in messages: operator and name (its first output's where it has none)."""
        name = self.proto.name or next((o for o in self.outputs if o), f"#{self.index}")
        return f"{self.op} {name!r}"


def _attribute_value(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return list(value)
    if attribute.type == AttributeProto.STRINGS:
        return [v.decode("utf-8", "replace") for v in value]
    return value


def subgraphs_of(node: NodeProto) -> list[GraphProto]:
    """Return the graphs in a node's attributes (If, Loop, Scan ...)."""
    subgraphs: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            subgraphs.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            subgraphs.extend(attribute.graphs)
    return subgraphs


def outer_uses(graph: GraphProto) -> Iterator[str]:
    """Yield the names that a subgraph takes from the graphs around it, repetitions included."""
    own_names = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    own_names |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in own_names:
                yield name
        for subgraph in subgraphs_of(node):
            for name in outer_uses(subgraph):
                if name not in own_names:
                    yield name
        own_names.update(node.output)
    for output in graph.output:
        if output.name not in own_names:
            yield output.name


def names_read(graph: GraphProto) -> set[str]:
    """Return the names that a graph's nodes, the subgraphs in them and its outputs read."""
    names = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    return names | {name for node in graph.node for sub in subgraphs_of(node) for name in outer_uses(sub)}


def dead_nodes(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> set[int]:
    """Return the indices of the nodes that no output depends on.

    Args:
        nodes: all nodes, in topological order.
        outputs: the names of the graph outputs.
    """
    needed = set(outputs)
    dead = set()
    for index in range(len(nodes) - 1, -1, -1):
        node = nodes[index]
        if not needed.intersection(node.output):
            dead.add(index)
            continue
        needed.update(node.input)
        for sub in subgraphs_of(node):
            needed.update(outer_uses(sub))
    return dead


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Give a graph other nodes, of which some may be its own."""
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


def constant_sources(graph: Graph) -> set[str]:
    """Return the constants whose value nobody outside can replace: before IR version 4 all weights are inputs."""
    inputs = {i.name for i in graph.model.graph.input} if graph.model.ir_version >= FREE_INITIALIZERS else set()
    return {name for name in graph.constants if name not in inputs}


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield all tensors stored in a graph: initializers and attributes, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            for subgraph in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from tensors_of(subgraph)


def stored_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors stored anywhere in a model; those of sparse tensors, functions and training, too."""
    graphs = [model.graph, *(g for t in model.training_info for g in (t.initialization, t.algorithm))]
    attributes = [a for f in model.functions for a in f.attribute_proto]
    nodes = [node for f in model.functions for node in f.node]
    while graphs or nodes or attributes:
        for graph in graphs:
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            nodes += graph.node
        attributes += [attribute for node in nodes for attribute in node.attribute]
        for attribute in attributes:
            yield from (*_given(attribute, "t"), *attribute.tensors)
            for sparse in (*_given(attribute, "sparse_tensor"), *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        graphs = [g for a in attributes for g in (*_given(a, "g"), *a.graphs)]
        nodes, attributes = [], []


def _given(attribute: AttributeProto, field: str) -> tuple[Any, ...]:
    return (getattr(attribute, field),) if attribute.HasField(field) else ()


class Graph:
    """The main graph of a model as lists and dictionaries.

    Args:
        model: the message.
        base: the folder of its external data.
        initializers: tensors to use in place of the message's own (a message under surgery has none yet).

    Attributes:
        model: the message itself; read here, edited only by surgery on its own copy.
        base: the folder of its external data.
        opset: the version of the default domain.
        nodes: all nodes in topological order.
        initializers: the stored tensors by name.
        constants: tensors by name: initializers and the values of Constant nodes.
        constant_nodes: by tensor name the Constant nodes in ``constants``.
        inputs: the names of the graph inputs that have no initializer.
        outputs: the names of the graph outputs.
        users: for each tensor the (node, operand) pairs that read it.
        producer: for each tensor the node that computes it.
        captured: names that a node's subgraphs read, by node index.
    """

    def __init__(
        self, model: ModelProto, base: Path | None = None, initializers: Mapping[str, TensorProto] | None = None
    ) -> None:
        self.model = model
        self.base = base
        graph = model.graph
        versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
        self.opset = versions.get("", 1)
        self.nodes = [Node(n, i, versions.get(domain_of(n), 1)) for i, n in enumerate(graph.node)]
        self.initializers = dict(initializers or {t.name: t for t in graph.initializer})
        # Initializers that are listed as inputs, too, are weights whose value a caller could replace: old exporters
        # list all of them. They are pruned like other weights.
        self.inputs = [i.name for i in graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in graph.output]
        self.constants = dict(self.initializers)
        self.constant_nodes: dict[str, Node] = {}
        self.users: dict[str, list[tuple[Node, int]]] = {}
        self.captured: dict[int, list[str]] = {}
        self.producer: dict[str, Node] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for node in self.nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        if node.op == "Constant" and not node.domain:
            tensor = constant_tensor(node)
            if tensor is not None:
                self.constants[node.outputs[0]] = tensor
                self.constant_nodes[node.outputs[0]] = node
        for position, name in enumerate(node.inputs):
            if name:
                self.users.setdefault(name, []).append((node, position))
        for name in node.outputs:
            if name:
                self.producer[name] = node
        if subgraphs := node.subgraphs:
            self.captured[node.index] = sorted({n for g in subgraphs for n in outer_uses(g)})

    def reads(self, node: Node) -> list[str]:
        """Return the tensors that a node reads: its operands that are given, then what its subgraphs capture."""
        return [name for name in (*node.inputs, *self.captured.get(node.index, ())) if name]

    @cached_property
    def operators(self) -> nx.DiGraph:
        """The operators as a networkx graph: node indices, and an edge from each producer to each reader.

        Edges carry a ``tensor``, the last one where several lead from a node to another. Constants that no node makes
        have no edges. The edges do not change with :meth:`adopt`, which adds initializers alone.
        """
        import networkx as nx  # here, since most runs walk no graph and the import takes a tenth of a second

        graph = nx.DiGraph()
        graph.add_nodes_from(node.index for node in self.nodes)
        for node in self.nodes:
            for name in self.reads(node):
                if name in self.producer:
                    graph.add_edge(self.producer[name].index, node.index, tensor=name)
        return graph

    def depends(self, result: str, source: str) -> bool:
        """Return whether a tensor is another one, or is computed from it."""
        if result == source:
            return True
        import networkx as nx

        maker = self.producer.get(result)
        readers = {node.index for node, _ in self.users.get(source, ())}
        readers |= {index for index, names in self.captured.items() if source in names}
        if maker is None or not readers or min(readers) > maker.index:
            return False
        between = self.operators.subgraph(range(min(readers), maker.index + 1))  # nodes are in topological order
        return not readers.isdisjoint({maker.index, *nx.ancestors(between, maker.index)})

    def behind(self, sources: Iterable[int]) -> set[int]:
        """Return the indices of some nodes and of all that is computed from them."""
        import networkx as nx

        found: set[int] = set()
        for index in sorted(sources):
            if index not in found:  # in topological order, so that few searches find everything
                found |= {index, *nx.descendants(self.operators, index)}
        return found

    def array(self, name: str) -> np.ndarray:
        """Return the value of a constant, not to be written to.

        Raises:
            ModelError: the tensor's data is missing or malformed.
        """
        if name in self._arrays:
            return self._arrays[name]
        value = tensor_array(self.constants[name], self.base)
        if value.nbytes <= CACHED:
            self._arrays[name] = value
        return value

    def inlined(self, name: str) -> TensorProto:
        """Return a constant as a tensor of that name that holds its own data."""
        tensor = self.constants[name]
        if tensor.data_location == TensorProto.EXTERNAL:
            return numpy_helper.from_array(self.array(name), name)
        if tensor.name == name:
            return tensor
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = name
        return copy

    def self_contained(self) -> ModelProto:
        """Return the model itself or, where data lies in other files, a copy that holds all of it."""
        if not any(t.data_location == TensorProto.EXTERNAL for t in self.model.graph.initializer):
            return self.model
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(self.inlined(tensor.name))
        return model

    def part(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[ValueInfoProto],
        outputs: Sequence[str],
        constants: Sequence[TensorProto],
    ) -> ModelProto:
        """Make a network of some nodes alone, in this one's versions and with its functions.

        Args:
            nodes: in the order in which they run.
            inputs: the tensors to feed, with types.
            outputs: the tensors to compute.
            constants: the weights that the nodes read.
        """
        results = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([n.proto for n in nodes], "part", inputs, results, constants)
        model = helper.make_model(graph, opset_imports=self.model.opset_import, functions=self.model.functions)
        model.ir_version = self.model.ir_version
        return model

    def forget(self, name: str) -> None:
        """Drop the cached value of a constant whose message was changed, so that it is read anew."""
        self._arrays.pop(name, None)

    def adopt(self, node: Node, tensor: TensorProto, operand: int) -> None:
        """Take in an initializer that a node's message was given as an operand."""
        node.inputs = tuple(node.proto.input)
        self.initializers[tensor.name] = self.constants[tensor.name] = tensor
        self.users[tensor.name] = [(node, operand)]


def tensor_array(tensor: TensorProto, base: Path | None = None) -> np.ndarray:
    """Return a tensor's value as an array; raw data is viewed and external data memory-mapped, not copied.

    Args:
        tensor: the message.
        base: the folder of external data.

    Raises:
        ModelError: the tensor's data is missing or malformed.
    """
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location == TensorProto.EXTERNAL:
            return _external_array(tensor, base)
        if tensor.HasField("raw_data") and tensor.data_type not in SUBBYTE:
            return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(tuple(tensor.dims))
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"initializer {tensor.name!r}: {error}. Export the model again.") from error


def _external_array(tensor: TensorProto, base: Path | None) -> np.ndarray:
    entries = {e.key: e.value for e in tensor.external_data}
    if base is None:
        raise ValueError("its data lies in another file, whose folder is not known")
    offset, length = int(entries.get("offset", 0) or 0), int(entries.get("length", 0) or 0)
    data = np.memmap(
        base / entries["location"], mode="r", dtype=np.uint8, offset=offset, shape=(length,) if length else None
    )
    if tensor.data_type in SUBBYTE:
        inline = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data.tobytes())
        return np.asarray(numpy_helper.to_array(inline))
    return data.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


SUBBYTE = {  # types of which a byte holds several elements, and strings
    getattr(TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2", "STRING")
    if hasattr(TensorProto, name)
}


def constant_tensor(node: Node) -> TensorProto | None:
    """Return the value of a Constant node as a tensor, or None where it is sparse or strings."""
    for attribute in node.proto.attribute:
        name = node.outputs[0]
        match attribute.name:
            case "value":
                return attribute.t
            case "value_float":
                return helper.make_tensor(name, TensorProto.FLOAT, (), [attribute.f])
            case "value_floats":
                return helper.make_tensor(name, TensorProto.FLOAT, (len(attribute.floats),), attribute.floats)
            case "value_int":
                return helper.make_tensor(name, TensorProto.INT64, (), [attribute.i])
            case "value_ints":
                return helper.make_tensor(name, TensorProto.INT64, (len(attribute.ints),), attribute.ints)
    return None


def schema_of(node: Node) -> onnx.defs.OpSchema | None:
    """Return the ONNX schema of the node's operator at the model's version, or None."""
    return _schema(node.op, node.version, node.domain)


@lru_cache(maxsize=1024)  # looked up for each node, of which most are of a few operators
def _schema(op: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None
