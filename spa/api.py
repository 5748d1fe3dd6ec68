"""The public functions: analyse and prune."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto

from spa import criteria, surgery
from spa.budget import Budget, Choice, choose
from spa.cost import Cost, CostModel, count_parameters, group_shares
from spa.coupling import Analysis, Group, couple
from spa.errors import ModelError, PlanError
from spa.graph import Graph
from spa.io import Source, load
from spa.plan import Plan, make_plan
from spa.report import GroupReport, Report

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from spa.calibration.data import Calibration
    from spa.latency import LatencyModel
    from spa.obspa.pipeline import Calibrated

OBSPA = "obspa"
RECONSTRUCTIONS = ("auto", "full", "bias", "none")
BY_DEFAULT = {OBSPA: "full", "flap": "bias"}  # what auto is, by criterion
WITHOUT_RUNS = "Criteria that look at the weights alone (l2, say) need no run."
Progress = Callable[[str, float], None]


def silent(stage: str, share: float) -> None:
    """No progress display."""


@dataclass(frozen=True)
class Result:
    """A pruned model and how it came about.

    Attributes:
        model: the pruned model.
        plan: which channels were kept.
        report: what it cost and what was left alone.
        analysis: the dense model's groups.
        source: where the dense model came from.
    """

    model: ModelProto
    plan: Plan
    report: Report
    analysis: Analysis
    source: Source

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Check the pruned model and write it; nothing is left behind on failure.

        Args:
            path: the ``.onnx`` file to write.
            force: allow overwriting the dense model's own file.

        Raises:
            SpaError: the model failed its checks, or the file cannot be written.
        """
        from spa.exporters.onnx import write

        external = any(t.data_location == TensorProto.EXTERNAL for t in self.source.model.graph.initializer)
        write(self.model, path, base=self.source.base, source=self.source.path, force=force, external=external)

    def to_graphsurgeon(self) -> gs.Graph:
        """The pruned model as an onnx-graphsurgeon graph."""
        import onnx_graphsurgeon as gs

        return gs.import_onnx(self.model)


def analyze(model: Any) -> Analysis:
    """Find the groups of coupled channels of a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``.

    Raises:
        ModelError: the model is malformed.
        UnsupportedError: its opset is out of range.
    """
    source = load(model)
    return couple(Graph(source.model, source.base))


