"""Errors, by what is at fault.

Every message has one grammar: the object, the fact, the remedy, as in
``Conv 'layer1.0': W has 3 axes, expected 4. Check the exporter.``
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "InvariantError",
    "MetricError",
    "ModelError",
    "OptionError",
    "OutOfReachError",
    "PlanError",
    "SizeError",
    "SpaError",
    "UnreadableError",
    "UnsupportedError",
]


class SpaError(Exception):
    """Any refusal of this package; `exit_code` is what the command line returns for it."""

    exit_code: int = 1


class PlanError(SpaError):
    """An impossible request: an unreachable ratio, nothing to prune, an option that does not fit this model."""

    exit_code = 3


class OutOfReachError(PlanError):
    """More is asked for than can be removed."""


class OptionError(PlanError):
    """An option that fits no model: unknown, no choice, out of range, or at odds with another one."""

    exit_code = 2


class SizeError(OptionError):
    """A size that names no open axis of the model: a slip on the command line."""


class ModelError(SpaError):
    """Malformed input: not a model, a broken one, or one that onnxruntime cannot run."""

    exit_code = 4


class UnreadableError(ModelError, PlanError):
    """A file that was named (a model, data, a plan, a request) is not there or cannot be opened."""

    exit_code = 6


class MetricError(SpaError):
    """A metric or a measuring command of the user's that fails: it crashes, takes too long, or gives no number."""

    exit_code = 7


class UnsupportedError(SpaError):
    """Valid input that this package does not cover."""

    exit_code = 5


class InvariantError(SpaError):
    """A bug of ours: something that must hold does not. The message asks the reader to report it."""

    exit_code = 70

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} This is a bug in spa; please report it with the model or its architecture.")


def printable(text: str) -> str:
    r"""Return a text that a terminal shows as it is: what would command the terminal, or has no form, is escaped.

    >>> printable("conv\x1b[31m")
    'conv\\x1b[31m'
    """
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return " Did you mean …?" for a word that is near to a known one, else nothing.

    >>> suggestion("ratoi", ["ratio", "of"])
    " Did you mean 'ratio'?"
    """
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near else ""


def nearest(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that is nearest to one, or None."""
    from difflib import get_close_matches  # needed for refusals alone

    return next(iter(get_close_matches(str(word), list(known), 1)), None)
