"""The search on made-up losses: few evaluations, no network twice, and every stop."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spa.errors import OutOfReachError
from spa.steering.bracket import NARROW, NEAR, Tool, search

Function = Callable[[float], float]


def tool(shortfall: Function, loss: Function = lambda r: r, steps: int = 10**6) -> tuple[Tool, list[float]]:
    """A search's tool, and the ratios that it evaluates; ratios are rounded to the step of a ladder."""
    tried: list[float] = []

    def attempt(ratio: float) -> float:
        tried.append(ratio)
        return shortfall(round(ratio * steps) / steps)

    return Tool(loss, lambda a, b: round(a * steps) == round(b * steps), attempt), tried


@pytest.mark.parametrize("most", [0.07, 0.31, 0.5, 0.66, 0.93])
def test_the_edge_is_found_within_seven_evaluations(most: float) -> None:
    bracketing, tried = tool(lambda r: -1.0 if r < most else 5.0)  # a cliff tells a search the least
    found = search(bracketing, -1.0, 7)
    assert found is not None and found <= most and most - found < 0.06
    assert len(tried) <= 7
    assert found == max(r for r in tried if r < most)


def test_an_estimate_that_is_right_saves_evaluations() -> None:
    def loss(r: float) -> float:
        return r**6

    informed, tried = tool(lambda r: loss(r) - 0.01, loss)
    blind, guesses = tool(lambda r: loss(r) - 0.01)
    for bracketing in (informed, blind):
        found = search(bracketing, -0.01, 20)
        assert found is not None
        assert 0 <= 0.01 - loss(found) <= 0.01 * NEAR or 0.01 ** (1 / 6) - found < NARROW
    assert len(tried) < len(guesses)


def test_the_next_ratio_is_where_a_line_in_the_estimated_loss_meets_the_tolerance() -> None:
    bracketing, tried = tool(lambda r: r**2 - 0.1, lambda r: r**2)
    search(bracketing, -0.1, 2)
    assert tried == [0.5, pytest.approx(0.1**0.5, abs=0.003)]


def test_a_network_is_evaluated_once() -> None:
    bracketing, tried = tool(lambda r: -1.0 if r < 0.4 else 5.0, steps=5)
    assert search(bracketing, -1.0, 7) is not None
    assert len({round(r * 5) for r in tried}) == len(tried)


def test_where_noise_hides_what_is_tolerated_the_bracket_is_halved() -> None:
    bracketing, tried = tool(lambda r: 0.5)  # as much as the dense network misses itself
    assert search(bracketing, 0.5, 3) is None
    assert tried == [0.5, 0.25, 0.125]


def test_nothing_found_is_none_and_nothing_to_remove_is_refused() -> None:
    bracketing, tried = tool(lambda r: 1.0)
    assert search(bracketing, -1.0, 6) is None
    assert len(tried) == 6 and tried == sorted(tried, reverse=True)

    def out_of_reach(ratio: float) -> float:
        raise OutOfReachError("too much")

    with pytest.raises(OutOfReachError):
        search(Tool(lambda r: r, lambda a, b: False, out_of_reach), -1.0, 6)


def test_ratios_out_of_reach_cost_no_evaluation() -> None:
    evaluated: list[float] = []

    def attempt(ratio: float) -> float:
        if ratio > 0.3:
            raise OutOfReachError("too much")
        evaluated.append(ratio)
        return -1.0

    found = search(Tool(lambda r: r, lambda a, b: False, attempt), -1.0, 3)
    assert found is not None and 0.25 <= found <= 0.3 and len(evaluated) == 3
