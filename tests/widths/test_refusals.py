"""Budgets that no choice meets are refused before the network runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import spa
from spa.errors import OutOfReachError
from spa.job import Job

RESNET = Path(__file__).parents[2] / "models" / "digits_resnet.onnx"


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
def test_a_budget_out_of_reach_is_refused_before_calibration(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated: list[Job] = []
    monkeypatch.setattr(Job, "calibrate", calibrated.append)
    with pytest.raises(OutOfReachError, match=r"at most .* can go under these constraints"):
        spa.prune(RESNET, ratio=0.9, of=of, min_width=30)
    assert not calibrated
