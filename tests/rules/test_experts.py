"""Mixtures of experts in one operator: whole experts go, or their inner widths, or the channels around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.surgery.apply import apply
from tests.oracle import Net, check, random_keeps


def mixture(fused: int = 1, third: bool = False, **attributes: Any) -> ModelProto:
    """Five experts of inner width 6 between layers of 8 channels, over samples of three tokens."""
    net = Net(17, com_microsoft=1)
    x = net.matmul(net.input("x", ["n", 3, 4]), 4, 8)
    rows = net.node("Reshape", x, net.constant(np.asarray([-1, 8])))
    router = net.matmul(rows, 8, 5, bias=False, name="router")
    operands = [net.weight(5, 6 * fused, 8, fan_in=8), net.weight(5, 6 * fused), net.weight(5, 8, 6, fan_in=6)]
    operands += [net.weight(5, 8), net.weight(5, 6, 8, fan_in=8)] if third else [net.weight(5, 8)]
    y = net.node("MoE", x, router, *operands, domain="com.microsoft", k=2, **attributes)
    return net.model(net.matmul(net.node("Add", x, y), 8, 3))


@pytest.mark.parametrize("options", [{"activation_type": "relu"}, {"activation_type": "gelu"}], ids=str)
def test_inner_widths_and_channels_of_experts_go_exactly(options: dict[str, Any]) -> None:
    model = mixture(**options)
    free = {g.name: g.size for g in couple(Graph(model)).groups if not g.frozen}
    assert sorted(free.values()) == [5, 6, 8]
    crossing = {g.size for g in couple(Graph(model)).prunable if g.crossings}
    assert crossing == {5}
    check(model)


def test_gates_in_turns_with_values_go_with_them() -> None:
    model = mixture(2, activation_type="swiglu", swiglu_fusion=1)
    assert 6 in {g.size for g in couple(Graph(model)).free}
    check(model)


def test_gates_beside_values_go_with_them() -> None:
    """Analysis alone: onnxruntime's CPU kernel takes turns only."""
    model = mixture(2, activation_type="swiglu", swiglu_fusion=1)
    next(a for n in model.graph.node for a in n.attribute if a.name == "swiglu_fusion").i = 2
    analysis = couple(Graph(model))
    (group,) = (g for g in analysis.free if g.size == 6)
    pruned = apply(analysis, make_plan(analysis, {group.name: np.asarray([0, 1, 3, 5])}))
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer if 5 in t.dims} for m in (model, pruned)
    )
    name = next(n for n, v in before.items() if v.shape == (5, 12, 8))
    np.testing.assert_array_equal(after[name], before[name][:, [0, 1, 3, 5, 6, 7, 9, 11]])


def test_whole_experts_go_and_never_more_are_picked_than_are_left() -> None:
    model = mixture(activation_type="relu")
    found = check(model, cross=True, fraction=0.9)
    node = next(n for n in found.pruned.graph.node if n.op_type == "MoE")
    assert next(a.i for a in node.attribute if a.name == "k") == 1
    analysis = couple(Graph(model))
    experts = next(g for g in analysis.prunable if g.crossings)
    keeps = random_keeps([experts], 0.2)
    assert apply(analysis, found.plan) is not None and len(keeps[experts.name]) == 4


def unpooled(shape: list[int], **attributes: Any) -> ModelProto:
    net = Net()
    h = net.conv(net.input("x", [2 if shape else "n", 3, 8, 8]), 3, 7)
    pooled, places = net.node("MaxPool", h, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    mixed = net.node("Relu", pooled)
    sizes = [net.constant(np.asarray(shape))] if shape else []
    back = net.node("MaxUnpool", mixed, places, *sizes, kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(back, 7, 5))


@pytest.mark.parametrize("shape", [[], [2, 7, 8, 8]], ids=["its own size", "a given size"])
def test_channels_pass_from_a_max_pool_through_its_indices(shape: list[int]) -> None:
    model = unpooled(shape)
    assert [g.size for g in couple(Graph(model)).free] == [7]
    check(model, feeds={"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)})


def test_indices_that_something_else_reads_or_of_another_size_keep_channels_whole() -> None:
    assert not couple(Graph(unpooled([2, 7, 9, 9]))).free
    net = Net()
    h = net.conv(net.input("x", ["n", 3, 8, 8]), 3, 7)
    pooled, places = net.node("MaxPool", h, outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    model = net.model(net.conv(pooled, 7, 5), net.node("Cast", places, to=1))
    assert not couple(Graph(model)).free
