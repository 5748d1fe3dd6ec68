"""Residual branches that add the same for every input go without a trace."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import spa
from tests.coupling.test_branches import WIDTH, branch, stem
from tests.oracle import Net


def network(scale: float, shift: float) -> ModelProto:
    """Two branches; the first is scaled and shifted before it is added."""
    net = Net()
    x = stem(net)
    y = net.node("Mul", branch(net, x), net.constant(np.full(WIDTH, scale)))
    x = net.node("Add", x, net.node("Add", y, net.constant(shift * np.arange(1.0, WIDTH + 1))))
    x = net.node("Add", x, branch(net, x))
    return net.model(net.gemm(x, WIDTH, 3))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_branch_that_is_constant_goes_and_nothing_changes(shift: float) -> None:
    model = network(0.0, shift)
    result = spa.prune(model, criterion="zero", depth="auto", round_to=1)
    assert len(result.report.gone) == 1 and len(result.report.branches) == 2
    assert sum(n.op_type == "Tanh" for n in result.model.graph.node) == 2
    assert spa.verify(model, result.model).max_abs_diff < 1e-5


def test_a_branch_that_varies_stays_and_so_do_all_where_depth_is_off() -> None:
    assert spa.prune(network(0.3, 0.0), criterion="zero", depth="auto").report.gone == ()
    result = spa.prune(network(0.0, 0.5), criterion="zero", round_to=1)
    assert result.report.gone == () and result.report.branches == ()


def test_the_last_normalisation_of_a_trained_block_may_be_what_is_zero() -> None:
    model = onnx.load("models/digits_resnet.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("layer1.1.bn2.weight", "layer1.1.bn2.bias"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    result = spa.prune(model, criterion="zero", depth="auto")
    assert result.report.gone == ("/layer1/layer1.1/Add_output_0[branch]",)
    assert spa.verify(model, result.model).max_abs_diff < 1e-4  # of logits up to 20
