"""What the analysis lets be pruned: values that are data keep their axes, sizes that depend on data do not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from tests.oracle import Net, check, freedom


@pytest.mark.parametrize("op", ["Neg", "Abs", "Sqrt", "Mul", "Concat"])
def test_a_small_bias_that_the_graph_computes_from_constants_keeps_its_axes(op: str) -> None:
    """Six floats are few enough to be a size; they are weights all the same."""
    net = Net()
    if op == "Concat":
        bias = net.node(op, net.weight(2), net.weight(4), axis=0)
    elif op == "Mul":
        bias = net.node(op, net.weight(6), net.constant(-0.7))
    else:
        bias = net.node(op, net.weight(6, positive=True))
    hidden = net.matmul(net.input("x", ["n", 4]), 4, 6, bias=False)
    moved = net.node("Add", hidden, bias)
    model = net.model(net.matmul(net.node("Relu", moved), 6, 3, bias=False))
    channels = "2+4" if op == "Concat" else "6"
    assert freedom(couple(Graph(model)), moved)[moved] == f"2! {channels}"  # at the first of two batch sizes
    check(model)


def test_integers_made_from_constants_are_sizes() -> None:
    net = Net()
    hidden = net.matmul(net.input("x", ["n", 4]), 4, 6, bias=False)
    whole = net.node("Neg", net.constant(np.arange(6, dtype=np.int64), "whole"))
    moved = net.node("Add", hidden, net.node("Cast", whole, to=TensorProto.FLOAT))
    model = net.model(net.matmul(net.node("Relu", moved), 6, 3, bias=False))
    assert freedom(couple(Graph(model)), hidden)[hidden] == "2! 6!"


def test_an_axis_whose_size_depends_on_data_is_frozen_with_the_reason() -> None:
    net = Net()
    ones = net.node("ConstantOfShape", net.input("count", [1], TensorProto.INT64), name="filling")
    total = net.node("ReduceSum", ones, net.constant(np.array([0])))
    hidden = net.node("Add", net.gemm(net.input("x", ["n", 5]), 5, 11), total)
    model = net.model(net.gemm(net.node("Relu", hidden), 11, 3))
    analysis = couple(Graph(model))
    (size,) = analysis.axes[ones]
    assert analysis.space.reason(size) == "ConstantOfShape 'filling' gives it a size that depends on data"
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    check(model, feeds={"x": x, "count": np.array([13])})


def test_sizes_that_depend_on_data_are_no_constants_in_restated_shapes() -> None:
    """Compress keeps as many rows as a condition says: one walk makes up 1009 of them, the other 2003."""
    net = Net()
    hidden = net.gemm(net.input("x", [7, 5]), 5, 22)
    picked = net.node("Compress", hidden, net.input("rows", [7], TensorProto.BOOL), axis=0)
    count = net.node("Slice", net.node("Shape", picked), net.constant(np.array([0])), net.constant(np.array([1])))
    tables = net.node("Reshape", picked, net.node("Concat", count, net.constant(np.array([11, 2])), axis=0))
    model = net.model(net.node("Einsum", net.node("Relu", tables), net.weight(11, 2, 3), equation="nab,abo->no"))
    analysis = couple(Graph(model))
    first, second = (walk.shape[tables] for walk in (analysis.points.first, analysis.points.second))
    assert (first, second) == ((1009, 11, 2), (2003, 11, 2))
    rng = np.random.default_rng(0)
    keep = np.array([True, False, True, True, False, False, True])
    found = check(model, feeds={"x": rng.standard_normal((7, 5)).astype(np.float32), "rows": keep})
    assert sorted(g.size for g in found.groups) == [2, 11]


def test_an_axis_without_entries_is_no_group() -> None:
    """A network without register tokens joins none of them to the others (DINOv3)."""
    net = Net()
    x, none = net.input("x", ["n", 3, 6]), net.constant(np.zeros((2, 0, 6), np.float32))
    h = net.node(
        "Relu",
        net.matmul(net.node("Concat", net.node("Expand", none, net.constant(np.array([2, 0, 6]))), x, axis=1), 6, 9),
    )
    analysis = couple(Graph(net.model(net.matmul(h, 9, 2))))
    assert [g.size for g in analysis.groups if g.frozen is None] == [9]
    assert all(g.size for g in analysis.groups)
