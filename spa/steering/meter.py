"""A metric beside a dense model: how much worse a pruned one is, how sure that is, and a log of all evaluations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from spa.errors import PlanError
from spa.model.alternatives import reunited
from spa.steering.measurement import CONFIDENCE, Measurement

if TYPE_CHECKING:
    from spa.steering.metric import Metric

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """The demand on a pruned model's metric: one of the two, or none.

    Attributes:
        max_drop: how much worse than the dense model's it may be.
        min_metric: the value that it must reach; where lower is better, the value that it must not exceed.
    """

    max_drop: float | None = None
    min_metric: float | None = None

    @property
    def is_given(self) -> bool:
        """Return whether anything is asked for."""
        return self.max_drop is not None or self.min_metric is not None


@dataclass(frozen=True)
class Evaluation:
    """A line of the log.

    Attributes:
        model: ``dense``, ``pruned``, or how much was removed, in words.
        value: the metric.
        drop: how much worse it is than the dense model's.
        noise: the standard error of the drop, as far as it is known; of the value where ``min_metric`` is asked for.
        met: whether it is within the tolerance with 95 % confidence; None where nothing is asked for.
        seconds: the time of the evaluation.
        others: further numbers.
        ratio: the fraction that was asked to be removed, in a search.
        change: the change of the outputs, relative to their variance, where it was measured.
    """

    model: str
    value: float
    drop: float
    noise: float
    met: bool | None
    seconds: float
    others: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    change: float | None = None


class Meter:
    """A metric that has measured the dense model, and measures others beside it.

    The noise of a metric is what it says itself (``stderr``, or the paired differences of its samples); else it is the
    difference between two evaluations of the dense model, where a search is to come.

    Args:
        metric: what measures.
        dense: the dense model.
        tolerance: what is asked for.

    Attributes:
        log: all evaluations so far.

    Raises:
        MetricError: the metric fails on the dense model.
        PlanError: the dense model itself is not what is asked for.
    """

    def __init__(self, metric: Metric, dense: ModelProto, tolerance: Tolerance) -> None:
        self.metric, self.tolerance = metric, tolerance
        self.log: list[Evaluation] = []
        self.spread = 0.0  # of two evaluations of one model
        self.dense = metric.evaluate(dense)
        self._enter("dense", self.dense)
        if tolerance.is_given and not metric.is_repeatable and self.dense.error is None:
            again = metric.evaluate(dense)
            self.spread = abs(again.value - self.dense.value)
            self._enter("dense, again", again)
        self._check_tolerance()

    def beside(self) -> Meter:
        """Return a meter of the same dense model, whose log goes on by itself."""
        meter = copy(self)
        meter.log = list(self.log)
        return meter

    def _check_tolerance(self) -> None:
        """Refuse a tolerance that the dense model does not meet, or that anything would meet."""
        name, value = self.metric.name, self.dense.value
        least, drop = self.tolerance.min_metric, self.tolerance.max_drop
        if least is not None and self._sign * (value - least) < 0:
            raise PlanError(f"the dense model's {name} is {value:g}, {least:g} is asked for. Ask for what it reaches.")
        if drop is not None and self.metric.higher_is_better and 0 < value <= drop:
            raise PlanError(
                f"the dense model's {name} is {value:g}, so that a drop of {drop:g} allows anything. "
                f"Give --max-drop in units of the metric: {drop / 100:g} for a hundredth of that, say."
            )

    @property
    def _sign(self) -> int:
        return 1 if self.metric.higher_is_better else -1

    def drop(self, found: Measurement) -> float:
        """Return how much worse a model is than the dense one."""
        return self._sign * (self.dense.value - found.value)

    def noise(self, found: Measurement) -> float:
        """Return the standard error that counts against a model, as far as it is known."""
        error = found.error_beside(self.dense) if self.tolerance.min_metric is None else found.error
        return self.spread if error is None else error

    def shortfall(self, found: Measurement) -> float:
        """Return by how much a model misses what is asked for, with 95 % confidence; 0 or less meets it."""
        least, most = self.tolerance.min_metric, self.tolerance.max_drop
        missed = self._sign * ((least or 0.0) - found.value) if least is not None else self.drop(found) - (most or 0.0)
        return missed + CONFIDENCE * self.noise(found)

    def measure(
        self, model: ModelProto, name: str = "pruned", ratio: float | None = None, change: float | None = None
    ) -> Measurement:
        """Evaluate a model, and enter it in the log.

        Args:
            model: a pruned one.
            name: what the log calls it.
            ratio: the fraction that was to be removed.
            change: of the outputs, for the log.

        Raises:
            MetricError: the metric fails.
        """
        found = self.metric.evaluate(reunited(model))
        self._enter(name, found, ratio, change)
        return found

    def _enter(self, name: str, found: Measurement, ratio: float | None = None, change: float | None = None) -> None:
        is_dense = name.startswith("dense")
        met = self.shortfall(found) <= 0 if self.tolerance.is_given and not is_dense else None
        noise = (found.error or self.spread) if is_dense else self.noise(found)
        _LOG.info("%s: %s %g, %.1f s", name, self.metric.name, found.value, found.seconds)
        self.log.append(
            Evaluation(
                model=name,
                value=found.value,
                drop=self.drop(found),
                noise=noise,
                met=met,
                seconds=round(found.seconds, 3),
                others=dict(found.others),
                ratio=ratio,
                change=change,
            )
        )

    def report(self, pruned: Measurement | None) -> dict[str, Any]:
        """Return what a report says of the metric.

        Args:
            pruned: of the network that was chosen; None where the metric failed on it.
        """
        return {
            "name": self.metric.name,
            "better": "higher" if self.metric.higher_is_better else "lower",
            "dense": self.dense.value,
            "pruned": None if pruned is None else pruned.value,
            "drop": None if pruned is None else self.drop(pruned),
            "noise": None if pruned is None else self.noise(pruned),
            "max_drop": self.tolerance.max_drop,
            "min_metric": self.tolerance.min_metric,
            "evaluations": [asdict(entry) for entry in self.log],
        }

    def lines(self) -> str:
        """Return the log as lines of text, for messages."""
        return "".join(f"\n  {e.model}: {self.metric.name} {e.value:g} ± {e.noise:.2g}" for e in self.log)
