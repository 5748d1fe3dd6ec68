"""The JSON schema of reports, made from the dataclasses that they are."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from spa.report import Report
from spa.request import options
from spa.request.option import (
    ANYTHING,
    ARRAYS,
    DEPTH,
    EVALUATION,
    FILE,
    FRACTIONS,
    FUNCTION,
    NUMBER,
    NUMBERS,
    PATTERNS,
    RANGE,
    RATIO,
    SIZES,
    SWITCH,
    WHOLE,
    WORD,
    WORDS,
    Kind,
)

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_NUMBER = {"type": "number"}
_KINDS: dict[Kind, dict[str, Any]] = {  # of an option's value; an object of Python is written as its name
    NUMBER: _NUMBER,
    WHOLE: {"type": "integer"},
    SWITCH: {"type": "boolean"},
    WORD: {"type": "string"},
    DEPTH: {"type": "string"},
    ANYTHING: {"type": "string"},
    RATIO: {"anyOf": [_NUMBER, {"const": "auto"}]},
    FILE: {"type": "string"},
    SIZES: {"type": "object", "additionalProperties": {"type": "integer"}},
    FRACTIONS: {"type": "object", "additionalProperties": _NUMBER},
    PATTERNS: {"type": "array", "items": {"type": "string"}},
    WORDS: {"type": "array", "items": {"type": "string"}},
    NUMBERS: {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER}]},
    RANGE: {"type": "array", "prefixItems": [_NUMBER, _NUMBER], "items": False},
    FUNCTION: {"type": "string"},
    EVALUATION: {"type": "string"},
    ARRAYS: {"type": "object", "additionalProperties": {"type": "string"}},
}


def report_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of what ``spa prune --json`` prints.

    >>> sorted(report_schema()["properties"])[:4]
    ['after', 'barriers', 'before', 'branches']
    """
    schema = _of_dataclass(Report)
    schema["properties"]["requested"] = request_schema()
    schema["properties"]["output"] = {"type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "spa report", **schema}


def request_schema() -> dict[str, Any]:
    """Return the JSON schema of a request, each option with its help text."""
    sections: dict[str, dict[str, Any]] = {}
    for section, about in options():
        accepted = _KINDS[about.metadata["kind"]]
        schema = {"anyOf": [accepted, {"type": "null"}]} if about.default is None else accepted
        sections.setdefault(section, {})[about.name] = {**schema, "description": about.metadata["help"]}
    return _object({name: _object(properties) for name, properties in sections.items()})


def _of_dataclass(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return _object({f.name: _of_type(hints[f.name]) for f in fields(kind)})


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _of_type(hint: Any) -> dict[str, Any]:
    """Return the schema of a type annotation."""
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if hint is Any:
        return {}
    if is_dataclass(hint):
        return _of_dataclass(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(a) for a in arguments]}
    if origin is tuple and arguments[1:] != (...,):
        return {"type": "array", "prefixItems": [_of_type(a) for a in arguments], "items": False}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of_type(arguments[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
        return {"type": "array", "items": _of_type(arguments[0])}
    raise TypeError(f"{hint!r} has no JSON schema. Use plain types.")
