"""The examples run, on fewer criteria and epochs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = {"torch_loop": "torch", "keras_loop": "tf2onnx", "jax_loop": "jax2onnx"}
SLOW = ("keras_loop", "jax_loop")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_workflows(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("workflows")
    monkeypatch.setattr(example, "AT_INITIALISATION", ("snip",))
    monkeypatch.setattr(example, "AFTER_TRAINING", ("obspa", "l2"))
    rows = {(w, c): a for w, c, a in example.workflows(example.digits(), 3)}
    dense = rows["train", ""]
    assert dense > 90
    assert rows["train, prune", "obspa"] > max(rows["train, prune", "l2"], dense - 10)
    assert rows["prune, train", "snip"] > 70
    assert rows["train, prune, fine-tune", "l2"] > 70
    assert "| train, prune | obspa |" in example.table([(*k, a) for k, a in rows.items()], 3)


# TensorFlow 2.21 and tf2onnx 1.17 call what numpy 2 deprecates, and protobuf types without __module__.
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
@pytest.mark.parametrize("name", ["torch_loop", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_steps_reach_the_budget_of_one_prune_and_train_on_in_the_same_framework(name: str) -> None:
    pytest.importorskip(NEEDED[name], reason=f"{NEEDED[name]} is not installed")
    example = load(name)
    x, x_test, y, y_test = example.digits()
    x, y = x[:512], y[:512]
    net = example.train(example.build(0), x, y, 3, 3e-3)
    dense = example.accuracy(net, x_test, y_test)
    assert dense > 60
    once = example.prune(net, x, 0.4).report
    (first, _), (second, small) = example.in_steps(net, x, y, 0.4, 2, 1)
    assert type(small) is type(net)
    assert first.report.before.macs == once.before.macs
    assert second.report.before.macs == first.report.after.macs
    assert first.report.reached == pytest.approx(1 - 0.6**0.5, abs=0.01)
    assert second.report.after.macs / once.before.macs == pytest.approx(once.after.macs / once.before.macs, abs=0.02)
    assert example.accuracy(small, x_test, y_test) > dense - 10
