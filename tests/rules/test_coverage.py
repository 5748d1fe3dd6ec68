"""Every operator of the standard is covered by a rule, or listed as unsupported with a reason; never both."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import spa
from spa import rules
from spa.algebra.grammar import ANY, parse
from spa.algebra.notation import rule_of
from spa.rules import barriers, find, supported
from tests.oracle import Net, is_clause, is_reason

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


def test_each_reason_is_a_clause() -> None:
    assert [key for key, reason in barriers().items() if not is_clause(reason) or not reason[0].islower()] == []


_SUMMARY = re.compile(r"(?!(?:What|Which|Where|How|Whether)\b)[A-Z][^\n]+?\.(?= Spec:|\n|$)")
_SPEC = re.compile(
    r"Spec: (?:https://onnx\.ai/onnx/operators/onnx__(?P<onnx>\w+)\.html|ContribOperators\.md#(?P<contrib>[\w.]+))\.\Z"
)
# Written by onnxruntime under a name of its own, without a page.
_ELSEWHERE = {"SimplifiedLayerNormalization": "RMSNormalization"}


def test_each_rule_states_its_law_in_a_sentence() -> None:
    assert [key for key, rule in supported().items() if not _SUMMARY.match((rule.__doc__ or "").strip())] == []


def test_each_rule_ends_with_the_page_that_specifies_one_of_its_operators() -> None:
    keys_of: dict[Any, set[str]] = {}
    for key, rule in supported().items():
        keys_of.setdefault(rule, set()).add(_ELSEWHERE.get(key, key))
    wrong = []
    for rule, keys in keys_of.items():
        match = _SPEC.search((rule.__doc__ or "").strip())
        page = match and (match["onnx"] or match["contrib"].replace("com.microsoft.", "com.microsoft::"))
        if page not in keys:
            wrong.append((sorted(keys), page))
    assert wrong == []


def test_each_reason_that_a_rule_gives_begins_with_a_verb() -> None:
    wrong = []
    for path in sorted(Path(rules.__path__[0]).glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and len(call.args) > 1):
                continue
            if call.func.attr in ("freeze", "opaque"):
                values = [n.value for n in ast.walk(call.args[1]) if isinstance(n, ast.Constant)]
                texts = [v for v in values if isinstance(v, str)]
                wrong += [(path.name, text) for text in texts if not is_reason(f"Op 'x' {text}")]
    for rule in supported().values():
        if notation := getattr(rule, "notation", None):
            wrong += [(notation, why) for _, why in parse(notation).frozen if not is_reason(f"Op 'x' {why}")]
    assert wrong == []


@pytest.mark.parametrize("text", ["looked up by Gather 'x'", "spatial axis of Conv 'x'", "Op 'x' looks it up.", "it"])
def test_what_is_no_clause_is_no_reason(text: str) -> None:
    assert not is_reason(text)
    assert not is_clause(text)


def test_an_unknown_operator_has_a_reason() -> None:
    assert find("my.domain::Nothing") == "operator my.domain::Nothing has no rule"


def test_a_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="'Conv' has a rule already"):
        rules.rule("Conv")(lambda op: None)
    with pytest.raises(ValueError, match="'Conv' has a rule already"):
        rules.unsupported("Conv", "a second opinion")
    with pytest.raises(ValueError, match="'NonZero' has a rule already"):
        rules.rule("NonZero")(lambda op: None)


LINE = "X[n c] -> Y[n c]"


def in_a_fresh_process(code: str) -> str:
    """What code prints where nothing of spa is loaded yet."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("key", ["Conv", "NonZero", "com.microsoft::FusedConv", "ai.onnx::Conv"])
def test_a_user_cannot_replace_a_built_in_rule_before_the_first_analysis(key: str) -> None:
    code = f"import spa\ntry: spa.rule({key!r}, {LINE!r})\nexcept ValueError as error: print(error)"
    assert (
        in_a_fresh_process(code)
        == f"operator {key.removeprefix('ai.onnx::')!r} has a rule already. Remove one of them."
    )


@pytest.mark.parametrize("module", ["quantised", "layout", "indexing"])
def test_a_module_of_rules_can_be_imported_first(module: str) -> None:
    unlisted = "{k.partition('::')[0] for k in rules._RULES.keys() - rules.supported().keys()}"
    code = f"import spa.rules.{module}\nfrom spa import rules\nprint({unlisted}, len(rules.supported()) > 200)"
    assert in_a_fresh_process(code) == "{'spa.flat'} True"


