"""Latency, throughput and memory of models in onnxruntime, side by side.

Two habits make the ratios mean something. The models take turns, run by run, so that a machine that warms up
or is shared slows all of them alike. And each model's memory is measured in a process of its own, where
nothing else is.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import onnx
import onnxruntime as ort

from spa.errors import InvariantError, ModelError, PlanError
from spa.model.writing import draft_folder
from spa.running.feeds import Recipe, first_run, resolve_sizes
from spa.running.memory import peak_resident
from spa.running.place import Place
from spa.running.runtime import (
    Model,
    input_specs,
    load_graph,
    load_session,
    model_name,
    run,
)

__all__ = ["BenchReport", "ModelBench", "bench"]

# Without a number of runs, `seconds` decides, within these.
_FEWEST_RUNS, _MOST_RUNS = 10, 10_000


@dataclass(frozen=True)
class ModelBench:
    """The cost of one model.

    Attributes:
        name: its path, or the name of its graph.
        median_ms: the median latency of a run, in milliseconds.
        p10_ms: the latency that 10 % of the runs stay below, in milliseconds.
        p90_ms: the latency that 90 % of the runs stay below, in milliseconds.
        throughput: samples per second, at the median latency.
        batch: samples per run.
        file_bytes: the file, with its external data.
        peak_memory_bytes: the most resident memory that loading and running takes, beyond what the process
            had after importing onnxruntime; None where the platform does not say or it was not asked for.
        speedup: the first model's latency per sample over this one's in the same round, the median over the
            rounds: above 1 is faster. A round that a busy machine slows counts as any other.
        speedup_p10: the same from ``p10_ms``: what a busy machine adds hardly counts.
        size_ratio: this file's size over the first's: below 1 is smaller.
        memory_ratio: this model's peak memory over the first's; None if one is unknown.
    """

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    throughput: float
    batch: int
    file_bytes: int
    peak_memory_bytes: int | None
    speedup: float
    speedup_p10: float
    size_ratio: float
    memory_ratio: float | None


@dataclass(frozen=True)
class BenchReport:
    """The measurements of ``bench``.

    Attributes:
        models: one entry per model, in the order given; ratios are against the first.
        runs: timed runs of each model.
        warmup: runs of each model before those.
        threads: threads within an operator.
        seed: the seed of the inputs.
        inputs: the shapes that each model was fed, by input.
        onnxruntime: its version.
        place: what measured: a runtime with its version, or a command.
    """

    models: tuple[ModelBench, ...]
    runs: int
    warmup: int
    threads: int
    seed: int
    inputs: tuple[Mapping[str, tuple[int, ...]], ...]
    onnxruntime: str
    place: str

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain data for ``json.dumps``.

        Returns:
            A dictionary of lists, numbers and strings.
        """
        plain = asdict(self)
        plain["models"] = list(plain["models"])
        plain["inputs"] = [{name: list(shape) for name, shape in shapes.items()} for shapes in self.inputs]
        return plain


