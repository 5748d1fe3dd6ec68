"""Branches in the search for widths: their cost, their place beside channels, and what the option does."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.cost import CostModel, count_parameters, measure
from spa.coupling.plan import dropped, make_plan
from spa.criteria.answers import Curve
from spa.errors import OptionError, PlanError
from spa.model.graph import Graph
from spa.report.html import page
from spa.report.text import branched
from spa.request import Request
from spa.surgery.apply import apply
from spa.widths.allocation import allocate
from spa.widths.budget import Budget
from spa.widths.depth import branches_for
from tests.coupling.test_branches import HIDDEN, WIDTH, two_blocks
from tests.coupling.test_detours import mobile
from tests.oracle import Net

RESNET = "models/digits_resnet.onnx"
DATA = {"data": "models/digits_train.npz", "samples": 32, "threads": 1}
FREE = 0.0


def groups_of(analysis: Analysis) -> list[Group]:
    """The hidden groups of the two blocks, then the branches."""
    hidden = sorted((g for g in analysis.free if g.size in (HIDDEN, 13)), key=lambda g: g.size)
    return [*hidden, *analysis.branches]


@pytest.mark.parametrize("widths", [(5, 13, 1, 1), (5, 4, 0, 1), (11, 6, 1, 0), (11, 13, 0, 0)])
def test_the_cost_of_a_choice_is_that_of_the_network_without_the_branches(widths: tuple[int, ...]) -> None:
    analysis = couple(Graph(two_blocks()))
    groups = groups_of(analysis)
    cost = CostModel(analysis, groups).evaluate(widths)
    kept = {g.name: np.arange(w) for g, w in zip(groups, widths, strict=True)}
    pruned = Graph(apply(analysis, make_plan(analysis, kept)))
    constants = WIDTH * (2 - sum(widths[2:]))  # in the places of the branches, which costs leave out
    assert cost.params == count_parameters(pruned)[0] - constants
    assert cost.macs == measure(couple(pruned)).macs
    assert cost.channels == sum(w * there for w, there in zip(widths[:2], widths[2:], strict=True))


def curves(analysis: Analysis, prices: tuple[float, float], rise: float = 1.0) -> dict[str, Curve]:
    """Losses that rise with the square of what is gone of a hidden group, and the prices of the branches."""
    *hidden, first, second = groups_of(analysis)
    found = {g.name: Curve(np.arange(g.size), rise * (np.arange(g.size + 1) / g.size) ** 2) for g in hidden}
    for b, price in zip((first, second), prices, strict=True):
        found[b.name] = Curve(np.zeros(1, int), np.array([0.0, price]))
    return found


def loss(analysis: Analysis, given: dict[str, Curve], widths: tuple[int, ...]) -> float:
    """The loss of a choice: cuts inside a branch that goes cost nothing more."""
    *hidden, first, second = groups_of(analysis)
    total = 0.0
    for g, b, width, there in zip(hidden, (first, second), widths[:2], widths[2:], strict=True):
        total += given[g.name].loss[g.size - width] if there else given[b.name].loss[1]
    return total


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5, 0.65])
@pytest.mark.parametrize("prices", [(0.01, 9.0), (0.3, 0.3), (9.0, 9.0), (0.6, 0.05)])
def test_a_branch_goes_where_that_costs_less_than_channels(ratio: float, prices: tuple[float, float]) -> None:
    analysis = couple(Graph(two_blocks()))
    groups, given = groups_of(analysis), curves(analysis, prices)
    choice = allocate(analysis, groups, given, Budget(ratio, round_to=1))
    taken = tuple(len(choice.kept.get(g.name, range(g.size))) for g in groups)
    costs = CostModel(analysis, groups)
    every = [w for w in product(range(1, 12), range(1, 14), (0, 1), (0, 1)) if costs.removed(w, "macs") >= ratio - 0.01]
    best = min(loss(analysis, given, w) for w in every)
    assert choice.reached >= ratio - 0.01
    # A Lagrangian search finds the lower hull; what it misses lies between two of its points, here up to one branch.
    assert loss(analysis, given, taken) <= best + 0.35
    assert (prices[0] < 9.0) or taken[2] == 1


def test_groups_inside_a_branch_that_goes_are_not_in_the_plan() -> None:
    analysis = couple(Graph(two_blocks()))
    groups, given = groups_of(analysis), curves(analysis, (FREE, 9.0))
    choice = allocate(analysis, groups, given, Budget(0.6, round_to=1))
    assert choice.kept[analysis.branches[0].name].size == 0
    assert groups[0].name not in choice.kept


def test_what_a_cut_inside_has_cost_is_no_reason_to_keep_a_branch() -> None:
    analysis = couple(Graph(two_blocks()))
    groups = groups_of(analysis)
    # With a fraction f of its hidden channels gone, dropping a branch costs (0.9 - f²) / (1 - f) for each MAC more, and
    # the next channel 2 f: less from f = 0.68 on. Without what the cuts have cost, 0.9 / (1 - f) is always more.
    given = curves(analysis, (0.9, 0.9))
    choice = allocate(analysis, groups, given, Budget(0.75, round_to=1))
    assert any(choice.kept.get(b.name, np.zeros(1)).size == 0 for b in analysis.branches)


# -- the option ------------------------------------------------------------------------------------------------------


def test_a_pattern_drops_what_it_names_and_leaves_all_else_whole() -> None:
    result = spa.prune(RESNET, criterion="l2", depth="*layer1.1*")
    assert list(result.report.gone) == ["/layer1/layer1.1/Add_output_0[branch]"] == list(result.plan.kept)
    assert [g.kept for g in result.report.groups if g.kept not in (g.size, 0)] == []
    assert [g.size for g in result.report.groups if g.kept == 0] == [32]
    assert result.report.after.macs == measure(couple(Graph(result.model))).macs < result.report.before.macs
    said = "1 of 1 residual branches went as a whole: /layer1/layer1.1/Add_output_0[branch]"
    assert said in page(result.report, "dense", "pruned") and branched(result.report) == said
    again = spa.prune(RESNET, plan=result.plan)
    assert again.model == result.model and list(again.report.gone) == list(result.report.gone)
    assert spa.prove(RESNET, result.plan).holds


def test_a_pattern_goes_with_a_ratio_of_channels() -> None:
    result = spa.prune(RESNET, criterion="l1", depth="*layer1.1*", ratio=0.5)
    assert list(result.report.gone) == ["/layer1/layer1.1/Add_output_0[branch]"]
    assert result.report.reached == pytest.approx(0.5, abs=0.01)


def test_a_number_drops_the_cheapest() -> None:
    result = spa.prune(RESNET, depth=2, **DATA)
    losses = {b.name: b.loss for b in result.report.branches}
    scores = spa.score(spa.analyze(RESNET), depth="auto", **DATA).candidates[0]  # type: ignore[union-attr]
    prices = {name: scores[name].loss[1] for name in [b.name for b in spa.analyze(RESNET).branches]}
    assert sorted(result.report.gone) == sorted(sorted(prices, key=lambda n: prices[n])[:2])
    assert {losses[n] for n in result.report.gone} == {prices[n] for n in result.report.gone}


def test_scores_of_branches_serve_a_plan() -> None:
    analysis = spa.analyze(RESNET)
    scores = spa.score(analysis, depth="auto", **DATA)
    plan = spa.plan(analysis, scores, depth=1, ratio=0.4)
    assert [kept for name, kept in plan.kept.items() if name.endswith("[branch]")] == [()]
    assert not any(name.endswith("[branch]") for name in spa.plan(analysis, scores, ratio=0.4).kept)


def test_branches_compete_with_channels_and_never_do_harm() -> None:
    alone = spa.prune(RESNET, ratio=0.6, **DATA)
    together = spa.prune(RESNET, ratio=0.6, depth="auto", **DATA)
    before, after = (r.report.calibration["after"] for r in (alone, together))  # type: ignore[index]
    assert after <= before
    assert together.report.reached == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "*nothing*"}, "depth: nothing in the model matches '\\*nothing\\*'"),
        ({"depth": "*conv1*", "ignore": ["Add"]}, "depth: no residual branch is left under this request. There are"),
        ({"depth": 4}, "depth: 4 residual branches cannot go, there are 3. Ask for fewer."),
        ({"depth": 1, "criterion": "l2"}, "criterion 'l2' does not say what residual branches cost. Use criterion obs"),
        ({"depth": "auto", "criterion": "l2"}, "does not say what residual branches cost"),
    ],
)
def test_what_cannot_go_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        spa.prune(RESNET, **options)


def test_detours_go_by_name_and_where_milliseconds_count() -> None:
    model = mobile()
    analysis = couple(Graph(model))
    names = [d.name for d in analysis.detours]
    assert [p.name for p in branches_for(analysis, "auto", "auto", (), (), timed=True)] == names
    result = spa.prune(model, criterion="l2", depth=names[1])
    assert list(result.report.gone) == [names[1]] == list(result.plan.kept)
    assert spa.prove(model, result.plan).holds
    for depth in ("auto", "2"):
        with pytest.raises(PlanError, match="the model has no residual branch"):
            branches_for(analysis, depth, Request.of(depth=depth).constraints.depth_kind, (), ())


def test_the_smaller_of_two_that_share_an_end_is_left_where_both_go() -> None:
    analysis = couple(Graph(mobile()))
    both = make_plan(analysis, {d.name: np.zeros(0, int) for d in analysis.detours[1:3]})
    assert analysis.detours[1].end == analysis.detours[2].end
    assert [p.name for p in dropped(analysis, analysis.kept(both.masks(analysis)))] == [analysis.detours[1].name]


def test_a_network_without_branches_is_refused() -> None:
    net = Net()
    model = net.model(net.gemm(net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 16)), 16, 2))
    with pytest.raises(PlanError, match="the model has no residual branch"):
        spa.prune(onnx.load_from_string(model.SerializeToString()), depth="auto", criterion="l2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth is 0. Give 'off', 'auto', a whole number above 0, or a shell pattern."),
        ({"depth": "-1"}, "depth is '-1'. Give 'off'"),
        ({"depth": True}, "depth is True"),
        ({"depth": 1.5}, "depth is 1.5"),
        (
            {"depth": "auto", "ranking": "uniform"},
            "depth 'auto' compares branches with channels, and ranking 'uniform'",
        ),
        ({"depth": "2", "plan": "plan.json"}, "a plan says which branches go, and depth is '2'"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        Request.of(**options)
    assert str(error.value).startswith(message)
