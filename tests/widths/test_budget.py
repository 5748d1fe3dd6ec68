"""Budgets are met, larger ratios never keep more, impossible ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from math import gcd
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spa
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.places import channel_of
from spa.criteria import AGGREGATES, NORMS, names, score
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.widths.budget import UNITS, Budget, choose, kept_channels
from spa.widths.ladders import Ladder, alignment, allowed_widths, ladders_of
from spa.widths.ranking import RANKINGS, ranked_chunks
from tests.oracle import Net, random_array
from tests.zoo import built

MODELS = Path(__file__).parents[2] / "models"
RESNET = MODELS / "digits_resnet.onnx"
VIT = MODELS / "digits_vit.onnx"


@pytest.mark.parametrize("of", sorted({*UNITS} - {"latency", "memory"}))  # in test_latency.py, and below
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.8])
def test_a_budget_is_met_within_one_per_cent_or_the_miss_is_said(of: str, ranking: str, ratio: float) -> None:
    for path in (RESNET, VIT):
        exact = spa.prune(path, ratio=ratio, of=of, ranking=ranking, round_to=1, criterion="l2").report
        assert abs(exact.reached - ratio) <= 0.01
        rounded = spa.prune(path, ratio=ratio, of=of, ranking=ranking, criterion="l2").report
        assert abs(rounded.reached - ratio) <= 0.01 or "nearest found" in rounded.notes[0]


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5])
def test_memory_goes_with_the_channels_of_the_largest_moment_and_a_miss_is_said(ratio: float) -> None:
    for path in (RESNET, VIT):
        report = spa.prune(path, ratio=ratio, of="memory", round_to=1, criterion="l2").report
        assert report.reached == pytest.approx(1 - report.after.memory / report.before.memory)
        assert abs(report.reached - ratio) <= 0.01 or "nearest found" in report.notes[0]


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


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_group_of_coarse_steps_is_passed_over_where_others_meet_the_ratio(scale: float) -> None:
    net = Net()
    x = net.input("x", ["n", 5])
    fine = net.matmul(net.node("Relu", net.matmul(x, 5, 256, bias=False)), 256, 3, bias=False)
    first, second = (net.constant(scale * random_array(*shape)) for shape in ((5, 16), (16, 400)))
    coarse = net.node("MatMul", net.node("Relu", net.node("MatMul", x, first)), second)
    report = spa.prune(net.model(fine, coarse), criterion="l2", ratio=0.2).report
    assert abs(report.reached - 0.2) <= 0.01
    assert {group.size: group.kept for group in report.groups}[16] == 16


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


def table(rows: int, columns: int) -> Analysis:
    """Heads, gated each by the product of its query and its key: all axes of weights are products of heads and dims."""
    net = Net()
    x, shape = net.input("x", ["n", 3]), net.constant(np.array([-1, rows, columns]))
    q, k, v = (net.node("Reshape", net.matmul(x, 3, rows * columns, bias=False), shape) for _ in range(3))
    gate = net.node("Unsqueeze", net.node("Einsum", q, k, equation="nhd,nhd->nh"), net.constant(np.array([2])))
    flat = net.node("Reshape", net.node("Mul", v, gate), net.constant(np.array([-1, rows * columns])))
    return couple(Graph(net.model(net.matmul(flat, rows * columns, 2))))


@pytest.mark.parametrize(
    ("rows", "columns", "multiple", "steps"),
    [
        (6, 24, 8, (1, 8)),  # the innermost factor bears the multiple
        (6, 9, 8, (1, 8)),
        (12, 5, 8, (8, 1)),  # five columns are too few to lose eight
    ],
)
def test_of_a_product_the_innermost_factor_that_can_shrink_bears_the_multiple(
    rows: int, columns: int, multiple: int, steps: tuple[int, int]
) -> None:
    analysis = table(rows, columns)
    groups = sorted(analysis.free, key=lambda g: g.size != rows)
    assert [g.size for g in groups] == [rows, columns, columns]
    assert alignment(analysis, groups, multiple) == [steps[0], steps[1], steps[1]]


def test_each_part_of_a_sum_keeps_the_multiple() -> None:
    """Both parts lie on one axis of each weight, behind each other."""
    net = Net()
    hidden = net.matmul(net.input("x", ["n", 3]), 3, 56, bias=False)
    left, right = net.node("Split", hidden, net.constant(np.array([16, 40])), axis=1, outputs=2)
    parts = net.node("Concat", net.node("Sigmoid", left), net.node("Tanh", right), axis=1)
    analysis = couple(Graph(net.model(net.matmul(parts, 56, 2))))
    assert [g.size for g in analysis.free] == [16, 40]
    assert alignment(analysis, analysis.free, 4) == [4, 4]
    assert alignment(analysis, analysis.free[:1], 4) == [4]


@pytest.mark.parametrize(
    ("size", "step", "least", "widths"),
    [
        (11, 4, 1, [11, 8, 4]),
        (12, 4, 4, [12, 8, 4]),
        (12, 4, 5, [12, 8]),
        (5, 1, 3, [5, 4, 3]),
        (3, 8, 1, [3]),
        (2, 1, 0, [2, 1]),
    ],
)
def test_widths_go_down_to_the_least_in_steps(size: int, step: int, least: int, widths: list[int]) -> None:
    assert allowed_widths(size, step, least) == widths


def test_uniform_removes_the_same_share_of_every_group() -> None:
    report = spa.prune(RESNET, ratio=0.5, of="channels", ranking="uniform", round_to=1, criterion="l2").report
    assert all(abs(g.kept / g.size - 0.5) <= 1 / g.size for g in report.groups)


def test_no_group_becomes_narrower_than_asked() -> None:
    report = spa.prune(RESNET, ratio=0.6, round_to=1, min_width=20, criterion="l2").report
    assert min(g.kept for g in report.groups) >= 20


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("layer2.*", lambda name: name.startswith("layer2.")),
        ("layer3.0.conv2.weight", lambda name: name in ("layer3.0.conv2.weight", "layer3.0.bn2.weight")),
        ("*.bn1.weight", lambda name: ".bn1." in name),
        ("Gemm", lambda name: name == "fc.weight"),
    ],
)
def test_ignored_names_and_operators_keep_their_channels(pattern: str, left: Callable[[str], bool]) -> None:
    """Each is pruned where nothing is ignored, so that its width says something."""
    before = {t.name: tuple(t.dims) for t in onnx.load(RESNET).graph.initializer}
    bare = {"ratio": 0.3, "ranking": "uniform", "round_to": 1, "criterion": "l2"}
    every = {t.name: tuple(t.dims) for t in spa.prune(RESNET, **bare).model.graph.initializer}
    result = spa.prune(RESNET, ignore=[pattern], **bare)
    after = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    ignored = [name for name in before if left(name)]
    assert ignored
    for name in ignored:
        carried = 1 if name == "fc.weight" else 0  # a classifier reads the channels, other layers make them
        assert every[name][carried] < before[name][carried]
        assert after[name][carried] == before[name][carried], name
    assert any(after[name] != before[name] for name in before)
    assert all(reason == f"the request ignores {pattern!r}" for _, _, reason in result.report.skipped)
    skipped = {name for name, _, _ in result.report.skipped}
    assert skipped
    assert skipped.isdisjoint(result.plan.kept)


def test_a_request_that_ignores_everything_is_refused() -> None:
    with pytest.raises(PlanError, match="the request ignores 'Conv'"):
        spa.prune(RESNET, ratio=0.1, ignore=["Conv"])


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


@pytest.mark.parametrize("criterion", [n for n in names({"weights"}) if n != "zero"])
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


def test_the_three_rankings_take_what_their_definitions_say() -> None:
    net = Net()
    h = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, 8, name="a"))
    h = net.node("Relu", net.gemm(h, 8, 8, name="b"))
    h = net.node("Relu", net.gemm(h, 8, 8, name="c", bias=False))  # c and d, without a bias, are a set of their own
    h = net.node("Relu", net.gemm(h, 8, 8, name="d", bias=False))
    analysis = couple(Graph(net.model(net.gemm(h, 8, 3, name="e"))))
    groups = {g.name[0]: g for g in analysis.free if g.size == 8}
    order = np.array([4, 0, 6, 2, 1, 7, 5, 3])
    first = {"a": 1.0, "b": 2.5, "c": 101.0, "d": 106.5}
    scores = {groups[n].name: start + order for n, start in first.items()}
    gone = {}
    for ranking in RANKINGS:
        budget = Budget(0.25, of="channels", ranking=ranking, round_to=1)
        kept = choose(analysis, list(groups.values()), scores, budget).kept
        gone[ranking] = {
            n: sorted({*range(8)} - set(kept.get(g.name, np.arange(8)).tolist())) for n, g in groups.items()
        }
    by_score = np.argsort(order).tolist()
    lost = {
        "global": {"a": 5, "b": 3, "c": 0, "d": 0},  # of 1, 2, 2.5, 3, 3.5, 4, 4.5, 5
        "uniform": {"a": 2, "b": 2, "c": 2, "d": 2},
        "isomorphic": {"a": 3, "b": 1, "c": 4, "d": 0},  # of 1, 2, 2.5, 3, and of 101 to 104
    }
    assert gone == {r: {n: sorted(by_score[:k]) for n, k in counts.items()} for r, counts in lost.items()}


def two_layers() -> tuple[Analysis, list[Group]]:
    """A hidden layer of four channels and one of twelve, which differ in structure."""
    net = Net()
    h = net.node("Relu", net.gemm(net.input("x", ["n", 5]), 5, 4, name="small", bias=False))
    h = net.node("Relu", net.gemm(h, 4, 12, name="large"))
    analysis = couple(Graph(net.model(net.gemm(h, 12, 3, name="head"))))
    return analysis, sorted((g for g in analysis.free if g.size in (4, 12)), key=lambda g: g.size)


def test_of_isomorphic_sets_of_different_sizes_the_same_fraction_goes() -> None:
    analysis, groups = two_layers()
    ladders = Budget(round_to=1).ladders(analysis, groups)
    chunks = ranked_chunks(groups, [np.arange(float(g.size)) for g in groups], ladders, "isomorphic")
    turns = [(c.key, groups[c.ladder].size) for c in chunks]
    assert turns[:5] == [(1 / 12, 12), (2 / 12, 12), (1 / 4, 4), (3 / 12, 12), (4 / 12, 12)]


def test_a_set_on_one_ladder_goes_uniformly_by_the_fraction_of_each() -> None:
    analysis, groups = two_layers()
    ladders = Budget(round_to=1, equal=(frozenset(g.name for g in groups),)).ladders(analysis, groups)
    assert [ladder.rungs for ladder in ladders] == [((4, 12), (3, 9), (2, 6), (1, 3))]
    chunks = ranked_chunks(groups, [np.arange(float(g.size)) for g in groups], ladders, "uniform")
    assert [c.key for c in chunks] == [1 / 4, 1 / 2, 3 / 4]


def test_without_options_every_width_down_to_one_is_allowed() -> None:
    analysis, groups = two_layers()
    assert ladders_of(analysis, groups) == [
        Ladder((i,), tuple((w,) for w in range(g.size, 0, -1))) for i, g in enumerate(groups)
    ]


@pytest.mark.parametrize("name", ["round_to", "min_width"])
def test_widths_below_one_are_refused(name: str) -> None:
    assert getattr(Budget(**{name: 1}), name) == 1
    with pytest.raises(PlanError, match=rf"{name} is 0\. Choose 1 or more\."):
        Budget(**{name: 0})


def test_groups_that_keep_their_whole_width_are_not_named() -> None:
    _, groups = two_layers()
    orders = [np.arange(g.size)[::-1] for g in groups]
    kept = kept_channels(groups, orders, [4, 9])
    assert {name: channels.tolist() for name, channels in kept.items()} == {groups[1].name: [*range(9)]}


def test_a_budget_is_not_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(Budget(), "ratio", 2.0)  # noqa: B010 (an assignment would not pass mypy)
