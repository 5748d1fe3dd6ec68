"""The place where models are timed: a runtime of this machine with its providers, or a command of the user's."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from spa.errors import MetricError, ModelError, OptionError, UnsupportedError, suggestion
from spa.model.files import place
from spa.model.writing import draft_folder
from spa.running.commands import MODEL, Role, by_command
from spa.running.runtime import CPU, ORT_ERRORS, Model, clean_reason, load_session, to_ort

_LOG = logging.getLogger(__name__)
RUNTIMES = ("onnxruntime", "openvino")
SECONDS = 600.0  # the limit of a command
ROLE = Role("the measuring command", "Give it longer (--measure-seconds), or let it run the model less often.")
_SUFFIX = "ExecutionProvider"


@dataclass(frozen=True)
class Place:
    """The place where models are timed.

    Attributes:
        runtime: ``onnxruntime`` or ``openvino``, in this process.
        providers: onnxruntime's, by full or short name (``cuda``), the first preferred; empty for the CPU.
        command: prints the milliseconds of ``{model}``, wherever it runs it; None where this machine is meant.
        seconds: the limit of one run of the command.

    Raises:
        OptionError: they contradict each other, or there is no such runtime or provider.
    """

    runtime: str = "onnxruntime"
    providers: tuple[str, ...] = ()
    command: str | None = None
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise OptionError(
                f"unknown runtime {self.runtime!r}.{suggestion(self.runtime, RUNTIMES)} "
                f"Choose one of {', '.join(RUNTIMES)}."
            )
        if self.providers and self.runtime != "onnxruntime":
            raise OptionError(f"providers are onnxruntime's, and the runtime is {self.runtime}. Leave one of them out.")
        if self.command is not None and MODEL not in self.command:
            raise OptionError(f"the measuring command {self.command!r} has no {MODEL}. Put it where the path belongs.")
        if not 0 < self.seconds < math.inf:
            raise OptionError(f"latency_seconds is {self.seconds:g}. Give a number above 0.")
        object.__setattr__(self, "providers", tuple(map(_full_name, self.providers)))

    @property
    def is_cpu(self) -> bool:
        """Return whether onnxruntime runs operators on the CPU, whose times its profile gives."""
        return self.runtime == "onnxruntime" and self.providers in ((), (CPU,))

    @property
    def engine(self) -> str:
        """Return the runtime of this process, with its version and its providers."""
        if self.runtime == "openvino":
            from spa.running.openvino import version

            return f"openvino {version()}"
        name = f"onnxruntime {ort.__version__}"
        return name if self.is_cpu else f"{name} ({', '.join(self.providers)})"

    @property
    def label(self) -> str:
        """Return what times whole networks, for reports."""
        return self.engine if self.command is None else repr(self.command)

    def check(self) -> None:
        """Refuse a runtime or provider that is not there.

        Raises:
            UnsupportedError: it is not.
        """
        if self.runtime == "openvino":
            from spa.running.openvino import version

            version()
        there = ort.get_available_providers()
        missing = [name for name in self.providers if name not in there]
        if missing:
            raise UnsupportedError(
                f"onnxruntime {ort.__version__} has no {missing[0]} here, but {', '.join(there)}. "
                "Install the build of onnxruntime that has it, or name another with --providers."
            )

    def step(self, model: Model, feeds: Mapping[str, np.ndarray], threads: int, name: str) -> Callable[[], object]:
        """Make a function that runs a model once, with inputs that the runtime holds already.

        Raises:
            ModelError: the runtime cannot load or run the model.
        """
        if self.runtime == "openvino":
            from spa.running.openvino import step

            return step(model, feeds, threads, name)
        session = load_session(model, threads=threads, optimise=True, name=name, providers=self.providers or (CPU,))
        values = to_ort(session, feeds)

        def run_once() -> object:
            try:
                return session.run_with_ort_values(None, values)
            except ORT_ERRORS as error:
                raise ModelError(f"onnxruntime cannot run {name}: {clean_reason(error)}") from error

        return run_once

    def milliseconds(self, model: Model, name: str) -> float:
        """Run the command on a model, and return what it prints.

        Args:
            model: a path, the bytes of a file, or a parsed model that holds its weights.
            name: what messages call it.

        Raises:
            MetricError: it fails, takes too long, or prints no positive number.
        """
        assert self.command is not None  # who asks has seen it
        with draft_folder(Path(tempfile.gettempdir())) as folder:
            file = folder / "model.onnx"
            if isinstance(model, ModelProto):
                place(model, file, None)
            elif isinstance(model, bytes):
                file.write_bytes(model)
            else:
                file = Path(model)
            value = by_command(self.command, file, self.seconds, ROLE)
        ms = value if isinstance(value, int | float) else next(iter(value.values()), None)
        if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 < ms < math.inf:
            raise MetricError(f"{ROLE.name} {self.command!r} gives {ms!r} for {name}. Print its milliseconds, above 0.")
        return float(ms)

    def rounds(self, named: Sequence[tuple[Model, str]], seconds: float, runs: int | None) -> np.ndarray:
        """Let the command measure models in turns, each at least once.

        Args:
            named: the models, and what messages call them.
            seconds: for each, after which no round begins.
            runs: rounds in place of that, or None.

        Returns:
            Milliseconds, ``[model, round]``.

        Raises:
            MetricError: it fails in the first round; the message says what was measured before. Where it fails later,
                the rounds before count, and a warning is logged.
        """
        end = time.perf_counter() + seconds * len(named)
        found: list[list[float]] = []
        while not found or (time.perf_counter() < end if runs is None else len(found) < runs):
            found.append([])
            for model, name in named:
                try:
                    found[-1].append(self.milliseconds(model, name))
                except MetricError as error:
                    if len(found) == 1:
                        raise MetricError(f"{error}{_before(found[0], named)}") from error
                    _LOG.warning("%d rounds count, as then %s", len(found) - 1, error)
                    return np.array(found[:-1]).T
        return np.array(found).T


def _before(found: Sequence[float], named: Sequence[tuple[Model, str]]) -> str:
    """Return what was measured before a failure, as the end of its message."""
    lines = [f"\n  {name}: {ms:g} ms" for ms, (_, name) in zip(found, named, strict=False)]
    return f"\nMeasured before:{''.join(lines)}" if lines else ""


def _full_name(name: str) -> str:
    """Return a provider's full name.

    Raises:
        OptionError: onnxruntime knows none of the name.

    >>> _full_name("cpu"), _full_name("CUDAExecutionProvider")
    ('CPUExecutionProvider', 'CUDAExecutionProvider')
    """
    known = {p.removesuffix(_SUFFIX).lower(): p for p in ort.get_all_providers()}
    short = name.removesuffix(_SUFFIX).lower()
    if short not in known:
        raise OptionError(
            f"onnxruntime has no provider {name!r}.{suggestion(short, known)} Choose among {', '.join(sorted(known))}."
        )
    return known[short]
