"""One pruning of one model: its steps (score, choose, cut, repair), and what they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

import spa.obspa.criterion
import spa.zero.criterion  # noqa: F401 # both register a criterion
from spa import criteria
from spa.coupling.analysis import Analysis
from spa.coupling.cost import measure
from spa.coupling.plan import Plan
from spa.criteria.answers import Answer, Curves, Removal, checked_answer, scored_groups
from spa.criteria.context import Context, Inputs
from spa.criteria.gradient import select_derivative
from spa.criteria.registry import Criterion
from spa.errors import PlanError
from spa.extras import extra
from spa.frameworks.kinds import ONE_HEAD_SIZE
from spa.inputs import inputs_of
from spa.inputs.runs import running
from spa.model.alternatives import reunited
from spa.model.files import INLINE
from spa.model.graph import Graph
from spa.model.halves import is_separated
from spa.model.slices import Slices
from spa.progress import Progress, silent
from spa.request import Request
from spa.running.threads import bounded_threads
from spa.surgery.apply import describe
from spa.surgery.conform import conform
from spa.widths.budget import Budget, Choice, choose
from spa.widths.selection import Selection, select

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from spa.calibration.data import Calibration
    from spa.obspa.pipeline import Calibrated
    from spa.running.change import Change
    from spa.steering.meter import Meter
    from spa.widths.latency import LatencyModel

AT_CHANCE = 2  # times the accuracy of chance, below which something is wrong with inputs or labels


class Clock:
    """A stopwatch for the stages of a pruning.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 4)
        _LOG.info("%s: %.2f s", stage, now - self._last)
        self._last = now


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
        reconstruct: which repair follows: ``full``, ``bias`` or ``none``.
        clock: seconds by stage.
        progress: called with a stage and the share of it that is done.
        calibration: the inputs, where they are needed.
        calibrated: the model with these inputs.
        dense_accuracy: of the dense model on them, in percent, where there are labels.
        meter: the user's metric beside the dense model, where there is one.
        lazy: whether large weights that lie outside stay there (``Outcome.slices``); for jobs that run nothing.
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
        if is_separated(graph.model):
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
            try_out(analysis.graph.self_contained(), analysis.points.chosen, measure(analysis).macs)
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

    @property
    def repair_notes(self) -> tuple[str, ...]:
        """Return what kept the repair from doing all that it could."""
        return () if self.calibrated is None or self.reconstruct == "none" else self.calibrated.notes()

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
        module = graph_module(graph.model, graph.base)
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
        if not isinstance(answer, Curves):
            return choose(self.analysis, self.selection.groups, answer, budget, latency), {}
        from spa.widths.allocation import allocate

        curves = answer.candidates[candidate]
        if budget.ranking == "global":
            choice = allocate(self.analysis, self.selection.groups, curves, budget, latency)
        else:
            scores = {n: c.scores() for n, c in curves.items()}
            choice = choose(self.analysis, self.selection.groups, scores, budget, latency)
        gone = {g.name: g.size - len(choice.kept.get(g.name, range(g.size))) for g in self.selection.groups}
        return choice, {n: float(c.loss[gone[n]]) for n, c in curves.items()}

    def cut(
        self,
        plan: Plan,
        losses: Mapping[str, float] | None = None,
        notes: tuple[str, ...] = (),
        fold: Callable[[ModelProto, Path | None], None] | None = None,
    ) -> Outcome:
        """Apply a plan, fold in what it leaves behind, and repair the result.

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
        outcome = replace(outcome, before=change, after=change)
        return outcome if self.reconstruct == "none" else self._repaired(outcome)

    def _repaired(self, outcome: Outcome) -> Outcome:
        """Repair a cut network; where refits do not help on the inputs held out, leave it as it was cut."""
        assert self.calibrated is not None  # `cut` asks
        model = ModelProto()
        model.CopyFrom(outcome.model)
        with running():
            self.calibrated.reconstruct(outcome.plan, model, self.reconstruct)
        self.clock("reconstruct")
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
        from spa.exporters.pytorch import graph_module, recover, store

        assert self.calibrated is not None  # `spa.goals.reach` makes inputs for it
        graph = self.analysis.graph
        student, teacher = graph_module(outcome.model, graph.base), graph_module(graph.model, graph.base)
        recover(student, teacher, self.calibrated.batches, epochs=epochs, seed=self.request.timing.seed)
        model = store(student, outcome.model)
        self.clock("recover")
        return replace(outcome, model=model, after=self._change(model))


def prepare(
    analysis: Analysis,
    request: Request,
    *,
    framework: str | None = None,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Job:
    """Prepare a pruning: select the groups and set the budget.

    Args:
        analysis: the dense model.
        request: what is asked for.
        framework: whose model it was: ``torch``, ``tensorflow``, ``jax`` or None.
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
    repaired = reconstruct in ("full", "readers")
    selection = (
        Selection(tuple(analysis.prunable))
        if planned
        else select(analysis, constraints.ignore, constraints.cross_norm, repaired, constraints.only)
    )
    return Job(
        analysis=analysis,
        request=request,
        selection=selection,
        criterion=criterion,
        budget=_budget(analysis, selection, request, framework),
        reconstruct=reconstruct,
        clock=clock or Clock(),
        progress=progress,
    )


def _budget(analysis: Analysis, selection: Selection, request: Request, framework: str | None) -> Budget:
    """Return the budget of a request; a ratio of ``auto`` becomes the one that the weights suggest."""
    goal, constraints = request.goal, request.constraints
    budget = Budget(
        ratio=goal.number,
        of=goal.unit,
        ranking=request.scoring.ranking,
        round_to=constraints.round_to,
        min_width=constraints.min_width,
        equal=_equal_sets(analysis, selection, request, framework),
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
        ratio_of=constraints.ratio_of or {},
        keep_at_least=constraints.keep_at_least or {},
        round_to=constraints.round_to,
    )


def _equal_sets(
    analysis: Analysis, selection: Selection, request: Request, framework: str | None
) -> tuple[frozenset[str], ...]:
    """Return the sets of groups that keep the same fraction of their channels."""
    patterns = request.constraints.equal
    if patterns is None and framework not in ONE_HEAD_SIZE:
        patterns = ()
    if patterns == () or request.goal.kind == "plan":
        return ()
    from spa.widths.equal import HEADS, equal_sets

    return equal_sets(analysis, selection.groups, (HEADS,) if patterns is None else patterns)


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
