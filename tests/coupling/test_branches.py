"""Residual branches: what is found, what is not, and that a network without some computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import spa
from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import Plan, make_plan
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.surgery.apply import apply
from tests.oracle import Net, OracleError, check

DIGITS = ("models/digits_resnet.onnx", "models/digits_vit.onnx")
WIDTH, HIDDEN = 7, 11


def branch(net: Net, x: str, hidden: int = HIDDEN) -> str:
    """Two layers on ``x``, back to its width."""
    return net.gemm(net.node("Tanh", net.gemm(x, WIDTH, hidden)), hidden, WIDTH)


def stem(net: Net) -> str:
    """What a residual stream begins with."""
    return net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))


def two_blocks(net: Net | None = None, opset: int = 21) -> ModelProto:
    """A residual network of two blocks, the branch on either side of the sum."""
    net = net or Net(opset)
    x = stem(net)
    x = net.node("Add", branch(net, x), x)
    x = net.node("Add", x, branch(net, x, 13))
    return net.model(net.gemm(x, WIDTH, 3))


def found(model: ModelProto) -> list[str]:
    """The names of the branches of a network."""
    return [b.name for b in couple(Graph(model)).branches]


def test_the_layers_between_a_skip_and_its_sum_are_a_branch() -> None:
    analysis = couple(Graph(two_blocks()))
    sums = [n for n in analysis.graph.nodes if n.op == "Add"]
    assert [b.name for b in analysis.branches] == [f"{n.outputs[0]}[branch]" for n in sums]
    assert [(b.sum, b.operand, b.axes, len(b.operators), len(b.writers)) for b in analysis.branches] == [
        (sums[0].index, 0, (1,), 3, 2),
        (sums[1].index, 1, (1,), 3, 2),
    ]
    hidden = [g for g in analysis.free if g.size in (HIDDEN, 13)]
    residual = next(g for g in analysis.free if g.size == WIDTH)
    assert [[b.holds(g) for g in hidden] for b in analysis.branches] == [[True, False], [False, True]]
    assert not any(b.holds(residual) for b in analysis.branches)


def _projected(net: Net) -> str:
    x = stem(net)
    return net.node("Add", net.gemm(x, WIDTH, WIDTH), branch(net, x))


def _read_twice(net: Net) -> str:
    x = stem(net)
    y = branch(net, x)
    return net.node("Mul", net.node("Add", x, y), y)


def _an_output(net: Net) -> str:
    x = stem(net)
    y = branch(net, x)
    net.outputs_too = y  # type: ignore[attr-defined] # read by the test alone
    return net.node("Add", x, y)


def _another_input(net: Net) -> str:
    x = stem(net)
    other = net.gemm(net.input("z", ["n", 5]), 5, WIDTH)
    return net.node("Add", x, net.gemm(net.node("Mul", other, x), WIDTH, WIDTH))


def _no_layers(net: Net) -> str:
    x = stem(net)
    return net.node("Add", x, net.node("Mul", x, net.node("Tanh", x)))


def _broadcast(net: Net) -> str:
    x = stem(net)
    return net.node("Add", x, net.gemm(x, WIDTH, 1))


@pytest.mark.parametrize("build", [_projected, _read_twice, _an_output, _another_input, _no_layers, _broadcast])
def test_what_cannot_go_alone_is_no_branch(build: Callable[[Net], str]) -> None:
    net = Net()
    y = net.gemm(build(net), WIDTH, 3)
    assert found(net.model(y, *([net.outputs_too] if hasattr(net, "outputs_too") else []))) == []


def test_a_branch_within_a_branch_is_found_and_both_may_go() -> None:
    net = Net()
    x = stem(net)
    inner = net.node("Tanh", net.gemm(x, WIDTH, WIDTH))
    inner = net.node("Add", inner, branch(net, inner))
    model = net.model(net.gemm(net.node("Add", x, net.gemm(inner, WIDTH, WIDTH)), WIDTH, 3))
    names = found(model)
    assert len(names) == 2
    for drop in ([names[0]], [names[1]], names):
        check(model, drop=drop)


@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_a_network_without_branches_computes_what_the_masked_one_does(which: list[int], opset: int) -> None:
    model = two_blocks(opset=opset)
    names = found(model)
    checked = check(model, drop=[names[i] for i in which])
    assert sum(n.op_type == "Tanh" for n in checked.pruned.graph.node) == 3 - len(which)


@pytest.mark.parametrize("path", DIGITS)
def test_real_networks_without_branches_compute_what_the_masked_ones_do(path: str) -> None:
    model = onnx.load(path)
    names = found(model)
    for drop in (names[:1], names[1::2], names):
        checked = check(model, drop=drop)
        assert Plan.from_json(checked.plan.to_json()) == checked.plan
        assert checked.pruned == apply(checked.analysis, checked.plan)


def test_the_oracle_sees_another_branch_or_none_gone() -> None:
    model = two_blocks()
    names = found(model)

    def instead(others: list[str]) -> Callable[[Analysis, Plan], ModelProto]:
        return lambda analysis, _: apply(analysis, make_plan(analysis, dict.fromkeys(others, np.zeros(0, int))))

    hidden = [g.name for g in couple(Graph(model)).free if g.size == 1]  # none, so that branches alone go
    check(model, groups=hidden, drop=names[:1])
    for others in ([], names[1:], names):
        with pytest.raises(OracleError):
            check(model, groups=hidden, drop=names[:1], surgeon=instead(others))


def test_a_constant_is_as_wide_as_what_is_left_of_the_stream() -> None:
    analysis = couple(Graph(two_blocks()))
    residual = next(g for g in analysis.free if g.size == WIDTH)
    plan = make_plan(analysis, {analysis.branches[0].name: np.zeros(0, int), residual.name: np.array([0, 2, 3])})
    pruned = Graph(apply(analysis, plan))
    node = pruned.producer[analysis.graph.nodes[analysis.branches[0].sum].outputs[0]]
    assert pruned.array(node.inputs[0]).tolist() == [0, 0, 0]


def test_a_group_that_is_no_branch_keeps_a_channel() -> None:
    analysis = spa.analyze(DIGITS[0])
    with pytest.raises(PlanError, match="keeps none of its"):
        make_plan(analysis, {analysis.free[0].name: np.zeros(0, int)})
    with pytest.raises(PlanError, match="the model has no group of that name"):
        make_plan(analysis, {"nothing[branch]": np.zeros(0, int)})
