"""What the layer before a residual branch that went learns of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, numpy_helper

import spa
from spa import job
from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import Plan, make_plan
from spa.job import Job, Outcome
from spa.model.graph import Graph
from spa.obspa.branches import BranchGauge
from spa.obspa.carriers import Carrier, before_clipping
from spa.obspa.compensate import compensate
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.surgery.apply import apply
from tests.oracle import Net

WIDTH = 7
EXACT = FitSettings(damping=1e-9)


def inputs(samples: int = 90, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(size=(samples, 5)).astype(np.float32)}]


def layers(net: Net, x: str, inside: int = 11) -> str:
    return net.gemm(net.node("Tanh", net.gemm(x, WIDTH, inside)), inside, WIDTH)


def linear_branches(count: int = 2) -> ModelProto:
    """x = p + W h, then branches that are linear in h."""
    net = Net()
    given = net.input("x", ["n", 5])
    p = net.node("Tanh", net.gemm(given, 5, WIDTH))
    x = net.node("Add", p, net.gemm(net.node("Tanh", net.gemm(given, 5, 11)), 11, WIDTH))
    for _ in range(count):
        x = net.node("Add", net.gemm(net.gemm(net.node("Sub", x, p), WIDTH, 11), 11, WIDTH), x)
    return net.model(net.gemm(x, WIDTH, 3))


def clipped(seed: int = 0) -> ModelProto:
    """A residual network with a ReLU behind each sum, the last branch small."""
    net = Net(seed=seed) if seed else Net()
    x = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    for _ in range(2):
        x = net.node("Relu", net.node("Add", x, layers(net, x)))
    return net.model(net.gemm(x, WIDTH, 3))


def tensors(model: ModelProto, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    shown = ModelProto()
    shown.CopyFrom(model)
    for name in set(names) - {o.name for o in model.graph.output}:
        shown.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


def without(model: ModelProto, *which: int) -> tuple[Analysis, Plan, ModelProto]:
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {analysis.branches[i].name: np.zeros(0, int) for i in which})
    return analysis, plan, apply(analysis, plan)


def error(model: ModelProto, *which: int, settings: FitSettings, seed: int = 1) -> float:
    """The error of the last of the sums that lost a branch, of what a ReLU makes of it where one reads it."""
    analysis, plan, pruned = without(model, *which)
    last = analysis.graph.nodes[analysis.branches[which[-1]].sum]
    reconstruct(analysis, plan, pruned, inputs(), settings, nodes={analysis.branches[i].sum for i in which})
    user = analysis.graph.users[last.outputs[0]][0][0]
    name = user.outputs[0] if user.op == "Relu" else last.outputs[0]
    (feeds,) = inputs(seed=seed)
    (was,), (is_now,) = (tensors(m, [name], feeds) for m in (model, pruned))
    return float(((is_now - was) ** 2).sum() / ((was - was.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_what_the_layer_can_compute_is_not_lost(which: tuple[int, ...]) -> None:
    model = linear_branches()
    assert error(model, *which, settings=FitSettings(damping=1e-9, carriers=False)) > 0.01
    assert error(model, *which, settings=EXACT) < 1e-9


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_through_relus_less_is_lost_on_other_inputs_too(which: tuple[int, ...]) -> None:
    model = clipped()
    constant = error(model, *which, settings=FitSettings(damping=1e-3, carriers=False))
    assert error(model, *which, settings=FitSettings(damping=1e-3)) < 0.8 * constant


def test_steps_through_a_relu_never_lose() -> None:
    rng = np.random.default_rng(0)
    target, current = rng.normal(size=(2, 1000))
    wanted = before_clipping(target, current)

    def clip(value: np.ndarray) -> np.ndarray:
        return np.maximum(value, 0)

    for size in (0.3, 0.7, 1.0):
        moved = current + size * (wanted - current)
        assert np.all(abs(clip(moved) - clip(target)) <= abs(clip(current) - clip(target)) + 1e-12)
        assert np.all(abs(clip(moved) - clip(target)) <= abs(moved - wanted) + 1e-12)
    assert np.array_equal(clip(wanted), clip(target))
    below = (target < 0) & (current < 0)
    assert below.any() and np.array_equal(wanted[below], current[below])


@pytest.mark.parametrize("carriers", [True, False])
def test_the_second_step_loses_less_than_the_first(carriers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for steps in (3, 1):
        for module in ("carriers", "constants"):
            monkeypatch.setattr(f"spa.obspa.{module}.STEPS", steps)
        found.append(error(clipped(), 1, settings=FitSettings(damping=1e-9, carriers=carriers), seed=0))
    assert found[0] < 0.98 * found[1]


def test_constants_of_branches_before_make_way() -> None:
    analysis, plan, pruned = without(clipped(), 0, 1)
    reconstruct(analysis, plan, pruned, inputs(), nodes={b.sum for b in analysis.branches})
    constants = [numpy_helper.to_array(t) for t in pruned.graph.initializer if t.name.endswith("_constant")]
    assert [bool(c.any()) for c in constants] == [False, True]


def test_what_the_addend_has_lost_is_made_up_for() -> None:
    net = Net()
    h = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, 11))
    p = net.gemm(net.gemm(h, 11, 13), 13, WIDTH)
    x = net.node("Add", p, net.gemm(h, 11, WIDTH))
    y = net.node("Add", x, net.gemm(net.node("Relu", x), WIDTH, WIDTH, name="last"))
    model = net.model(net.gemm(y, WIDTH, 3))
    found = carrier_of(model)
    assert found is not None and found.layer.size(Graph(model))[2] == 11  # the later of the two layers
    analysis = couple(Graph(model))
    (inner,) = (g for g in analysis.free if g.size == 13)
    (branch,) = analysis.branches
    dense_y = analysis.graph.nodes[branch.sum].outputs[0]
    errors = []
    for kept in (13, 4):
        plan = make_plan(analysis, {branch.name: np.zeros(0, int), inner.name: np.arange(kept)})
        pruned = apply(analysis, plan)
        reconstruct(analysis, plan, pruned, inputs(), EXACT, nodes={branch.sum})
        (was,), (is_now,) = (tensors(m, [dense_y], inputs()[0]) for m in (model, pruned))
        errors.append(float(((was - is_now) ** 2).mean()))
    assert errors[0] > 1e-3  # no linear layer knows the ReLU
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)  # all else that is lost can be computed from h


def test_a_price_is_the_less_of_both_repairs() -> None:
    analysis = couple(Graph(linear_branches()))
    found = BranchGauge(analysis, inputs(), inputs(seed=1), 1e-9).changes(analysis.branches)
    assert max(found.values()) < 1e-6  # of single precision


def carrier_of(model: ModelProto, which: int = -1) -> Carrier | None:
    analysis = couple(Graph(model))
    which = which % len(analysis.branches)
    _, _, pruned = without(model, which)
    branch, graph = analysis.branches[which], Graph(pruned)
    node = graph.producer[analysis.graph.nodes[branch.sum].outputs[0]]
    return Carrier.find(graph, analysis.graph, node, node.inputs[1 - branch.operand])


def _read_by_others(net: Net) -> str:
    x = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    x = net.node("Add", x, layers(net, x))
    y = net.node("Add", x, layers(net, x))
    return net.node("Mul", y, net.node("Tanh", x))


def _no_layer(net: Net) -> str:
    x = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    return net.node("Add", x, layers(net, x))


def _relu_before_alone(net: Net) -> str:
    x = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    return net.node("Tanh", net.node("Add", x, layers(net, x)))


def _shared_weights(net: Net) -> str:
    w, x = net.weight(WIDTH, WIDTH), net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, WIDTH))
    x = net.node("Add", x, net.node("MatMul", net.node("Tanh", x), w))
    y = net.node("Add", x, layers(net, x))
    return net.node("MatMul", y, w)


@pytest.mark.parametrize("build", [_read_by_others, _no_layer, _relu_before_alone, _shared_weights])
def test_no_layer_is_refitted_that_serves_others_or_does_not_reach_the_sum(build: Callable[[Net], str]) -> None:
    net = Net()
    assert carrier_of(net.model(net.gemm(build(net), WIDTH, 3))) is None


def test_the_layer_is_the_last_before_the_sum() -> None:
    found = carrier_of(linear_branches(), 1)
    assert found is not None and not found.clipped and found.constants == ()
    assert found.layer.size(Graph(linear_branches()))[1:] == (WIDTH, 11)
    through = carrier_of(clipped())
    assert through is not None and through.clipped and through.after.addend is not None
    stem = carrier_of(clipped(), 0)
    assert stem is not None and stem.clipped and stem.after.addend is None


def _always(real: Callable[..., Any], chosen: bool, of: Job, outcomes: list[Outcome], carriers: bool) -> Any:
    return real(of, outcomes, carriers=chosen)


def test_of_two_repairs_the_one_that_changes_the_outputs_less_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = clipped()
    _, plan, _ = without(model, 1)
    options = {"plan": plan, "data": inputs()[0], "samples": 64, "threads": 1, "reconstruct": "readers"}
    both = spa.prune(model, **options)
    alone = []
    real = job._repaired_models
    for carriers in (True, False):
        monkeypatch.setattr(job, "_repaired_models", partial(_always, real, carriers))
        alone.append(spa.prune(model, **options).report.calibration["after"])
    assert alone[0] != alone[1]
    assert both.report.calibration["after"] == min(alone)


def test_biases_alone_leave_the_layer_as_it_is() -> None:
    model = clipped()
    analysis, plan, pruned = without(model, 1)
    before = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    compensate(analysis, plan, pruned, inputs())
    after = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    assert all(np.array_equal(before[n], after[n]) for n in before if before[n].ndim == 2)
