"""Lists of budgets, as text and as numbers."""

from __future__ import annotations

from typing import Any

import pytest

from spa.errors import OptionError
from spa.steering.grid import Spec, numbers, specs


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1:0.7:0.2", [0.1, 0.3, 0.5, 0.7]),
        ("0.1:0.75:0.2", [0.1, 0.3, 0.5, 0.7]),
        ("0.1:0.68:0.2", [0.1, 0.3, 0.5]),
        ("0.5", [0.5]),
        (0.5, [0.5]),
        ((1, 8), [1.0, 8.0]),
    ],
)
def test_lists_are_read(text: Any, values: list[float]) -> None:
    assert numbers(text, "ratio") == values


@pytest.mark.parametrize("text", ["", "a,b", "0.1:0.7", "0.1:0.7:0", "0.7:0.1:0.1", "0:1:1e-9", "1:nan:1", None, {}])
def test_what_is_no_list_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="Give numbers, such as"):
        numbers(text, "ratio")


def test_all_are_combined_once() -> None:
    found = specs("macs", {"ratio": [0.3, 0.3], "latency_ms": "2", "criterion": "l1,l2", "round_to": [1, 8]})
    assert len(found) == len(set(found)) == 8
    assert found[0] == Spec("l1", "macs", 0.3, None, 1)
    assert {s.name for s in found} >= {"l1-macs-0.3-by1", "l2-2ms-by8"}
    assert [s.is_timed for s in found[:2]] == [False, True]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "needs budgets"),
        ({"ratio": 0.3, "round_to": 1.5}, "no whole number"),
        ({"ratio": 0.3, "criterion": [len]}, "takes names"),
        ({"ratio": "0.0001:0.9:0.001", "round_to": "1:9:1"}, "1000 at most"),
    ],
)
def test_grids_that_make_no_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        specs("macs", values)
