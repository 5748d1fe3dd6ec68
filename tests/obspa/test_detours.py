"""What repair makes of a detour that went, and what is measured of detours that may go."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import Plan, make_plan
from spa.model.graph import Graph
from spa.obspa.branches import BranchGauge
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.running.change import Yardstick
from spa.running.live import PaddedBatch
from spa.surgery.apply import apply
from tests.coupling.test_detours import WIDTH, mobile, swish
from tests.oracle import Net, distance

Feeds = dict[str, np.ndarray]


def images(samples: int = 60, seed: int = 0, columns: int = 4) -> list[Feeds]:
    return [{"x": np.random.default_rng(seed).normal(size=(samples, 5, 6, columns)).astype(np.float32)}]


def without(model: ModelProto, *which: int) -> tuple[Analysis, Plan, ModelProto]:
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {analysis.detours[i].name: np.zeros(0, int) for i in which})
    return analysis, plan, apply(analysis, plan)


def affine(matmul: bool = False) -> ModelProto:
    """A network whose activation is affine, though no table says so: |h + 50| * 0.4, of |h| < 50."""
    net = Net()
    x = net.input("x", ["n", 5, 6, 5 if matmul else 4])
    h = net.matmul(x, 5, WIDTH, bias=False) if matmul else net.conv(x, 5, WIDTH, (1, 1))
    there = net.node("Abs", net.node("Add", h, net.constant(np.float32(50))))
    y = net.node("Mul", there, net.constant(np.float32(0.4)))
    return net.model(net.matmul(y, WIDTH, 3) if matmul else net.conv(y, WIDTH, 3, (1, 1)))


@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("carriers", [True, False])
def test_where_a_detour_is_affine_nothing_is_lost(carriers: bool, matmul: bool) -> None:
    analysis, plan, pruned = without(affine(matmul), 0)
    columns = 5 if matmul else 4
    yardstick = Yardstick(analysis.graph, images(seed=1, columns=columns))
    before = yardstick.change(pruned).error
    settings = FitSettings(damping=1e-6, carriers=carriers)
    reconstruct(analysis, plan, pruned, images(columns=columns), settings, nodes={analysis.detours[0].end})
    assert before > 0.01 > 1e-9 > yardstick.change(pruned).error  # type: ignore[operator] # outputs are floats


def test_scale_and_shift_are_those_of_the_regression() -> None:
    model = mobile()
    analysis, plan, pruned = without(model, 0)
    first = analysis.detours[0]
    settings = FitSettings(carriers=False)
    reconstruct(analysis, plan, pruned, images(), settings, nodes={first.end})
    from onnx import helper
    from onnxruntime import InferenceSession

    target = analysis.graph.nodes[first.end].outputs[0]
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in (first.source, target))
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, y = (np.moveaxis(v, 1, 0).reshape(WIDTH, -1) for v in session.run([first.source, target], images()[0]))
    slopes, shifts = zip(*(np.polyfit(a, b, 1) for a, b in zip(x, y, strict=True)), strict=True)
    constants = {t.name: numpy_helper.to_array(t).ravel() for t in pruned.graph.initializer}
    (scale,) = (v for n, v in constants.items() if n.endswith("_scale"))
    (shift,) = (v for n, v in constants.items() if n.endswith("_shift"))
    assert np.allclose(scale, slopes, atol=1e-4) and np.allclose(shift, shifts, atol=1e-4)


def test_the_layer_before_learns_what_scale_and_shift_cannot() -> None:
    # Of normal inputs the best map is a multiple of the layer before. Of skewed ones it is not.
    net, found = Net(), []
    x = net.conv(net.input("x", ["n", 5, 6, 4]), 5, WIDTH, (1, 1))
    model = net.model(net.conv(net.node("Mul", x, net.node("Tanh", x)), WIDTH, 3, (1, 1)))
    for carriers in (False, True):
        analysis, plan, pruned = without(model, 0)
        skewed = [{"x": batch["x"] ** 2} for batch in images(200)]
        reconstruct(analysis, plan, pruned, skewed, FitSettings(carriers=carriers), nodes={analysis.detours[0].end})
        (held_out,) = images(seed=1)
        found.append(Yardstick(analysis.graph, [{"x": held_out["x"] ** 2}]).change(pruned).error)
    assert found[1] < 0.9 * found[0]  # type: ignore[operator] # outputs are floats


def test_padding_counts_in_no_regression() -> None:
    net = Net()
    x = swish(net, net.matmul(net.input("x", ["n", "t", 5]), 5, WIDTH, bias=False))
    model = net.model(net.matmul(x, WIDTH, 3))
    real = np.arange(6) < np.array([6, 2, 4])[:, None]
    values = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    padded = PaddedBatch({"x": np.where(real[:, :, None], values, 1000)}, real)
    found = []
    for batch in (padded, {"x": values[real][None]}):
        analysis, plan, pruned = without(model, 0)
        reconstruct(analysis, plan, pruned, [batch], FitSettings(damping=1e-6), nodes={analysis.detours[0].end})
        found.append({t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer})
    assert all(distance(found[0][name], found[1][name]) < 1e-4 for name in found[0])  # sums of a few rows, in float32


def test_detours_that_do_less_cost_less() -> None:
    analysis = couple(Graph(affine()))
    gauge = BranchGauge(analysis, images(64), images(32, seed=1), 0.1)
    (nothing,) = gauge.changes(analysis.detours).values()
    other = couple(Graph(mobile()))
    changes = BranchGauge(other, images(64), images(32, seed=1), 0.1).changes(other.detours)
    assert nothing < 1e-8 < min(changes.values()) and len(changes) == 5
    assert changes[other.detours[0].name] < changes[other.detours[1].name]  # an activation, and taps besides
