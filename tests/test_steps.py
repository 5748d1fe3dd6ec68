"""The steps of a pruning one by one give what pruning at once gives, and take what a researcher brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spa
from spa.criteria import Curves, Removal

MODELS = Path(__file__).parent.parent / "models"
RESNET = MODELS / "digits_resnet.onnx"
DATA = str(MODELS / "digits_train.npz")


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "l2"},
        {"criterion": "l1", "ranking": "uniform", "round_to": 4, "ignore": ["fc.*"]},
        {"criterion": "wanda", "data": DATA, "samples": 32},
        {"criterion": "obspa", "data": DATA, "samples": 32},
        {"criterion": "zero"},
    ],
)
def test_the_steps_give_the_bytes_of_pruning_at_once(options: dict[str, object]) -> None:
    request = spa.Request.of(ratio=0.3, **options)
    at_once = spa.prune(RESNET, request=request)
    analysis = spa.analyze(RESNET)
    plan = spa.plan(analysis, spa.score(analysis, request=request), request=request)
    assert plan == at_once.plan
    model = spa.apply(analysis, plan)
    if options["criterion"] == "obspa":
        model = spa.repair(analysis, plan, model, request=request)
    assert model.SerializeToString(deterministic=True) == at_once.model.SerializeToString(deterministic=True)


def test_the_three_answers_of_criteria() -> None:
    analysis = spa.analyze(RESNET)
    scores = spa.score(analysis, criterion="l2")
    assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in analysis.free}
    assert isinstance(spa.score(analysis, criterion="obspa", samples=8), Curves)
    assert isinstance(spa.score(analysis, criterion="zero"), Removal)


def test_scores_of_ones_own_decide_which_channels_go() -> None:
    analysis = spa.analyze(RESNET)
    group = max(analysis.free, key=lambda g: g.size)
    scores = np.arange(group.size)[::-1].astype(float)  # the last channels matter least
    plan = spa.plan(analysis, {group.name: scores}, ratio=0.1)
    kept = plan.kept[group.name]
    assert plan.kept.keys() == {group.name}
    assert kept == tuple(range(len(kept)))


def test_repair_leaves_the_pruned_model_as_it_is_and_changes_its_copy() -> None:
    analysis = spa.analyze(RESNET)
    plan = spa.plan(analysis, spa.score(analysis, criterion="l2"), ratio=0.3)
    pruned = spa.apply(analysis, plan)
    before = pruned.SerializeToString(deterministic=True)
    copies = [
        spa.repair(analysis, plan, pruned, data=DATA, samples=32, reconstruct=how) for how in ("none", "bias", "full")
    ]
    assert pruned.SerializeToString(deterministic=True) == before
    texts = [c.SerializeToString(deterministic=True) for c in copies]
    assert texts[0] == before
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"nothing": np.ones(3)}, {}, "name no group that can be pruned"),
        ("short", {}, r"gives shape \(3,\) for group"),
        ("right", {"max_distortion": 0.1}, "takes a ratio of macs, params or channels"),
        ("right", {"latency_ms": 0.1}, "takes a ratio of macs, params or channels"),
        ("right", {"of": "latency"}, "takes a ratio of macs, params or channels"),
        ("right", {"ratio": 0.999}, "at most"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(scores: object, options: dict[str, object], message: str) -> None:
    analysis = spa.analyze(RESNET)
    if isinstance(scores, str):
        scores = {g.name: np.ones(3 if scores == "short" else g.size) for g in analysis.free}
    with pytest.raises(spa.PlanError, match=message):
        spa.plan(analysis, scores, **options)


def test_a_frameworks_model_is_analysed_like_a_file() -> None:
    torch = pytest.importorskip("torch", reason="needs  pip install 'spa-onnx[torch]'")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
    analysis = spa.analyze(net, example_inputs=torch.randn(1, 3, 16, 16))
    assert [g.size for g in analysis.free] == [16]


def test_what_is_no_analysis_or_no_pruned_model_of_it_is_refused() -> None:
    analysis = spa.analyze(RESNET)
    plan = spa.plan(analysis, spa.score(analysis, criterion="l2"), ratio=0.3)
    with pytest.raises(spa.PlanError, match="a str is no analysis"):
        spa.score(str(RESNET))  # type: ignore[arg-type] # what is tested
    for model in (analysis.graph.model, str(RESNET)):
        with pytest.raises(spa.PlanError, match="not what this plan makes"):
            spa.repair(analysis, plan, model)
    with pytest.raises(spa.PlanError, match="request is a dict"):
        spa.prune(RESNET, request={"ratio": 0.3})  # type: ignore[arg-type] # what is tested
