"""The points of a sweep: budgets, criteria and roundings, each combined with each; and how lists are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from spa.errors import OptionError

MOST_POINTS = 1000
SWEPT = ("ratio", "latency_ms", "criterion", "round_to")  # the options that may be lists


@dataclass(frozen=True)
class Spec:
    """A point to be made.

    Attributes:
        criterion: its name.
        of: the unit of the ratio.
        ratio: the fraction to remove, or None.
        latency_ms: the milliseconds to arrive at, or None.
        round_to: widths are multiples of this.
    """

    criterion: str
    of: str
    ratio: float | None
    latency_ms: float | None
    round_to: int

    @property
    def name(self) -> str:
        """The stem of its files, such as ``obspa-macs-0.3-by8``."""
        budget = f"{self.of}-{self.ratio:g}" if self.latency_ms is None else f"{self.latency_ms:g}ms"
        return f"{self.criterion}-{budget}-by{self.round_to}"

    @property
    def options(self) -> dict[str, Any]:
        """The options of a request that make it."""
        budget = {"ratio": self.ratio} if self.latency_ms is None else {"latency_ms": self.latency_ms}
        return {"criterion": self.criterion, "round_to": self.round_to, **budget}

    @property
    def is_timed(self) -> bool:
        """Return whether it is made by measuring times, which others must not disturb."""
        return self.latency_ms is not None or self.of == "latency"


def numbers(value: Any, name: str) -> list[float]:
    """Return numbers from a list, one number, or text: ``0.1,0.3`` or ``0.1:0.7:0.1``, ends included.

    Args:
        value: what was given.
        name: of the option, for messages.

    Raises:
        OptionError: it is something else.

    >>> numbers("0.1:0.4:0.1", "ratio"), numbers("2,3.5", "latency_ms")
    ([0.1, 0.2, 0.3, 0.4], [2.0, 3.5])
    """
    try:
        if not isinstance(value, str):
            return [float(v) for v in (value if isinstance(value, Sequence) else [value])]
        if ":" not in value:
            return [float(part) for part in value.split(",")]
        start, stop, step = (float(part) for part in value.split(":"))
        count = round((stop - start) / step)
        if not 0 <= count < MOST_POINTS:
            raise ValueError
        return [round(start + i * step, 9) for i in range(count + 1) if start + i * step <= stop + 1e-9]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise OptionError(f"{name} is {value!r}. Give numbers, such as 0.1,0.3,0.5 or 0.1:0.7:0.1.") from error


def specs(of: str, values: dict[str, Any]) -> list[Spec]:
    """Return the points of a sweep, each once.

    Args:
        of: the unit of ratios.
        values: by option (see ``SWEPT``) what was given: a list or a single value; criteria are names.

    Raises:
        OptionError: there are none, too many, or one is of the wrong kind.
    """
    criteria = _words(values.get("criterion", "obspa"))
    roundings = numbers(values.get("round_to", 8), "round_to")
    if any(r != int(r) for r in roundings):
        raise OptionError("round_to is no whole number. Give 1, 8 or 16, say.")
    budgets: list[tuple[float | None, float | None]] = []
    if values.get("ratio") is not None:
        budgets += [(r, None) for r in numbers(values["ratio"], "ratio")]
    if values.get("latency_ms") is not None:
        budgets += [(None, ms) for ms in numbers(values["latency_ms"], "latency_ms")]
    if not budgets:
        raise OptionError("a sweep needs budgets. Give ratios, such as 0.1:0.7:0.1, or latencies in milliseconds.")
    points = list(dict.fromkeys(_combined(criteria, of, budgets, [int(r) for r in roundings])))
    if len(points) > MOST_POINTS:
        raise OptionError(f"{len(points)} points are asked for. Ask for {MOST_POINTS} at most.")
    return points


def _words(value: Any) -> list[str]:
    found = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not found or not all(isinstance(word, str) and word for word in found):
        raise OptionError("criterion: a sweep takes names of criteria. Register your own by spa.criterion.")
    return found


def _combined(
    criteria: Sequence[str], of: str, budgets: Sequence[tuple[float | None, float | None]], roundings: Sequence[int]
) -> Iterator[Spec]:
    for criterion, rounding, (ratio, ms) in product(criteria, roundings, budgets):
        yield Spec(criterion=criterion, of=of, ratio=ratio, latency_ms=ms, round_to=rounding)
