"""Inlining a model's local functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator

import networkx as nx
from onnx import ModelProto, NodeProto, inliner

from spa.errors import ModelError

MOST_NODES = 1_000_000  # once all functions are inlined

Key = tuple[str, str, str]  # domain, name, overload


def inlined(model: ModelProto) -> ModelProto:
    """Return a model without local functions: the same message where it has none.

    onnx's inliner (1.21) ends the process on functions that call each other in a circle, and expands whatever
    it is given; both are refused before it is called.

    Raises:
        ModelError: a function calls itself, through others or not; or the model would get too large.
    """
    if not model.functions:
        return model
    keys = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {key: Counter(_called(function.node, keys)) for key, function in keys.items()}
    graph = nx.DiGraph()
    graph.add_nodes_from(keys)
    graph.add_edges_from((key, other) for key, others in calls.items() for other in others)
    if not nx.is_directed_acyclic_graph(graph):
        names = " -> ".join(repr(key[1]) for key, _ in nx.find_cycle(graph))
        raise ModelError(f"local functions call each other in a circle: {names}. ONNX forbids that; export it again.")
    sizes: dict[Key, int] = {}
    for key in reversed(list(nx.topological_sort(graph))):
        own = sum(1 for _ in _all_nodes(keys[key].node)) - calls[key].total()
        sizes[key] = own + sum(count * sizes[other] for other, count in calls[key].items())
    total = sum(sizes[key] for key in _called(model.graph.node, keys))
    if total > MOST_NODES:
        raise ModelError(
            f"its local functions expand to {total:.3g} nodes (at most {MOST_NODES:,} are read). Simplify the model."
        )
    return inliner.inline_local_functions(model)


def _called(nodes: Iterable[NodeProto], keys: Container[Key]) -> Iterator[Key]:
    for node in _all_nodes(nodes):
        key = (node.domain, node.op_type, node.overload)
        if key in keys:
            yield key


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Iterate over nodes and those of their sub-graphs."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting.extend(attribute.g.node)
            for inner in attribute.graphs:
                waiting.extend(inner.node)
