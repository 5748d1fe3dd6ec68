"""One pruning of one model: its steps (score, choose, cut, repair), and what they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

import spa.obspa.criterion
import spa.zero.criterion  # noqa: F401 # both register a criterion
from spa import criteria
from spa.coupling.analysis import Analysis, Part
from spa.coupling.cost import measure
from spa.coupling.plan import Plan, dropped
from spa.criteria.answers import Answer, Curve, Curves, Removal, checked_answer, scored_groups
from spa.criteria.context import Context, Inputs
from spa.criteria.gradient import select_derivative
from spa.criteria.registry import Criterion
from spa.errors import PlanError
from spa.extras import extra
from spa.inputs import inputs_of
from spa.inputs.runs import running
from spa.model.alternatives import is_rewritten, reunited
from spa.model.files import INLINE
from spa.model.graph import Graph
from spa.model.slices import Slices
from spa.progress import Clock, Progress, silent
from spa.request import Request
from spa.running.journal import NOTHING_KEPT, Journal, opened
from spa.running.stream import samples_in
from spa.running.tasks import ALONE
from spa.running.threads import bounded_threads
from spa.steering.fingerprint import of_run
from spa.surgery.apply import describe
from spa.surgery.conform import conform
from spa.widths.budget import Budget, Choice, choose
from spa.widths.depth import branches_for, dropping
from spa.widths.selection import Selection, select

if TYPE_CHECKING:
    from spa.calibration.data import Calibration
    from spa.obspa.pipeline import Calibrated
    from spa.running.change import Change
    from spa.steering.meter import Meter
    from spa.widths.latency import LatencyModel

_LOG = logging.getLogger(__name__)
RECOVERY_SAMPLES = 2000  # that a training by the dense outputs is worth
REFITS = ("full", "quick", "readers")  # the repairs that refit weights
AT_CHANCE = 2  # times the accuracy of chance, below which something is wrong with inputs or labels


@dataclass(frozen=True)
class Outcome:
    """A pruned model.

    Attributes:
        plan: which channels were kept.
        model: what came of it.
        losses: the estimated loss of each group where there is an estimate.
        notes: what the user should know.
        before: the change of the outputs before reconstruction, where inputs were at hand.
        after: the change in the end.
        latency: what was measured, where that is the budget.
        metric: what the user's metric says, where there is one.
        candidate: which of several loss curves chose the widths.
        slices: what initializers of ``model`` without data stand for, by name, where the job is lazy.
    """

    plan: Plan
    model: ModelProto
    losses: Mapping[str, float]
    notes: tuple[str, ...]
    before: Change | None = None
    after: Change | None = None
    latency: Mapping[str, Any] | None = None
    metric: dict[str, Any] | None = None
    candidate: int = 0
    slices: Mapping[str, Slices] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The change of the outputs in the end, relative to their variance, where it could be measured."""
        return None if self.after is None else self.after.error