def prune(
    model: Any,
    *,
    ratio: float | None = None,
    of: str = "macs",
    latency_ms: float | None = None,
    ranking: str = "global",
    criterion: str = "obspa",
    data: Any = None,
    samples: int = 512,
    labels: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reconstruct: str | bool | None = None,
    norm: str = "mean",
    agg: str = "mean",
    ignore: Sequence[str] = (),
    round_to: int = 8,
    min_width: int = 1,
    cross_norm: bool = False,
    seed: int = 0,
    threads: int = 2,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    progress: Progress = silent,
) -> Result:
    """Remove channels from a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``; not changed.
        ratio: the fraction to remove, between 0 and 1; 0.5 by default.
        of: of what: ``macs``, ``params``, ``channels`` or ``latency``, in onnxruntime on this machine.
        latency_ms: the latency that the pruned network shall have, in milliseconds, instead of a ratio.
        ranking: ``global``, ``uniform`` or ``isomorphic`` (see :class:`spa.budget.Budget`).
        criterion: how channels are scored: ``obspa``, by what their removal costs after all other channels have made
            up for it; one of :func:`spa.criteria.activation_names`, by the weights and what they are multiplied with;
            or one of :func:`spa.criteria.names`, by the weights alone.
        data: inputs to learn from: a file (``.npz``, ``.npy``), a folder, an iterable of feeds, or None, which makes
            them up (see :func:`spa.calibration.data.read_data`).
        samples: how many inputs to use at most.
        labels: the name of the labels in the data; they are used for nothing but the reported accuracy.
        mean: what is subtracted from images (of a folder, or made up), per channel.
        std: what they are then divided by.
        reconstruct: how what remains is made to do what went: ``full`` (or True) refits all layers, ``bias`` moves
            their means alone, ``none`` (or False) leaves them as they were; ``auto`` (or None) is ``full`` with
            ``obspa``, ``bias`` with ``flap``, else ``none``.
        norm: how scores are normalised within a parameter; ``flap`` always standardises them.
        agg: how the scores of a group's parameters are combined.
        ignore: shell patterns; groups are left alone where a parameter, a node or an operator matches.
        round_to: widths become multiples of this, which runtimes like.
        min_width: no group becomes narrower.
        cross_norm: prune groups over which a normalisation takes statistics, too (residual streams of transformers).
        seed: of everything random.
        threads: of onnxruntime and of linear algebra, while calibrating and timing.
        batch: the size of open batch axes while timing.
        sizes: of other open axes while timing (see :func:`spa.bench.bench`).
        plan: keep exactly what this plan says; the options above that choose are then ignored.
        progress: called with the stage and the share of it that is done, while calibrating.

    Returns:
        The pruned model, the plan and a report.

    Raises:
        ModelError: the model is malformed.
        UnsupportedError: it is valid, but not covered.
        PlanError: nothing can be pruned, or not as much as asked for.
    """
    clock = _Clock()
    source = load(model)
    clock("load")
    analysis = couple(Graph(source.model, source.base))
    clock("analyse")
    chosen, skipped = _choose_groups(analysis, ignore, cross_norm)
    notes: tuple[str, ...] = ()
    criteria.check(criterion, norm, agg, extra=(OBSPA,))
    how = _reconstruction(reconstruct, criterion if plan is None else None)
    requested: dict[str, Any] = {"plan": True}
    if latency_ms is not None:
        of = _unit_of_milliseconds(latency_ms, ratio, of)
    budget = Budget(0.5 if ratio is None else ratio, of, ranking, round_to, min_width)
    if plan is None:
        asked = {"ratio": budget.ratio} if latency_ms is None else {"latency_ms": latency_ms}
        requested = {**asked, "of": of, "ranking": ranking, "criterion": criterion, "round_to": round_to}
        requested |= {"norm": norm, "agg": agg, "ignore": list(ignore), "min_width": min_width}
        requested |= {"cross_norm": cross_norm, "seed": seed}
        if not chosen:
            raise PlanError(_nothing(analysis, skipped))
    else:
        chosen, skipped = list(analysis.prunable), []
    calibrated = given = dense_accuracy = None
    if how != "none" or (plan is None and criterion in (OBSPA, *criteria.activation_names())):
        requested |= {"reconstruct": how}
        given = _inputs(analysis.graph, data, labels, samples, seed, mean, std)
        notes += given.notes
        from spa.obspa.pipeline import Calibrated, accuracy

        with _running():
            if given.labels is not None:
                dense_accuracy = accuracy(source.model, source.base, given, threads)
            calibrated = Calibrated(analysis, given.batches, data is None, threads, seed, progress)
        clock("calibrate")
    losses: dict[str, float] = {}
    timed: dict[str, Any] | None = None
    if plan is None:

        def pick(budget: Budget, latency: LatencyModel | None = None) -> tuple[Choice, dict[str, float]]:
            return _choose(analysis, chosen, calibrated, criterion, norm, agg, budget, seed, latency)

        if of == "latency":
            from spa import latency

            watch = latency.Stopwatch(threads, batch, sizes or {})
            choice, losses, timed, said = latency.choose(analysis, chosen, budget, latency_ms, pick, watch, progress)
            notes += said
        else:
            choice, losses = pick(budget)
            notes += choice.notes
        clock("choose")
        plan = make_plan(analysis, choice.kept)
    pruned = surgery.apply(analysis, plan)
    clock("prune")
    calibration = None
    if calibrated is not None and given is not None:
        calibration = {"source": given.source, "samples": given.samples, "before": calibrated.distortion(pruned)}
        if how != "none":
            with _running():
                calibrated.reconstruct(plan, pruned, how)
            clock("reconstruct")
        calibration["after"] = calibrated.distortion(pruned)
        if given.labels is not None:
            calibration["accuracy"] = [dense_accuracy, accuracy(pruned, source.base, given, threads)]
        clock("measure")
    report = _report(analysis, chosen, skipped, plan, pruned, source, requested, notes, clock.seconds)
    report = replace(
        report,
        calibration=calibration,
        latency=timed,
        reached=report.reached if timed is None else 1 - timed["measured"] / timed["dense"],
        groups=tuple(replace(g, loss=losses.get(g.name)) for g in report.groups),
    )
    return Result(pruned, plan, report, analysis, source)


