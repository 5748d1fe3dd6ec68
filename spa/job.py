"""One pruning of one model: what its steps share, and the ways to arrive at a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from spa import criteria
from spa.coupling.analysis import Analysis, Group
from spa.coupling.plan import Plan, make_plan
from spa.criteria import gradient
from spa.criteria.gradient import derivatives
from spa.errors import ModelError, OutOfReachError, PlanError
from spa.extras import extra
from spa.progress import Progress, silent
from spa.surgery.apply import apply
from spa.widths.budget import Budget, Choice, choose

if TYPE_CHECKING:
    from spa.calibration.data import Calibration
    from spa.obspa.pipeline import Calibrated
    from spa.widths.latency import LatencyModel

OBSPA, GATE, ZERO = "obspa", "gate", "zero"
RECONSTRUCTIONS = ("auto", "full", "bias", "none")
BY_DEFAULT = {OBSPA: "full", "flap": "bias"}  # what auto is, by criterion
WITHOUT_RUNS = "Criteria that look at the weights alone (l2, say) need no run."
ATTEMPTS = 8  # networks that are tried to meet a tolerated distortion
NEAR = 0.9  # of the tolerated distortion, from which on an attempt is as good as any


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """What has passed since the last call belongs to this stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        self._last = now


@dataclass(frozen=True)
class Outcome:
    """A pruned model.

    Attributes:
        plan: which channels were kept.
        model: what came of it.
        losses: the estimated loss of each group where there is an estimate.
        notes: what the user should know.
        changes: the outputs' relative change ``before`` and ``after`` reconstruction, where inputs were at hand.
        latency: what was measured, where that is the budget.
    """

    plan: Plan
    model: ModelProto
    losses: Mapping[str, float]
    notes: tuple[str, ...]
    changes: Mapping[str, float | None]
    latency: Mapping[str, Any] | None = None


