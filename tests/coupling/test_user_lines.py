"""Lines of a user that do not fit a model: the line is named, and not the model."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx.parser
import pytest

import spa
from spa import rules
from spa.errors import ModelError
from spa.model import shape_registry


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registries, whose changes are undone."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    monkeypatch.setattr(shape_registry, "_NOTED", dict(shape_registry._NOTED))
    yield


def analyze(line: str) -> spa.Analysis:
    spa.rule("my::Odd", line)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "my": 1]>
        net (float[5, 2] x) => (float[5, 1] y) <float[2, 3] a = {1, 2, 3, 4, 5, 6}, float[3, 1] b = {1, 2, 3}> {
            h = MatMul(x, a)
            odd = my.Odd(h)
            y = MatMul(odd, b)
        }""")
    return spa.analyze(model)


def test_a_line_that_contradicts_the_operands_is_a_barrier_that_names_it() -> None:
    line = "X[c c] -> Y[c c]"
    barriers = analyze(line).barriers
    assert [why for key, why in barriers.items() if key.startswith("Odd")] == [
        f"its shapes do not fit its rule's line {line!r}"
    ]


def test_a_line_whose_output_the_next_operator_cannot_take_is_named() -> None:
    with pytest.raises(ModelError) as error:
        analyze("X[n c] -> Y[c n]")
    assert re.search(
        r"The output shape of Odd '.*' is what its rule's line says\. Check that line\.$", str(error.value)
    )
