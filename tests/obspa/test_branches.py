"""What repair makes of a branch that went, and what is measured of branches that may go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import spa
from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import make_plan
from spa.criteria.answers import Curve, Curves
from spa.model.graph import Graph
from spa.obspa.branches import BranchGauge, priced
from spa.obspa.compensate import compensate
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.sensitivity import Measured
from spa.running.change import Yardstick
from spa.running.live import PaddedBatch
from spa.surgery.apply import apply
from tests.coupling.test_branches import WIDTH, branch, stem
from tests.oracle import Net, distance

NONE = np.zeros(0, int)


def inputs(samples: int = 40, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(size=(samples, 5)).astype(np.float32)}]


def network(*scales: float) -> ModelProto:
    """A residual network whose branches are as large as they are given; each ends in a bias."""
    net = Net()
    x = stem(net)
    for scale in scales:
        y = net.node("Mul", branch(net, x), net.constant(np.float32(scale)))
        x = net.node("Add", x, net.node("Add", y, net.weight(WIDTH)))
    return net.model(net.gemm(x, WIDTH, 3))


def without(model: ModelProto, *which: int) -> tuple[Analysis, ModelProto]:
    """A network's analysis, and what is left without some of its branches."""
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {analysis.branches[i].name: NONE for i in which})
    return analysis, apply(analysis, plan)


@pytest.mark.parametrize("repair", ["full", "bias"])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_where_branches_are_constant_nothing_is_lost(which: list[int], repair: str) -> None:
    model = network(0.0, 0.0)
    analysis, pruned = without(model, *which)
    plan = make_plan(analysis, {analysis.branches[i].name: NONE for i in which})
    if repair == "full":
        reconstruct(analysis, plan, pruned, inputs(), FitSettings(damping=1e-6))
    else:
        compensate(analysis, plan, pruned, inputs())
    yardstick = Yardstick(analysis.graph, inputs(seed=1))
    assert yardstick.change(without(model, *which)[1]).error > 0.01  # type: ignore[operator] # outputs are floats
    assert yardstick.change(pruned).error < 1e-10  # type: ignore[operator]


def test_the_constant_is_the_mean_of_the_branch() -> None:
    model = network(1.0, 1.0)
    analysis, pruned = without(model, 1)
    last = analysis.branches[1]
    plan = make_plan(analysis, {last.name: NONE})
    reconstruct(analysis, plan, pruned, inputs(), FitSettings(carriers=False), nodes={last.sum})
    tensor = analysis.graph.nodes[last.sum].inputs[last.operand]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    mean = session.run([tensor], inputs()[0])[0].mean(axis=0)
    constants = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}
    (constant,) = (value for name, value in constants.items() if name.endswith("_constant"))
    assert np.allclose(constant, mean, atol=1e-6)


def test_padding_counts_in_no_constant() -> None:
    net = Net()
    x = net.input("x", ["n", "t", 5])
    h = net.node("Tanh", net.matmul(x, 5, WIDTH))
    inner = net.matmul(net.node("Tanh", net.matmul(h, WIDTH, 11)), 11, WIDTH)
    model = net.model(net.matmul(net.node("Add", h, inner), WIDTH, 3))
    analysis, pruned = without(model, 0)
    plan = make_plan(analysis, {analysis.branches[0].name: NONE})
    real = np.arange(6) < np.array([6, 2, 4])[:, None]
    x = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    padded = PaddedBatch({"x": np.where(real[:, :, None], x, 1000)}, real)
    only_real = {"x": x[real][None]}
    other = without(model, 0)[1]
    nodes = {analysis.branches[0].sum}
    reconstruct(analysis, plan, pruned, [padded], nodes=nodes)
    reconstruct(analysis, plan, other, [only_real], nodes=nodes)
    ours, theirs = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer if t.name.endswith("_constant")}
        for m in (pruned, other)
    )
    assert list(ours) == list(theirs) and all(distance(ours[n], theirs[n]) < 1e-5 for n in ours)


def test_larger_branches_cost_more() -> None:
    analysis = couple(Graph(network(0.0, 2.0, 0.3)))
    gauge = BranchGauge(analysis, inputs(64), inputs(32, seed=1), 0.1)
    found = gauge.changes(analysis.branches)
    nothing, much, little = (found[b.name] for b in analysis.branches)
    assert nothing < 1e-10 < little < much


def test_prices_are_in_the_unit_of_the_curves() -> None:
    curves = {n: Curve(np.arange(3), np.array([0, 1, top, 9])) for n, top in (("a", 2.0), ("b", 6.0), ("c", 8.0))}
    measured = {"a": Measured(2, 1.0), "b": Measured(2, 2.0), "c": Measured(2, 2.0)}  # 2, 3 and 4 for 1
    assert priced({"f": 0.5}, curves, measured)["f"].loss.tolist() == [0.0, 1.5]
    assert priced({"f": 0.5}, curves, {})["f"].loss.tolist() == [0.0, 0.5]


def test_branches_stand_in_some_curves_and_not_in_others() -> None:
    analysis = spa.analyze("models/digits_resnet.onnx")
    options = {"data": "models/digits_train.npz", "samples": 32, "threads": 1}
    scores = spa.score(analysis, depth="auto", **options)
    assert isinstance(scores, Curves)
    names = {b.name for b in analysis.branches}
    assert [names & set(c) for c in scores.candidates] == [names, set()]
