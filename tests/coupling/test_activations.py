"""The memory of activations, against lifetimes counted by hand and by a walk that keeps and frees tensors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import spa
from spa.coupling.analysis import Analysis, couple
from spa.coupling.cost import CostModel, measure
from spa.coupling.plan import make_plan
from spa.criteria.answers import Curve
from spa.model.graph import Graph
from spa.surgery.apply import apply
from spa.widths.allocation import allocate
from spa.widths.budget import Budget
from tests.oracle import Net

DIGITS = ("models/digits_resnet.onnx", "models/digits_vgg.onnx", "models/digits_vit.onnx")


def memory(model: ModelProto) -> int:
    return measure(couple(Graph(model))).memory


def test_tensors_are_live_from_their_maker_to_their_last_reader() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    a = net.gemm(x, 3, 7)
    b = net.gemm(a, 7, 11)
    c = net.node("Relu", b)
    d = net.gemm(c, 11, 5)
    model = net.model(net.node("Concat", d, x, axis=1))
    # With x, which the last node reads: 3 + 7, 3 + 7 + 11, 3 + 11 + 11, 3 + 11 + 5, 3 + 5 + 8.
    assert memory(model) == 4 * (3 + 11 + 11)


def test_outputs_are_live_to_the_end() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    a = net.gemm(x, 3, 13)
    b = net.gemm(a, 13, 5)
    c = net.gemm(b, 5, 17)
    assert memory(net.model(net.gemm(c, 17, 2))) == 4 * (5 + 17)
    net = Net()
    x = net.input("x", ["n", 3])
    a = net.gemm(x, 3, 13)
    c = net.gemm(net.gemm(a, 13, 5), 5, 17)
    assert memory(net.model(a, net.gemm(c, 17, 2))) == 4 * (13 + 5 + 17)


def test_another_shape_takes_no_memory_and_keeps_the_tensor_alive() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    y = net.gemm(x, 3, 12)
    z = net.node("Reshape", y, net.constant(np.array([-1, 2, 6])))
    v = net.node("Relu", x)
    w = net.node("ReduceMax", z, net.constant(np.array([2])), keepdims=0)
    # y is live, as z, while v is made: 3 + 12 + 3. As tensors of their own y and z would be 24.
    assert memory(net.model(net.node("Concat", v, w, axis=1))) == 4 * 18


def test_halves_take_half() -> None:
    net = Net()
    model = net.model(net.node("Relu", net.node("Cast", net.input("x", ["n", 7]), to=onnx.TensorProto.FLOAT16)))
    assert memory(model) == 4 * 7 + 2 * 7


def walked(analysis: Analysis) -> int:
    """The most bytes at a time, by keeping and freeing tensors node by node; each view is one more tensor."""
    graph, walk = analysis.graph, analysis.points.first
    left = {n: len(graph.users.get(n, ())) + (n in graph.outputs) for n in walk.shape}
    sized = {
        n: int(np.prod(walk.shape[n])) * onnx.helper.tensor_dtype_to_np_dtype(walk.dtype[n]).itemsize
        for n in walk.shape
        if n not in walk.computed and not analysis.is_constant(n)
    }
    live = {n: sized[n] for n in graph.inputs}
    most = 0
    for node in graph.nodes:
        live |= {o: sized[o] for o in node.outputs if o in sized}
        most = max(most, sum(live.values()))
        for name in node.inputs:
            left[name] = left.get(name, 0) - 1
        live = {n: size for n, size in live.items() if left[n] > 0}
    return most // analysis.points.batch


def test_it_is_what_a_walk_finds_where_views_are_small() -> None:
    analysis = couple(Graph(onnx.load("models/digits_resnet.onnx")))  # which flattens what its pooling has left
    assert measure(analysis).memory == walked(analysis) == 24576


@pytest.mark.parametrize("path", DIGITS)
def test_that_of_a_choice_is_that_of_the_network_cut(path: str) -> None:
    analysis = couple(Graph(onnx.load(path)))
    groups = analysis.free
    rng = np.random.default_rng(0)
    for _ in range(3):
        widths = [int(rng.integers(1, g.size + 1)) for g in groups]
        kept = {g.name: np.arange(w) for g, w in zip(groups, widths, strict=True)}
        pruned = couple(Graph(apply(analysis, make_plan(analysis, kept))))
        assert CostModel(analysis, groups).evaluate(widths).memory == measure(pruned).memory


def test_that_of_a_network_without_branches_is_that_of_the_network_cut() -> None:
    analysis = couple(Graph(onnx.load("models/digits_resnet.onnx")))
    for gone in ([0], [1, 2], [0, 1, 2]):
        widths = [0 if i in gone else 1 for i in range(3)]
        kept = {analysis.branches[i].name: np.zeros(0, int) for i in gone}
        pruned = couple(Graph(apply(analysis, make_plan(analysis, kept))))
        assert CostModel(analysis, analysis.branches).evaluate(widths).memory == measure(pruned).memory


def two_peaks() -> ModelProto:
    """Two layers of 17 channels, each as bad a moment as the other, and one of 13 that is none."""
    net = Net()
    x = net.gemm(net.gemm(net.input("x", ["n", 3]), 3, 17, name="a"), 17, 3)
    x = net.gemm(net.gemm(x, 3, 13, name="b"), 13, 3)
    return net.model(net.gemm(net.gemm(x, 3, 17, name="c"), 17, 3))


def test_where_two_moments_are_as_bad_both_become_less() -> None:
    analysis = couple(Graph(two_peaks()))
    groups = [g for g in analysis.free if g.size in (13, 17)]
    curves = {g.name: Curve(np.arange(g.size), np.arange(g.size + 1.0)) for g in groups}
    choice = allocate(analysis, groups, curves, Budget(0.15, of="memory", round_to=1))
    assert {n.split("[")[0]: len(k) for n, k in choice.kept.items()} == {"a": 14, "c": 14}
    choice = allocate(analysis, groups, curves, Budget(0.5, of="memory", round_to=1))
    assert {n.split("[")[0]: len(k) for n, k in choice.kept.items()} == {"a": 7, "b": 7, "c": 7}


def test_a_budget_of_memory_is_met_and_reported() -> None:
    result = spa.prune("models/digits_vit.onnx", ratio=0.4, of="memory", criterion="l2", cross_norm=True)
    assert result.report.reached == pytest.approx(0.4, abs=0.01)
    assert result.report.after.memory == memory(result.model) == 56576 - round(result.report.reached * 56576)
    assert result.report.to_dict()["before"]["memory"] == 56576
