"""A run of a network by windows of layers, one after the other, for networks larger than the memory to spare.

A window is as many operators, in their order, as read a bounded number of bytes of weights. It is a network of its
own: its inputs are what earlier windows computed and it reads, its outputs what later ones read. Together the windows
compute what the network computes; onnxruntime maps the weights of one window at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from spa.errors import UnsupportedError
from spa.model.graph import Graph, Node, tensors_of
from spa.running.runtime import load_session, run

WHOLE = 2**28  # bytes of weights up to which a network is run as a whole
WINDOW = 2**27  # bytes of weights


def weight_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's elements, about half too many where a byte holds two."""
    try:
        return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:  # no type of ONNX's
        return 0


def is_large(model: ModelProto) -> bool:
    """Return whether a model is checked by windows of layers where its weights lie outside."""
    return sum(map(weight_bytes, tensors_of(model.graph))) > WHOLE


def run_by_windows(
    model: ModelProto, base: Path, feeds: Mapping[str, np.ndarray], most: int = WINDOW, name: str = "the model"
) -> dict[str, np.ndarray]:
    """Run a network with external data by windows.

    Args:
        model: the network, whose large weights are external data.
        base: their folder.
        feeds: one array per input.
        most: bytes of weights that the operators of a window read together; one operator may read more.
        name: what messages call the model.

    Returns:
        The outputs by name.

    Raises:
        ModelError: onnxruntime cannot load or run a window.
        UnsupportedError: what passes from one window to another is no tensor.
    """
    graph = Graph(model, base)
    last = {read: node.index for node in graph.nodes for read in graph.reads(node)}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    live: dict[str, Any] = dict(feeds)
    for nodes in windows(graph, graph.nodes, most):
        end = nodes[-1].index
        made = [output for node in nodes for output in node.outputs if last.get(output, -1) > end]
        for output, value in zip(made, _run(graph, nodes, live, made, name), strict=True):
            live[output] = value
        live = {key: value for key, value in live.items() if last.get(key, -1) > end}
    return {output: live[output] for output in graph.outputs if output in live}


def windows(graph: Graph, operators: Iterable[Node], most: int) -> Iterator[list[Node]]:
    """Yield operators by windows; Constant nodes, which each window brings along itself, are left out.

    Args:
        graph: the network.
        operators: some of its nodes, in their order.
        most: bytes of weights that the operators of a window read together; one operator may read more.
    """
    nodes: list[Node] = []
    read, size = set[str](), 0
    for node in operators:
        if node.outputs and node.outputs[0] in graph.constant_nodes:
            continue
        weights = {name for name in graph.reads(node) if name in graph.constants}
        more = sum(weight_bytes(graph.constants[name]) for name in weights - read)
        if nodes and size + more > most:
            yield nodes
            nodes, read, size = [], set(), 0
            more = sum(weight_bytes(graph.constants[name]) for name in weights)
        nodes.append(node)
        read |= weights
        size += more
    if nodes:
        yield nodes


def _run(graph: Graph, nodes: list[Node], live: Mapping[str, Any], made: list[str], name: str) -> list[Any]:
    own = {output for node in nodes for output in node.outputs}
    read = dict.fromkeys(n for node in nodes for n in graph.reads(node) if n not in own)
    fed = {n: live[n] for n in read if n in live}
    constants = [_constant(graph, n) for n in read if n in graph.constants and n not in fed]
    if not made:
        return []
    part = graph.part(nodes, [_info(n, value) for n, value in fed.items()], made, constants)
    return run(load_session(part, name=name, folder=graph.base), fed, name=name)


def _constant(graph: Graph, name: str) -> TensorProto:
    tensor = graph.constants[name]
    outside = tensor.data_location == TensorProto.EXTERNAL and tensor.name == name
    return tensor if outside else graph.inlined(name)


def _info(name: str, value: Any) -> ValueInfoProto:
    if not isinstance(value, np.ndarray):
        raise UnsupportedError(f"{name!r} is no tensor, so that the network cannot be run by windows of layers.")
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
