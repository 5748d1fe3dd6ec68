"""The proof of a user's own plan: it holds for right surgery, and fails for wrong surgery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

import spa
from models.builders import ZOO
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan, make_plan
from spa.surgery import proof as module
from spa.surgery.proof import COARSE_TOLERANCE, TOLERANCE, distance, prove
from tests.oracle import Net, random_keeps

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vgg", "digits_vit", "digits_lstm"])
def test_the_plan_of_a_pruned_and_refitted_network_is_proved(name: str) -> None:
    proof = spa.prune(MODELS / f"{name}.onnx", ratio=0.3, samples=32).prove(seeds=2)
    assert proof.holds
    assert proof.error <= TOLERANCE < 0.01 < proof.effect
    assert proof.groups
    assert proof.crossing == ()


def test_wrong_surgery_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = spa.analyze(MODELS / "digits_resnet.onnx")
    plan = make_plan(analysis, random_keeps(analysis.free))
    assert prove(analysis, plan).holds
    right = module.apply

    def swapped(analysis: Analysis, plan: Plan) -> ModelProto:
        """Surgery that exchanges two channels of one weight."""
        model = right(analysis, plan)
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[0] > 1)
        value = numpy_helper.to_array(tensor).copy()
        value[[0, 1]] = value[[1, 0]]
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        return model

    monkeypatch.setattr(module, "apply", swapped)
    assert not prove(analysis, plan).holds


def test_groups_that_cross_a_normalisation_are_named_and_left_whole() -> None:
    result = spa.prune(MODELS / "digits_vit.onnx", ratio=0.4, criterion="l2", cross_norm=True)
    proof = result.prove()
    assert proof.holds
    crossing = {g.name for g in result.analysis.groups if g.crossings}
    assert set(proof.crossing) == crossing & result.plan.kept.keys() != set()
    assert not crossing.intersection(proof.groups)


def test_a_plan_of_crossing_groups_alone_has_nothing_to_prove() -> None:
    analysis = spa.analyze(MODELS / "digits_vit.onnx")
    group = next(g for g in analysis.prunable if g.crossings)
    plan = make_plan(analysis, {group.name: np.arange(group.size - 8)})
    with pytest.raises(spa.PlanError, match="takes statistics over each of its 1 groups"):
        prove(analysis, plan)
    with pytest.raises(spa.PlanError, match="it removes nothing"):
        prove(analysis, make_plan(analysis, {}))


def test_a_plan_of_another_network_is_refused() -> None:
    plan = spa.prune(MODELS / "digits_vgg.onnx", ratio=0.3, criterion="l2").plan
    with pytest.raises(spa.PlanError, match="the plan names"):
        spa.prove(MODELS / "digits_resnet.onnx", plan)


def test_half_precision_and_quantised_networks_get_the_coarse_tolerance() -> None:
    for name in ("handmade_residual_fp16", "handmade_qdq"):
        analysis = spa.analyze(ZOO[name]())
        proof = prove(analysis, make_plan(analysis, random_keeps(analysis.free)))
        assert proof.tolerance == COARSE_TOLERANCE
        assert proof.holds
    assert spa.prune(MODELS / "digits_vgg.onnx", ratio=0.3, criterion="l2").prove(tolerance=0.0).tolerance == 0.0


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0], [1.0, 1.0], np.inf),
        ([np.nan], [1.0], np.inf),
        ([np.nan], [np.nan], 0.0),
        ([], [], 0.0),
        (["a"], ["b"], np.inf),
        (["a"], ["a"], 0.0),
    ],
)
def test_the_distance_of_two_outputs(value: list[object], reference: list[object], expected: float) -> None:
    assert distance(value, reference) == expected


def test_equality_that_says_nothing_is_called_empty() -> None:
    net = Net()
    h = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, 7, name="a"))
    model = net.model(net.gemm(h, 7, 3, name="b"))
    analysis = spa.analyze(model)
    plan = make_plan(analysis, random_keeps(analysis.free))
    assert not prove(analysis, plan).is_empty
    head = next(t for t in model.graph.initializer if t.name == "b")
    head.CopyFrom(numpy_helper.from_array(np.zeros(tuple(head.dims), np.float32), "b"))
    proof = prove(spa.analyze(model), plan)
    assert proof.holds
    assert proof.is_empty


def test_a_model_that_draws_random_numbers_or_gives_no_numbers_is_refused() -> None:
    def network(*operators: str) -> tuple[Analysis, Plan]:
        net = Net()
        h = net.gemm(net.input("x", ["n", 5]), 5, 7, name="a")
        for operator in operators:
            h = net.node(operator, h)
        y = net.gemm(net.node("Relu", h), 7, 3, name="b")
        noise = net.node("RandomNormalLike", y) if "noise" in names else None
        analysis = spa.analyze(net.model(net.node("Add", y, noise) if noise else y))
        return analysis, make_plan(analysis, random_keeps(analysis.free))

    names = {"noise"}
    with pytest.raises(spa.UnsupportedError, match="it draws random numbers"):
        prove(*network())
    names = set()
    with pytest.raises(spa.ModelError, match="outputs are not finite"):
        prove(*network("Log"))
    with pytest.raises(spa.PlanError, match="seeds is 0"):
        prove(*network(), seeds=0)


def test_a_plan_is_proved_from_its_file_too(tmp_path: Path) -> None:
    result = spa.prune(MODELS / "digits_vgg.onnx", ratio=0.3, criterion="l2")
    path = tmp_path / "plan.json"
    path.write_text(result.plan.to_json(), encoding="utf-8")
    assert spa.prove(MODELS / "digits_vgg.onnx", path).groups == result.prove().groups
