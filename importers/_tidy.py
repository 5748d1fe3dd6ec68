"""Cleaning up what exporters write; no value and no parameter changes.

Cases:
1. What :func:`spa.model.normalise.normalise` rewrites: functions, names that occur twice, sequences of slices.
2. ``Identity(initializer)`` under a parameter's own name becomes an initializer of that name: exporters merge
   parameters that happen to be equal, and pruning must be able to tell them apart.
3. Any other ``Identity`` goes, unless it makes an output from an input, a parameter or another output.
4. What is computed from constants alone becomes a constant. Initializers are parameters here, and not constants:
   what is computed from them must follow when they are pruned.
5. A convolution's bias of zeros goes. PyTorch's exporter gives one to each that has none, expanded to the size of its
   weight while the network runs; a bias that is computed is no place where a reconstruction could put a constant.
6. Nodes and initializers that no output needs go.
7. Documentation, metadata and declared shapes of inner values go: exporters put the paths of the user's sources
   there, and shapes that may be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableSequence
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.model.graph import (
    Node,
    constant_tensor,
    dead_nodes,
    domain_of,
    names_read,
    subgraphs_of,
    tensor_array,
    tensors_of,
)
from spa.model.normalise import normalise
from spa.model.traits import Trait, operators
from spa.running.runtime import load_session, run

LARGEST_CONSTANT = 2**20  # bytes; what would be larger is computed at run time, as the exporter wrote it
_NEVER_FOLDED = {
    "Constant",
    "Dropout",
    *operators(Trait.QUANTISING),
    *operators(Trait.RANDOM),
    *operators(Trait.SEQUENCE),
}


def tidy(model: ModelProto, parameters: Collection[str] = ()) -> ModelProto:
    """Apply cases 1 to 7 to a model.

    Args:
        model: a message that the caller owns; changed in place.
        parameters: names that the framework gives to its parameters, for case 2.

    Returns:
        The same message, or another where functions were inlined.

    Raises:
        ModelError: onnxruntime cannot compute the constants.
    """
    model = normalise(model, own=True)
    _remove_identities(model.graph, parameters)
    _fold(model)
    _remove_zero_biases(model.graph)
    _remove_unused(model.graph)
    _remove_remarks(model)
    return model


def rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename values, in place; other values that have one of the new names give way.

    Args:
        model: the model.
        names: the new names by the old ones.
    """
    wanted = set(names.values())
    taken = {name for graph in _graphs(model.graph) for name in _made(graph)} | wanted
    changes = {}
    for name in sorted(wanted.intersection(taken) - names.keys()):
        count = 1
        while f"{name}_{count}" in taken:
            count += 1
        changes[name] = f"{name}_{count}"
        taken.add(changes[name])
    changes.update(names)
    for graph in _graphs(model.graph):
        for item in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            item.name = changes.get(item.name, item.name)
        for node in graph.node:
            _replace(node.input, changes)
            _replace(node.output, changes)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and the graphs inside it."""
    yield graph
    for node in graph.node:
        for sub in subgraphs_of(node):
            yield from _graphs(sub)


def _made(graph: GraphProto) -> Iterator[str]:
    """Yield the names of a graph's own values."""
    yield from (item.name for item in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output


def _replace(names: MutableSequence[str], changes: Mapping[str, str]) -> None:
    for at, name in enumerate(names):
        if name in changes:
            names[at] = changes[name]


def _remove_identities(graph: GraphProto, parameters: Collection[str]) -> None:  # Cases 2 and 3
    initializers = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output}
    fixed = {i.name for i in graph.input} | initializers.keys() | outputs
    changes: dict[str, str] = {}
    removed = set()
    for index, node in enumerate(graph.node):
        if node.op_type != "Identity" or domain_of(node):
            continue
        source, target = node.input[0], node.output[0]
        source = changes.get(source, source)
        if source in initializers and target in parameters and target not in outputs:
            own = TensorProto()
            own.CopyFrom(initializers[source])
            own.name = target
            initializers[target] = own
            graph.initializer.append(own)
            fixed.add(target)
        elif target not in outputs:
            changes[target] = source
        elif source not in fixed:
            changes = {old: target if new == source else new for old, new in changes.items()} | {source: target}
        else:
            continue
        removed.add(index)
    _delete(graph.node, removed)
    for inner in _graphs(graph):
        for node in inner.node:
            _replace(node.input, changes)
            if inner is graph:
                _replace(node.output, changes)


def _fold(model: ModelProto) -> None:  # Case 4
    graph = model.graph
    constant: set[str] = set()
    folded: list[int] = []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and not domain_of(node):
            constant.update(node.output)
        elif _foldable(node) and constant.issuperset(name for name in node.input if name):
            constant.update(node.output)
            folded.append(index)
    if not folded:
        return
    values = _computed(model, folded)
    for index in folded:
        node = graph.node[index]
        value = values[node.output[0]]
        if len(value.raw_data) <= LARGEST_CONSTANT:
            node.CopyFrom(helper.make_node("Constant", [], node.output, name=node.name, value=value))


def _foldable(node: NodeProto) -> bool:
    """Tell whether constant inputs make for constant outputs; sources of chance and control flow do not count."""
    return (
        not domain_of(node)
        and any(node.input)
        and len(node.output) == 1
        and node.op_type not in _NEVER_FOLDED
        and not subgraphs_of(node)
    )


def _computed(model: ModelProto, folded: list[int]) -> dict[str, TensorProto]:
    """Compute the outputs of these nodes, which need nothing but constants."""
    graph = model.graph
    names = [graph.node[i].output[0] for i in folded]
    part = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "constants"
    part.graph.node.extend(n for n in graph.node if n.op_type == "Constant" and not domain_of(n))
    part.graph.node.extend(graph.node[i] for i in folded)
    part.graph.output.extend(ValueInfoProto(name=name) for name in names)
    results = run(load_session(part, name="the model's constants"), {})
    return {name: numpy_helper.from_array(value, name) for name, value in zip(names, results, strict=True)}


def _remove_zero_biases(graph: GraphProto) -> None:  # Case 5
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and not domain_of(node) and len(node.input) > 2:
            source = producer.get(node.input[2])
            while source is not None and source.op_type in ("Expand", "CastLike"):
                source = producer.get(source.input[0])
            if source is None or source.op_type != "Constant":
                continue
            value = constant_tensor(Node(source, 0, 1))
            if value is not None and not tensor_array(value).any():
                del node.input[2]


def _remove_unused(graph: GraphProto) -> None:  # Case 6
    _delete(graph.node, dead_nodes(graph.node, [o.name for o in graph.output]))
    needed = names_read(graph)
    _delete(graph.initializer, {i for i, t in enumerate(graph.initializer) if t.name not in needed})


def _delete(items: MutableSequence[Any], indices: Collection[int]) -> None:
    for index in sorted(indices, reverse=True):
        del items[index]


def _remove_remarks(model: ModelProto) -> None:  # Case 7
    for graph in _graphs(model.graph):
        for item in (graph, *graph.input, *graph.output, *graph.node):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
        del graph.value_info[:]
    for tensor in tensors_of(model.graph):
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    del model.metadata_props[:]
    model.ClearField("doc_string")
