"""From a job to its goal: a plan, a ratio, a latency, or a tolerated change of the outputs or of the user's metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spa.coupling.plan import Plan, disagreeing, make_plan
from spa.criteria.answers import Curves, Removal
from spa.errors import MetricError, OutOfReachError, PlanError, SpaError
from spa.job import REFITS, Job, Outcome, loaded, repaired, resumable
from spa.progress import silent
from spa.steering import bracket
from spa.steering.measurement import Measurement
from spa.steering.meter import Meter
from spa.surgery.folding import fold
from spa.widths.budget import Budget, refuse_out_of_reach

if TYPE_CHECKING:
    from spa.widths.stopwatch import Stopwatch

EVALUATIONS = 8  # of a metric to meet a tolerance, those of the dense model included
LEAST = 1e-9  # a ratio that asks for nothing beyond what else is asked for
ATTEMPTS = 8  # networks that are tried to meet a tolerated change
NEAR = 0.9  # of the tolerated change, from which on an attempt is as good as any
DESTROYED = 0.9  # change of the outputs, relative to their variance; that of the best constant is 1
Point = tuple[float, float]  # a ratio and the change of the outputs there


def reach(job: Job) -> Outcome:
    """Prune as the goal of a job's request says, and train for a while and evaluate where that is asked for.

    Raises:
        PlanError: the goal is out of reach.
        MetricError: the user's metric fails on the dense model, or before any network has met what is asked for; or
            the measuring command does, before any network was measured.
        OptionError: the cluster that is asked for cannot be reached, or the folder for work holds something else.
        ModelError: onnxruntime cannot run the model, where the goal, the criterion or the repair needs that.
    """
    job.request.execution.workers.check()
    with resumable(job):
        job.start_metric()
        prepare_inputs(job)
        return attain(job)


def attain(job: Job) -> Outcome:
    """Prune as the goal says where metric and inputs are ready; raise as :func:`reach`."""
    goal = job.request.goal
    if goal.kind == "metric" and not isinstance(job.answer, Removal):
        return to_metric(job)
    if goal.kind == "plan":
        plan = loaded(job.request)
        outcome = job.cut(plan, notes=_plan_notes(job, plan))
    elif isinstance(removal := job.answer, Removal):
        outcome = job.cut(removal.plan, notes=removal.notes, fold=removal.fold)
    elif goal.max_distortion is not None:
        outcome = to_distortion(job, goal.max_distortion)
    elif goal.unit == "latency":
        outcome = to_latency(job, goal.latency_ms)
    elif goal.ratio is None and (job.budget.fixed or job.request.constraints.depth_kind in ("number", "pattern")):
        outcome = to_widths(job)
    else:
        outcome = to_budget(job, job.budget)
    return evaluated(job, checked(job, finished(job, outcome)))


def side_by_side(job: Job) -> bool:
    """Return whether a job's repair is worth sharing, see :func:`attain_together`."""
    goal = job.request.goal
    plain = goal.kind == "ratio" and goal.ratio is not None and goal.unit != "latency"
    return plain and job.calibrated is not None and job.reconstruct in REFITS and not isinstance(job.answer, Removal)


def attain_together(jobs: Sequence[Job]) -> list[Outcome | SpaError]:
    """Attain the ratios of jobs that share calibration and repair, beside one run of the dense network.

    Args:
        jobs: those of which :func:`side_by_side` is true, without a metric.

    Returns:
        What :func:`attain` would return, or raise where a goal is out of reach.
    """
    found: dict[int, Outcome | SpaError] = {}
    drafts: list[tuple[int, Outcome]] = []
    for number, job in enumerate(jobs):
        job.clock.start()
        try:
            drafts += [(number, draft) for draft in _drafts(job, job.budget)]
        except PlanError as error:
            found[number] = error
    outcomes = repaired([(jobs[number], draft) for number, draft in drafts]) if drafts else []
    for number, job in enumerate(jobs):
        if number in found:
            continue
        own = [outcome for (of, _), outcome in zip(drafts, outcomes, strict=True) if of == number]
        job.clock.start()
        try:
            found[number] = checked(job, finished(job, _least_changed(own)))
        except PlanError as error:
            found[number] = error
    return [found[number] for number in range(len(jobs))]


def prepare_inputs(job: Job) -> None:
    """Read or make up what a job must run the model on; refuse a ratio out of reach before that."""
    goal = job.request.goal
    if job.needs_inputs:
        if goal.kind == "ratio" and goal.ratio is not None and goal.unit != "latency":
            refuse_out_of_reach(job.analysis, job.selection.everything, job.budget)
        job.calibrate()
    elif goal.unit == "latency":
        job.try_out()