@dataclass
class Job:
    """One pruning of one model.

    Attributes:
        analysis: the dense model.
        groups: those that may be pruned.
        criterion: how channels are scored; norm and agg as in :func:`spa.criteria.score`.
        norm: see there.
        agg: see there.
        seed: of everything random.
        how: which reconstruction follows: ``full``, ``bias`` or ``none``.
        calibrated: the model with inputs, where they are needed.
        labels: the class of each input, where there are any.
        gradients: by initializer, where the caller has them (see :mod:`spa.criteria.gradient`).
        hessian_gradients: see there.
        clock: what stages take.
    """

    analysis: Analysis
    groups: Sequence[Group]
    criterion: str
    norm: str
    agg: str
    seed: int
    how: str
    calibrated: Calibrated | None
    labels: np.ndarray | None
    gradients: Mapping[str, Any] | None
    hessian_gradients: Mapping[str, Any] | None
    clock: Clock
    _scores: dict[str, np.ndarray] | None = field(init=False, default=None)

    def run(
        self,
        budget: Budget,
        plan: Plan | None,
        latency_ms: float | None,
        max_distortion: float | None,
        timing: tuple[int, int, Mapping[str, int]],
    ) -> Outcome:
        """Prune by a plan, by what changes nothing, by a tolerated change, or by a budget.

        Args:
            budget: what to remove; of its ratio only where nothing else says how much.
            plan: the channels to keep, if they are known.
            latency_ms: what the pruned model may take.
            max_distortion: the change of the outputs to tolerate.
            timing: threads, batch and other sizes of what is timed.
        """
        if plan is not None:
            return self.cut(plan)
        if self.criterion == ZERO:
            return self.to_zero()
        if max_distortion is not None:
            return self.to_distortion(budget, max_distortion)
        if budget.of == "latency":
            return self.to_latency(budget, latency_ms, *timing)
        return self.to_budget(budget)

    def choose(
        self, budget: Budget, latency: LatencyModel | None = None, fading: float | None = None
    ) -> tuple[Choice, dict[str, float]]:
        """The channels to keep, and the estimated loss of each group where there is an estimate."""
        if self.criterion != OBSPA or self.calibrated is None:
            if self._scores is None:
                self._scores = self._scored()
            return choose(self.analysis, self.groups, self._scores, budget, latency), {}
        from spa.widths.allocation import allocate

        with running():
            curves = self.calibrated.curves(self.groups, fading)
        if budget.ranking == "global":
            choice = allocate(self.analysis, self.groups, curves, budget, latency)
        else:
            scores = {n: c.scores() for n, c in curves.items()}
            choice = choose(self.analysis, self.groups, scores, budget, latency)
        gone = {g.name: g.size - len(choice.kept.get(g.name, range(g.size))) for g in self.groups}
        return choice, {n: float(c.loss[gone[n]]) for n, c in curves.items()}

    def _scored(self) -> dict[str, np.ndarray]:
        if self.criterion in criteria.activation_names() and self.calibrated is not None:
            with running():
                return self.calibrated.scores(self.groups, self.criterion, self.norm, self.agg)
        if self.criterion == GATE and self.calibrated is not None:
            with running():
                return self.calibrated.gates(self.groups)
        given = None
        if self.criterion in criteria.gradient_names():
            given = derivatives(self.criterion, self.gradients, self.hessian_gradients)
            given = self._differentiated() if given is None else given
        return criteria.score(
            self.analysis, self.groups, self.criterion, self.norm, self.agg, self.seed, derivatives=given
        )

    def _differentiated(self) -> dict[str, np.ndarray]:
        """What the criterion needs of the cross-entropy on the labelled inputs, by PyTorch."""
        otherwise = "Or give gradients by initializer, or use --criterion gate, which only runs the model."
        if self.calibrated is None or self.labels is None:
            raise PlanError(f"criterion {self.criterion!r} takes derivatives of a loss on labelled data. {otherwise}")
        with extra("torch"):
            import torch
        from spa.criteria.autograd import from_autograd
        from spa.exporters.pytorch import graph_module

        graph = self.analysis.graph
        module = graph_module(graph.model, graph.base)
        batches = [tuple(torch.tensor(b[n]) for n in module.input_names) for b in self.calibrated.batches]
        ends = np.cumsum([len(b[0]) for b in batches])
        labels = [torch.tensor(part) for part in np.split(self.labels.astype(np.int64), ends[:-1])]
        needs = gradient.CRITERIA[self.criterion].needs
        return from_autograd(module, batches, labels, needs=needs, names=module.keys)

    def cut(
        self,
        plan: Plan,
        losses: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
        fold: Callable[[ModelProto, Path | None], None] | None = None,
    ) -> Outcome:
        """Apply a plan, fold in what it leaves behind, and reconstruct."""
        model = apply(self.analysis, plan)
        if fold is not None:
            fold(model, self.analysis.graph.base)
        self.clock("prune")
        changes: dict[str, float | None] = {}
        if self.calibrated is not None:
            changes["before"] = changes["after"] = self.calibrated.distortion(model)
            self.clock("measure")
            if self.how != "none":
                with running():
                    self.calibrated.reconstruct(plan, model, self.how)
                self.clock("reconstruct")
                changes["after"] = self.calibrated.distortion(model)
                self.clock("measure")
        return Outcome(plan, model, losses or {}, notes, changes)

    def recovered(self, outcome: Outcome, epochs: int) -> Outcome:
        """Train the pruned model for a while towards the dense one's outputs on the same inputs, without labels.

        Raises:
            UnsupportedError: PyTorch is not installed, or an operator has no counterpart in it.
        """
        from spa.exporters.pytorch import graph_module, recover, store

        assert self.calibrated is not None  # `prune` makes inputs for it
        graph = self.analysis.graph
        student, teacher = graph_module(outcome.model, graph.base), graph_module(graph.model, graph.base)
        recover(student, teacher, self.calibrated.batches, epochs=epochs, seed=self.seed)
        model = store(student, outcome.model)
        self.clock("recover")
        changes = {**outcome.changes, "after": self.calibrated.distortion(model)}
        self.clock("measure")
        return replace(outcome, model=model, changes=changes)

    def to_zero(self) -> Outcome:
        """Remove what changes nothing, whatever the budget."""
        from spa.zero import lossless

        found = lossless(self.analysis, self.groups)
        notes = () if found.plan.removes else ("no channel is always the same or read by nobody: nothing was removed",)
        return self.cut(found.plan, notes=notes, fold=found.fold)

    def to_budget(self, budget: Budget, trials: bool = True) -> Outcome:
        """Remove what a budget asks for; of several choices that are worth a trial, what changes the outputs least."""
        fadings: tuple[float | None, ...] = (None,)
        if trials and self.calibrated is not None and (self.criterion, self.how) == (OBSPA, "full"):
            fadings = self.calibrated.fadings
        outcomes: list[Outcome] = []
        for fading in fadings:
            choice, losses = self.choose(budget, fading=fading)
            plan = make_plan(self.analysis, choice.kept)
            self.clock("choose")
            if all(plan != o.plan for o in outcomes):
                outcomes.append(self.cut(plan, losses, choice.notes))
        return min(outcomes, key=_change)

    def to_latency(
        self, budget: Budget, ms: float | None, threads: int, batch: int, sizes: Mapping[str, int]
    ) -> Outcome:
        """Remove what a budget of latency asks for, or what leaves so many milliseconds."""
        from spa.widths import latency, stopwatch

        watch = stopwatch.Stopwatch(threads, batch, sizes)
        progress = silent if self.calibrated is None else self.calibrated.progress
        choice, losses, timed, notes = latency.choose(
            self.analysis, self.groups, budget, ms, self.choose, watch, progress
        )
        self.clock("choose")
        return replace(self.cut(make_plan(self.analysis, choice.kept), losses, notes), latency=timed)

    def to_distortion(self, budget: Budget, most: float) -> Outcome:
        """Remove as much as changes the outputs by no more than a tolerated share of their variance.

        The change grows about exponentially with the ratio, so a bracket is narrowed by interpolating its logarithm,
        or halved where the same end moved twice.

        Raises:
            PlanError: even the least that can go changes the outputs more, or they are no floats.
        """
        low, high = (0.0, most / 100), (1.0, max(1.0, 10 * most))  # ratio and change: met, and not met
        best: Outcome | None = None
        refused = PlanError("nothing can go under these constraints. Lower --round-to or --min-width.")
        ratio = 0.5
        ends: list[bool] = []  # whether each attempt was met
        for _ in range(ATTEMPTS):
            try:
                outcome = self.to_budget(replace(budget, ratio=ratio), trials=False)
            except OutOfReachError as error:
                refused, high = error, (ratio, high[1])
            else:
                change = outcome.changes["after"]
                if change is None:
                    raise PlanError("the model has no float output that could be compared. Give a ratio.")
                if change <= most:
                    low = (ratio, max(change, most / 100))
                    if outcome.plan.removes:
                        best = replace(outcome, notes=())
                    if change >= NEAR * most:
                        break
                else:
                    refused, high = _too_much(outcome, ratio, budget.of, most), (ratio, change)
            if high[0] - low[0] < 0.01:
                break
            ends.append(low[0] == ratio)
            ratio = (low[0] + high[0]) / 2 if ends[-2:] in ([True] * 2, [False] * 2) else _between(low, high, most)
        if best is None:
            raise refused
        return best