class InputOptions(TypedDict, total=False):
    """The keyword arguments of :func:`bench` that say what is fed; :class:`_Inputs` holds their defaults."""

    batch: int
    seed: int
    sizes: Mapping[str, int] | None


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The inputs to feed; see :func:`bench`."""

    batch: int = 1
    seed: int = 0
    sizes: Mapping[str, int] | None = None


def bench(
    models: Model | Sequence[Model],
    *,
    runs: int | None = None,
    seconds: float = 2.0,
    warmup: int = 3,
    threads: int = 2,
    isolate_memory: bool = True,
    place: Place | None = None,
    **inputs: Unpack[InputOptions],
) -> BenchReport:
    """Measure models as users run them: in onnxruntime on the CPU with all its graph optimisations, or elsewhere.

    Args:
        models: paths, bytes of files, or parsed models, or one of these; the first is the yardstick.
        runs: timed runs of each model. If not given, ``seconds`` decides.
        seconds: about how long to time each model, in seconds (10 to 10,000 runs).
        warmup: runs of each model that are not timed.
        threads: threads within an operator; operators run one after another.
        isolate_memory: whether to measure each model's peak memory, in a fresh process; of onnxruntime on the CPU.
        place: another runtime, other providers, or a command; onnxruntime on the CPU by default.
        **inputs: what is fed: ``batch``, the size of dynamic batch axes (1); ``seed`` of the inputs (0); ``sizes`` of
            other dynamic axes, by the axis' name or by ``input[axis]``; each must exist in a model.

    Raises:
        ModelError: a model cannot be loaded or run, or takes the process that runs it down.
        UnsupportedError: an input is of a type for which no values can be made up, or ``place`` is not there.
        MetricError: a command fails; the message says what it has measured before.
        PlanError: ``sizes`` names an axis that no model has.
    """
    options, place = _Inputs(**inputs), place or Place()
    place.check()
    named = _named(models)
    for option, value, least in (("runs", runs, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} is {value}. Give at least {least}.")
    # Memory first: a model on which onnxruntime crashes then takes down the other process, and is named.
    recipes = _recipes(named, threads, options)
    feeds = [recipe.feeds(options.seed) for recipe in recipes]
    memory: list[int | None] = [None] * len(named)
    if isolate_memory and place.is_cpu and place.command is None:
        memory = [
            _peak_memory(model, name, arrays, threads) for (model, name), arrays in zip(named, feeds, strict=True)
        ]
    if place.command is None:
        steps = [place.step(model, arrays, threads, name) for (model, name), arrays in zip(named, feeds, strict=True)]
        times = _take_turns(steps, runs=runs, seconds=seconds, warmup=warmup)
    else:
        times = place.rounds(named, seconds, runs)
    return BenchReport(
        models=_entries(named, times, [recipe.batch for recipe in recipes], memory),
        runs=times.shape[1],
        warmup=warmup,
        threads=threads,
        seed=options.seed,
        inputs=tuple({key: tuple(array.shape) for key, array in arrays.items()} for arrays in feeds),
        onnxruntime=ort.__version__,
        place=place.label,
    )


def _named(models: Model | Sequence[Model]) -> list[tuple[Model, str]]:
    """Return each model with what messages call it."""
    if isinstance(models, str | os.PathLike | bytes | onnx.ModelProto):
        models = [models]
    if not models:
        raise ValueError("models is empty. Give at least one.")
    return [(model, model_name(model, f"model {at}")) for at, model in enumerate(models, 1)]


def _entries(
    named: Sequence[tuple[Model, str]], times: np.ndarray, batches: Sequence[int], memory: Sequence[int | None]
) -> tuple[ModelBench, ...]:
    """Compare each model's figures with the first's; times are in milliseconds, ``[model, run]``."""
    medians = np.median(times, axis=1)
    least = np.percentile(times, 10, axis=1)
    files = [_file_bytes(model, name) for model, name in named]
    return tuple(
        ModelBench(
            name=name,
            median_ms=float(medians[at]),
            p10_ms=float(least[at]),
            p90_ms=float(np.percentile(times[at], 90)),
            throughput=float(1000 * batches[at] / medians[at]),
            batch=batches[at],
            file_bytes=files[at],
            peak_memory_bytes=memory[at],
            speedup=float(np.median(times[0] / times[at])) * batches[at] / batches[0],
            speedup_p10=float(least[0] / least[at]) * batches[at] / batches[0],
            size_ratio=files[at] / files[0],
            memory_ratio=_ratio(memory[at], memory[0]),
        )
        for at, (_, name) in enumerate(named)
    )


# -- latency -----------------------------------------------------------------------------------------------


def _take_turns(steps: Sequence[Callable[[], object]], *, runs: int | None, seconds: float, warmup: int) -> np.ndarray:
    """Time ``steps`` in turn, run by run.

    Args:
        steps: what to time.
        runs: how often each, or None for as often as fits.
        seconds: the time for each, if ``runs`` is None.
        warmup: rounds that are not timed.

    Returns:
        Milliseconds, ``[step, run]``.
    """
    for _ in range(warmup):
        for step in steps:
            step()
    most = _MOST_RUNS if runs is None else runs
    rounds: list[list[float]] = []
    collecting = gc.isenabled()
    gc.disable()  # As timeit does: a collection would be charged to whichever model is at work.
    try:
        end = time.perf_counter() + seconds * len(steps)
        while len(rounds) < most:
            times = []
            for step in steps:
                start = time.perf_counter()
                step()
                times.append(1000 * (time.perf_counter() - start))
            rounds.append(times)
            if runs is None and len(rounds) >= _FEWEST_RUNS and time.perf_counter() >= end:
                break
    finally:
        if collecting:
            gc.enable()
    return np.array(rounds).T


def _recipes(named: Sequence[tuple[Model, str]], threads: int, options: _Inputs) -> list[Recipe]:
    """Return inputs on which each model runs; found without optimisations, which could crash on a wrong guess."""
    recipes = []
    for (model, name), own in zip(named, _sizes_of_each(named, options.sizes or {}), strict=True):
        session = load_session(model, threads=threads, name=name)
        recipe, _ = first_run(session, model=model, seed=options.seed, batch=options.batch, sizes=own, name=name)
        recipes.append(recipe)
    return recipes


def _sizes_of_each(named: Sequence[tuple[Model, str]], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the sizes that concern each model: with several models, not every axis is in every one."""
    if not sizes:
        return [{} for _ in named]
    chosen: list[dict[str, int]] = []
    refusals: dict[str, PlanError] = {}
    for model, name in named:
        specs = input_specs(load_graph(model, name=name))
        own: dict[str, int] = {}
        for key, size in sizes.items():
            try:
                resolve_sizes(specs, sizes={key: size})
                own[key] = size
            except PlanError as error:
                refusals.setdefault(key, error)
        chosen.append(own)
    for key, refusal in refusals.items():
        if not any(key in own for own in chosen):
            raise refusal
    return chosen


