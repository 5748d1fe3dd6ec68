"""Why a framework's model cannot be had: exceptions of the framework in short, and what its own code computes."""

from __future__ import annotations

from collections.abc import Sequence

from spa.errors import UnsupportedError


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


def refuse_lost_branches(gone: Sequence[str], model: str) -> None:
    """Refuse to rebuild a model whose own code computes residual branches or detours that went.

    Args:
        gone: their names.
        model: what the model is called.

    Raises:
        UnsupportedError: one went.
    """
    if gone:
        what = "the residual branch" if gone[0].endswith("[branch]") else "the detour"
        raise UnsupportedError(
            f"{model}'s own code computes {what} {gone[0]!r}, which is gone. Take it out of the code by hand, take the "
            "ONNX model, or prune with depth='off'."
        )
