"""Budgets are met, larger ratios never keep more, impossible ones are refused."""

from __future__ import annotations

from math import gcd
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spa
from spa.coupling.places import channel_of
from spa.criteria import AGGREGATES, NORMS, names, score
from spa.errors import PlanError
from spa.widths.budget import RANKINGS, UNITS, Budget
from tests.zoo import built

MODELS = Path(__file__).parents[2] / "models"
RESNET = MODELS / "digits_resnet.onnx"
VIT = MODELS / "digits_vit.onnx"


@pytest.mark.parametrize("of", sorted({*UNITS} - {"latency"}))  # tests/test_latency.py
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.8])
def test_a_budget_is_met_within_one_per_cent_or_the_miss_is_said(of: str, ranking: str, ratio: float) -> None:
    for path in (RESNET, VIT):
        exact = spa.prune(path, ratio=ratio, of=of, ranking=ranking, round_to=1, criterion="l2").report
        assert abs(exact.reached - ratio) <= 0.01
        rounded = spa.prune(path, ratio=ratio, of=of, ranking=ranking, criterion="l2").report
        assert abs(rounded.reached - ratio) <= 0.01 or "nearest found" in rounded.notes[0]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_larger_ratio_never_keeps_more(ranking: str, round_to: int) -> None:
    reached = [
        spa.prune(RESNET, ratio=r, ranking=ranking, round_to=round_to, criterion="l2").report.after.macs
        for r in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ]
    assert reached == sorted(reached, reverse=True)


def test_densenet_is_monotonic_where_skipping_whole_groups_is_not() -> None:
    model = built("densenet")
    after = [
        spa.prune(model, ratio=r, of="params", round_to=1, criterion="l2").report.after.params
        for r in (0.5, 0.6, 0.7, 0.8)
    ]
    assert after == sorted(after, reverse=True)
    assert len(set(after)) == 4


def test_what_the_report_says_is_what_the_file_stores() -> None:
    result = spa.prune(VIT, ratio=0.4, of="params", criterion="l2")
    tensors = [*result.model.graph.initializer, *(a.t for n in result.model.graph.node for a in n.attribute)]
    stored = sum(int(np.prod(t.dims)) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    assert result.report.after.params == stored
    assert abs((1 - result.report.after.params / result.report.before.params) - result.report.reached) < 1e-9


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_widths_of_weights_become_multiples(multiple: int) -> None:
    result = spa.prune(RESNET, ratio=0.4, round_to=multiple, criterion="l2")
    before = {t.name: tuple(t.dims) for t in onnx.load(RESNET).graph.initializer}
    for tensor in result.model.graph.initializer:
        for size, old in zip(tensor.dims, before[tensor.name], strict=True):
            assert size == old or size % multiple == 0


def test_uniform_removes_the_same_share_of_every_group() -> None:
    report = spa.prune(RESNET, ratio=0.5, of="channels", ranking="uniform", round_to=1, criterion="l2").report
    assert all(abs(g.kept / g.size - 0.5) <= 1 / g.size for g in report.groups)


def test_no_group_becomes_narrower_than_asked() -> None:
    report = spa.prune(RESNET, ratio=0.6, round_to=1, min_width=20, criterion="l2").report
    assert min(g.kept for g in report.groups) >= 20


@pytest.mark.parametrize("pattern", ["layer2.*", "Conv", "*.bn1.weight"])
def test_ignored_names_and_operators_keep_their_channels(pattern: str) -> None:
    try:
        report = spa.prune(RESNET, ratio=0.1, ignore=[pattern], round_to=1, criterion="l2").report
    except PlanError as error:
        assert pattern == "Conv"
        assert "ignored by 'Conv'" in str(error)
        return
    assert report.skipped
    assert all(f"ignored by {pattern!r}" == reason for _, _, reason in report.skipped)
    assert all(len(g.name) for g in report.groups)


def test_crossings_are_pruned_only_on_request() -> None:
    assert all(not g.crossings for g in spa.prune(VIT, ratio=0.3, criterion="l2").report.groups)
    assert any(g.crossings for g in spa.prune(VIT, ratio=0.3, cross_norm=True, criterion="l2").report.groups)


def test_an_impossible_ratio_says_what_can_be_reached() -> None:
    with pytest.raises(PlanError, match=r"cannot remove 99\.0% of the macs: at most \d+\.\d% can go"):
        spa.prune(VIT, ratio=0.99)


@pytest.mark.parametrize("ratio", [0, 1, -1, 2, float("nan")])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match="between 0 and 1"):
        Budget(ratio=ratio)


# -- criteria -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", names())
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("agg", AGGREGATES)
def test_every_criterion_gives_one_finite_score_per_channel(criterion: str, norm: str, agg: str) -> None:
    analysis = spa.analyze(RESNET)
    for group, scores in zip(analysis.free, score(analysis, analysis.free, criterion, norm, agg).values(), strict=True):
        assert scores.shape == (group.size,)
        assert np.isfinite(scores).all()


def test_magnitudes_agree_with_a_plain_loop() -> None:
    analysis = spa.analyze(VIT)
    for criterion, element in (("l1", np.abs), ("l2", np.square)):
        found = score(analysis, analysis.free, criterion, norm="none", agg="sum")
        for group in analysis.free[:4]:
            expected = np.zeros(group.size)
            for place in group.places:
                value = analysis.graph.array(place.tensor)
                if sum(n > 1 for n in value.shape) >= 2:
                    channel = channel_of(analysis.expr(place), group.dim)
                    for index, c in enumerate(channel):
                        if c >= 0:
                            expected[c] += element(np.take(value, index, axis=place.axis).astype(np.float64)).sum()
            np.testing.assert_allclose(found[group.name], expected, rtol=1e-5)


def test_random_scores_follow_the_seed() -> None:
    analysis = spa.analyze(RESNET)
    first, again, other = (score(analysis, analysis.free, "random", seed=s) for s in (1, 1, 2))
    name = analysis.free[0].name
    assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


def test_bn_scale_reads_the_scales_of_batch_normalization() -> None:
    analysis = spa.analyze(RESNET)
    group = next(
        g for g in analysis.free if [p.tensor for p in g.places if "bn" in p.tensor][0:1] == ["layer1.0.bn1.weight"]
    )
    scores = score(analysis, [group], "bn_scale", norm="none")[group.name]
    np.testing.assert_allclose(scores, np.abs(analysis.graph.array("layer1.0.bn1.weight")), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(ratio=st.floats(0.05, 0.9), round_to=st.sampled_from([1, 2, 4, 8]), ranking=st.sampled_from(RANKINGS))
def test_any_budget_is_met_refused_or_noted(ratio: float, round_to: int, ranking: str) -> None:
    try:
        report = spa.prune(RESNET, ratio=ratio, round_to=round_to, ranking=ranking, criterion="l2").report
    except PlanError as error:
        assert "at most" in str(error)
        return
    assert abs(report.reached - ratio) <= 0.01 or report.notes
    assert all(gcd(g.kept, round_to) == round_to or g.kept == g.size for g in report.groups)
