"""The view of a model as a graph of operators."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from onnx import TensorProto, helper

from models.builders import ZOO
from spa.model.graph import Graph


def random_graph(seed: int) -> Graph:
    """Nodes with one or two outputs that read some of the tensors before them, or a graph input."""
    rng = np.random.default_rng(seed)
    names, nodes = ["x"], []
    for i in range(12):
        read = [str(n) for n in rng.choice(names, min(len(names), rng.integers(1, 3)), replace=False)]
        made = [f"t{i}"] if rng.random() < 0.7 else [f"t{i}", f"u{i}"]
        nodes.append(helper.make_node("Op", read, made, domain="my"))
        names += made
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    return Graph(helper.make_model(helper.make_graph(nodes, "g", infos, [])))


@pytest.mark.parametrize("seed", range(5))
def test_a_tensor_depends_on_what_it_is_computed_from_and_on_nothing_else(seed: int) -> None:
    graph = random_graph(seed)
    sources: dict[str, set[str]] = {"x": {"x"}}
    for node in graph.nodes:
        for name in node.outputs:
            sources[name] = {name}.union(*(sources[n] for n in node.inputs))
    for result in sources:
        assert {s for s in sources if graph.depends(result, s)} == sources[result]


def test_what_a_subgraph_captures_is_an_edge() -> None:
    graph = Graph(ZOO["handmade_if"]())
    index, names = next(iter(graph.captured.items()))
    made = [n for n in names if n in graph.producer]
    assert made
    for name in made:
        assert name not in graph.nodes[index].inputs
        assert graph.operators.has_edge(graph.producer[name].index, index)
        assert graph.depends(graph.nodes[index].outputs[0], name)


def test_the_operators_are_a_graph_in_the_order_of_the_nodes() -> None:
    graph = Graph(ZOO["handmade_residual"]())
    assert [*graph.operators.nodes] == [node.index for node in graph.nodes]
    assert all(a < b for a, b in graph.operators.edges)
    assert nx.is_directed_acyclic_graph(graph.operators)
    assert graph.operators.number_of_edges() > 0
