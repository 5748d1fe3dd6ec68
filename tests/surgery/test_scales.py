"""What stands for a detour goes into the layer before or after, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.running.runtime import load_session
from spa.surgery.apply import apply
from spa.surgery.folding import fold
from tests.coupling.test_detours import WIDTH, gate, swish
from tests.oracle import Net, distance

Build = Callable[[Net], str]
IMAGE = ["n", 5, 6, 4]


def _before(net: Net) -> str:
    return net.conv(swish(net, net.conv(net.input("x", IMAGE), 5, WIDTH)), WIDTH, 3)


def _before_without_bias(net: Net) -> str:
    return net.conv(swish(net, net.conv(net.input("x", IMAGE), 5, WIDTH, bias=False)), WIDTH, 3)


def _depthwise_before(net: Net) -> str:
    x = net.conv(net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH)), WIDTH, WIDTH, group=WIDTH)
    return net.conv(swish(net, x), WIDTH, 3)


def _gemm(net: Net) -> str:
    return net.gemm(swish(net, net.gemm(net.input("x", ["n", 5]), 5, WIDTH)), WIDTH, 3)


def _after(net: Net) -> str:
    return net.conv(gate(net, net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH))), WIDTH, 3, (1, 1))


def _after_without_bias(net: Net) -> str:
    x = gate(net, net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH)))
    return net.conv(x, WIDTH, 3, (3, 2), pads=[0, 0, 0, 0], bias=False)


def _depthwise_after(net: Net) -> str:
    x = gate(net, net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH)))
    return net.conv(net.conv(x, WIDTH, WIDTH, pads=[0, 0, 0, 0], group=WIDTH), WIDTH, 3)


def _gemm_after(net: Net) -> str:
    x = net.gemm(net.input("x", ["n", 5]), 5, WIDTH)
    y = net.node("Gemm", swish(net, x), net.weight(3, WIDTH), net.weight(3), transB=1, alpha=0.5)
    return net.node("Add", y, net.gemm(x, WIDTH, 3))


def _gemm_with_beta(net: Net) -> str:
    x = net.gemm(net.input("x", ["n", 5]), 5, WIDTH)
    y = net.node("Gemm", swish(net, x), net.weight(WIDTH, 3), net.weight(3), beta=0.5)
    return net.node("Add", y, net.gemm(x, WIDTH, 3))


def _batch_norm(net: Net) -> str:
    return net.conv(gate(net, net.batch_norm(net.conv(net.input("x", IMAGE), 5, WIDTH), WIDTH)), WIDTH, 3)


def _padded_by_itself(net: Net) -> str:
    x = gate(net, net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH)))
    return net.node("Conv", x, net.weight(3, WIDTH, 3, 3), kernel_shape=[3, 3], auto_pad="SAME_UPPER")


def _padded(net: Net) -> str:
    return net.conv(gate(net, net.node("Relu", net.conv(net.input("x", IMAGE), 5, WIDTH))), WIDTH, 3)


def _matmul(net: Net) -> str:
    return net.matmul(swish(net, net.matmul(net.input("x", ["n", "t", 5]), 5, WIDTH, bias=False)), WIDTH, 3)


def _read_twice(net: Net) -> str:
    x = net.conv(net.input("x", IMAGE), 5, WIDTH)
    return net.node("Add", net.conv(swish(net, x), WIDTH, 3), net.conv(x, WIDTH, 3))


def _tied(net: Net) -> str:
    weight, bias = net.weight(WIDTH, 5, 1, 1), net.weight(WIDTH)
    x = net.input("x", IMAGE)
    one, other = (net.node("Conv", x, weight, bias, kernel_shape=[1, 1]) for _ in range(2))
    return net.conv(net.node("Relu", net.node("Mul", net.conv(swish(net, one), WIDTH, WIDTH), other)), WIDTH, 3)


FOLDED: dict[Build, list[str]] = {
    _before: [],
    _before_without_bias: [],
    _depthwise_before: [],
    _gemm: [],
    _after: [],
    _after_without_bias: [],
    _depthwise_after: [],
    _gemm_after: [],
    _gemm_with_beta: ["Mul", "Add"],
    _batch_norm: [],
    _padded: ["Mul", "Add"],
    _padded_by_itself: ["Mul", "Add"],
    _matmul: ["Add"],
    _read_twice: ["Mul", "Add"],
    _tied: ["Mul", "Add"],
}


def network(build: Build) -> ModelProto:
    net = Net()
    return net.model(build(net))


def _filled(pruned: ModelProto) -> None:
    """Give what stands for detours values that are unlike each other."""
    rng = np.random.default_rng(3)
    for tensor in pruned.graph.initializer:
        if tensor.name.endswith(("_scale", "_shift")):
            value = rng.normal(size=tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


@pytest.mark.parametrize("build", FOLDED, ids=lambda b: b.__name__)
def test_scale_and_shift_go_into_a_layer_where_that_changes_nothing(build: Build) -> None:
    analysis = couple(Graph(network(build)))
    detour = analysis.detours[-1]
    plan = make_plan(analysis, {detour.name: np.zeros(0, int)})
    pruned = apply(analysis, plan)
    _filled(pruned)
    folded = ModelProto()
    folded.CopyFrom(pruned)
    fold(analysis, plan, folded)
    stand_ins = {t.name for t in pruned.graph.initializer if t.name.endswith(("_scale", "_shift"))}
    left = [n.op_type for n in folded.graph.node if stand_ins.intersection(n.input) and n.op_type in ("Mul", "Add")]
    assert left == FOLDED[build]
    assert all(name.startswith(detour.name.partition("[")[0]) for name in stand_ins) and len(stand_ins) == 2
    dims = {i.name: [d.dim_value or 2 for d in i.type.tensor_type.shape.dim] for i in pruned.graph.input}
    feeds = {n: np.random.default_rng(0).normal(size=shape).astype(np.float32) for n, shape in dims.items()}
    (before,), (after,) = (load_session(m).run(None, feeds) for m in (pruned, folded))
    assert distance(after, before) < 1e-5
    fold(analysis, plan, folded)  # again changes nothing
    assert np.array_equal(load_session(folded).run(None, feeds)[0], after)
    assert len(folded.graph.node) == len(pruned.graph.node) - 2 + len(left)


@pytest.mark.parametrize("build", [_before, _after], ids=lambda b: b.__name__)
def test_weights_that_stay_outside_are_left_alone(build: Build) -> None:
    analysis = couple(Graph(network(build)))
    plan = make_plan(analysis, {analysis.detours[0].name: np.zeros(0, int)})
    pruned = apply(analysis, plan)
    _filled(pruned)
    before = pruned.SerializeToString()
    fold(analysis, plan, pruned, outside={t.name for t in pruned.graph.initializer})
    assert pruned.SerializeToString() == before