@dataclass
class Job:
    """One pruning of one model.

    Attributes:
        analysis: the dense model.
        request: what was asked for.
        selection: the groups that may be pruned.
        criterion: how channels are scored.
        budget: what to remove, and which widths groups may have.
        reconstruct: which repair follows: ``full``, ``quick``, ``readers``, ``bias`` or ``none``.
        clock: seconds by stage.
        progress: called with a stage and the share of it that is done.
        calibration: the inputs, where they are needed.
        calibrated: the model with these inputs.
        dense_accuracy: of the dense model on them, in percent, where there are labels.
        meter: the user's metric beside the dense model, where there is one.
        lazy: whether large weights that lie outside stay there (``Outcome.slices``); for jobs that run nothing.
        journal: keeps what is calibrated, see :func:`resumable`.
    """

    analysis: Analysis
    request: Request
    selection: Selection
    criterion: Criterion
    budget: Budget
    reconstruct: str
    clock: Clock
    progress: Progress = silent
    calibration: Calibration | None = None
    calibrated: Calibrated | None = None
    dense_accuracy: float | None = None
    meter: Meter | None = None
    lazy: bool = False
    journal: Journal = NOTHING_KEPT
    _answer: Answer | None = field(init=False, default=None)
    _tried: bool = field(init=False, default=False)

    @property
    def needs_inputs(self) -> bool:
        """Return whether the model must be run on inputs; given ones are always used, if only to measure changes."""
        goal, repair = self.request.goal, self.request.repair
        scored = goal.kind != "plan" and self.scoring_needs_inputs
        wanted = goal.kind == "distortion" or repair.recover > 0 or self.request.inputs.data is not None
        return scored or wanted or self.reconstruct != "none"

    @property
    def runs_nothing(self) -> bool:
        """Return whether the model's weights are all that is looked at, so that they may stay in their files."""
        goal = self.request.goal
        runs = self.needs_inputs or self.request.evaluation.evaluate is not None or goal.unit == "latency"
        return not runs and goal.kind != "metric"

    @property
    def scoring_needs_inputs(self) -> bool:
        """Return whether the criterion needs inputs."""
        scoring = self.request.scoring
        derived = scoring.gradients is not None or scoring.hessian_gradients is not None
        return self.criterion.needs_inputs(derivatives_given=derived)

    def calibrate(self) -> Calibrated:
        """Read or make up the inputs, and join them with the model."""
        from spa.obspa.pipeline import Calibrated

        request = self.request
        self.try_out()
        self.calibration = inputs_of(self.analysis, request)
        self.dense_accuracy = self.accuracy(self.analysis.graph.model)
        synthetic = request.inputs.data is None
        with running():
            self.calibrated = Calibrated(
                self.analysis,
                self.calibration.batches,
                synthetic,
                request.timing.threads,
                request.timing.seed,
                self.progress,
                held_out=[] if self.calibration.held_out is None else self.calibration.held_out.batches,
                workers=request.execution.workers,
                journal=self.journal,
            )
        self.clock("calibrate")
        return self.calibrated

    def start_metric(self) -> None:
        """Evaluate the dense model by the user's metric, where there is one: what fails there costs no calibration.

        Raises:
            MetricError: the metric fails.
            PlanError: the dense model is not what is asked for.
        """
        evaluation, inputs = self.request.evaluation, self.request.inputs
        if evaluation.evaluate is None:
            return
        from spa.calibration.data import Images
        from spa.steering.labelled import Samples
        from spa.steering.meter import Meter, Tolerance
        from spa.steering.metric import metric_of

        self.try_out()
        graph, goal = self.analysis.graph, self.request.goal
        if is_rewritten(graph.model):
            graph = Graph(reunited(graph.model), graph.base)
        samples = Samples(
            path=Path(),
            graph=graph,
            labels=inputs.labels,
            images_as=Images(inputs.mean, inputs.std, self.request.timing.sizes, inputs.value_range),
            preprocess=inputs.preprocess,
        )
        metric = metric_of(
            evaluation.evaluate,
            samples,
            key=evaluation.metric,
            better=evaluation.better,
            seconds=evaluation.evaluate_seconds,
        )
        self.progress("evaluate", 0.0)
        self.meter = Meter(metric, graph.model, Tolerance(goal.max_drop, goal.min_metric))
        self.clock("evaluate")

    def adopt(self, other: Job, answer: bool) -> None:
        """Take over what another job of the same model has prepared.

        Args:
            other: its calibration and its metric serve this one, too.
            answer: whether its scores do: the criterion and the groups are the same.
        """
        self.calibration, self.calibrated = other.calibration, other.calibrated
        self.dense_accuracy, self._tried = other.dense_accuracy, other._tried
        self.meter = None if other.meter is None else other.meter.beside()
        if answer:
            self._answer, self.selection = other.answer, other.selection

    def try_out(self) -> None:
        """Run the dense model in a child process before its first run here: a crash or a hang of kernels is a message.

        Raises:
            ForeignFailure: it crashed, or did not end.
        """
        if self._tried:
            return
        from spa.running.trial import try_out

        self._tried = True

        analysis = self.analysis
        with running():
            graph = analysis.graph
            try_out(graph.model, analysis.points.chosen, measure(analysis).macs, base=graph.base)
        self.clock("try")

    def accuracy(self, model: ModelProto) -> float | None:
        """Return a model's top-1 accuracy on the inputs held out in percent; None where there are no labels."""
        if self.calibration is None or self.calibration.labels is None:
            return None
        from spa.obspa.pipeline import accuracy

        with running():
            return accuracy(model, self.analysis.graph.base, self.calibration.measured, self.request.timing.threads)

    @property
    def goal_notes(self) -> tuple[str, ...]:
        """Return the ratio that the weights suggest, where that is the goal."""
        if self.request.goal.kind != "auto":
            return ()
        return (f"the weights suggest to remove {self.budget.ratio:.1%} of the {self.budget.of}",)

    @property
    def input_notes(self) -> tuple[str, ...]:
        """Return what is to be said of the inputs."""
        return () if self.calibration is None else (*self.calibration.notes, *self._at_chance())

    def _at_chance(self) -> Iterator[str]:
        """Say that the dense model knows no better than chance, which is seldom its fault."""
        from spa.calibration.interface import interface_of

        classes = interface_of(self.analysis.graph.model).classes if self.dense_accuracy is not None else None
        if classes is not None and (self.dense_accuracy or 0.0) < AT_CHANCE * 100 / classes[1]:
            yield (
                f"the dense network is right on {self.dense_accuracy:.1f} % of the labelled inputs, hardly more than "
                "chance: are they scaled as for its training, and the classes numbered as it does?"
            )

    def repair_notes(self, plan: Plan) -> tuple[str, ...]:
        """Return what kept the repair of what a plan cuts from doing all that it could."""
        if self.calibrated is None or self.reconstruct == "none":
            return ()
        return (*self.calibrated.notes(), *(() if self.reconstruct == "bias" else self.calibrated.left_out(plan)))

    def calibration_report(self, outcome: Outcome) -> dict[str, Any] | None:
        """Return what a report says of the inputs and of the outputs' change; None where nothing was run."""
        given = self.calibration
        if given is None:
            return None
        report: dict[str, Any] = {
            "source": given.source,
            "samples": given.samples,
            "held_out": 0 if given.held_out is None else given.held_out.samples,
            "reconstruct": self.reconstruct,
            "before": None if outcome.before is None else outcome.before.error,
            "after": outcome.error,
            "inputs": {name: list(array.shape) for name, array in given.batches[0].items()},
            "agreement": {} if outcome.after is None else dict(outcome.after.agreement),
        }
        if given.elsewhere is not None and outcome.after is not None:
            report["elsewhere"] = {"inputs": given.elsewhere.source, "after": self._change_elsewhere(outcome.model)}
        if given.labels is not None:
            report["accuracy"] = [self.dense_accuracy, self.accuracy(outcome.model)]
        return report

    def _change_elsewhere(self, model: ModelProto) -> float | None:
        """Measure the change of the outputs on inputs of a domain that was not used."""
        from spa.running.change import Yardstick
        from spa.running.padding import with_padding

        assert self.calibration is not None and self.calibration.elsewhere is not None  # who asks has seen them
        graph, threads = self.analysis.graph, self.request.timing.threads
        batches = with_padding(graph, self.calibration.elsewhere.batches, threads)
        with running(), bounded_threads(threads):
            error = Yardstick(graph, batches, threads).change(model).error
        self.clock("measure")
        return error

    # -- scores -----------------------------------------------------------------------------------------------------

    @property
    def answer(self) -> Answer:
        """Return what the criterion says of the groups; it is asked once. Groups without scores keep everything."""
        if self._answer is None:
            scoring = self.request.scoring
            context = Context(
                analysis=self.analysis,
                groups=self.selection.groups,
                norm=scoring.norm,
                agg=scoring.agg,
                seed=self.request.timing.seed,
                inputs=self._scoring_inputs(),
                branches=() if self.request.constraints.depth_kind == "pattern" else self.selection.branches,
                derivatives={need: self._derivative(need) for need in sorted(self.criterion.derivatives)},
            )
            bounds = bounded_threads(context.inputs.threads) if context.inputs is not None else nullcontext()
            with running(), bounds:
                answer = self.criterion.score(context)
            self._answer = checked_answer(answer, self.selection.groups, self.criterion.name)
            if not isinstance(self._answer, Removal):
                scored = scored_groups(self._answer, self.selection.groups, self.criterion.name)
                self.selection = replace(self.selection, groups=scored)
        return self._answer

    def curves(self, candidate: int = 0) -> Mapping[str, Curve]:
        """Return the loss curves of groups by name, where the criterion has been asked and gives any."""
        return self._answer.candidates[candidate] if isinstance(self._answer, Curves) else {}

    @property
    def _labels(self) -> np.ndarray | None:
        return None if self.calibration is None else self.calibration.labels

    def _scoring_inputs(self) -> Inputs | None:
        """Return the inputs that the criterion asks for.

        Raises:
            PlanError: it needs labels, and there are none.
        """
        if "labels" in self.criterion.needs and self._labels is None:
            raise PlanError(f"criterion {self.criterion.name!r} needs labelled data. Give data with labels.")
        if not self.criterion.needs_inputs(derivatives_given=True) or self.calibrated is None:
            return None
        return self.calibrated.inputs(self._labels if "labels" in self.criterion.needs else None)

    def _derivative(self, need: str) -> Mapping[str, Any]:
        """Return the caller's derivatives, or else those of the cross-entropy on the labelled inputs."""
        scoring = self.request.scoring
        given = select_derivative(need, scoring.gradients, scoring.hessian_gradients)
        return self._differentiated(need) if given is None else given

    def _differentiated(self, need: str) -> dict[str, np.ndarray]:
        """Take derivatives of the cross-entropy on the labelled inputs, by PyTorch."""
        otherwise = "Or give gradients by initializer, or use --criterion gate, which only runs the model."
        if self.calibrated is None or self._labels is None:
            name = self.criterion.name
            raise PlanError(f"criterion {name!r} takes derivatives of a loss on labelled data. {otherwise}")
        with extra("torch"):
            import torch
        from spa.criteria.autograd import from_autograd
        from spa.exporters.pytorch import graph_module

        graph = self.analysis.graph
        module = graph_module(reunited(graph.model), graph.base)
        batches = [tuple(torch.tensor(b[n]) for n in module.input_names) for b in self.calibrated.batches]
        ends = np.cumsum([len(b[0]) for b in batches])
        labels = [torch.tensor(part) for part in np.split(self._labels.astype(np.int64), ends[:-1])]
        return from_autograd(module, batches, labels, need=need, names=module.keys)

    # -- widths -----------------------------------------------------------------------------------------------------

    def choose(
        self, budget: Budget, latency: LatencyModel | None = None, candidate: int = 0, answer: Answer | None = None
    ) -> tuple[Choice, dict[str, float]]:
        """Choose the channels to keep.

        Args:
            budget: what to remove.
            latency: estimates times, where that is the budget.
            candidate: which of several loss curves to go by.
            answer: to go by in place of the criterion's.

        Returns:
            The choice, and the estimated loss of each group where the criterion estimates one.
        """
        answer = self.answer if answer is None else answer
        assert not isinstance(answer, Removal)  # `spa.goals.reach` takes it as it is
        curves = answer.candidates[candidate] if isinstance(answer, Curves) else {}
        budget, branches = self._with_depth(budget, answer, candidate)
        groups = (*self.selection.groups, *branches)
        if not isinstance(answer, Curves):
            scores = {**answer, **{b.name: np.zeros(1) for b in branches}}
            return choose(self.analysis, groups, scores, budget, latency), {}
        from spa.widths.allocation import allocate

        free = Curve(np.zeros(1, int), np.zeros(2))  # of branches that the user names
        curves = {b.name: free for b in branches} | dict(curves)
        if budget.ranking == "global":
            choice = allocate(self.analysis, groups, curves, budget, latency)
        else:
            scores = {n: c.scores() for n, c in curves.items()}
            choice = choose(self.analysis, groups, scores, budget, latency)
        gone = {g.name: g.size - len(choice.kept.get(g.name, range(g.size))) for g in groups}
        gone |= {b.name: b.size for b in branches}  # what their going would cost
        return choice, {n: float(c.loss[gone[n]]) for n, c in curves.items() if n in gone}

    def _with_depth(self, budget: Budget, answer: Answer, candidate: int) -> tuple[Budget, tuple[Part, ...]]:
        """Return the budget with the branches that must go, and the branches that the search has to do with.

        Raises:
            PlanError: branches must be compared, and the answer does not say what they cost.
        """
        branches, constraints = self.selection.branches, self.request.constraints
        if constraints.depth_kind == "pattern" or not branches:
            return dropping(budget, branches), branches
        candidates = answer.candidates if isinstance(answer, Curves) else ({},)
        prices = {b: candidates[0][b.name].loss[-1] for b in branches if b.name in candidates[0]}
        if not prices:
            raise PlanError(
                f"depth is {constraints.depth!r}, and criterion {self.criterion.name!r} does not say what residual "
                "branches cost. Use criterion obspa, or name the branches."
            )
        if constraints.depth_kind == "auto":
            return budget, tuple(b for b in branches if b.name in candidates[candidate])
        cheapest = tuple(sorted(prices, key=lambda b: prices[b])[: int(constraints.depth)])
        return dropping(budget, cheapest), cheapest

    def cut(
        self,
        plan: Plan,
        losses: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
        fold: Callable[[ModelProto, Path | None], None] | None = None,
    ) -> Outcome:
        """Apply a plan, fold in what it leaves behind, and repair the result; arguments as in :meth:`draft`."""
        return repaired([(self, self.draft(plan, losses, notes, fold))])[0]

    def draft(
        self,
        plan: Plan,
        losses: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
        fold: Callable[[ModelProto, Path | None], None] | None = None,
    ) -> Outcome:
        """Apply a plan, and fold in what it leaves behind.

        Args:
            plan: the channels to keep.
            losses: the estimated loss of each group, for the report.
            notes: for the report.
            fold: changes the pruned model in place, given the folder of its external data.
        """
        described = describe(self.analysis, plan, INLINE if self.lazy and fold is None else None)
        model = described.model
        if fold is not None:
            fold(model, self.analysis.graph.base)
            conform(model)
        self.clock("prune")
        outcome = Outcome(plan=plan, model=model, losses=losses or {}, notes=notes, slices=described.slices)
        if self.calibrated is None:
            return outcome
        change = self._change(model)
        return replace(outcome, before=change, after=change)

    def judged(self, outcome: Outcome, model: ModelProto) -> Outcome:
        """Return a cut network as it was repaired; where refits do not help on the inputs held out, as it was cut."""
        change = self._change(model)
        before, after = outcome.error, change.error
        if before is None or after is None or after <= before:
            return replace(outcome, model=model, after=change)
        worse = f"changes the outputs by {after:.3g} of their variance, the cut alone by {before:.3g}"
        if self.reconstruct == "bias":  # as published: means are restored at the cost of confidence
            return replace(outcome, model=model, after=change, notes=(*outcome.notes, f"moving biases {worse}"))
        return replace(outcome, notes=(*outcome.notes, f"the repair was left out: it {worse}"))

    def _change(self, model: ModelProto) -> Change:
        """Measure the change of the outputs."""
        assert self.calibrated is not None  # who asks has calibrated
        change = self.calibrated.change(model)
        self.clock("measure")
        _LOG.debug("the outputs change by %s of their variance", change.error)
        return change

    def recovered(self, outcome: Outcome, epochs: int) -> Outcome:
        """Train the pruned model towards the dense model's outputs on the same inputs, without labels.

        Raises:
            UnsupportedError: PyTorch is not installed, or an operator has no counterpart in it.
        """
        from spa.exporters.pytorch import recovered

        assert self.calibrated is not None  # `spa.goals.reach` makes inputs for it
        batches, seed = self.calibrated.batches, self.request.timing.seed
        model = recovered(self.analysis, outcome.plan, outcome.model, batches, epochs, seed, self.progress)
        self.clock("recover")
        change, notes = self._change(model), list(outcome.notes)
        if (count := samples_in(batches)) < RECOVERY_SAMPLES:
            notes.append(f"recovery learnt from {count} inputs; it gains more from {RECOVERY_SAMPLES} (--samples)")
        if outcome.error is not None and change.error is not None and change.error > outcome.error:
            notes.append(
                f"recovery was left out: it changes the outputs by {change.error:.3g} of their variance, the network "
                f"without it by {outcome.error:.3g}"
            )
            return replace(outcome, notes=tuple(notes))
        return replace(outcome, model=model, after=change, notes=tuple(notes))


