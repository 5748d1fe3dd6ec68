"""The registry: one rule per operator. How to add one: see README.md beside this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

import onnx

from spa.algebra.notation import output_shapes, rule_of
from spa.algebra.op import Op
from spa.model.graph import Node, schema_of
from spa.model.shape_registry import register_notation

Rule = Callable[[Op], None]
REVIEWED_OPSET = 28  # up to which every version of every operator of the standard was compared with its rule
_RULES: dict[str, Rule] = {}
_UNSUPPORTED: dict[str, str] = {}
_KEY = re.compile(r"(?:[\w.]+::)?\w+")


def rule(*keys: str, doc: str | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators, each named ``Op`` or ``domain::Op``.

    As a decorator it registers a function of :class:`spa.algebra.op.Op`. With a line of notation as its last argument
    it registers that line, and there is nothing to decorate:

        spa.rule("my.domain::MyScale", "X[n c *s], S[c] -> Y[n c *s]")

    Args:
        keys: the operators, then the line, if any.
        doc: the line's docstring: its law in a sentence, and a ``Spec:`` link. A function has its own.

    Raises:
        ValueError: an operator has a rule already, or the line is not in the notation.
    """

    def register(function: Rule) -> Rule:
        for key in keys:
            if key in _RULES or key in _UNSUPPORTED:
                raise ValueError(f"{key} has a rule already")
            _RULES[key] = function
            if (notation := getattr(function, "notation", None)) and _needs_shapes(key):
                register_notation(key, partial(output_shapes, notation))
        return function

    line = keys[-1] if keys and not _KEY.fullmatch(keys[-1]) else None
    keys = keys if line is None else keys[:-1]
    if not keys:
        raise ValueError("no operator is named: give 'domain::Op' before the line")
    if line is not None:
        register(rule_of(line, doc=doc))
    return register


def _needs_shapes(key: str) -> bool:
    """Whether an operator is a user's: those of ONNX and onnxruntime have shape functions, which know types, too."""
    domain, _, op = key.rpartition("::")
    return domain != "com.microsoft" and not onnx.defs.has(op, domain)


def unsupported(key: str, reason: str) -> None:
    """List an operator as a barrier, with the reason that users read: a clause with a verb, without a period.

    Raises:
        ValueError: the operator has a rule already.
    """
    if key in _RULES or key in _UNSUPPORTED:
        raise ValueError(f"{key} has a rule already")
    _UNSUPPORTED[key] = reason


@cache
def load() -> None:
    """Import all rules, those of installed packages included."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="spa.rules"):
        entry.load()


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
    """Return all rules by operator, sorted."""
    load()
    return dict(sorted(_RULES.items()))


def barriers() -> dict[str, str]:
    """Return the operators listed as unsupported, each with its reason, sorted."""
    load()
    return dict(sorted(_UNSUPPORTED.items()))
