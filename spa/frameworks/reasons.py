"""The reason in an exception of a framework, short enough for a message of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    r"""Return an error's message up to its first line break, as a sentence.

    >>> first_line(ValueError("no such layer\n  at graph.py:7"))
    'no such layer.'
    """
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def reason_of(error: Exception) -> str:
    r"""Return an error's class and the first line of its message, as a clause without a full stop.

    >>> reason_of(ValueError("no such layer.\n  at graph.py:7"))
    'ValueError: no such layer'
    """
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(".: ")