# -- size and memory ---------------------------------------------------------------------------------------


def _ratio(value: int | None, first: int | None) -> float | None:
    return value / first if value is not None and first else None


def _file_bytes(model: Model, name: str) -> int:
    """Add up the bytes of a model's file and of the external files that hold its tensors."""
    if isinstance(model, bytes):
        return len(model)
    if isinstance(model, onnx.ModelProto):
        return model.ByteSize()
    path = Path(model)
    total = path.stat().st_size
    locations = {
        entry.value
        for tensor in _initializers(load_graph(path, name=name).graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return total + sum((path.parent / location).stat().st_size for location in locations)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _initializers(inner)


def _peak_memory(model: Model, name: str, feeds: Mapping[str, np.ndarray], threads: int) -> int | None:
    """Measure the peak memory, in bytes, of loading a model and running it in a fresh process."""
    with draft_folder(Path(tempfile.gettempdir())) as folder:
        path = os.path.join(folder, "model.onnx")
        if isinstance(model, bytes):
            Path(path).write_bytes(model)
        elif isinstance(model, onnx.ModelProto):
            onnx.save(model, path)
        else:
            path = os.fspath(model)
        # .npz has no bfloat16, but keeps its bits.
        arrays = [array.view(np.uint16) if array.dtype.kind == "V" else array for array in feeds.values()]
        stored = os.path.join(folder, "feeds.npz")
        np.savez(stored, *arrays)
        job = {"model": path, "name": name, "feeds": stored, "inputs": list(feeds), "threads": threads}
        # This file's package first, also where it is imported from a checkout that is not installed.
        code = (
            f"import sys; sys.path.insert(0, {os.fspath(Path(__file__).resolve().parents[1])!r}); "
            "from spa.running.bench import _measure_memory; sys.stdout.write(_measure_memory(sys.argv[1]))"
        )
        command = [sys.executable, "-c", code, json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        cause = signal.Signals(-done.returncode).name
        raise ModelError(f"onnxruntime crashes on {name} with its optimisations on ({cause}). Leave this model out.")
    if done.returncode > 0:
        raise InvariantError(f"The process that measures the memory of {name} failed: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ModelError(answer["error"])
    return None if answer["peak"] is None else int(answer["peak"])


def _measure_memory(job_json: str) -> str:
    """Load and run a model in the fresh process, and measure its peak memory.

    Args:
        job_json: the model's path and name, the feeds' file, the inputs' names in its order, and the threads.

    Returns:
        As JSON, ``peak``, the bytes beyond what the process had before (or null), or ``error``, a message.
    """
    job = json.loads(job_json)
    with np.load(job["feeds"]) as stored:
        feeds = {name: stored[f"arr_{at}"] for at, name in enumerate(job["inputs"])}
    gc.collect()
    before = _start_watching()
    try:
        session = load_session(job["model"], threads=job["threads"], optimise=True, name=job["name"])
        for _ in range(2):  # The first run plans memory, the second allocates by that plan.
            run(session, feeds, name=job["name"])
    except ModelError as error:
        return json.dumps({"error": str(error)})
    after = peak_resident()
    return json.dumps({"peak": None if before is None or after is None else max(0, after - before)})


def _start_watching() -> int | None:
    """Reset the peak where the platform allows it, and return it: the bytes above which memory counts."""
    # Linux: sets the high-water mark back to what is resident now (man 5 proc, clear_refs). Elsewhere, or
    # where it is not allowed, the mark that the imports have left is the base.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()