def _unit_of_milliseconds(latency_ms: float, ratio: float | None, of: str) -> str:
    """The budget's unit where a latency is asked for, which nothing else must contradict."""
    if ratio is not None:
        raise PlanError(f"both ratio {ratio:g} and a latency of {latency_ms:g} ms are asked for. Choose one.")
    if of not in ("macs", "latency"):  # macs is the default
        raise PlanError(f"a latency of {latency_ms:g} ms is no budget of {of}. Leave one of the two out.")
    if not 0 < latency_ms < float("inf"):
        raise PlanError(f"latency_ms is {latency_ms:g}, the milliseconds to arrive at. Choose more than 0.")
    return "latency"


def _reconstruction(given: str | bool | None, criterion: str | None) -> str:
    """Which reconstruction is meant, ``full``, ``bias`` or ``none``; no criterion stands for a given plan."""
    how = given if isinstance(given, str) else {None: "auto", True: "full", False: "none"}.get(given, "unknown")
    if how not in RECONSTRUCTIONS:
        raise PlanError(f"unknown reconstruction {given!r}. Choose one of {', '.join(RECONSTRUCTIONS)}.")
    return BY_DEFAULT.get(criterion or "", "none") if how == "auto" else how


@contextmanager
def _running() -> Iterator[None]:
    """Say, with each refusal of a model that does not run, what needs no run."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error} {WITHOUT_RUNS}") from error


def _inputs(
    graph: Graph,
    data: Any,
    labels: str | None,
    samples: int,
    seed: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Calibration:
    """Calibration inputs, given or made up."""
    from spa.calibration.data import Calibration, read_data
    from spa.calibration.synthetic import synthesise

    if samples < 1:
        raise PlanError(f"samples is {samples}. Choose 1 or more.")
    if data is not None:
        return read_data(data, graph.model, labels=labels, samples=samples, seed=seed, mean=mean, std=std)
    with _running():
        batches = synthesise(graph.self_contained(), samples, seed=seed, mean=mean, std=std)
    count = sum(next((len(a) for a in b.values() if a.ndim), 1) for b in batches)
    return Calibration(batches, None, count, "synthetic", ())


def _choose(
    analysis: Analysis,
    groups: Sequence[Group],
    calibrated: Calibrated | None,
    criterion: str,
    norm: str,
    agg: str,
    budget: Budget,
    seed: int,
    latency: LatencyModel | None = None,
) -> tuple[Choice, dict[str, float]]:
    """The channels to keep, and the estimated loss of each group where there is an estimate."""
    if calibrated is not None and criterion in criteria.activation_names():
        with _running():
            scores = calibrated.scores(groups, criterion, norm, agg)
        return choose(analysis, groups, scores, budget), {}
    if calibrated is None or criterion != OBSPA:
        scores = criteria.score(analysis, groups, criterion, norm, agg, seed)
        return choose(analysis, groups, scores, budget, latency), {}
    from spa.obspa.allocate import allocate

    with _running():
        curves = calibrated.curves(groups)
    if budget.ranking == "global":
        choice = allocate(analysis, groups, curves, budget, latency)
    else:
        scores = {}
        for name, curve in curves.items():
            scores[name] = np.empty(curve.order.size)
            scores[name][curve.order] = np.diff(curve.loss)
        choice = choose(analysis, groups, scores, budget, latency)
    gone = {g.name: g.size - len(choice.kept.get(g.name, range(g.size))) for g in groups}
    return choice, {n: float(c.loss[gone[n]]) for n, c in curves.items()}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 4)
        self._last = now


def _choose_groups(
    analysis: Analysis, ignore: Sequence[str], cross_norm: bool
) -> tuple[list[Group], list[tuple[str, int, str]]]:
    chosen: list[Group] = []
    skipped: list[tuple[str, int, str]] = []
    for group in analysis.prunable:
        pattern = _ignored(analysis, group, ignore)
        if pattern is not None:
            skipped.append((group.name, group.size, f"ignored by {pattern!r}"))
        elif group.crossings and not cross_norm:
            skipped.append((group.name, group.size, f"statistics are taken over it by {group.crossings[0]}"))
        else:
            chosen.append(group)
    return chosen, skipped


def _ignored(analysis: Analysis, group: Group, patterns: Sequence[str]) -> str | None:
    """The first pattern that matches the group's name, parameters, readers or writers (node name or operator)."""
    if not patterns:
        return None
    nodes = [analysis.graph.nodes[i] for i in (*group.readers, *group.writers)]
    names = {group.name, *(p.tensor for p in group.places)}
    names |= {n.proto.name for n in nodes} | {n.key for n in nodes}
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names if name)), None)


