"""Constants in the places of branches go into biases, where the network computes the same without the Add."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import spa
from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.running.verify import verify
from spa.surgery.apply import apply
from spa.surgery.folding import fold
from tests.oracle import Net

WIDTH = 7


def without(
    model: ModelProto, value: float | None = None, shape: tuple[int, ...] = ()
) -> tuple[ModelProto, ModelProto]:
    """A network without its last branch, whose constant is random (or zero), and the same with it folded."""
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {analysis.branches[-1].name: np.zeros(0, int)})
    pruned = apply(analysis, plan)
    (tensor,) = (t for t in pruned.graph.initializer if t.name.endswith("_constant"))
    rng = np.random.default_rng(0)
    constant = rng.normal(size=shape or tuple(tensor.dims)) if value is None else np.zeros(tensor.dims)
    tensor.CopyFrom(numpy_helper.from_array(constant.astype(np.float32), tensor.name))
    folded = ModelProto()
    folded.CopyFrom(pruned)
    fold(analysis, plan, folded)
    return pruned, folded


def hidden(net: Net, x: str) -> str:
    return net.gemm(net.node("Tanh", net.gemm(x, WIDTH, 11)), 11, WIDTH)


def sequence_layer(net: Net, x: str) -> str:
    return net.matmul(net.node("Tanh", net.matmul(x, WIDTH, 11)), 11, WIDTH)


def a_gemm(net: Net) -> str:
    x = net.gemm(net.input("x", ["n", 5]), 5, WIDTH)
    return net.node("Add", x, hidden(net, x))


def through_sums(net: Net) -> str:
    x = net.node("Tanh", net.matmul(net.input("x", ["n", 4, 5]), 5, WIDTH))
    y = net.node("Add", x, net.node("Tanh", x))
    y = net.node("Add", y, net.matmul(net.node("Relu", x), WIDTH, WIDTH))  # whose Add of a bias takes it
    return net.node("Add", y, sequence_layer(net, y))


def a_layer_norm(net: Net) -> str:
    x = net.node("LayerNormalization", net.input("x", ["n", 4, WIDTH]), net.weight(WIDTH), net.weight(WIDTH))
    return net.node("Add", x, sequence_layer(net, x))


def a_convolution(net: Net) -> str:
    x = net.node("Conv", net.input("x", ["n", 3, 5, 6]), net.weight(WIDTH, 3, 1, 1), net.weight(WIDTH))
    return net.node("Add", net.conv(net.node("Relu", x), WIDTH, WIDTH, (1, 1)), x)


def a_batch_norm(net: Net) -> str:
    x = net.batch_norm(net.conv(net.input("x", ["n", 3, 5, 6]), 3, WIDTH, (1, 1)), WIDTH)
    return net.node("Add", net.conv(net.node("Relu", x), WIDTH, WIDTH, (1, 1)), x)


@pytest.mark.parametrize("build", [a_gemm, through_sums, a_layer_norm, a_convolution, a_batch_norm])
@pytest.mark.parametrize("is_output", [True, False])
def test_a_bias_takes_the_constant(build: Callable[[Net], str], is_output: bool) -> None:
    net = Net()
    y = build(net)
    pruned, folded = without(net.model(y if is_output else net.node("Tanh", y)))
    assert len(folded.graph.node) == len(pruned.graph.node) - 1
    assert not any(t.name.endswith("_constant") for t in folded.graph.initializer)
    assert verify(pruned, folded, atol=1e-5, rtol=1e-5).equal
    onnx.checker.check_model(folded, full_check=True)


def behind_an_activation(net: Net) -> str:
    x = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    return net.node("Add", x, hidden(net, x))


def a_skip_that_others_read(net: Net) -> str:
    x = net.gemm(net.input("x", ["n", 5]), 5, WIDTH)
    return net.node("Mul", net.node("Add", x, hidden(net, x)), x)


def a_bias_that_others_read(net: Net) -> str:
    bias = net.weight(WIDTH)
    x = net.node("Gemm", net.input("x", ["n", 5]), net.weight(5, WIDTH), bias)
    return net.node("Mul", net.node("Add", x, hidden(net, x)), bias)


def a_weighed_bias(net: Net) -> str:
    x = net.node("Gemm", net.input("x", ["n", 5]), net.weight(5, WIDTH), net.weight(WIDTH), beta=0.5)
    return net.node("Add", x, hidden(net, x))


def an_addend_that_others_read(net: Net) -> str:
    p = net.gemm(net.input("x", ["n", 5]), 5, WIDTH)
    x = net.node("Add", p, net.node("Tanh", p))
    return net.node("Mul", net.node("Add", x, hidden(net, x)), p)


@pytest.mark.parametrize(
    "build",
    [
        behind_an_activation,
        a_skip_that_others_read,
        a_bias_that_others_read,
        a_weighed_bias,
        an_addend_that_others_read,
    ],
)
def test_elsewhere_the_constant_stays_and_the_network_as_it_is(build: Callable[[Net], str]) -> None:
    net = Net()
    pruned, folded = without(net.model(net.node("Tanh", build(net))))
    assert folded == pruned


def test_a_constant_along_another_axis_stays() -> None:
    """As many numbers as there are channels, but along the width of the image."""
    net = Net()
    x = net.node("Conv", net.input("x", ["n", 3, 5, WIDTH]), net.weight(WIDTH, 3, 1, 1), net.weight(WIDTH))
    model = net.model(net.node("Tanh", net.node("Add", net.conv(net.node("Relu", x), WIDTH, WIDTH, (1, 1)), x)))
    pruned, folded = without(model, shape=(WIDTH,))
    assert folded == pruned
    pruned, folded = without(model, shape=(WIDTH, 1, 1))
    assert folded != pruned


@pytest.mark.parametrize("build", [behind_an_activation, a_skip_that_others_read, a_weighed_bias, a_batch_norm])
def test_of_zeros_nothing_stays(build: Callable[[Net], str]) -> None:
    net = Net()
    pruned, folded = without(net.model(net.node("Tanh", build(net))), 0.0)
    assert len(folded.graph.node) == len(pruned.graph.node) - 1
    assert verify(pruned, folded, atol=0, rtol=0).equal


@pytest.mark.parametrize("build", [a_gemm, a_skip_that_others_read])
def test_shapes_are_declared_of_what_is_there(build: Callable[[Net], str]) -> None:
    net = Net()
    model = onnx.shape_inference.infer_shapes(net.model(net.node("Tanh", build(net))))
    _, folded = without(model, 0.0)
    made = {name for node in folded.graph.node for name in node.output}
    assert folded.graph.value_info and {info.name for info in folded.graph.value_info} <= made


def test_zeros_stay_where_the_sum_is_an_output_and_others_read_the_skip() -> None:
    net = Net()
    x = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    pruned, folded = without(net.model(net.node("Add", x, hidden(net, x)), net.node("Relu", x)), 0.0)
    assert folded == pruned


def test_weights_that_lie_elsewhere_stay_as_they_are() -> None:
    net = Net()
    x = net.gemm(net.input("x", ["n", 5]), 5, WIDTH, name="w")
    analysis = couple(Graph(net.model(net.gemm(net.node("Add", x, hidden(net, x)), WIDTH, 3))))
    plan = make_plan(analysis, {analysis.branches[-1].name: np.zeros(0, int)})
    pruned = apply(analysis, plan)
    (tensor,) = (t for t in pruned.graph.initializer if t.name.endswith("_constant"))
    tensor.CopyFrom(numpy_helper.from_array(np.ones(WIDTH, np.float32), tensor.name))
    before = pruned.SerializeToString()
    fold(analysis, plan, pruned, outside=["w.bias"])
    assert pruned.SerializeToString() == before
    fold(analysis, plan, pruned)
    assert pruned.SerializeToString() != before


def test_a_pruned_transformer_has_no_constants_left() -> None:
    analysis = spa.analyze("models/digits_vit.onnx")
    plan = make_plan(analysis, {analysis.branches[i].name: np.zeros(0, int) for i in (3, 6)})
    options = {"plan": plan, "data": "models/digits_train.npz", "samples": 16, "threads": 1, "reconstruct": "bias"}
    model = spa.prune("models/digits_vit.onnx", **options).model
    assert not any(t.name.endswith("_constant") for t in model.graph.initializer)
    assert sum(n.op_type == "Add" for n in apply(analysis, plan).graph.node) == 2 + sum(
        n.op_type == "Add" for n in model.graph.node
    )
