"""Measurements: a metric of a model, and its standard error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

CONFIDENCE = 1.645  # standard errors below which a value lies with 95 % confidence


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a model.

    Attributes:
        value: the metric.
        others: further numbers that came with it, by name.
        stderr: the standard error of ``value``, where the metric gives it.
        by_sample: the metric of each sample, (samples,), of which ``value`` is the mean, where the metric gives them.
        step: what a decision on one sample is worth, in units of ``by_sample``; 0 where those are real numbers.
        seconds: the time that the evaluation took.
    """

    value: float
    others: Mapping[str, float] = field(default_factory=dict)
    stderr: float | None = None
    by_sample: np.ndarray | None = None
    step: float = 0.0
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """The standard error of the value, where it is known."""
        return self.stderr if self.by_sample is None else standard_error(self.by_sample, self.step)

    def error_beside(self, other: Measurement) -> float | None:
        """Return the standard error of the difference from another model's value; None where it is not known.

        Two models on the same samples mostly agree, so that their difference is known far better than either value.
        """
        if self.by_sample is not None and other.by_sample is not None:
            return standard_error(self.by_sample - other.by_sample, self.step)
        errors = self.error, other.error
        return None if errors[0] is None or errors[1] is None else float(np.hypot(errors[0], errors[1]))


def standard_error(values: np.ndarray, step: float) -> float:
    """Return the standard error of a mean.

    Args:
        values: one per sample, (samples,).
        step: of decisions, as if 2.7 more had been different, which makes the bound Wilson's where none is: that none
            of fifty differs does not prove that none of a thousand would.

    >>> round(CONFIDENCE * standard_error(np.zeros(300), 100.0), 2)
    0.9
    """
    n = values.size
    squares = float(np.square(values - values.mean()).sum()) + (CONFIDENCE * step) ** 2
    return float(np.sqrt(squares / (n * max(n - 1, 1)))) if step == 0 else float(np.sqrt(squares) / n)
