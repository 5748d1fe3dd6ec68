"""Sweeps: one calibration and one scoring, then a network for each of many budgets, as files and as a table.

Each network is byte for byte the one that a single :func:`spa.prune` makes of the same options; unless another repair
is asked for, where that would take ``full`` a sweep takes ``quick``. Networks are repaired side by side, beside one run
of the dense one. A sweep that was interrupted goes on where it was: a point is done when its report is there, which is
written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx

from spa import criteria
from spa._version import __version__
from spa.api import Result, opened, report_of
from spa.coupling.analysis import Analysis, couple
from spa.errors import MetricError, ModelError, OptionError, PlanError, SpaError
from spa.frameworks.kinds import equal_by_default
from spa.goals import attain, attain_together, evaluated, side_by_side
from spa.job import Job, Outcome, for_workers, prepare
from spa.model.alternatives import reunited
from spa.model.diagnosis import diagnosed
from spa.model.graph import Graph
from spa.model.io import Source
from spa.model.writing import check_target, text_draft
from spa.progress import Clock, Progress, silent
from spa.report.command import command_line
from spa.report.comparison import Point, Sweep
from spa.report.environment import environment
from spa.request import Request
from spa.request.option import plain
from spa.running.tasks import PREFIX
from spa.steering import pareto
from spa.steering.fingerprint import content_of
from spa.steering.grid import SWEPT, Spec, specs

TABLE, SHEET, PAGE = "sweep.json", "sweep.csv", "index.html"
SECONDS = 0.25  # of timing each network
LOCK = "sweep.lock"  # held while a sweep is at work
TOGETHER, TOGETHER_BYTES = 8, 1 << 29  # networks that are repaired side by side at most, and the bytes of their weights


def sweep(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    request: Request | None = None,
    convert_options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Sweep:
    """Prune a model to many budgets, with one calibration and one scoring, and compare the networks.

    Args:
        model: as in :func:`spa.prune`.
        folder: where the files go: for each point ``NAME.onnx`` and its report ``NAME.json``; ``sweep.json`` and
            ``sweep.csv``. A folder with an unfinished sweep of the same request goes on; another one is refused.
        request: what to do; the options below change it.
        convert_options: for a framework's model, ``example_inputs`` and the options of :func:`spa.convert`.
        progress: called with the stage and the share of it that is done.
        **options: those of :func:`spa.prune`; ``ratio``, ``latency_ms``, ``criterion`` and ``round_to`` may be lists,
            and numbers also text: ``0.1:0.7:0.1``.

    Returns:
        The points, the Pareto front and its knee.

    Raises:
        OptionError: options are wrong, or the folder holds something else, or another sweep is at work in it.
        PlanError: no point can be made.
        SpaError: as :func:`spa.prune`.

    >>> import spa, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = spa.sweep("models/digits_vgg.onnx", folder, ratio=[0.2, 0.4], criterion="l2", samples=16)
    >>> [point.file for point in found.points]
    ['l2-macs-0.2-by8.onnx', 'l2-macs-0.4-by8.onnx']
    """
    base, wanted = _wanted(request, options)
    base.execution.workers.check()
    conversion = dict(convert_options or {})
    source, framework_model = opened(model, conversion.pop("example_inputs", None), conversion, Clock())
    store = _Store.open(Path(folder), source, base, None if isinstance(model, onnx.ModelProto) else model)
    with store.locked(), diagnosed(source):
        analysis = couple(Graph(source.model, source.base), base.timing.sizes)
        equal = () if framework_model is None else equal_by_default(framework_model.kind, framework_model.source)
        runner = _Runner(analysis, base, equal, progress, store.folder)

        def finish(spec: Spec, job: Job, outcome: Outcome | SpaError) -> None:
            if isinstance(outcome, SpaError):
                store.refuse(spec, outcome)
                return
            outcome = evaluated(job, outcome)
            report = report_of(job, outcome, source, framework_model)
            store.keep(
                spec,
                Result(reunited(outcome.model), outcome.plan, report, job.request, analysis, source, framework_model),
            )

        runner.run([spec for spec in wanted if not store.has(spec)], finish)
        return store.finish(wanted, runner, base)


def _wanted(request: Request | None, options: dict[str, Any]) -> tuple[Request, list[Spec]]:
    """Return what all points share, and the points.

    Raises:
        OptionError: options are wrong.
    """
    swept = {name: options.pop(name) for name in SWEPT if name in options}
    base = Request.of(request, **options)
    if base.goal.kind in ("metric", "distortion", "plan", "auto"):
        raise OptionError("a sweep goes through ratios or latencies. Leave the other goal out, or use prune.")
    if base.goal.of == "latency" and swept.get("latency_ms") is not None:
        raise OptionError("ratios of latency and milliseconds are asked for together. Leave one of the two out.")
    return base, specs(base.goal.of, _with_base(swept, base))


def _with_base(swept: Mapping[str, Any], base: Request) -> dict[str, Any]:
    """Return the values of the swept options, those of the request where they are not given."""
    given = {
        "ratio": base.goal.ratio,
        "latency_ms": base.goal.latency_ms,
        "criterion": plain(base.scoring.criterion),
        "round_to": base.constraints.round_to,
    }
    if any(swept.get(name) is not None for name in ("ratio", "latency_ms")):
        given |= {"ratio": None, "latency_ms": None}
    return given | {name: value for name, value in swept.items() if value is not None}


# -- making ----------------------------------------------------------------------------------------------------------


class _Runner:
    """The making of a sweep's points from one calibration, and one scoring for each criterion.

    Args:
        analysis: the dense model.
        base: what all points share.
        equal: what keeps one fraction where the request does not say.
        progress: called with the stage and the share of it that is done.
        folder: of the sweep.
    """

    def __init__(
        self, analysis: Analysis, base: Request, equal: tuple[str, ...], progress: Progress, folder: Path
    ) -> None:
        self.analysis, self.base, self.equal, self.progress = analysis, base, equal, progress
        self.workers = base.execution.workers
        if self.workers.folder is None:  # that of the sweep is one that all machines see
            self.workers = replace(self.workers, folder=folder)
        self._first: Job | None = None
        self._scored: dict[str, Job] = {}

    def prepared(self, spec: Spec) -> Job:
        """Return a job for a point, calibrated and scored.

        Raises:
            PlanError: the point cannot be made.
        """
        request = Request.of(self.base, **spec.options)
        if request.repair.reconstruct == "auto" and criteria.get(request.scoring.criterion).reconstruct == "full":
            request = Request.of(request, reconstruct="quick")
        job = prepare(self.analysis, request, equal=self.equal, progress=self.progress)
        if self._first is None:
            self._first = self._calibrated(job)
        scored = self._scored.get(spec.criterion)
        job.adopt(scored or self._first, answer=scored is not None)
        if scored is None:
            _ = job.answer
            self._scored[spec.criterion] = job
        job.clock = Clock()
        return job

    def _calibrated(self, job: Job) -> Job:
        """Evaluate the dense model and calibrate once, also for criteria of weights: changes are measured."""
        job.start_metric()
        try:
            job.calibrate()
        except ModelError:
            if job.needs_inputs:
                raise
        if job.calibrated is not None:
            job.calibrated.workers = self.workers
        return job

    def run(self, wanted: Sequence[Spec], finish: Callable[[Spec, Job, Outcome | SpaError], None]) -> None:
        """Make points, and hand each over as soon as it is there; one that cannot be made is handed over as the error.

        Times are measured alone: points that need them come first, one after the other.
        """
        waiting: list[tuple[Spec, Job]] = []
        for spec in sorted(wanted, key=lambda s: not s.is_timed):
            try:
                job = self.prepared(spec)
            except PlanError as error:
                if not self._scored:
                    raise
                finish(spec, self._scored[next(iter(self._scored))], error)
                continue
            if spec.is_timed or (self.workers.alone and not side_by_side(job)):
                self.progress("sweep", len(waiting) / len(wanted))
                finish(spec, job, _attained([job])[0])
            else:
                waiting.append((spec, job))
        done = 0
        for numbers, outcomes in self._made(self._shared_out([job for _, job in waiting]), waiting):
            for number, outcome in zip(numbers, outcomes, strict=True):
                finish(*waiting[number], outcome)
                done += 1
                self.progress("sweep", done / len(waiting))

    def _shared_out(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Return the numbers of jobs that are repaired side by side, at least as many sets as there are workers.

        Networks of a set are in memory together. Sets mix large and small networks, so that they take about as long;
        of full repairs, in which the dense network's run is little, each worker gets two.
        """
        weights = sum(t.ByteSize() for t in self.analysis.graph.model.graph.initializer)
        most = max(1, min(TOGETHER, TOGETHER_BYTES // max(weights, 1)))
        workers = 1 if self.workers.alone else self.workers.count()
        sets: list[list[int]] = []
        for repair in dict.fromkeys(job.reconstruct for job in jobs):
            numbers = [i for i, job in enumerate(jobs) if job.reconstruct == repair]
            if not all(side_by_side(jobs[i]) for i in numbers):
                sets += [[i] for i in numbers]
                continue
            least = workers * (2 if repair == "full" and workers > 1 else 1)
            count = min(max(-(-len(numbers) // most), least), len(numbers))
            sets += [numbers[i::count] for i in range(count)]
        return sets

    def _made(
        self, sets: Sequence[list[int]], waiting: Sequence[tuple[Spec, Job]]
    ) -> Iterator[tuple[list[int], list[Outcome | SpaError]]]:
        """Attain the goals of jobs, by the workers; yield each set as it comes."""
        together = [[waiting[i][1] for i in numbers] for numbers in sets]
        if self.workers.alone or not sets:
            yield from ((numbers, _attained(jobs)) for numbers, jobs in zip(sets, together, strict=True))
            return
        bare = for_workers([job for _, job in waiting])
        for which, (outcomes, clocks) in self.workers.each(_attained_apart, bare, sets, self.base.timing.threads):
            for job, seconds in zip(together[which], clocks, strict=True):
                job.clock.seconds |= seconds
            yield sets[which], outcomes


def _attained_apart(
    jobs: Sequence[Job], numbers: Sequence[int]
) -> tuple[list[Outcome | SpaError], list[dict[str, float]]]:
    """Attain the goals of some of the jobs in another process; return the seconds of each, too."""
    some = [jobs[number] for number in numbers]
    return _attained(some), [job.clock.seconds for job in some]


def _attained(jobs: Sequence[Job]) -> list[Outcome | SpaError]:
    """Attain the goals of jobs without their metrics; return the error where one is out of reach."""
    meters = [job.meter for job in jobs]
    for job in jobs:
        job.meter = None
    try:
        if side_by_side(jobs[0]):
            return attain_together(jobs)
        return [attain(job) for job in jobs]
    except (MetricError, PlanError) as error:  # of a measuring command: the other points stand
        return [error]
    finally:
        for job, meter in zip(jobs, meters, strict=True):
            job.meter = meter


# -- keeping ---------------------------------------------------------------------------------------------------------


class _Store:
    """A folder with the files of a sweep.

    Args:
        folder: it exists.
        source: the dense model.
        model: what it is called.
        fingerprint: tells this sweep from others; None where nothing does.
    """

    def __init__(self, folder: Path, source: Source, model: str, fingerprint: str | None) -> None:
        self.folder, self.source, self.model, self.fingerprint = folder, source, model, fingerprint
        self._refused: dict[str, str] = {}

    @staticmethod
    def open(folder: Path, source: Source, base: Request, model: Any) -> _Store:
        """Open a folder for a sweep; make it where it is not there.

        Raises:
            OptionError: it holds something else.
            SpaError: it cannot be made.
        """
        name = os.fspath(model) if isinstance(model, str | os.PathLike) else source.model.graph.name or "the model"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise SpaError(
                f"cannot make the folder {str(folder)!r}: {error.strerror}. Choose another place."
            ) from error
        if not (folder / TABLE).exists() and any(p.name != LOCK for p in folder.iterdir()):
            raise OptionError(f"{str(folder)!r} is not empty and holds no sweep. Choose another folder.")
        check_target(folder / TABLE)
        return _Store(folder, source, str(name), _fingerprint(source, base))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out of the folder, and see that what it holds is of this one.

        Raises:
            OptionError: another sweep is at work in it, or made what it holds.
        """
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.folder / LOCK, timeout=0):
                self._begin()
                yield
        except Timeout as error:
            raise OptionError(
                f"another sweep is at work in {str(self.folder)!r}. Wait for it, or choose another folder."
            ) from error

    def _begin(self) -> None:
        """Put the fingerprint into the folder, or compare it with the one that is there."""
        for left in self.folder.glob(f"{PREFIX}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        table = self.folder / TABLE
        if not table.exists():
            self._write(TABLE, json.dumps({"fingerprint": self.fingerprint}))
        elif self.fingerprint is None:
            raise OptionError(
                f"{str(self.folder)!r} holds a sweep, and whether it had the same inputs cannot be told of a Python "
                "object. Choose another folder, or give a file or arrays."
            )
        elif _read(table).get("fingerprint") != self.fingerprint:
            raise OptionError(
                f"{str(self.folder)!r} holds the sweep of another model, of other options or inputs or of another "
                "version. Choose another folder, or remove it."
            )

    def has(self, spec: Spec) -> bool:
        """Return whether a point is done."""
        return (self.folder / f"{spec.name}.json").exists() and (self.folder / f"{spec.name}.onnx").exists()

    def keep(self, spec: Spec, result: Result) -> None:
        """Write a network, then its report."""
        result.save(self.folder / f"{spec.name}.onnx")
        self._write(f"{spec.name}.json", json.dumps(result.report.to_dict(), indent=1, default=str))

    def refuse(self, spec: Spec, error: SpaError) -> None:
        """Remember why a point has no network."""
        self._refused[spec.name] = str(error)

    def finish(self, wanted: Sequence[Spec], runner: _Runner, base: Request) -> Sweep:
        """Time the networks, find the front, and write the tables.

        Raises:
            PlanError: no point could be made.
        """
        points = [self._point(spec) for spec in wanted]
        if all(p.refused for p in points):
            raise PlanError(f"no point could be made; the first: {points[0].refused}")
        reports = [_read(self.folder / f"{p.name}.json") for p in points if not p.refused]
        from spa.report.html import sweep_page

        runner.progress("time", 0.0)
        dense_ms, points = self._timed(points, runner.analysis, base)
        found = _compared(self, points, reports[0], dense_ms, base)
        found = replace(found, again=self._again(found))
        self._write(SHEET, found.to_csv())
        self._write(PAGE, sweep_page(found, self._command(wanted, base)))
        content = found.to_dict() | {"fingerprint": self.fingerprint}
        self._write(TABLE, json.dumps(content, indent=1))
        return found

    def _again(self, found: Sweep) -> str | None:
        """Return the command that makes the recommended network with the full repair, where it had a quicker one."""
        if not any(p.name == found.knee and p.repair == "quick" for p in found.points):
            return None
        requested = _read(self.folder / f"{found.knee}.json")["requested"]
        requested["repair"]["reconstruct"] = "full"
        return command_line("prune", self.model, f"{found.knee}-full.onnx", requested, {})

    def _command(self, wanted: Sequence[Spec], base: Request) -> str:
        """Return the command line of the sweep."""
        lists: dict[str, list[Any]] = {
            "--ratios": [s.ratio for s in wanted if s.ratio is not None],
            "--latencies-ms": [s.latency_ms for s in wanted if s.latency_ms is not None],
            "--criteria": [s.criterion for s in wanted],
            "--round-tos": [s.round_to for s in wanted],
        }
        further = {flag: ",".join(str(v) for v in dict.fromkeys(values)) for flag, values in lists.items() if values}
        return command_line("sweep", self.model, str(self.folder), _shared(base), further)

    def _point(self, spec: Spec) -> Point:
        point = Point(spec.name, **asdict(spec), refused=self._refused.get(spec.name))
        if point.refused:
            return point
        report = _read(self.folder / f"{spec.name}.json")
        calibration, metric = report["calibration"] or {}, report["metric"] or {}
        return replace(
            point,
            reached=report["reached"],
            macs=report["after"]["macs"],
            params=report["after"]["params"],
            bytes=report["after"]["bytes"],
            memory=report["after"]["memory"],
            change=calibration.get("after"),
            accuracy=(calibration.get("accuracy") or [None, None])[1],
            metric=metric.get("pruned"),
            drop=metric.get("drop"),
            seconds=round(sum(report["seconds"].values()), 3),
            repair=calibration.get("reconstruct"),
        )

    def _timed(self, points: Sequence[Point], analysis: Analysis, base: Request) -> tuple[float | None, list[Point]]:
        """Time all networks in turns, the dense one first; None where nothing runs them, or a table alone is known."""
        from spa.widths.stopwatch import Stopwatch

        if base.timing.latency_table is not None and base.timing.latency_command is None:
            return None, list(points)
        made = [p for p in points if p.file]
        place = base.timing.place
        watch = Stopwatch(base.timing.threads, base.timing.batch, analysis.points.chosen, SECONDS, place=place)
        models = [onnx.load(self.folder / str(p.file)) for p in made]
        try:
            dense, *ms = watch.networks([analysis.graph.self_contained(), *models]).ms
        except (MetricError, ModelError):
            return None, list(points)
        by_name = dict(zip((p.name for p in made), ms, strict=True))
        return dense, [replace(p, milliseconds=by_name.get(p.name)) for p in points]

    def _write(self, name: str, text: str) -> None:
        with text_draft(self.folder / name, text) as draft:
            draft.publish(draft.folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpaError(f"cannot read {str(path)!r} of an earlier sweep: {error}. Remove it.") from error
    return content if isinstance(content, dict) else {}


def _fingerprint(source: Source, base: Request) -> str | None:
    """Return what tells one sweep from another: the model, what all points share, the inputs, and the version."""
    inputs = [content_of(value) for value in (base.inputs.data, base.scoring.gradients, base.scoring.hessian_gradients)]
    if None in inputs:
        return None
    digest = hashlib.sha256(source.model.SerializeToString(deterministic=True))
    digest.update(json.dumps([_shared(base), inputs, __version__], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _shared(base: Request) -> dict[str, dict[str, Any]]:
    """Return the options that all points share, as plain data."""
    shared = Request.of(base, criterion="obspa", round_to=None).to_dict()
    del shared["execution"]  # of which no result depends
    shared["goal"] |= {"ratio": None, "latency_ms": None}
    return shared


def _dense(report: Mapping[str, Any], ms: float | None) -> dict[str, float | None]:
    calibration, metric = report["calibration"] or {}, report["metric"] or {}
    return {
        **{name: report["before"][name] for name in ("macs", "params", "bytes", "memory")},
        "accuracy": (calibration.get("accuracy") or [None])[0],
        "metric": metric.get("dense"),
        "milliseconds": ms,
    }


def _compared(
    store: _Store, points: Sequence[Point], report: Mapping[str, Any], ms: float | None, base: Request
) -> Sweep:
    """Mark the Pareto front, and find its knee.

    Args:
        store: where the files are.
        points: all points.
        report: of one of them, for what it says of the dense model.
        ms: the dense model's time.
        base: what all points share.
    """
    dense, metric_name = _dense(report, ms), (report["metric"] or {}).get("name")
    made = [p for p in points if not p.refused]
    timed = any(p.latency_ms is not None or p.of == "latency" for p in points)
    cost = "milliseconds" if timed and dense["milliseconds"] else base.goal.of if base.goal.of in dense else "macs"
    loss = next((n for n in ("drop", "change") if all(getattr(p, n) is not None for p in made)), None)
    names, knee = [], None
    if loss is not None:
        costs, losses = ([float(getattr(p, n)) for p in made] for n in (cost, loss))
        front = pareto.front(costs, losses)
        names = [made[i].name for i in front]
        ends = [*(costs[i] for i in front), float(dense[cost] or 0.0)], [*(losses[i] for i in front), 0.0]
        at = pareto.knee(*ends)  # the dense model is the other end
        knee = None if at is None else names[at]
    marked = tuple(replace(p, on_front=p.name in names) for p in points)
    return Sweep(
        model=store.model,
        dense=dense,
        points=marked,
        cost=cost,
        loss=loss,
        metric_name=metric_name,
        knee=knee,
        folder=str(store.folder),
        environment=environment(),
    )