def _nothing(analysis: Analysis, skipped: Sequence[tuple[str, int, str]]) -> str:
    if skipped:
        name, _, reason = skipped[0]
        return f"no group can be pruned under this request: {name!r}: {reason}. Change --ignore or allow --cross-norm."
    if analysis.barriers:
        operator, reason = next(iter(analysis.barriers.items()))
        what = f"{operator}: {reason}. Give it a rule; 'spa inspect' shows more."
        return f"the model has no group that can be pruned: {what}"
    why = next((f": {g.name!r} is frozen by {g.frozen}" for g in analysis.groups if g.frozen), "")
    return f"the model has no group that can be pruned{why}. 'spa inspect' lists them all."


def _report(
    analysis: Analysis,
    chosen: Sequence[Group],
    skipped: Sequence[tuple[str, int, str]],
    plan: Plan,
    pruned: ModelProto,
    source: Source,
    requested: dict[str, Any],
    notes: tuple[str, ...],
    seconds: dict[str, float],
) -> Report:
    costs = CostModel(analysis, [g.dim for g in chosen])
    widths = [len(plan.kept.get(g.name, range(g.size))) for g in chosen]
    before, after = costs.evaluate(costs.sizes), costs.evaluate(widths)
    before = Cost(*_stored(analysis.graph, before))
    after = Cost(*_stored(Graph(pruned, source.base), after))
    unit = requested.get("of", "macs")
    dense = getattr(before, unit, 0)  # a latency is measured, not counted
    shares = group_shares(analysis)
    return Report(
        before,
        after,
        requested,
        1 - getattr(after, unit) / dense if dense else 0.0,
        tuple(
            GroupReport(g.name, g.size, w, *shares[g.name], g.crossings) for g, w in zip(chosen, widths, strict=True)
        ),
        tuple((g.name, g.size, g.frozen) for g in analysis.groups if g.frozen is not None and g.size > 1),
        tuple(skipped),
        tuple(analysis.barriers.items()),
        notes,
        seconds,
    )


def _stored(graph: Graph, cost: Cost) -> tuple[int, int, int, int]:
    params, size = count_parameters(graph)
    return params, cost.macs, size, cost.channels
