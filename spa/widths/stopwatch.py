"""Times of networks and of their parts, and where they are kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto

from spa.errors import ModelError
from spa.model.bodies import KINDS
from spa.running import openvino
from spa.running.bench import bench
from spa.running.place import Place
from spa.running.processor import cpu_name
from spa.running.runtime import ORT_ERRORS, clean_reason, load_session, to_ort


@dataclass(frozen=True)
class Timing:
    """The times of networks that took turns.

    Attributes:
        ms: by network the milliseconds that a tenth of the runs stay below: what others do beside it hardly counts.
        inputs: the shapes that the first was fed.
        spread: by how much nine tenths of the first's runs differ at most, as a factor; above 2 the machine is busy.
    """

    ms: tuple[float, ...]
    inputs: Mapping[str, tuple[int, ...]]
    spread: float


@dataclass
class Stopwatch:
    """A timer of operators and networks.

    Attributes:
        threads: of onnxruntime.
        batch: the size of open batch axes.
        sizes: of other open axes (see :func:`spa.running.bench.bench`).
        seconds: for timing a network.
        part_seconds: for timing a part.
        fewest: runs of a part that are timed at least.
        warmup: runs of a part before those.
        place: where they are timed; a command times whole networks alone, and parts are timed in its runtime here.
    """

    threads: int = 2
    batch: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 2.0
    part_seconds: float = 0.03
    fewest: int = 8
    warmup: int = 3
    place: Place = field(default_factory=Place)

    @property
    def context(self) -> str:
        """The conditions that the times of operators depend on: runtime, processor and threads."""
        return f"{self.place.engine}, {cpu_name()}, {self.threads} threads"

    @property
    def measures(self) -> bool:
        """Return whether whole networks are measured, and not only estimated from their parts."""
        return True

    @property
    def label(self) -> str:
        """Return what times whole networks, for reports."""
        return self.place.label

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know of its times."""
        return ()

    def known(self) -> Cache:
        """Return the times of parts that are known already."""
        return Cache(cache_file())

    def inputs(self, model: ModelProto) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes that a network is fed.

        Raises:
            ModelError: onnxruntime cannot run it.
        """
        found = bench(
            [model],
            runs=1,
            warmup=0,
            threads=self.threads,
            batch=self.batch,
            sizes=self.sizes,
            isolate_memory=False,
        )
        return found.inputs[0]

    def networks(self, models: Sequence[ModelProto]) -> Timing:
        """Time models that take turns.

        Raises:
            ModelError: the runtime cannot run one.
            MetricError: a command fails.
        """
        found = bench(
            models,
            seconds=self.seconds,
            threads=self.threads,
            batch=self.batch,
            sizes=self.sizes,
            isolate_memory=False,
            place=self.place,
        )
        first = found.models[0]
        return Timing(tuple(m.p10_ms for m in found.models), found.inputs[0], first.p90_ms / first.p10_ms)

    def part(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        """Time a part: return the milliseconds of its operators that a tenth of the runs stay below.

        They come from the runtime's own profile. Conversions to and from its blocked layout are left out: inside a
        network there are none between parts. So are loops and branches, whose operators have times of their own. With
        providers other than the CPU's it is the time of whole runs.

        Raises:
            ModelError: the runtime cannot run it.
        """
        if not self.place.is_cpu:
            return self._part_elsewhere(model, feeds)
        with tempfile.TemporaryDirectory(prefix="spa-latency-") as folder:
            session = load_session(
                model, threads=self.threads, optimise=True, profiling=os.path.join(folder, "profile"), name="a part"
            )
            runs, end = 0, time.perf_counter() + self.part_seconds
            try:
                values = to_ort(session, feeds)
                while runs < self.warmup + self.fewest or time.perf_counter() < end:
                    session.run_with_ort_values(None, values)
                    runs += 1
            except ORT_ERRORS as error:
                raise ModelError(f"onnxruntime cannot run a part: {clean_reason(error)}") from error
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        totals = [0.0]
        for event in events:
            if event["name"] == "model_run":
                totals.append(0.0)
            elif event["name"].endswith("_kernel_time") and not event["args"]["op_name"].startswith(_UNCOUNTED):
                totals[-1] += event["dur"] / 1000
        return float(np.percentile(totals[self.warmup : runs], 10))

    def _part_elsewhere(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        """Time a part in OpenVINO by its profile, or by the clock."""
        in_openvino = self.place.runtime == "openvino"
        if in_openvino:
            run_once = openvino.step(model, feeds, self.threads, "a part", profiled=True)
        else:
            run_once = self.place.step(model, feeds, self.threads, "a part")
        times: list[float] = []
        end = time.perf_counter() + self.part_seconds
        while len(times) < self.warmup + self.fewest or time.perf_counter() < end:
            start = time.perf_counter()
            request = run_once()
            ms = 1000 * (time.perf_counter() - start)
            times.append(openvino.operator_milliseconds(request) if in_openvino else ms)
        return float(np.percentile(times[self.warmup :], 10))


_UNCOUNTED = ("Reorder", *KINDS)


def cache_file() -> Path:
    """Return where times are kept from one run to the next: in the user's folder for caches."""
    from platformdirs import user_cache_path

    return user_cache_path("spa", appauthor=False, opinion=False) / "latency.json"


class Cache:
    """Milliseconds by key, in a file; a file that cannot be read counts as empty, one that cannot be written is let be.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._new: dict[str, float] = {}

    def _read(self) -> dict[str, float]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        valid = isinstance(known, dict) and all(type(v) is float and 0 <= v < math.inf for v in known.values())
        return known if valid else {}

    def __len__(self) -> int:
        return len(self._known | self._new)

    def get(self, key: str) -> float | None:
        """Return the time stored under a key, or None."""
        return self._new.get(key, self._known.get(key))

    def put(self, key: str, ms: float) -> None:
        """Remember a time."""
        self._new[key] = float(ms)

    def save(self) -> None:
        """Write the file in one step, with what others have written since it was read."""
        if not self._new:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(self._read() | self._new, file)
                os.replace(partial, self._path)
            except OSError:
                os.unlink(partial)
