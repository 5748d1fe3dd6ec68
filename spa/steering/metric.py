"""The user's metric: what ``evaluate`` may be, and how one evaluation goes."""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx import ModelProto

from spa.errors import MetricError, OptionError, SpaError, suggestion
from spa.model.files import place
from spa.model.writing import draft_folder
from spa.running.commands import MODEL
from spa.steering.child import by_command, by_function, numbers_in
from spa.steering.labelled import KINDS, MAKERS, Samples
from spa.steering.measurement import Measurement

DIRECTIONS = ("auto", "higher", "lower")
STDERR = "stderr"  # the name under which a metric gives the standard error of its value
FUNCTION = re.compile(r"[\w.]+:\w+")


@dataclass(frozen=True)
class Metric:
    """A metric of models.

    Attributes:
        name: what reports call it.
        higher_is_better: whether it is; else lower is.
        measure: evaluates a model that holds its weights, or whose external data lie where the dense model's do.
        is_repeatable: whether the same model always gets the same value.
    """

    name: str
    higher_is_better: bool
    measure: Callable[[ModelProto], Measurement]
    is_repeatable: bool

    def evaluate(self, model: ModelProto) -> Measurement:
        """Evaluate a model.

        Raises:
            MetricError: the metric fails, or gives no finite number.
        """
        start = time.perf_counter()
        found = self.measure(model)
        for name, value in ((self.name, found.value), (STDERR, found.stderr)):
            if value is not None and not math.isfinite(value):
                raise MetricError(f"the metric gives {value} as {name!r}. Give a finite number.")
        return replace(found, seconds=time.perf_counter() - start)


def check_evaluate(evaluate: Any) -> None:
    """Refuse what cannot be a metric; a path is looked for later, when it is read.

    Raises:
        OptionError: it is none.
    """
    if callable(evaluate) or MODEL in evaluate:
        return
    kind, colon, rest = evaluate.partition(":")
    if colon and kind in KINDS and rest:
        return
    hint = suggestion(kind, KINDS) if colon else ""
    if not FUNCTION.fullmatch(evaluate) or (hint and "." not in kind and find_spec(kind) is None):
        raise OptionError(
            f"evaluate is {evaluate!r}.{hint} Give module:function, a command with {MODEL} in it, or "
            f"{', '.join(f'{kind}:PATH' for kind in KINDS)}."
        )


def metric_of(
    evaluate: Any, samples: Samples, *, key: str | None = None, better: str = "auto", seconds: float = math.inf
) -> Metric:
    """Make a metric of what a user gives.

    Args:
        evaluate: a function of a model's path that returns a number or a mapping of numbers; ``module:function``; a
            command with ``{model}``; or ``top1:PATH`` and the like (see :mod:`spa.steering.labelled`).
        samples: how ready-made metrics read theirs; the path is replaced.
        key: which of several numbers is the metric; the first by default.
        better: ``higher``, ``lower``, or ``auto``: lower for ``mae``, else higher.
        seconds: the limit of one evaluation in a process of its own.

    Raises:
        OptionError: it is no metric.
        PlanError: the samples of a ready-made metric cannot be read.
    """
    check_evaluate(evaluate)
    kind, _, path = ("", "", "") if callable(evaluate) else evaluate.partition(":")
    if kind in KINDS and MODEL not in evaluate:
        higher = KINDS[kind] if better == "auto" else better == "higher"
        return Metric(kind, higher, MAKERS[kind](replace(samples, path=Path(path))), True)
    call = _caller(evaluate, seconds)
    name = str(key or (getattr(evaluate, "__name__", "metric") if callable(evaluate) else "metric"))

    def measure(model: ModelProto) -> Measurement:
        with draft_folder(Path(tempfile.gettempdir())) as folder:
            file = folder / "model.onnx"
            place(model, file, samples.graph.base)
            return _measurement(call(file), key)

    return Metric(name, better != "lower", measure, False)


def _caller(evaluate: Any, seconds: float) -> Callable[[Path], Any]:
    if callable(evaluate):
        return lambda file: _called(evaluate, file)
    if MODEL in evaluate:
        return lambda file: by_command(evaluate, file, seconds)
    return lambda file: by_function(evaluate, file, seconds)


def _called(function: Callable[[str], Any], file: Path) -> Any:
    """Call a user's function in this process.

    Raises:
        MetricError: it raises.
    """
    try:
        return numbers_in(function(str(file)))
    except SpaError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's function may raise
        raise MetricError(f"evaluate raised {type(error).__name__}: {error}. Run it on the model by hand.") from error


def _measurement(value: Any, key: str | None) -> Measurement:
    """Return what a metric gave as a measurement.

    Raises:
        MetricError: it is no number, or no mapping with one.
    """
    numbers: dict[str, float] = {}
    values = value if isinstance(value, Mapping) else {"metric": value}
    for name, item in values.items():
        if isinstance(item, int | float) and not isinstance(item, bool):
            with suppress(OverflowError):
                numbers[str(name)] = float(item)
    stderr = numbers.pop(STDERR, None)
    if key is not None and key not in numbers:
        known = f"it gives {', '.join(numbers)}" if numbers else "it gives none"
        raise MetricError(f"the metric has no number {key!r}: {known}.{suggestion(key, numbers)} Check --metric.")
    if not numbers:
        raise MetricError(
            f"the metric gives {str(value)[:200]}, which is no number. Return a number, or a dict of them."
        )
    name = key or next(iter(numbers))
    main = numbers.pop(name)
    return Measurement(main, numbers, None if stderr is None else abs(stderr))
