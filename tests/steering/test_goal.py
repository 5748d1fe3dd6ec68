"""Prunings by the user's metric from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.errors import MetricError, OptionError, PlanError
from spa.request import Request
from tests.test_cli import refused
from tests.test_cli import spa as run_cli

MODELS = Path(__file__).parent.parent.parent / "models"
RESNET, TEST = MODELS / "digits_resnet.onnx", MODELS / "digits_test.npz"


def test_as_much_goes_as_the_metric_tolerates() -> None:
    result = spa.prune(RESNET, criterion="l2", evaluate=f"top1:{TEST}", max_drop=2.0)
    metric = result.report.metric
    assert metric is not None and len(metric["evaluations"]) <= 8
    assert metric["drop"] + 1.645 * metric["noise"] <= 2.0
    assert 0.05 < result.report.reached < 0.6
    best = max(e["ratio"] for e in metric["evaluations"] if e["met"])
    assert metric["ratio"] == best
    assert min(e["ratio"] for e in metric["evaluations"] if e["met"] is False) > best
    alone = spa.prune(RESNET, criterion="l2", ratio=best)
    assert alone.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


def size_metric(path: str) -> float:
    return float(Path(path).stat().st_size)


def test_a_function_in_python_and_lower_is_better() -> None:
    dense = size_metric(str(RESNET))
    result = spa.prune(RESNET, criterion="l2", evaluate=size_metric, better="lower", ratio=0.3)
    metric = result.report.metric
    assert metric is not None and metric["name"] == "size_metric"
    assert metric["drop"] == metric["pruned"] - metric["dense"] < -0.2 * dense
    assert [e["model"] for e in metric["evaluations"]] == ["dense", "pruned"]


class Failing:
    """A metric that gives numbers, then fails."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, path: str) -> float:
        if not self.values:
            raise OSError("the disk is gone")
        return self.values.pop(0)


def prune_with(evaluate: Any, **options: Any) -> spa.Result:
    return spa.prune(RESNET, criterion="l2", evaluate=evaluate, **options)


def test_a_failure_loses_nothing() -> None:
    found = prune_with(Failing(90, 90, 89.9, 70), max_drop=1)  # met at a half, not at three quarters
    assert found.report.metric is not None and found.report.metric["pruned"] == 89.9
    assert any("the search ended early" in n and "the disk is gone" in n for n in found.report.notes)
    with pytest.raises(MetricError, match=r"(?s)disk is gone.*Evaluated before:.*dense: .*50.0% of macs: metric 70"):
        prune_with(Failing(90, 90, 70), max_drop=1)
    unmeasured = prune_with(Failing(90), ratio=0.3)
    assert unmeasured.report.metric is not None and unmeasured.report.metric["pruned"] is None
    assert any("was not evaluated" in n for n in unmeasured.report.notes)


def test_a_metric_that_fails_on_the_dense_model_fails_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.job.Job.calibrate", lambda job: pytest.fail("calibrated"))
    with pytest.raises(MetricError, match="the disk is gone"):
        spa.prune(RESNET, evaluate=Failing(), max_drop=1)


def test_a_tolerance_below_the_noise_is_refused_with_the_log() -> None:
    with pytest.raises(
        PlanError, match=r"(?s)error of 0\.46; 0\.1 is allowed, with 95 % .*Give the metric more samples.*dense"
    ):
        prune_with(f"top1:{TEST}", max_drop=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": 1}, "max_drop needs a metric"),
        ({"min_metric": 0.5}, "min_metric needs a metric"),
        ({"max_drop": 1, "ratio": 0.5, "evaluate": len}, "Choose one"),
        ({"max_drop": -1, "evaluate": len}, "Give a number above 0"),
        ({"min_metric": float("inf"), "evaluate": len}, "finite"),
        ({"max_drop": 1, "of": "latency", "evaluate": len}, "a budget of latency takes a number"),
        ({"evaluate": ""}, "Give a command"),
        ({"evaluate": len, "evaluate_seconds": 0}, "above 0"),
        ({"evaluate": len, "better": "more"}, "Choose one of auto, higher, lower"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Request.of(**options)


def test_the_command_line_prints_the_log_and_ends_with_seven_where_the_metric_fails(tmp_path: Path) -> None:
    good = ("--criterion", "l2", "--evaluate", f"top1:{TEST}", "--min-metric", 97)
    result = run_cli("prune", RESNET, "-o", tmp_path / "o.onnx", *good)
    assert result.returncode == 0, result.stderr
    assert "evaluations" in result.stdout and "50.0% of macs" in result.stdout and "97 was asked for" in result.stdout
    (tmp_path / "o.onnx").unlink()
    failing = run_cli("prune", RESNET, "-o", tmp_path / "o.onnx", "--evaluate", "false {model}", "--max-drop", 1)
    refused(failing, 7, "the metric 'false {model}' failed with exit code 1", "It printed nothing")
    told = run_cli("prune", RESNET, "-o", tmp_path / "o.onnx", "--evaluate", "false {model}", "--json")
    assert json.loads(told.stdout)["error"]["kind"] == "MetricError"
    assert list(tmp_path.iterdir()) == []


def test_labels_and_normalisation_of_the_data_do_not_disturb_a_metric_on_arrays(tmp_path: Path) -> None:
    with np.load(TEST) as data:
        np.savez(tmp_path / "v.npz", input=data["input"], y=data["label"])
    result = prune_with(f"top1:{tmp_path / 'v.npz'}", ratio=0.2, mean=[0.5], std=[0.5])
    assert result.report.metric is not None and result.report.metric["dense"] > 99