def _plan_notes(job: Job, plan: Plan) -> tuple[str, ...]:
    """Say where a plan that somebody has edited contradicts itself."""
    others = disagreeing(job.analysis, plan)
    if not others:
        return ()
    return (
        f"the plan's 'kept' says of {others[0]!r}{' and others' if others[1:] else ''} what does not follow from its "
        "'groups': 'groups' is what counts, 'kept' is for other tools",
    )


def finished(job: Job, outcome: Outcome) -> Outcome:
    """Train a pruned network for as many epochs as are asked for, and fold what stands for branches that went."""
    epochs = job.request.repair.recover
    outcome = job.recovered(outcome, epochs) if epochs else outcome
    fold(job.analysis, outcome.plan, outcome.model, outcome.slices)
    return outcome


def evaluated(job: Job, outcome: Outcome) -> Outcome:
    """Add what the user's metric says; where it fails on the pruned network, a note says so and nothing is lost."""
    if job.meter is None:
        return outcome
    found = None
    try:
        found = job.meter.measure(outcome.model, change=outcome.error)
    except MetricError as error:
        outcome = replace(outcome, notes=(*outcome.notes, f"the pruned model was not evaluated: {error}"))
    job.clock("evaluate")
    return replace(outcome, metric=job.meter.report(found))


def checked(job: Job, outcome: Outcome) -> Outcome:
    """Refuse a refitted network whose outputs are no better than a constant, unless that is insisted on.

    Networks that nothing was to refit get a note: they are meant to be trained. So do those that were not run at all.

    Raises:
        PlanError: the network is destroyed.
    """
    if job.calibration is None:
        return replace(outcome, notes=(*outcome.notes, *_unmeasured(job, outcome)))
    if outcome.error is None or outcome.error < DESTROYED or not outcome.plan.removes:
        return outcome
    told = f"the outputs change by {outcome.error:.3g} of their variance, so that they are no better than a constant"
    if job.reconstruct not in REFITS and not job.request.repair.recover:
        return replace(outcome, notes=(*outcome.notes, f"{told}: fine-tuning is needed, or --reconstruct full"))
    if job.request.repair.insist or job.calibration.held_out is None:
        return replace(outcome, notes=(*outcome.notes, told))
    if job.request.goal.kind == "metric":  # which says more
        return outcome
    made_up = job.request.inputs.data is None
    cure = "Give real inputs with --data" if made_up else "Give more inputs, which are like those in use"
    raise PlanError(
        f"{told}, on {job.calibration.held_out.samples} {'made-up ' if made_up else ''}inputs that no fit has seen. "
        f"{cure}, remove less, or keep the network with --insist."
    )


def _unmeasured(job: Job, outcome: Outcome) -> tuple[str, ...]:
    """Say that nobody knows how the outputs changed, where nothing was run and a criterion of weights chose.

    Even a handful of made-up inputs would cost as much as such a pruning itself.
    """
    if job.meter is not None or job.request.goal.kind == "plan" or not outcome.plan.removes:
        return ()
    if isinstance(job.answer, Removal):  # of what computes nothing
        return ()
    return (
        f"criterion {job.criterion.name} looks at the weights alone, and the change of the outputs was not measured: "
        "--data measures it; expect to fine-tune",
    )


def to_budget(job: Job, budget: Budget, trials: bool = True) -> Outcome:
    """Remove what a budget asks for.

    Args:
        job: the pruning.
        budget: what to remove.
        trials: whether to cut and repair each choice that the criterion thinks worth a trial, and to keep the one that
            changes the outputs least.
    """
    return _least_changed(repaired([(job, draft) for draft in _drafts(job, budget, trials)]))


def _drafts(job: Job, budget: Budget, trials: bool = True) -> list[Outcome]:
    """Choose widths, and cut the network; once for each choice that is worth a trial, or only for the first."""
    trials = trials and job.reconstruct in REFITS and isinstance(job.answer, Curves)
    candidates = len(job.answer.candidates) if trials and isinstance(job.answer, Curves) else 1
    drafts: list[Outcome] = []
    for candidate in range(candidates):
        try:
            choice, losses = job.choose(budget, candidate=candidate)
        except OutOfReachError:
            if not drafts:
                raise
            continue  # what only branches free
        plan = make_plan(job.analysis, choice.kept)
        job.clock("choose")
        if all(plan != o.plan for o in drafts):
            drafts.append(replace(job.draft(plan, losses, choice.notes), candidate=candidate))
    return drafts


def _least_changed(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda o: o.error or 0.0)


