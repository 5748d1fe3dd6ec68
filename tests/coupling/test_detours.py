"""Detours: what is found, what is not, and that a network without some computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from spa.coupling.analysis import Analysis, Detour, couple
from spa.coupling.plan import Plan, make_plan
from spa.model.graph import Graph
from spa.surgery.apply import apply
from tests.oracle import Net, OracleError, check

WIDTH = 7


def swish(net: Net, x: str) -> str:
    """An activation of two nodes, which no layer computes."""
    return net.node("Mul", x, net.node("Sigmoid", x))


def gate(net: Net, x: str) -> str:
    """Squeeze and excite."""
    squeezed = net.node("Relu", net.conv(net.node("GlobalAveragePool", x), WIDTH, 3))
    return net.node("Mul", x, net.node("Sigmoid", net.conv(squeezed, 3, WIDTH)))


def mobile(opset: int = 21) -> ModelProto:
    """A pointwise, a depthwise and a pointwise convolution, each with an activation, and a gate."""
    net = Net(opset)
    x = swish(net, net.conv(net.input("x", ["n", 5, 6, 4]), 5, WIDTH, (1, 1)))
    x = swish(net, net.conv(x, WIDTH, WIDTH, group=WIDTH))
    x = swish(net, net.conv(gate(net, x), WIDTH, 11, (1, 1)))
    return net.model(net.conv(x, 11, 3))


def detours(model: ModelProto) -> tuple[Detour, ...]:
    return couple(Graph(model)).detours


def kinds(model: ModelProto) -> list[str]:
    return [d.name.rpartition("[")[2].rstrip("]") for d in detours(model)]


def test_activations_depthwise_convolutions_and_gates_are_detours() -> None:
    analysis = couple(Graph(mobile()))
    assert kinds(mobile()) == ["activation", "depthwise", "activation", "gate", "activation"]
    assert [[analysis.graph.nodes[i].op for i in d.operators] for d in analysis.detours] == [
        ["Sigmoid", "Mul"],
        ["Conv", "Sigmoid", "Mul"],
        ["Sigmoid", "Mul"],
        ["GlobalAveragePool", "Conv", "Relu", "Conv", "Sigmoid", "Mul"],
        ["Sigmoid", "Mul"],
    ]
    assert all(d.axes == (1,) for d in analysis.detours)


def _fused(net: Net, x: str) -> str:
    return net.node("Relu", net.batch_norm(net.conv(x, 5, WIDTH), WIDTH))


def _strided(net: Net, x: str) -> str:
    x = net.node("Relu", net.conv(x, 5, WIDTH))
    return net.node("Relu", net.conv(x, WIDTH, WIDTH, kernel=(3, 3), group=WIDTH, strides=[2, 2], pads=[1, 1, 1, 1]))


def _softmax(net: Net, x: str) -> str:
    return net.node("Softmax", net.conv(x, 5, WIDTH), axis=1)


def _with_another(net: Net, x: str) -> str:
    y = net.conv(x, 5, WIDTH)
    return net.node("Mul", y, net.node("Sigmoid", net.conv(x, 5, WIDTH)))


def _read_inside(net: Net, x: str) -> str:
    y = net.conv(x, 5, WIDTH)
    sigmoid = net.node("Sigmoid", y)
    return net.node("Mul", net.node("Mul", y, sigmoid), net.conv(sigmoid, WIDTH, WIDTH))


@pytest.mark.parametrize("build", [_fused, _strided, _softmax, _with_another, _read_inside])
def test_what_costs_nothing_or_is_more_than_a_detour_is_none(build: Callable[[Net, str], str]) -> None:
    net = Net()
    y = build(net, net.input("x", ["n", 5, 6, 4]))
    assert kinds(net.model(net.conv(y, WIDTH, 3))) == []


def test_what_is_an_output_is_no_detour() -> None:
    net = Net()
    y = swish(net, net.conv(net.input("x", ["n", 5, 6, 4]), 5, WIDTH))
    assert kinds(net.model(net.conv(y, WIDTH, 3), y)) == []


@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [1, 2], [0, 1, 3], [0, 1, 2, 3, 4]])
def test_a_network_without_detours_computes_what_the_masked_one_does(which: list[int], opset: int) -> None:
    model = mobile(opset)
    found = detours(model)
    checked = check(model, drop=[found[i].name for i in which])
    left = [n.op_type for n in checked.pruned.graph.node]
    assert ("GlobalAveragePool" not in left) == (3 in which)


def test_channels_go_from_what_stands_for_a_detour() -> None:
    model = mobile()
    names = [d.name for d in detours(model)]
    pruned = check(model, drop=[names[1], names[3]]).pruned
    shapes = [tuple(t.dims) for t in pruned.graph.initializer if t.name.endswith(("_scale", "_shift"))]
    assert shapes == [(WIDTH - 2, 1, 1)] * 4


def test_the_last_axis_of_sequences_has_scale_and_shift() -> None:
    net = Net()
    x = swish(net, net.matmul(net.input("x", ["n", "t", 5]), 5, WIDTH))
    model = net.model(net.matmul(x, WIDTH, 3))
    (detour,) = detours(model)
    assert detour.axes == (2,)
    check(model, drop=[detour.name])


def test_the_oracle_notices_a_detour_that_is_still_there() -> None:
    def other(analysis: Analysis, plan: Plan) -> ModelProto:
        kept = dict(plan.kept) | {analysis.detours[1].name: (0,)}
        return apply(analysis, make_plan(analysis, {n: np.array(k, int) for n, k in kept.items()}))

    model = mobile()
    with pytest.raises(OracleError, match="off the masked original"):
        check(model, drop=[detours(model)[1].name], surgeon=other)
