"""An extension of griffe (which mkdocstrings reads the code with) that turns our docstrings into Markdown.

Sphinx roles become plain code. Doctests, which Markdown would read as quotations and links, become blocks of code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?([^`]+)`")
_FENCE = re.compile(r"\s*(```+|~~~+)")
_PROMPT = re.compile(r"( *)>>>(?: |$)")


class Roles(griffe.Extension):
    """Write ``:func:`spa.prune``` as `spa.prune`, and doctests as blocks of code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fence_doctests(_ROLE.sub(r"`\1`", obj.docstring.value))


def fence_doctests(docstring: str) -> str:
    """Wrap every doctest, from its first prompt to the next blank line, in a fenced block with its indentation."""
    return "\n".join(_fenced(docstring.split("\n")))


def _fenced(lines: list[str]) -> Iterator[str]:
    open_fence, indent = "", None  # the marks of a block that the author fenced; the indentation of a doctest
    for line in lines:
        fence, prompt = _FENCE.match(line), _PROMPT.match(line)
        if indent is not None and (not line.strip() or not line.startswith(indent)):
            yield f"{indent}```"
            indent = None
        if open_fence:
            open_fence = "" if line.strip() == open_fence else open_fence
        elif indent is None and fence:
            open_fence = fence[1]
        elif indent is None and prompt:
            indent = prompt[1]
            yield f"{indent}```pycon"
        yield line
    if indent is not None:
        yield f"{indent}```"