def _change(outcome: Outcome) -> float:
    """The outputs' change; all are alike where it is not known."""
    return outcome.changes.get("after") or 0.0


def _too_much(outcome: Outcome, ratio: float, of: str, most: float) -> PlanError:
    return PlanError(
        f"removing {ratio:.1%} of the {of} changes the outputs by {outcome.changes['after']:.3g} of their variance, "
        f"more than {most:g}. Tolerate more, or leave sensitive layers alone with --ignore."
    )


def _between(low: tuple[float, float], high: tuple[float, float], goal: float) -> float:
    """Where a straight line in the logarithm meets the goal, kept away from the ends."""
    share = log(goal / low[1]) / max(log(high[1] / low[1]), 1e-9)
    return low[0] + float(np.clip(share, 0.15, 0.85)) * (high[0] - low[0])


def reconstruction(given: str | bool | None, criterion: str | None) -> str:
    """Which reconstruction is meant, ``full``, ``bias`` or ``none``; no criterion stands for a given plan.

    Raises:
        PlanError: it is unknown.
    """
    how = given if isinstance(given, str) else {None: "auto", True: "full", False: "none"}.get(given, "unknown")
    if how not in RECONSTRUCTIONS:
        raise PlanError(f"unknown reconstruction {given!r}. Choose one of {', '.join(RECONSTRUCTIONS)}.")
    return BY_DEFAULT.get(criterion or "", "none") if how == "auto" else how


@contextmanager
def running() -> Iterator[None]:
    """Say, with each refusal of a model that does not run, what needs no run."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error} {WITHOUT_RUNS}") from error


def calibrate(
    analysis: Analysis, given: Calibration, synthetic: bool, threads: int, seed: int, progress: Progress
) -> Calibrated:
    """The model with its inputs."""
    from spa.obspa.pipeline import Calibrated

    with running():
        return Calibrated(analysis, given.batches, synthetic, threads, seed, progress)


def inputs(
    analysis: Analysis,
    data: Any,
    labels: str | None,
    samples: int,
    seed: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Calibration:
    """Calibration inputs, given or made up (see :func:`spa.calibration.data.read_data`)."""
    from spa.calibration.data import Calibration, read_data
    from spa.calibration.synthetic import synthesise

    if samples < 1:
        raise PlanError(f"samples is {samples}. Choose 1 or more.")
    graph = analysis.graph
    if data is not None:
        return read_data(data, graph.model, labels=labels, samples=samples, seed=seed, mean=mean, std=std)
    with running():
        batches = synthesise(graph.self_contained(), samples, seed=seed, mean=mean, std=std)
    count = sum(next((len(a) for a in b.values() if a.ndim), 1) for b in batches)
    return Calibration(batches, None, count, "synthetic", ())
