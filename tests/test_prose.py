"""Docstring summaries say what a thing is or does; they are not questions without a mark."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUESTION = r"(What|Which|Where|How|Whether)\b"


def questions(source: str) -> Iterator[str]:
    """Yield the summaries in a module that begin like a question, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            if re.match(QUESTION, summary):
                yield f"{node.body[0].lineno}: {summary}"


@pytest.mark.parametrize("folder", ["spa", "importers", "exporters"])
def test_no_docstring_summary_begins_like_a_question(folder: str) -> None:
    found = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in (ROOT / folder).rglob("*.py")}
    assert found
    assert [f"{path}:{q}" for path, text in found.items() for q in questions(text)] == []


def test_questions_are_found_in_modules_classes_and_functions() -> None:
    source = '"""Which."""\nclass A:\n    """Whether it is."""\n    def b(self):\n        """Return what it is."""\n'
    assert list(questions(source)) == ["1: Which.", "3: Whether it is."]
