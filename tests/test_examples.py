"""The examples run, on fewer criteria and epochs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_workflows(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("workflows", EXAMPLES / "workflows.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "AT_INITIALISATION", ("snip",))
    monkeypatch.setattr(example, "AFTER_TRAINING", ("obspa", "l2"))
    rows = {(w, c): a for w, c, a in example.workflows(example.digits(), 3)}
    dense = rows["train", ""]
    assert dense > 90
    assert rows["train, prune", "obspa"] > max(rows["train, prune", "l2"], dense - 10)
    assert rows["prune, train", "snip"] > 70
    assert rows["train, prune, fine-tune", "l2"] > 70
    assert "| train, prune | obspa |" in example.table([(*k, a) for k, a in rows.items()], 3)
