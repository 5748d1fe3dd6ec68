"""The allocation removes what costs least loss per cost, against counts by hand and by brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa.coupling.analysis import Analysis, Group, couple
from spa.criteria.answers import Curve
from spa.model.graph import Graph
from spa.widths import allocation
from spa.widths.allocation import allocate
from spa.widths.budget import Budget
from tests.oracle import Net

SIZE = 8
ORDER = np.array([4, 0, 6, 2, 1, 7, 5, 3])


def branches() -> tuple[Analysis, list[Group], np.ndarray]:
    """Three hidden layers side by side; a channel of them costs 5 + 3, 5 + 11 or 5 + 23 MACs."""
    net = Net()
    x = net.input("x", ["n", 5])
    hidden = [net.node("Relu", net.gemm(x, 5, SIZE, name=f"w{i}")) for i in range(3)]
    analysis = couple(Graph(net.model(*(net.gemm(h, SIZE, n) for h, n in zip(hidden, (3, 11, 23), strict=True)))))
    groups = sorted((g for g in analysis.free if g.size == SIZE), key=lambda g: g.name)
    return analysis, groups, np.array([8, 16, 28])


@pytest.mark.parametrize("of", ["macs", "channels"])
@pytest.mark.parametrize("seed", range(3))
def test_of_convex_losses_the_least_per_cost_go_in_turn(of: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    analysis, groups, macs = branches()
    cost = macs if of == "macs" else np.ones(3)
    added = np.sort(rng.uniform(0.1, 5, (3, SIZE)) * macs[:, None], axis=1)  # by each channel that goes
    curves = {g.name: Curve(ORDER, np.concatenate([[0], np.cumsum(row)])) for g, row in zip(groups, added, strict=True)}
    most = SIZE - 1  # the last channel stays
    turns = sorted((added[g, i] / cost[g], g) for g in range(3) for i in range(most))
    for count in (2, 7, 12, 19):
        gone = np.bincount([g for _, g in turns[:count]], minlength=3)
        ratio = float((gone * cost).sum() / (SIZE * cost.sum()))
        choice = allocate(analysis, groups, curves, Budget(ratio, of=of, round_to=1))
        assert choice.reached == pytest.approx(ratio)
        kept = [choice.kept.get(g.name, np.arange(SIZE)).tolist() for g in groups]
        assert kept == [sorted(ORDER[n:].tolist()) for n in gone]


def test_a_stretch_that_is_cheap_as_a_whole_goes_as_a_whole() -> None:
    analysis, groups, _ = branches()
    dear_at_first = np.array([0, 6, 6.1, 6.2, 6.3, 30, 60, 90, 120])  # 1.6 a channel up to the fourth
    steady = 2.0 * np.arange(9)
    curves = {g.name: Curve(ORDER, c) for g, c in zip(groups, (steady, dear_at_first, steady), strict=True)}
    choice = allocate(analysis, groups, curves, Budget(4 / 24, of="channels", round_to=1))
    assert {n: len(k) for n, k in choice.kept.items()} == {groups[1].name: 4}


def test_what_meets_the_budget_is_left_as_it_is() -> None:
    """One rung higher would meet it, too, at less loss, but further from the ratio."""
    fraction = [0.0, 0.5, 0.505]
    losses = [np.array([0.0, 1.0, 2.0])]
    assert allocation._nearest([2], [2], losses, lambda rungs: fraction[rungs[0]], 0.505) == [2]


def test_groups_without_a_curve_keep_everything() -> None:
    analysis, groups, _ = branches()
    choice = allocate(
        analysis, groups, {groups[1].name: Curve(ORDER, np.arange(9.0))}, Budget(0.5, of="channels", round_to=1)
    )
    assert {n: len(k) for n, k in choice.kept.items()} == {groups[1].name: 4}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=7), st.integers(0, 5))
def test_the_hull_is_the_highest_convex_curve_that_no_point_lies_below(increments: list[int], base: int) -> None:
    loss = np.concatenate([[0.0], np.cumsum(increments)])
    widths = np.array([17, 12, 11, 8, 4, 3, 2, 1])[: len(loss)]
    segments = allocation._hull(widths, loss, base)
    ends = [0, *(end - base for _, end in segments)]
    assert ends[-1] == len(loss) - 1
    removed = widths[0] - widths
    assert [slope for slope, _ in segments] == pytest.approx(
        [(loss[b] - loss[a]) / (removed[b] - removed[a]) for a, b in pairwise(ends)]
    )
    assert all(a < b for (a, _), (b, _) in pairwise(segments))
    assert (np.interp(removed, removed[ends], loss[ends]) <= loss + 1e-9).all()
