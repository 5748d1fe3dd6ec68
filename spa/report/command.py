"""The command line of a request, for those who want to repeat a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from spa.request import options
from spa.request.option import FRACTIONS, SIZES, SWITCH, flag_of, plain


def command_line(
    verb: str, model: str, output: str | None, requested: Mapping[str, Mapping[str, Any]], further: Mapping[str, Any]
) -> str:
    """Return the command that makes a run again; objects of Python stand in it by what they are, in brackets.

    Args:
        verb: ``prune``, ``sweep`` or ``sensitivity``.
        model: the dense model's file.
        output: the file or folder that was written, or None.
        requested: a report's, by section and option; those that are left at their defaults are left out.
        further: options of the command itself, by flag.

    >>> from spa.request import Request
    >>> command_line("prune", "a.onnx", "b.onnx", Request.of(ratio=0.3, ignore=["fc*"]).to_dict(), {})
    "spa prune a.onnx -o b.onnx --ratio 0.3 --ignore 'fc*'"
    """
    words = ["spa", verb, model, *([] if output is None else ["-o", output])]
    for flag, value in further.items():
        words += [flag, str(value)]
    for section, about in options():
        value = requested.get(section, {}).get(about.name)
        if value is None or value == plain(about.default):
            continue
        flag, kind = flag_of(about), about.metadata["kind"]
        if not kind.on_file:
            words += [flag, f"[{value}]"]
        elif kind is SWITCH:
            words.append(flag)
        elif kind in (SIZES, FRACTIONS):
            words += [word for name, size in value.items() for word in (flag, f"{name}={size}")]
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            words += [word for item in value for word in (flag, item)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
