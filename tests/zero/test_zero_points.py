"""Integer weights, whose zero is a zero point."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from tests.oracle import Net
from tests.zero.test_zero import compact, removed


def integer_product(gone: list[int], zero_points: list[int]) -> ModelProto:
    """[n 7] in bytes through integer weights, of which some rows are the zero points."""
    net = Net()
    hidden = net.gemm(net.input("x", ["n", 5]), 5, 7, name="hidden")
    scale, zero = net.constant(0.05), net.constant(np.uint8(120))
    weights = np.random.default_rng(0).integers(-9, 9, (7, 3)).astype(np.int8)
    points = np.asarray(zero_points, np.int8)
    weights[weights == points] += 10
    weights[gone] = points
    name = net.constant(points if len(points) > 1 else points[0])
    y = net.node("MatMulInteger", net.node("QuantizeLinear", hidden, scale, zero), net.constant(weights), zero, name)
    return net.model(net.node("Cast", y, to=TensorProto.FLOAT))


@pytest.mark.parametrize("zero_points", [[0], [3], [3, -2, 5]])
def test_rows_of_zero_points_read_nothing(zero_points: list[int]) -> None:
    compaction, _ = compact(integer_product([2, 4], zero_points))
    assert list(removed(compaction).values()) == [[2, 4]]


def test_rows_of_zeros_read_something_where_zero_is_another_number() -> None:
    model = integer_product([], [3])
    (weights,) = (t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2)
    value = numpy_helper.to_array(weights).copy()
    value[[2, 4]] = 0
    weights.CopyFrom(numpy_helper.from_array(value, weights.name))
    assert removed(compact(model)[0]) == {}