@pytest.mark.parametrize("keys", [("q::A", "Conv2", "q::A"), ("q::A", "Conv2", "Conv"), ("q::A", "Conv2", "")])
@pytest.mark.parametrize("line", [(), (LINE,)], ids=["decorator", "line"])
def test_a_rule_is_registered_for_all_its_operators_or_for_none(keys: tuple[str, ...], line: tuple[str, ...]) -> None:
    before = supported()
    with pytest.raises(ValueError, match=r"has a rule already|is named twice|names no operator"):
        rules.rule(*keys, *line)(lambda op: None)
    assert supported() == before


@pytest.mark.parametrize("name", [None, 3, "", "::", "a::", "::B", "a::b::c", b"Op"])
def test_what_is_no_operators_name_is_refused(name: Any) -> None:
    message = f"{re.escape(repr(name))} names no operator. Write 'Op' for one of ONNX, 'domain::Op' for any other."
    for keys in ((name,), (name, LINE), ("q::A", name)):
        with pytest.raises(ValueError, match=message):
            rules.rule(*keys)
    with pytest.raises(TypeError, match=r"the rule of 'q::A' is 3\. Decorate a function of an Op"):
        rules.rule("q::A")(3)  # type: ignore[arg-type] # the mistake
    with pytest.raises(ValueError, match="names no operator"):
        rules.rule(lambda op: None)  # type: ignore[arg-type] # a decorator without its operator


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
        text = text.partition(";")[0]  # clauses name letters that an f-string may insert
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
        assert operand.name in {f.name for f in formal} | shared_by(key)
        assert operand.repeats or operand.optional == any(f.option == _OPTIONAL for f in formal), operand.name
    for position, operand in enumerate(pattern.outputs):
        formal_names = {s.outputs[position].name for s in history if position < len(s.outputs)}
        assert operand.name in formal_names | shared_by(key)


def shared_by(key: str) -> set[str]:
    """The name for any operand, where operators share the rule: their formal names differ."""
    return {ANY} if sum(rule is supported()[key] for rule in supported().values()) > 1 else set()


def test_many_rules_are_lines_of_notation() -> None:
    assert {"BatchNormalization", "Conv", "ConvTranspose", "GroupNormalization"} <= {k for k, _ in CASES}
    alone = {key for key, rule in supported().items() if hasattr(rule, "notation")}
    assert {"Add", "Conv", "Det", "GridSample", "InstanceNormalization", "LRN", "Relu", "Trilu"} <= alone


def test_a_line_without_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="no operator is named"):
        rules.rule("X[n] -> Y[n]")


def test_a_line_without_an_arrow_is_no_operators_name() -> None:
    with pytest.raises(ValueError, match="there is no '->'"):
        rules.rule("my.domain::Odd", "X[n] Y[n]")


def test_every_version_of_an_operator_that_onnx_knows_was_reviewed() -> None:
    """A new opset fails here first: compare its operators with their rules, then raise REVIEWED_OPSET."""
    newest = {s.name: s.since_version for s in onnx.defs.get_all_schemas() if s.domain == ""}
    later = {name: since for name, since in newest.items() if since > rules.REVIEWED_OPSET}
    assert later == {}


def test_a_version_that_was_not_reviewed_is_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(opset=18)
    x = net.conv(net.input("x", ["n", 3, 8, 8]), 3, 5)
    model = net.model(net.conv(net.node("Split", x, num_outputs=1, axis=1), 5, 2))  # Split-18 brought num_outputs
    assert [g.size for g in spa.analyze(model).free] == [5]
    monkeypatch.setattr(rules, "REVIEWED_OPSET", 17)
    analysis = spa.analyze(model)
    assert analysis.free == ()
    assert "has not been reviewed for version 18" in next(iter(analysis.barriers.values()))


def test_lines_of_built_in_rules_which_are_parsed_when_they_are_used_are_in_the_notation() -> None:
    lines = {getattr(rule, "notation", None) for rule in supported().values()} - {None}
    assert len(lines) > 30
    for line in lines:
        assert rule_of(line).notation == line  # type: ignore[attr-defined] # which rule_of gives it