def to_widths(job: Job) -> Outcome:
    """Give groups the widths that the request names, and leave all others whole."""
    budget = replace(job.budget, floors={g.name: g.size for g in job.selection.groups})
    outcome = to_budget(job, replace(budget, ratio=LEAST))
    about_ratio = job.choose(replace(budget, ratio=LEAST))[0].notes  # that nobody has asked for
    return replace(outcome, notes=tuple(n for n in outcome.notes if n not in about_ratio))


def to_latency(job: Job, milliseconds: float | None) -> Outcome:
    """Remove what a budget of latency asks for, or what leaves so many milliseconds.

    Where branches compete with channels, the best choice without them is tried, too.
    """
    outcomes: list[Outcome] = []
    for candidate in depths(job):
        try:
            outcomes.append(of_candidate(job, job.budget, candidate, milliseconds))
        except OutOfReachError:
            if not outcomes:
                raise  # else only branches free as much
    return min(outcomes, key=lambda o: o.error or 0.0)


def of_candidate(job: Job, budget: Budget, candidate: int, milliseconds: float | None = None) -> Outcome:
    """Remove what a budget asks for by one of the criterion's candidates, and repair the result.

    Args:
        job: the pruning.
        budget: what to remove.
        candidate: which of several loss curves to go by.
        milliseconds: that are to be left, in place of the budget's ratio.
    """
    timed = None
    if budget.of == "latency":
        from spa.widths import latency

        watch = stopwatch_of(job)
        progress = silent if job.calibrated is None else job.progress
        pick = partial(job.choose, candidate=candidate)
        choice, losses, timed, notes = latency.choose(
            job.analysis, job.selection.everything, budget, milliseconds, pick, watch, progress
        )
    else:
        choice, losses = job.choose(budget, candidate=candidate)
        notes = choice.notes
    job.clock("choose")
    return replace(job.cut(make_plan(job.analysis, choice.kept), losses, notes), latency=timed)


def depths(job: Job) -> tuple[int, ...]:
    """Return which loss curves to try: the first, and where they name branches the first of those that do not."""
    if not isinstance(job.answer, Curves) or job.request.constraints.depth_kind != "auto":
        return (0,)
    names = {b.name for b in job.selection.branches}
    without = next(i for i, curves in enumerate(job.answer.candidates) if names.isdisjoint(curves))
    return 0, without


def stopwatch_of(job: Job) -> Stopwatch:
    """Return what times the networks of a job.

    Raises:
        UnsupportedError: the runtime or provider that is asked for is not there.
    """
    from spa.widths import stopwatch

    timing = job.request.timing
    place, sizes = timing.place, job.analysis.points.chosen
    place.check()
    if timing.latency_table is not None:
        from spa.widths import table

        known = Path(timing.latency_table)
        return table.TabledStopwatch(timing.threads, timing.batch, sizes, place=place, table=known)
    return stopwatch.Stopwatch(timing.threads, timing.batch, sizes, place=place)


def to_distortion(job: Job, most: float) -> Outcome:
    """Remove as much as changes the outputs by no more than a tolerated fraction of their variance.

    The change grows about exponentially with the ratio, so a bracket is narrowed by interpolating its logarithm,
    or halved where the same end moved twice.

    Args:
        job: the pruning, with inputs.
        most: mean squared change of the outputs over their variance.

    Raises:
        PlanError: even the least that can go changes the outputs more, or they are no floats.
    """
    low, high = (0.0, most / 100), (1.0, max(1.0, 10 * most))  # a ratio that meets the goal, and one that does not
    best: Outcome | None = None
    refusal = PlanError("nothing can go under these constraints. Lower --round-to or --min-width.")
    ratio = 0.5
    met: list[bool] = []  # by attempt
    for _ in range(ATTEMPTS):
        try:
            outcome = to_budget(job, replace(job.budget, ratio=ratio), trials=False)
        except OutOfReachError as error:
            refusal, high = error, (ratio, high[1])
        else:
            change = _known_change(outcome)
            if change <= most:
                low = (ratio, max(change, most / 100))
                if outcome.plan.removes:
                    best = replace(outcome, notes=())
                if change >= NEAR * most:
                    break
            else:
                refusal, high = _too_much(job.budget.of, ratio, change, most), (ratio, change)
        if high[0] - low[0] < 0.01:
            break
        met.append(low[0] == ratio)
        same_end = met[-2:] in ([True] * 2, [False] * 2)
        ratio = (low[0] + high[0]) / 2 if same_end else _interpolated(low, high, most)
    if best is None:
        raise refusal
    return best


def _known_change(outcome: Outcome) -> float:
    if outcome.error is None:
        raise PlanError("the model has no float output that could be compared. Give a ratio.")
    return outcome.error


