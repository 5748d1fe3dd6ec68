"""The lines that reports print."""

from __future__ import annotations

from typing import Any

import pytest

from spa.report.text import calibrated


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"before": None, "after": None}, "512 synthetic inputs"),
        (
            {"before": 0.3559, "after": 0.0171},
            "512 synthetic inputs; output error (MSE / variance) on 64 others: 0.356 after pruning, 0.017 after "
            "reconstruction",
        ),
        (
            {"before": 0.25, "after": 0.25, "held_out": 0},
            "512 synthetic inputs; output error (MSE / variance) on the same inputs: 0.250 after pruning",
        ),
        (
            {"before": 0.25, "after": 0.25, "agreement": {"y": 0.975}},
            "512 synthetic inputs; output error (MSE / variance) on 64 others: 0.250 after pruning; "
            "97.5% of the decisions of 'y' as before",
        ),
        (
            {"before": 0.25, "after": 0.2, "elsewhere": {"inputs": "drawings", "after": 0.0625}},
            "512 synthetic inputs; output error (MSE / variance) on 64 others: 0.250 after pruning, 0.200 after "
            "reconstruction, 0.062 on drawings instead",
        ),
        (
            {"before": None, "after": None, "accuracy": (97.5, 96.25)},
            "512 synthetic inputs; accuracy on 64 others: 97.5 % before, 96.2 % after",
        ),
    ],
)
def test_one_line_says_how_much_the_outputs_changed(found: dict[str, Any], expected: str) -> None:
    assert calibrated({"samples": 512, "source": "synthetic", "held_out": 64, "agreement": {}} | found) == expected