def for_workers(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs that share calibration without what stays in this process: progress, the user's metric and data."""
    calibrated, found = copy(jobs[0].calibrated), [copy(job) for job in jobs]
    if calibrated is not None:
        calibrated.progress, calibrated.workers, calibrated.journal = silent, ALONE, NOTHING_KEPT
    for job in found:
        inputs = job.request.inputs
        if inputs.data is not None:
            job.request = replace(job.request, inputs=replace(inputs, data="given"))
        job.progress, job.meter, job.calibrated, job.journal = silent, None, calibrated, NOTHING_KEPT
    return found


def repaired(drafts: Sequence[tuple[Job, Outcome]]) -> list[Outcome]:
    """Repair cut networks side by side; each comes out as it would alone.

    Networks that lost residual branches are repaired twice, once with the layers before these refitted: that makes more
    of the sums and may make less of the outputs. The one that changes the outputs less stays.

    Args:
        drafts: the networks, and their jobs, which share calibration and repair.
    """
    first = drafts[0][0]
    if first.calibrated is None or first.reconstruct == "none":
        return [outcome for _, outcome in drafts]
    start = time.perf_counter()
    models = _repaired_models(first, [outcome for _, outcome in drafts], carriers=True)
    dropping = [(n, o) for n, (_, o) in enumerate(drafts) if _drops_branches(first, o) and first.reconstruct in REFITS]
    others = _repaired_models(first, [outcome for _, outcome in dropping], carriers=False)
    tries = [[model] for model in models]
    for (number, _), other in zip(dropping, others, strict=True):
        tries[number].append(other)
    seconds = (time.perf_counter() - start) / len(drafts)
    found = []
    for candidates, (job, outcome) in zip(tries, drafts, strict=True):
        job.clock.add("reconstruct", seconds)
        found.append(min((job.judged(outcome, model) for model in candidates), key=lambda o: o.error or 0.0))
    return found


def _repaired_models(job: Job, outcomes: Sequence[Outcome], carriers: bool) -> list[ModelProto]:
    """Return repaired copies of cut networks."""
    models = [ModelProto() for _ in outcomes]
    for model, outcome in zip(models, outcomes, strict=True):
        model.CopyFrom(outcome.model)
    if models and job.calibrated is not None:
        pairs = [(outcome.plan, model) for model, outcome in zip(models, outcomes, strict=True)]
        with running():
            job.calibrated.reconstruct(pairs, job.reconstruct, carriers)
    return models


def _drops_branches(job: Job, outcome: Outcome) -> bool:
    return bool(dropped(job.analysis, job.analysis.kept(outcome.plan.masks(job.analysis))))


@contextmanager
def resumable(job: Job) -> Iterator[Job]:
    """Let a job that calibrates keep what it finds in the folder that the request names, and go on with it.

    Args:
        job: the pruning.

    Raises:
        OptionError: the folder holds the calibration of something else, or is in use.
    """
    work = job.request.execution.work
    if work is None or not job.needs_inputs:
        yield job
        return
    request = job.request
    inputs = (request.inputs.data, request.scoring.gradients, request.scoring.hessian_gradients)
    fingerprint = of_run(job.analysis.graph.model, request.to_dict(), inputs)
    with opened(Path(work), fingerprint) as job.journal:
        yield job


def prepare(
    analysis: Analysis,
    request: Request,
    *,
    equal: tuple[str, ...] = (),
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Job:
    """Prepare a pruning: select the groups and set the budget.

    Args:
        analysis: the dense model.
        request: what is asked for.
        equal: what keeps one fraction where the request does not say.
        progress: called with a stage and the share of it that is done.
        clock: goes on counting.

    Raises:
        PlanError: no group can be pruned under the request, or options contradict each other.
    """
    if not isinstance(analysis, Analysis):
        raise PlanError(f"a {type(analysis).__name__} is no analysis. Give what spa.analyze returns.")
    _refuse_made_up(request)
    criterion = criteria.get(request.scoring.criterion)
    planned = request.goal.kind == "plan"
    constraints = request.constraints
    reconstruct = request.repair.reconstruct
    if reconstruct == "auto":
        reconstruct = "none" if planned else criterion.reconstruct
    repaired = reconstruct in REFITS
    selection = (
        Selection(tuple(analysis.prunable))
        if planned
        else select(analysis, constraints.ignore, constraints.cross_norm, repaired, constraints.only)
    )
    branches = (
        _planned_branches(analysis, request)
        if planned
        else branches_for(
            analysis,
            constraints.depth,
            constraints.depth_kind,
            constraints.ignore,
            constraints.only,
            timed=request.goal.unit == "latency",
        )
    )
    selection = replace(selection, branches=branches)
    return Job(
        analysis=analysis,
        request=request,
        selection=selection,
        criterion=criterion,
        budget=_budget(analysis, selection, request, equal),
        reconstruct=reconstruct,
        clock=clock or Clock(),
        progress=progress,
    )


def _planned_branches(analysis: Analysis, request: Request) -> tuple[Part, ...]:
    """Return the branches that a plan drops."""
    kept = analysis.kept(loaded(request).masks(analysis))
    return dropped(analysis, kept)


def loaded(request: Request) -> Plan:
    """Return the plan of a request that has one, read from its file where it names one."""
    plan = request.goal.plan
    return plan if isinstance(plan, Plan) else Plan.load(str(plan))


def _budget(analysis: Analysis, selection: Selection, request: Request, equal: tuple[str, ...]) -> Budget:
    """Return the budget of a request; a ratio of ``auto`` becomes the one that the weights suggest."""
    goal, constraints = request.goal, request.constraints
    budget = Budget(
        ratio=goal.number,
        of=goal.unit,
        ranking=request.scoring.ranking,
        round_to=constraints.round_to,
        min_width=constraints.min_width,
        equal=_equal_sets(analysis, selection, request, equal),
        **_given_widths(analysis, selection, request),
    )
    if goal.kind == "auto":
        from spa.widths.sparsity import suggested_ratio

        budget = replace(budget, ratio=suggested_ratio(analysis, selection.groups, budget))
    return budget


def _given_widths(analysis: Analysis, selection: Selection, request: Request) -> dict[str, dict[str, int]]:
    """Return the widths that the request gives, exact ones (``fixed``) and those that are kept (``floors``), by group.

    Raises:
        PlanError: a pattern names no group, a width is more than the group has, or two contradict each other.
    """
    if request.goal.kind == "plan":
        return {}
    from spa.widths.given import given_widths

    constraints = request.constraints
    return given_widths(
        analysis,
        selection.groups,
        width=constraints.width or {},
        heads=constraints.heads or {},
        ratio_of=constraints.ratio_of or {},
        keep_at_least=constraints.keep_at_least or {},
        round_to=constraints.round_to,
    )


def _equal_sets(
    analysis: Analysis, selection: Selection, request: Request, default: tuple[str, ...]
) -> tuple[frozenset[str], ...]:
    """Return the sets of groups that keep the same fraction of their channels."""
    patterns = default if request.constraints.equal is None else request.constraints.equal
    if patterns == () or request.goal.kind == "plan":
        return ()
    from spa.widths.equal import equal_sets

    return equal_sets(analysis, selection.groups, patterns)


def _refuse_made_up(request: Request) -> None:
    """Refuse options that say what to make up where inputs are given.

    Raises:
        PlanError: there is one.
    """
    inputs = request.inputs
    if inputs.data is None:
        return
    asked = {"domain": inputs.domain != "auto", "text": inputs.text, "tokenizer": inputs.tokenizer}
    if names := [name for name, given in asked.items() if given]:
        raise PlanError(f"data and {names[0]} are given together, which is for made-up inputs. Leave one of them out.")
