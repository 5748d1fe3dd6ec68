"""Topological order of nodes: converters to float16, say, write nodes before those that they read."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto

from spa.errors import ModelError
from spa.model.graph import outer_uses, replace_nodes, subgraphs_of


def is_sorted(graph: GraphProto) -> bool:
    """Return whether each node stands behind those that it reads, in sub-graphs, too."""
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if not later.isdisjoint(_read(node)) or not all(is_sorted(inner) for inner in subgraphs_of(node)):
            return False
        later.difference_update(node.output)
    return True


def sort(model: ModelProto) -> None:
    """Put the nodes of a model in order, in place; what need not move stays where it is.

    Raises:
        ModelError: nodes read each other in a circle.
    """
    graphs = [model.graph]
    for graph in graphs:
        graphs.extend(inner for node in graph.node for inner in subgraphs_of(node))
    for graph in reversed(graphs):  # inner ones first, since what a node takes from outside is read off sorted ones
        _sort(graph)


def _sort(graph: GraphProto) -> None:
    import networkx as nx  # here, since few files need it and the import takes a tenth of a second

    nodes = list(graph.node)
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order = nx.DiGraph()
    order.add_nodes_from(range(len(nodes)))
    order.add_edges_from((producer[n], i) for i, node in enumerate(nodes) for n in _read(node) if n in producer)
    try:
        indices = list(nx.lexicographical_topological_sort(order))
    except nx.NetworkXUnfeasible as error:
        inner = nodes[nx.find_cycle(order)[0][0]]
        raise ModelError(
            f"{inner.op_type} {inner.name!r} reads what is computed from its own output. Export the model again."
        ) from error
    replace_nodes(graph, [nodes[index] for index in indices])


def _read(node: NodeProto) -> set[str]:
    return {n for n in (*node.input, *(n for inner in subgraphs_of(node) for n in outer_uses(inner))) if n}
