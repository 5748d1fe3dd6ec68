"""Options: how one is declared, the kinds of values, and how a value given by a user becomes one of its kind."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from spa.errors import OptionError, suggestion


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Attributes:
        name: a word for it.
        expected: ends the sentence "Give …" of a refusal.
        convert: turns a value into one of the kind; raises ValueError where it is none.
        on_file: whether a command line and a file can hold such values.
    """

    name: str
    expected: str
    convert: Callable[[Any], Any]
    on_file: bool = True


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError
    return int(value)


def _switch(value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is no subclass of Python's
        raise ValueError
    return bool(value)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return str(value)


def _depth(value: Any) -> str:
    number = str(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
    if not isinstance(number, str) or not number or number.startswith("-") or (number.isdigit() and not int(number)):
        raise ValueError
    return number


def _ratio(value: Any) -> float | str:
    return value if isinstance(value, str) and value == "auto" else _number(value)


def _patterns(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not (found or isinstance(value, Iterable)) or not all(isinstance(v, str) and v for v in found):
        raise ValueError
    return found


def _numbers(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, Real):
        return _number(value)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError
    return tuple(_number(v) for v in value)


def _range(value: Any) -> tuple[float, float]:
    ends = _numbers(value)
    if isinstance(ends, float) or len(ends) != 2:
        raise ValueError
    low, high = ends
    if not (low < high and math.isfinite(high - low)):
        raise ValueError
    return low, high


def _sizes(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError
    sizes = {_word(name): _whole(size) for name, size in value.items()}
    if any(size < 1 for size in sizes.values()):
        raise ValueError
    return sizes


def _fractions(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError
    fractions = {_word(name): _number(fraction) for name, fraction in value.items()}
    if any(not 0 < fraction < 1 for fraction in fractions.values()):
        raise ValueError
    return fractions


def _source(value: Any) -> Any:
    if isinstance(value, bool | Real | bytes) or (isinstance(value, str) and not value):
        raise ValueError
    return value


def _arrays(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    return value


def _callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError
    return value


def _evaluation(value: Any) -> Any:
    if not callable(value) and not (isinstance(value, str) and value.strip()):
        raise ValueError
    return value


NUMBER = Kind("number", "a number", _number)
WHOLE = Kind("whole number", "a whole number", _whole)
SWITCH = Kind("switch", "True or False", _switch)
WORD = Kind("word", "a string", _word)
ANYTHING = Kind("word", "a string or an object", lambda value: value)
RATIO = Kind("ratio", "a number between 0 and 1, or 'auto'", _ratio)
DEPTH = Kind("depth", "'off', 'auto', a whole number above 0, or a shell pattern", _depth)
WORDS = Kind("words", "a word, or a list of them", _patterns)
PATTERNS = Kind("patterns", "a shell pattern, or a list of them", _patterns)
NUMBERS = Kind("numbers", "a number, or one for each channel", _numbers)
RANGE = Kind("range", "two numbers, the lower one first", _range)
SIZES = Kind("sizes", "a mapping from names to whole numbers of 1 or more", _sizes)
FRACTIONS = Kind("fractions", "a mapping from names to numbers between 0 and 1", _fractions)
FILE = Kind("file", "a path", _source)
EVALUATION = Kind("metric", "a command, module:function, or a function", _evaluation)
FUNCTION = Kind("function", "a function", _callable, on_file=False)
ARRAYS = Kind("arrays", "a mapping from initializer names to arrays", _arrays, on_file=False)


def option(
    default: Any,
    help: str,
    *,
    kind: Kind,
    choices: Callable[[], tuple[str, ...]] | None = None,
    bounds: tuple[int, int | None] | None = None,
    shown: str | None = None,
    flag: str | None = None,
) -> Any:
    """Declare an option, a field of a :class:`Section`.

    Args:
        default: its value where it is not given; None as a value stands for it.
        help: its meaning, in Markdown, for every place that shows it.
        kind: the kind of its values.
        choices: gives the words that it takes.
        bounds: the smallest and the largest number that it takes.
        shown: stands for the default where that does not speak for itself.
        flag: its name on the command line, if another one.
    """
    about = {"help": help, "kind": kind, "choices": choices, "bounds": bounds, "shown": shown, "flag": flag}
    return field(default=default, metadata=about)


class Section:
    """Options that belong together; each value is converted to its kind, or refused.

    Attributes:
        example: some of them on a command line.
    """

    example = ""

    def __post_init__(self) -> None:
        """Convert every value.

        Raises:
            OptionError: a value is not of the option's kind, no choice of it, or out of its bounds.
        """
        for about in fields(self):  # type: ignore[arg-type] # every section is a dataclass
            object.__setattr__(self, about.name, _converted(about, getattr(self, about.name)))


def _converted(about: Field[Any], value: Any) -> Any:
    if value is None or value is about.default:
        return about.default
    kind, choices, bounds = (about.metadata[name] for name in ("kind", "choices", "bounds"))
    least, most = bounds or (None, None)
    try:
        value = kind.convert(value)
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError
    except ValueError:
        limits = "" if least is None else f" of {least} or more" if most is None else f" from {least} to {most}"
        raise OptionError(f"{about.name} is {_shown(value)}. Give {kind.expected}{limits}.") from None
    if choices is not None and value not in choices():
        hint = suggestion(value, choices())
        raise OptionError(f"unknown {about.name} {value!r}.{hint} Choose one of {', '.join(choices())}.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def flag_of(about: Field[Any]) -> str:
    """Return an option's name on the command line, such as ``--round-to``."""
    return "--" + (about.metadata["flag"] or about.name).replace("_", "-")


def default_of(about: Field[Any]) -> str:
    """Return an option's default as readers see it; empty where it is nothing."""
    shown = about.metadata["shown"]
    if shown is not None:
        return str(shown)
    return "" if about.default in (None, (), MISSING) else str(about.default)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it; an object becomes its name, or that of its type."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {str(k): v if isinstance(v, int | float | str) else type(v).__name__ for k, v in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return name if isinstance(name, str) else f"a {type(value).__name__}"
