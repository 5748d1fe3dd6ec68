"""Inlining of an If whose condition is known, as exporters of TorchScript write for each ``squeeze``.

The condition must be a constant, or be computed from sizes that are the same for every input of the model; one that
tells a batch of one from others is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from spa.errors import SpaError
from spa.model.follows import following
from spa.model.graph import Graph, constant_sources, dead_nodes, replace_nodes, subgraphs_of
from spa.model.two_points import two_points


def inline_branches(model: ModelProto) -> int:
    """Put the branch that runs in the place of each If of the main graph whose condition is known, in place.

    Args:
        model: the model, in topological order.

    Returns:
        How many were inlined; an If inside a branch counts once it lies in the main graph, in a later call.
    """
    graph = model.graph
    if not any(is_if(node) for node in graph.node):
        return 0
    known = _known_conditions(model)
    chosen = {i: _branch(node, known[node.input[0]]) for i, node in enumerate(graph.node) if _is_inlinable(node, known)}
    if not chosen:
        return 0
    outputs = [o.name for o in graph.output]
    dead = dead_nodes(graph.node, outputs)  # before, and left alone
    names = _Names(graph)
    nodes: list[NodeProto] = []
    spared: list[NodeProto] = []
    for index, node in enumerate(graph.node):
        if index in chosen:
            inner, weights = _inlined(node, chosen[index], names)
            nodes += inner
            graph.initializer.extend(weights)
        else:
            nodes.append(node)
        if index in dead:
            spared += [node] if index not in chosen else inner
    needed = {name for node in spared for name in (*node.output, *node.input)}
    unread = dead_nodes(nodes, [*outputs, *needed])
    replace_nodes(graph, [n for i, n in enumerate(nodes) if i not in unread])
    return len(chosen)


def is_if(node: NodeProto) -> bool:
    """Return whether a node is an If of the standard that reads a condition."""
    return node.op_type == "If" and node.domain in ("", "ai.onnx") and bool(node.input)  # else malformed


def _is_inlinable(node: NodeProto, known: Mapping[str, bool]) -> bool:
    return is_if(node) and node.input[0] in known and not _branch(node, known[node.input[0]]).sparse_initializer


def _branch(node: NodeProto, condition: bool) -> GraphProto:
    name = "then_branch" if condition else "else_branch"
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def _known_conditions(model: ModelProto) -> dict[str, bool]:
    """Return the conditions that are the same whatever the model is fed."""
    graph = Graph(model)
    names = {node.inputs[0] for node in graph.nodes if is_if(node.proto)}
    given = names & constant_sources(graph)
    known = {name: graph.array(name) for name in given if graph.constants[name].data_type == TensorProto.BOOL}
    if computed := names - given:
        try:
            points = two_points(graph)
        except SpaError:  # said better by the analysis
            return {name: bool(value.reshape(-1)[0]) for name, value in known.items() if value.size == 1}
        marks = following(graph, points)
        known |= {n: points.first.value[n] for n in computed if n in marks and not marks[n].any()}
    return {name: bool(np.reshape(value, -1)[0]) for name, value in known.items() if np.size(value) == 1}


class _Names:
    """The names of a model's tensors, in all of its graphs.

    Args:
        graph: the main graph.
    """

    def __init__(self, graph: GraphProto) -> None:
        self._defined = Counter(definitions(graph))

    def given(self, name: str) -> str:
        """Return the name that a tensor of a branch bears in the main graph: its own, where no other has it."""
        if self._defined[name] <= 1:
            return name
        count = 2
        while f"{name}_{count}" in self._defined:
            count += 1
        self._defined[f"{name}_{count}"] += 1
        return f"{name}_{count}"


def definitions(graph: GraphProto) -> Iterator[str]:
    """Yield the names that a graph and the graphs inside it define."""
    yield from _defined(graph)
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield from definitions(inner)


def _defined(graph: GraphProto) -> Iterator[str]:
    """Yield the names that a graph itself defines."""
    yield from (info.name for info in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _inlined(node: NodeProto, branch: GraphProto, names: _Names) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the nodes and weights that stand for an If whose branch is known."""
    computed = {name for inner in branch.node for name in inner.output}
    renamed = {name: names.given(name) for name in _defined(branch)}
    repeated = Counter(output.name for output in branch.output)
    passed = []
    for output, result in zip(branch.output, node.output, strict=False):
        if not result:
            continue
        if output.name in computed and repeated[output.name] == 1:
            renamed[output.name] = result
        else:
            passed.append((output.name, result))
    nodes = []
    for inner in branch.node:
        copy = NodeProto()
        copy.CopyFrom(inner)
        rename(copy, lambda name: renamed.get(name, name))
        nodes.append(copy)
    nodes += [helper.make_node("Identity", [renamed.get(name, name)], [result]) for name, result in passed]
    weights = []
    for tensor in branch.initializer:
        copied = TensorProto()
        copied.CopyFrom(tensor)
        copied.name = renamed[tensor.name]
        weights.append(copied)
    return nodes, weights


def rename(node: NodeProto, new: Callable[[str], str]) -> None:
    """Rename what a node and the graphs inside it read and write, but for what those graphs define themselves."""
    node.input[:] = [new(name) for name in node.input]
    node.output[:] = [new(name) for name in node.output]
    for graph in subgraphs_of(node):
        own = set(_defined(graph))

        def inside(name: str, own: set[str] = own) -> str:
            return name if name in own else new(name)

        for inner in graph.node:
            rename(inner, inside)
        for output in graph.output:
            output.name = inside(output.name)
