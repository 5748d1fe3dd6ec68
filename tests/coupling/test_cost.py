"""Costs against numbers worked out by hand: sizes are distinct primes, so that no factor can stand in for another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from spa.coupling.analysis import couple
from spa.coupling.cost import CostModel, count_parameters, measure
from spa.model.graph import Graph
from tests.oracle import Net


def conv(batch: int | str = "n") -> ModelProto:
    net = Net()
    return net.model(net.conv(net.input("x", [batch, 3, 13, 17]), 3, 7, (5, 11)))


def strided_conv() -> ModelProto:
    net = Net()
    x = net.input("x", ["n", 3, 13, 17])
    return net.model(net.conv(x, 3, 7, (5, 11), strides=[2, 3], pads=[0, 0, 0, 0]))  # gives 5 by 3


def grouped_conv() -> ModelProto:
    net = Net()
    return net.model(net.conv(net.input("x", ["n", 6, 13, 17]), 6, 14, (5, 11), group=2))


def transposed_conv() -> ModelProto:
    net = Net()
    x = net.input("x", ["n", 3, 13, 17])
    return net.model(net.node("ConvTranspose", x, net.weight(3, 7, 5, 11), kernel_shape=[5, 11], strides=[2, 2]))


def gemm(**options: int) -> ModelProto:
    net = Net()
    x = net.input("x", [5, "n"] if options.get("transA") else ["n", 5])
    return net.model(net.node("Gemm", x, net.weight(*((7, 5) if options.get("transB") else (5, 7))), **options))


def matmul() -> ModelProto:
    net = Net()
    return net.model(net.matmul(net.input("x", ["n", 11, 5]), 5, 7, bias=False))


def attention_product() -> ModelProto:
    """Two activations, [n 3 11 5] and [n 3 5 13]; the batch axes are counted once."""
    net = Net()
    return net.model(net.node("MatMul", net.input("q", ["n", 3, 11, 5]), net.input("k", ["n", 3, 5, 13])))


def vector() -> ModelProto:
    net = Net()
    return net.model(net.node("MatMul", net.input("x", ["n", 11, 5]), net.weight(5)))


def einsum() -> ModelProto:
    net = Net()
    x = net.input("x", ["n", 11, 5])
    return net.model(net.node("Einsum", x, net.weight(5, 7, 3), equation="abc,cde->abde"))


MACS: dict[str, tuple[int, Callable[[], ModelProto]]] = {
    "conv": (13 * 17 * 7 * 3 * 5 * 11, conv),
    "strided conv": (5 * 3 * 7 * 3 * 5 * 11, strided_conv),
    "grouped conv": (13 * 17 * 14 * 3 * 5 * 11, grouped_conv),  # each output sees the 3 inputs of its group
    "transposed conv": (13 * 17 * 3 * 7 * 5 * 11, transposed_conv),  # each input goes through the kernel once
    "gemm": (5 * 7, gemm),
    "gemm transB": (5 * 7, lambda: gemm(transB=1)),
    "matmul": (11 * 5 * 7, matmul),
    "attention product": (3 * 11 * 5 * 13, attention_product),
    "matrix and vector": (11 * 5, vector),
    "einsum": (11 * 5 * 7 * 3, einsum),
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates_of_one_sample_are_counted_with_every_factor(name: str) -> None:
    expected, build = MACS[name]
    assert measure(couple(Graph(build()))).macs == expected


def test_a_batch_that_the_model_fixes_counts_whole() -> None:
    assert measure(couple(Graph(conv(batch=19)))).macs == 19 * MACS["conv"][0]


def test_a_reshaped_batch_leaves_the_cost_of_one_sample() -> None:
    net = Net()
    rows = net.node("Reshape", net.input("x", ["n", 11, 5]), net.constant(np.array([-1, 5])))
    assert measure(couple(Graph(net.model(net.gemm(rows, 5, 7))))).macs == 11 * 5 * 7


def mlp(dtype: int = TensorProto.FLOAT) -> ModelProto:
    net = Net(dtype=dtype)
    h = net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 11, name="a"))
    h = net.node("Reshape", h, net.constant(np.array([-1, 11])))
    return net.model(net.gemm(h, 11, 5, name="b"))


@pytest.mark.parametrize(("dtype", "size"), [(TensorProto.FLOAT, 4), (TensorProto.FLOAT16, 2), (TensorProto.DOUBLE, 8)])
def test_parameters_and_bytes_are_those_of_weights_and_not_of_shapes(dtype: int, size: int) -> None:
    graph = Graph(mlp(dtype))
    cost = measure(couple(graph))
    assert cost.params == 3 * 11 + 11 + 11 * 5 + 5
    assert cost.bytes == size * cost.params
    assert count_parameters(graph) == (cost.params, cost.bytes)
    assert cost.channels == 11


def test_each_width_has_its_own_cost() -> None:
    analysis = couple(Graph(mlp()))
    costs = CostModel(analysis, analysis.free)
    for width in (1, 4, 11):
        found = costs.evaluate([width])
        assert (found.macs, found.params) == (3 * width + width * 5, 3 * width + width + width * 5 + 5)
        assert found.channels == width
        assert costs.removed([width], "macs") == pytest.approx(1 - width / 11)
