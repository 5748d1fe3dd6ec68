"""Loss curves are corrected by what the outputs lose, measured on inputs that the curves have not seen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

import spa
from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import make_plan
from spa.criteria.answers import Curve
from spa.criteria.context import Context, Inputs
from spa.model.graph import Graph
from spa.obspa.criterion import FEWEST_MEASURED, MOST_MEASURED, loss_curves, measured_samples
from spa.obspa.curves import MomentReader
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.score import curves
from spa.obspa.sensitivity import TRUST, Gauge, Measured, corrected
from spa.running.change import Yardstick
from spa.running.feeds import make_feeds
from spa.running.stream import Stream
from spa.surgery.apply import apply
from tests.obspa.test_obspa import group, network, residual_net
from tests.oracle import Net

Array = np.ndarray


def test_the_regression_is_that_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 8))
    columns = np.array([[0, 5], [1, -1], [2, 3], [4, 6]])  # 7 belongs to no channel
    reader = MomentReader((x.T @ x / 500)[None], np.ones((1, 1, 8)), columns)
    gone, others, share = reader.regression(np.array([1, 2]), 1e-12)
    assert gone.tolist() == [1, 2, 3] and others.tolist() == [0, 4, 5, 6, 7]
    np.testing.assert_allclose(share[0].T, np.linalg.lstsq(x[:, others], x[:, gone], rcond=None)[0], atol=1e-6)


@pytest.mark.parametrize("bias, norm", [(True, True), (False, False)])
def test_a_measurement_is_the_change_once_the_group_is_cut_and_its_readers_are_fitted(bias: bool, norm: bool) -> None:
    rng = np.random.default_rng(0)
    analysis = couple(Graph(residual_net(rng, bias, norm)))
    x, apart = ({"x": rng.standard_normal((n, 3, 8, 8)).astype(np.float32)} for n in (64, 16))
    losses, measured = curves(analysis, analysis.free, [x], gauge=Gauge(analysis, [apart], 1e-6))
    assert set(measured) == set(losses)
    for found in (g for g in analysis.free if g.name in losses):
        point = measured[found.name]
        assert point.removed == round(0.3 * found.size)
        plan = make_plan(analysis, {found.name: losses[found.name].order[point.removed :]})
        pruned = apply(analysis, plan)
        yardstick = Yardstick(analysis.graph, [apart])
        cut = yardstick.change(pruned).error
        reconstruct(analysis, plan, pruned, [x], FitSettings(damping=1e-6), nodes=set(found.readers))
        fitted = yardstick.change(pruned).error
        assert cut is not None and fitted is not None and fitted < 0.8 * cut
        assert point.change < 0.9 * cut
        if len(found.readers) == 1:  # else each refit repairs what those before it left
            assert point.change == pytest.approx(fitted, rel=0.02)


@pytest.mark.parametrize(("name", "begins"), [("digits_resnet", True), ("digits_vit", True), ("digits_lstm", False)])
def test_a_cut_is_run_from_where_it_begins_to_change_the_network(
    name: str, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LSTM's initial state has the size of its batch, which surgery computes anew from the input: all is run."""
    analysis = couple(Graph(onnx.load(f"models/{name}.onnx")))
    gauge = Gauge(analysis, [make_feeds(analysis.graph.model, seed=seed, batch=8) for seed in (0, 1)], 0.1)
    starts, begun = gauge.starts(analysis.free), []
    begin_at = Stream.begin_at

    def began(stream: Stream, output: str) -> bool:
        found = begin_at(stream, output)
        begun.append(stream.at if found else None)
        return found

    monkeypatch.setattr(Stream, "begin_at", began)
    for each in sorted(analysis.free, key=lambda g: max(g.readers)):
        start = starts.take(each, max(each.readers))
        whole, part = (gauge.measure(each, np.arange(each.size), [], s) for s in (None, start))
        assert whole is not None and part is not None and start is not None
        assert part.change == pytest.approx(whole.change, rel=1e-4)
    assert len(begun) == len(analysis.free)
    assert all((at is not None) == begins for at in begun)
    assert not begins or max(begun) > len(analysis.graph.nodes) / 3


