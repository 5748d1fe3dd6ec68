"""Every operator of the standard is covered by a rule, or listed as unsupported with a reason; never both."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import onnx
import pytest

from spa import rules
from spa.algebra.notation import parse
from spa.rules import barriers, find, supported

OLDEST = 7
_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional


def standard() -> set[str]:
    """All operators of ONNX that a model of opset 7 or later can hold, deprecated ones included."""
    found = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain in ("", "ai.onnx"):
            last = onnx.defs.get_schema(schema.name, max_inclusive_version=10**6, domain=schema.domain)
            if not (last.deprecated and last.since_version <= OLDEST):
                found.add(schema.name)
        else:
            found.add(f"{schema.domain}::{schema.name}")
    return found


def test_every_operator_of_the_standard_is_covered_or_listed_with_a_reason() -> None:
    assert sorted(standard() - supported().keys() - barriers().keys()) == []


def test_no_operator_is_both_covered_and_listed() -> None:
    assert supported().keys() & barriers().keys() == set()


def test_deprecated_operators_are_covered_too() -> None:
    assert {"Upsample", "Scatter"} <= supported().keys()


@pytest.mark.newest
def test_what_is_covered_exists() -> None:
    ours = {k for k in {*supported(), *barriers()} if not k.startswith("com.microsoft")}
    # Written by onnxruntime's and exporters' tools without a schema of the standard.
    known = {"SimplifiedLayerNormalization"}
    assert sorted(ours - standard() - known) == []


def test_each_reason_is_a_phrase() -> None:
    for key, reason in barriers().items():
        assert len(reason) > 10, key
        assert reason[0].islower(), key
        assert not reason.endswith("."), key


def test_each_rule_states_its_law_in_its_docstring() -> None:
    for key, rule in supported().items():
        if rule.__qualname__ != "rule_of.<locals>.law":  # the line of notation is its own statement
            assert rule.__doc__, key
            assert rule.__doc__.strip().split("\n")[0].endswith((".", ":")), key


def test_an_unknown_operator_has_a_reason() -> None:
    assert find("my.domain::Nothing") == "no rule for operator my.domain::Nothing"


def test_a_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv has a rule already"):
        rules.rule("Conv")(lambda op: None)
    with pytest.raises(ValueError, match="Conv has a rule already"):
        rules.unsupported("Conv", "a second opinion")
    with pytest.raises(ValueError, match="NonZero has a rule already"):
        rules.rule("NonZero")(lambda op: None)


# -- notation -------------------------------------------------------------------------------------------------------


def lines(rule: Any) -> Iterator[str]:
    """The lines of notation in a rule; what an f-string inserts is read as nothing."""
    if rule.__closure__ and "text" in rule.__code__.co_freevars:
        yield rule.__closure__[rule.__code__.co_freevars.index("text")].cell_contents
        return
    for name in rule.__code__.co_names:
        value = rule.__globals__.get(name)
        if isinstance(value, str) and "->" in value:
            yield value
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if "->" in text and "[" in text and "\n" not in text.strip():
            yield text


def in_the_standard(key: str) -> bool:
    """Contributed operators have no schema to compare with."""
    domain, _, op = key.rpartition("::")
    return bool(onnx.defs.has(op, domain))


CASES = sorted((k, line) for k, rule in supported().items() if in_the_standard(k) for line in set(lines(rule)))


@pytest.mark.parametrize(("key", "line"), CASES, ids=[k for k, _ in CASES])
def test_operands_bear_the_formal_names_of_the_schema(key: str, line: str) -> None:
    domain, _, op = key.rpartition("::")
    pattern = parse(line)
    newest = onnx.defs.get_schema(op, max_inclusive_version=10**6, domain=domain)
    history = [
        s
        for s in onnx.defs.get_all_schemas_with_history()
        if s.name == op and s.domain == domain and s.since_version >= min(OLDEST, newest.since_version)
    ]
    for position, operand in enumerate(pattern.inputs):
        formal = [s.inputs[position] for s in history if position < len(s.inputs)]
        assert operand.name in {f.name for f in formal}
        assert operand.optional == any(f.option == _OPTIONAL for f in formal), operand.name
    for position, operand in enumerate(pattern.outputs):
        assert operand.name in {s.outputs[position].name for s in history if position < len(s.outputs)}


def test_some_rules_are_lines_of_notation() -> None:
    assert {"BatchNormalization", "Conv", "ConvTranspose", "GroupNormalization"} <= {k for k, _ in CASES}
