"""The groups that a request may prune: those that no normalisation crosses, and sometimes others."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import spa
from spa.errors import PlanError
from spa.running.runtime import load_session
from spa.surgery.masking import masked
from spa.widths.selection import ALL_CROSS
from tests.oracle import Net, distance, random_array


def dynamically_quantised(rows: int = 32) -> ModelProto:
    net = Net()
    hidden = net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, rows))
    q, scale, zero = net.node("DynamicQuantizeLinear", hidden, outputs=3)
    weights = net.constant((np.arange(rows * 3).reshape(rows, 3) * 37 % 200 - 100).astype(np.int8))
    product = net.node("Cast", net.node("MatMulInteger", q, weights, zero), to=TensorProto.FLOAT)
    return net.model(net.node("Mul", product, net.node("Mul", scale, net.constant(0.01))))


def normalised() -> ModelProto:
    net = Net()
    hidden = net.matmul(net.input("x", ["n", 5]), 5, 16)
    normal = net.node("LayerNormalization", hidden, net.weight(16, positive=True), net.weight(16), axis=-1)
    return net.model(net.matmul(net.node("Relu", normal), 16, 3))


def test_a_scale_of_dynamic_quantisation_is_no_normalisation() -> None:
    model = dynamically_quantised()
    result = spa.prune(model, criterion="l2", ratio=0.2, round_to=1)
    (group,) = result.report.groups
    assert group.kept < group.size
    assert group.crossings  # no equality is claimed
    x = random_array(64, 5)
    expected = load_session(masked(result.analysis, result.plan)).run(None, {"x": x})[0]
    found = load_session(result.model).run(None, {"x": x})[0]
    assert distance(found, expected) < 0.02  # another scale rounds each of 24 products to other steps of 1/255


def test_where_a_normalisation_crosses_every_group_what_is_repaired_is_pruned_and_else_refused() -> None:
    with pytest.raises(PlanError, match=r"LayerNormalization .* takes statistics over it.*--cross-norm"):
        spa.prune(normalised(), criterion="l2", ratio=0.3, round_to=1)
    result = spa.prune(normalised(), ratio=0.3, round_to=1, samples=64)
    assert ALL_CROSS in result.report.notes
    assert result.report.groups[0].kept < 16
    with pytest.raises(PlanError, match="nothing that could be proved"):
        result.prove()


def test_a_group_that_no_normalisation_crosses_keeps_the_others_whole() -> None:
    net = Net()
    hidden = net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, 16))
    normal = net.node("LayerNormalization", net.matmul(hidden, 16, 8), net.weight(8, positive=True), net.weight(8))
    result = spa.prune(net.model(net.matmul(normal, 8, 3)), ratio=0.2, round_to=1, samples=64)
    assert ALL_CROSS not in result.report.notes
    assert [group.size for group in result.report.groups] == [16]
