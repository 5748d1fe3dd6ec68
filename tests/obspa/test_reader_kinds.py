"""The kinds of readers: which node is which, and what a kind is asked for, in which order."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph, Node
from spa.obspa import readers
from spa.obspa.curves import Observation
from spa.obspa.linear import linear, uses
from spa.obspa.readers import KINDS, kind_of
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.obspa.refit import reconstruct
from spa.obspa.score import curves
from spa.running.stream import Stream
from spa.surgery.apply import apply

Array = np.ndarray


def model(nodes: list[tuple[str, list[str], str]], weights: dict[str, tuple[int, ...]]) -> ModelProto:
    """x [n 6] through some nodes to y."""
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    protos = [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(protos, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def kinds(network: ModelProto) -> list[str]:
    graph = Graph(network)
    return [type(kind_of(graph, node)).__name__ for node in graph.nodes]


def test_each_node_has_the_kind_that_it_is() -> None:
    own = model(
        [("MatMul", ["x", "w"], "h"), ("Relu", ["h"], "r"), ("MatMul", ["r", "v"], "y")], {"w": (6, 9), "v": (9, 4)}
    )
    assert kinds(own) == ["LinearLayer", "NoneType", "LinearLayer"]
    tied = model([("MatMul", ["x", "w"], "h"), ("MatMul", ["h", "w"], "y")], {"w": (6, 6)})
    assert kinds(tied) == ["TiedLayer", "TiedLayer"]
    read = model([("MatMul", ["x", "w"], "h"), ("Add", ["h", "w"], "y")], {"w": (6, 6)})
    assert kinds(read) == ["TiedLayer", "NoneType"]
    product = model([("Transpose", ["x"], "t"), ("MatMul", ["x", "t"], "y")], {})
    assert kinds(product) == ["NoneType", "ActivationProduct"]
    cell = model([("Unsqueeze", ["x", "axis"], "u"), ("GRU", ["u", "w", "r"], "y")], {"w": (1, 15, 6), "r": (1, 15, 5)})
    cell.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    assert kinds(cell) == ["NoneType", "RecurrentCell"]


def test_the_special_kind_stands_before_the_general_one() -> None:
    names = [type(k).__name__ for k in KINDS]
    assert names.index("TiedLayer") < names.index("LinearLayer")


class _Noted(ReaderKind):
    """A kind that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def matches(self, graph: Graph, node: Node) -> bool:
        return node.op == "MatMul"

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        assert all(n in stream.live[0] for n in (node.inputs[0], node.outputs[0]))
        self.asked.append(("observe", node.inputs[1]))
        return []

    def may_refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> bool:
        self.asked.append(("may_refit", node.inputs[1]))
        return node.inputs[1] != "u"

    def prepare(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        assert reconstruction.dense.at == reconstruction.pruned.at == 0
        self.asked.append(("prepare", node.inputs[1]))

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        assert {node.inputs[0], node.outputs[0]} <= reconstruction.dense.live[0].keys()
        assert pruned_node.inputs[0] in reconstruction.pruned.live[0]
        assert reconstruction.pruned.at == pruned_node.index
        self.asked.append(("refit", node.inputs[1]))


def test_a_new_kind_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [("MatMul", ["x", "w"], "h"), ("Relu", ["h"], "r"), ("MatMul", ["r", "v"], "s"), ("Relu", ["s"], "t")]
    network = model([*nodes, ("MatMul", ["t", "u"], "y")], {"w": (6, 9), "v": (9, 7), "u": (7, 4)})
    kind = _Noted()
    monkeypatch.setattr(readers, "KINDS", (kind,))
    analysis = couple(Graph(network))
    x = np.random.default_rng(1).standard_normal((10, 6)).astype(np.float32)
    assert curves(analysis, analysis.free, [{"x": x}]) == ({}, {})
    assert kind.asked == [("observe", "v"), ("observe", "u")]
    kind.asked.clear()
    plan = make_plan(analysis, {g.name: np.arange(g.size - 2) for g in analysis.free})
    reconstruct(analysis, plan, apply(analysis, plan), [{"x": x}])
    assert kind.asked == [("may_refit", "v"), ("prepare", "v"), ("may_refit", "u"), ("refit", "v")]


def test_weights_that_are_also_read_transposed_are_not_fitted_to_both() -> None:
    nodes = [
        ("MatMul", ["x", "a"], "h"),
        ("MatMul", ["h", "w"], "s"),
        ("Transpose", ["w"], "wt"),
        ("MatMul", ["s", "wt"], "t"),
    ]
    network = model([*nodes, ("MatMul", ["t", "b"], "y")], {"a": (6, 9), "w": (9, 7), "b": (9, 4)})
    graph = Graph(network)
    first, last = (linear(graph, graph.producer[n]) for n in ("s", "t"))
    assert first is not None
    assert last is not None
    assert uses(graph, first) is uses(graph, last) is None
    analysis = couple(graph)
    plan = make_plan(analysis, {g.name: np.arange(g.size - 2) for g in analysis.free})
    assert analysis.free
    pruned = apply(analysis, plan)
    before = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    x = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    reconstruct(analysis, plan, pruned, [{"x": x}])
    after = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    np.testing.assert_array_equal(after["w"], before["w"])
    assert (after["b"] != before["b"]).any()
