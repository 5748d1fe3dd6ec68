"""The registry of rules, one per operator; README.md beside this file says how to add one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from pkgutil import iter_modules

import onnx

from spa.algebra.notation import output_shapes, rule_of
from spa.algebra.op import Op
from spa.extras import entry_points, load_entries
from spa.model.graph import Node, schema_of
from spa.model.marks import FLAT
from spa.model.shape_registry import register_notation

Rule = Callable[[Op], None]
_COMPLETE = False  # whether the built-in rules are registered; their lines are parsed by the tests, not at each start
REVIEWED_OPSET = 28  # up to which every version of every operator of the standard was compared with its rule
_RULES: dict[str, Rule] = {}
_UNSUPPORTED: dict[str, str] = {}
_KEY = re.compile(r"(?:[\w.-]+::)?\w+")
_LINE = re.compile(r"->|\[|\s")  # no operator's name holds any of these, and no line lacks all of them


def rule(*keys: str, doc: str | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators, each named ``Op`` or ``domain::Op``: for all of them, or for none.

    As a decorator it registers a function of :class:`spa.algebra.op.Op`. With a line of notation as its last argument
    it registers that line, and there is nothing to decorate:

        spa.rule("my.domain::MyScale", "X[n c *s], S[c] -> Y[n c *s]")

    Args:
        keys: the operators, then the line, if any.
        doc: the line's docstring: its law in a sentence, and a ``Spec:`` link. A function has its own.

    Raises:
        TypeError: what is decorated is no function.
        ValueError: an operator has a rule already or is named otherwise, or the line is not in the notation.
    """
    line = keys[-1] if keys and isinstance(keys[-1], str) and _LINE.search(keys[-1]) else None
    operators = [_key(key) for key in (keys if line is None else keys[:-1])]
    if not operators:
        raise ValueError("no operator is named. Give 'domain::Op' before the line.")
    _refuse_taken(operators)

    def register(function: Rule) -> Rule:
        if not callable(function):
            raise TypeError(
                f"the rule of {operators[0]!r} is {function!r}. Decorate a function of an Op, or give a line."
            )
        _refuse_taken(operators)
        notation = getattr(function, "notation", None)
        for key in operators:
            _RULES[key] = function
            if notation and _needs_shapes(key):
                register_notation(key, partial(output_shapes, notation))
        return function

    if line is not None:
        register(rule_of(line, doc=doc, parse_now=_COMPLETE))
    return register


def _key(name: object) -> str:
    """Return the operator that a name stands for; ``ai.onnx`` is the default domain.

    Raises:
        ValueError: it is not written as an operator's name.
    """
    if not isinstance(name, str) or not _KEY.fullmatch(name):
        raise ValueError(f"{name!r} names no operator. Write 'Op' for one of ONNX, 'domain::Op' for any other.")
    return name.removeprefix("ai.onnx::")


def _refuse_taken(operators: Sequence[str]) -> None:
    """Raise ValueError where an operator has a rule already, or is named twice."""
    for i, key in enumerate(operators):
        if key in _RULES or key in _UNSUPPORTED:
            raise ValueError(f"operator {key!r} has a rule already. Remove one of them.")
        if key in operators[:i]:
            raise ValueError(f"operator {key!r} is named twice. Name it once.")


def _needs_shapes(key: str) -> bool:
    """Return whether an operator is a user's; those of ONNX and onnxruntime have shape functions, which know types."""
    domain, _, op = key.rpartition("::")
    return domain != "com.microsoft" and not onnx.defs.has(op, domain)


def unsupported(key: str, reason: str) -> None:
    """List an operator as a barrier, with the reason that users read: a clause with a verb, without a period.

    Raises:
        ValueError: the operator has a rule already.
    """
    _refuse_taken([key])
    _UNSUPPORTED[key] = reason


@cache
def load() -> None:
    """Import the rules of installed packages; those of this one are there as soon as it is imported."""
    load_entries(entry_points(group="spa.rules"))


def unreviewed(node: Node) -> str | None:
    """Return the reason why a node's version is a barrier, or None.

    A later version of an operator may carry attributes that change what its axes are, which a rule written before
    would ignore in silence.
    """
    schema = None if node.domain else schema_of(node)
    if schema is None or schema.since_version <= REVIEWED_OPSET:
        return None
    return f"the rule has not been reviewed for version {schema.since_version} of the operator"


def find(key: str) -> Rule | str:
    """Return an operator's rule, or the reason why it has none."""
    load()
    return _RULES.get(key) or _UNSUPPORTED.get(key) or f"operator {key} has no rule"


def supported() -> dict[str, Rule]:
    """Return all rules by operator, sorted; marks are no operators that a file may hold."""
    load()
    return {key: rule for key, rule in sorted(_RULES.items()) if not key.startswith(f"{FLAT}::")}


def barriers() -> dict[str, str]:
    """Return the operators listed as unsupported, each with its reason, sorted."""
    load()
    return dict(sorted(_UNSUPPORTED.items()))


# Not only in `load`: a user who registers a rule before any analysis must see that the operator has one.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
_COMPLETE = True
