"""The Pareto front against every pair, and the knee."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spa.steering.pareto import front, knee

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(PAIRS)
def test_the_front_is_what_nobody_beats(pairs: list[tuple[int, int]]) -> None:
    costs, losses = zip(*pairs, strict=True)
    found = front(costs, losses)
    best = {pair for pair in pairs if not any(a <= pair[0] and b <= pair[1] and (a, b) != pair for a, b in pairs)}
    assert {pairs[i] for i in found} == best
    assert len(found) == len(best)  # of equal ones the first
    assert [costs[i] for i in found] == sorted(costs[i] for i in found)


def test_a_straight_front_and_a_short_one_have_no_knee() -> None:
    assert knee([1, 2, 3], [3, 2, 1]) is None
    assert knee([1, 2], [5, 0]) is None


def test_the_knee_does_not_depend_on_units() -> None:
    costs, losses = [1, 3, 4, 9], [20.0, 6.0, 5.0, 0.0]
    assert knee(costs, losses) == 1
    assert knee([c * 1e9 for c in costs], [x / 1e3 for x in losses]) == 1