def _too_much(unit: str, ratio: float, change: float, most: float) -> PlanError:
    return PlanError(
        f"removing {ratio:.1%} of the {unit} changes the outputs by {change:.3g} of their variance, "
        f"more than {most:g}. Tolerate more, or leave sensitive layers alone with --ignore."
    )


def _interpolated(low: Point, high: Point, change: float) -> float:
    """Return the ratio where a straight line in the logarithm meets a change, kept away from both ends."""
    fraction = log(change / low[1]) / max(log(high[1] / low[1]), 1e-9)
    return low[0] + float(np.clip(fraction, 0.15, 0.85)) * (high[0] - low[0])


# -- a metric --------------------------------------------------------------------------------------------------------


def to_metric(job: Job) -> Outcome:
    """Remove as much as the user's metric tolerates.

    Each candidate is repaired as the final network is, and evaluated once. Where the metric fails after some candidate
    has met what is asked for, that one is the result, with a note.

    Args:
        job: the pruning, with its meter.

    Raises:
        PlanError: even the least that was tried is too much.
        MetricError: the metric fails before any candidate has met what is asked for; says what was measured before.
    """
    meter = job.meter
    assert meter is not None  # a request with such a goal has a metric
    search = _MetricSearch(job, meter)
    tool = bracket.Tool(loss=search.loss, same=search.same, attempt=search.attempt)
    notes: tuple[str, ...] = ()
    try:
        bracket.search(tool, meter.shortfall(meter.dense), EVALUATIONS - len(meter.log))
    except MetricError as error:
        if search.best is None:
            raise MetricError(f"{error}\nEvaluated before:{meter.lines()}") from error
        notes = (f"the search ended early, and more might go: {error}",)
    if search.best is None:
        raise search.refusal()
    ratio, outcome, measurement = search.best
    outcome = replace(outcome, notes=(*outcome.notes, *notes), metric=meter.report(measurement) | {"ratio": ratio})
    return checked(job, outcome)


class _MetricSearch:
    """The steps of a search by a metric.

    Attributes:
        best: the largest ratio that has met what is asked for, with its network and what the metric says of it.
    """

    def __init__(self, job: Job, meter: Meter) -> None:
        self.job, self.meter = job, meter
        self.best: tuple[float, Outcome, Measurement] | None = None
        self._choices: dict[float, tuple[Plan, float]] = {}

    def _choice(self, ratio: float) -> tuple[Plan, float]:
        """Return the plan of a ratio, and its estimated loss; the ratio itself where nothing is estimated."""
        if ratio not in self._choices:
            choice, losses = self.job.choose(replace(self.job.budget, ratio=ratio))
            plan = make_plan(self.job.analysis, choice.kept)
            self._choices[ratio] = plan, sum(losses.values()) if losses else ratio
        return self._choices[ratio]

    def loss(self, ratio: float) -> float:
        """Return the estimated loss of a ratio."""
        return self._choice(ratio)[1] if ratio else 0.0

    def same(self, a: float, b: float) -> bool:
        """Return whether two ratios lead to one network."""
        return self._choice(a)[0] == self._choice(b)[0]

    def attempt(self, ratio: float) -> float:
        """Prune, repair and evaluate; return by how much the metric misses what is asked for."""
        job, meter = self.job, self.meter
        outcome = finished(job, to_budget(job, replace(job.budget, ratio=ratio)))
        job.progress("evaluate", len(meter.log) / EVALUATIONS)
        found = meter.measure(outcome.model, f"{ratio:.1%} of {job.budget.of}", ratio, outcome.error)
        job.clock("evaluate")
        shortfall = meter.shortfall(found)
        if shortfall <= 0 and outcome.plan.removes and (self.best is None or ratio > self.best[0]):
            self.best = ratio, outcome, found
        return shortfall

    def refusal(self) -> PlanError:
        """Return why nothing was found."""
        tried = [e for e in self.meter.log if e.ratio is not None]
        if not tried:
            return PlanError("nothing can go under these constraints. Lower --round-to or --min-width.")
        least = min(tried, key=lambda e: e.ratio or 0.0)
        name, tolerance = self.meter.metric.name, self.meter.tolerance
        asked = f"{tolerance.max_drop:g} is allowed" if tolerance.max_drop else f"{tolerance.min_metric:g} is asked for"
        remedy = "Give the metric more samples" if least.noise >= least.drop else "Tolerate more"
        return PlanError(
            f"even without {least.model} {name} is {least.value:g}, a drop of {least.drop:.3g} with a standard error "
            f"of {least.noise:.2g}; {asked}, with 95 % confidence. {remedy}, or spare sensitive layers with --ignore."
            f"{self.meter.lines()}"
        )
