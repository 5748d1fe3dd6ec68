"""The guide to writing rules runs as it stands."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from spa import rules
from spa.model import shape_registry

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "write-a-rule.md"


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    rules.load()
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    monkeypatch.setattr(shape_registry, "_NOTED", dict(shape_registry._NOTED))


def test_the_guide_to_writing_rules_runs(own_registry: None) -> None:
    failed, tried = doctest.testfile(str(GUIDE), module_relative=False)
    assert tried > 10
    assert failed == 0