def test_what_is_compared_may_lie_before_the_start() -> None:
    """The logits of a first output are read by its softmax alone, which has run where the second head's cut begins."""
    net = Net()
    h = net.node("Relu", net.matmul(net.input("x", ["n", 6]), 6, 10))
    early = net.node("Softmax", net.matmul(h, 10, 4), axis=-1)
    late = net.matmul(net.node("Relu", net.matmul(h, 10, 12)), 12, 3)
    analysis = couple(Graph(net.model(early, late)))
    gauge = Gauge(analysis, [make_feeds(analysis.graph.model, batch=16)], 0.1)
    last = max(analysis.free, key=lambda g: min(g.operators))
    start = gauge.starts(analysis.free).take(last, max(last.readers))
    whole, part = (gauge.measure(last, np.arange(last.size), [], s) for s in (None, start))
    assert whole is not None and part is not None and whole.change > 0
    assert part.change == pytest.approx(whole.change, rel=1e-4)


def test_what_does_not_arrive_at_the_outputs_costs_little() -> None:
    """Two equal branches; the second is multiplied by 0.1 behind a Tanh, which its loss curve cannot see."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((6, 10)), rng.standard_normal((10, 4)) / 3
    weights: dict[str, Array] = {"a1": a, "a2": a, "b1": b, "b2": b, "small": np.full(1, 0.1)}
    nodes = []
    for i in "12":
        nodes += [
            helper.make_node("MatMul", ["x", f"a{i}"], [f"h{i}"]),
            helper.make_node("Relu", [f"h{i}"], [f"r{i}"]),
            helper.make_node("MatMul", [f"r{i}", f"b{i}"], [f"z{i}"]),
            helper.make_node("Tanh", [f"z{i}"], [f"t{i}"]),
        ]
    nodes += [helper.make_node("Mul", ["t2", "small"], ["s2"]), helper.make_node("Add", ["t1", "s2"], ["y"])]
    analysis = couple(Graph(network(nodes, weights, ["n", 6], 2)))
    x = [{"x": rng.standard_normal((n, 6)).astype(np.float32)} for n in (256, 32)]

    def ratio(held_out: list[dict[str, Array]]) -> float:
        context = Context(analysis, analysis.free, inputs=Inputs(analysis, x[:1], held_out=held_out))
        found = loss_curves(context).candidates[0]
        return float(found[group(analysis, "a1")].loss[3] / found[group(analysis, "a2")].loss[3])

    assert ratio([]) == pytest.approx(1, rel=0.2)
    assert ratio(x[1:]) == pytest.approx(100**TRUST, rel=0.5)


def line(slope: float) -> Curve:
    return Curve(np.arange(4), slope * np.arange(5.0))


def test_corrections_keep_the_scale_of_all_and_stay_within_bounds() -> None:
    losses = {"a": line(1), "b": line(2), "c": line(3), "zero": line(0), "alone": line(5)}
    points = {"a": Measured(1, 0.4), "b": Measured(1, 0.2), "c": Measured(2, 0.0), "zero": Measured(1, 1.0)}
    found = corrected(losses, points)  # ratios 0.4, 0.1 and 0
    assert found["b"].loss[1] == pytest.approx(2)
    assert found["a"].loss[1] == pytest.approx(4**TRUST)
    assert found["c"].loss[1] == pytest.approx(3 * 0.01**TRUST)
    assert found["zero"].loss[-1] == 0 and found["alone"].loss[1] == 5
    assert corrected(losses, {}) == losses


def test_the_number_of_inputs_follows_the_number_of_groups() -> None:
    assert measured_samples(448, 28) == MOST_MEASURED
    assert measured_samples(128, 25) == 10
    assert measured_samples(24, 100) == FEWEST_MEASURED


def test_a_group_of_one_channel_is_not_measured() -> None:
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((6, 1)), "b": rng.standard_normal((1, 4))}
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    model: ModelProto = network(nodes, weights, ["n", 6], 2)
    analysis: Analysis = couple(Graph(model))
    x = {"x": rng.standard_normal((8, 6)).astype(np.float32)}
    gauge = Gauge(analysis, [x], 1e-3)
    assert all(gauge.measure(g, np.arange(g.size), []) is None for g in analysis.groups if g.size == 1)


def test_a_small_matrix_of_two_readers_is_measured_as_each_reads_it() -> None:
    net = Net()
    x, shared = net.input("x", ["n", 7]), net.weight(11, 5, fan_in=11)
    ends = [net.node("MatMul", net.node("Relu", net.matmul(x, 7, 11)), shared) for _ in range(2)]
    result = spa.prune(net.model(*ends), ratio=0.3, samples=32, round_to=1)
    assert sorted(result.plan.sizes.values()) == [11, 11]
    assert result.prove().holds
