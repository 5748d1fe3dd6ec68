"""Sensitivity: what each group costs when it alone is pruned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa.api import opened
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.cost import CostModel
from spa.coupling.plan import make_plan
from spa.criteria.answers import Curve, Curves, Removal
from spa.errors import PlanError
from spa.job import Job, for_workers, prepare
from spa.model.diagnosis import diagnosed
from spa.model.graph import Graph
from spa.progress import Clock, Progress, silent
from spa.report.layers import layer_names
from spa.report.sensitivity import GroupCurve, Sensitivity
from spa.request import Request
from spa.surgery.apply import apply

FRACTIONS = (0.25, 0.5, 0.75)


def sensitivity(
    model: Any,
    *,
    fractions: Sequence[float] = FRACTIONS,
    measure: bool = False,
    request: Request | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Sensitivity:
    """Return what each group costs when it alone is pruned.

    Args:
        model: as in :func:`spa.prune`.
        fractions: the fractions of a group's channels to remove; the nearest allowed widths are taken.
        measure: whether to measure the change of the outputs at each of them, too, which takes a run for each.
        request: what to do; the options below change it.
        progress: called with the stage and the share of it that is done.
        **options: those of :func:`spa.prune` on scoring, constraints and inputs.

    Raises:
        PlanError: a fraction is not between 0 and 1, no group can be pruned, or the criterion gives no scores.
        SpaError: as :func:`spa.prune`.

    >>> import spa
    >>> found = spa.sensitivity("models/digits_vgg.onnx", criterion="l2")
    >>> found.groups[0].widths
    (24, 16, 8)
    """
    if not fractions or not all(0 < f < 1 for f in fractions):
        raise PlanError(f"fractions are {list(fractions)}. Give numbers between 0 and 1, ends excluded.")
    request = Request.of(request, **options)
    request.execution.workers.check()
    request.refuse_idle_timing()
    source, _ = opened(model, None, {}, Clock())
    with diagnosed(source):
        analysis = couple(Graph(source.model, source.base), request.timing.sizes)
        job = prepare(analysis, request, progress=progress)
        if measure or job.scoring_needs_inputs:
            job.calibrate()
        answer = job.answer
        if isinstance(answer, Removal):
            raise PlanError(f"criterion {job.criterion.name!r} scores no channels. Choose another one.")
        curves = (
            answer.candidates[0] if isinstance(answer, Curves) else {n: Curve.of_scores(s) for n, s in answer.items()}
        )
        names = layer_names(analysis)
        place = {name: i for i, name in enumerate(names)}
        groups = sorted(job.selection.groups, key=lambda g: place.get(g.name, 0))
        tasks = [_Task(group.name, names.get(group.name, group.name), curves[group.name], measure) for group in groups]
        found = [x for _, x in sorted(_curves(job, tasks, fractions), key=lambda numbered: numbered[0])]
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else source.model.graph.name or "the model"
    return Sensitivity(name, job.criterion.name, tuple(found))


@dataclass(frozen=True)
class _Task:
    """A group whose costs are asked for.

    Attributes:
        group: its name; a worker's copy of the group would be none of its copy of the network.
        layer: the name of its layer.
        curve: its losses.
        measure: whether to measure the change of the outputs.
    """

    group: str
    layer: str
    curve: Curve
    measure: bool


def _curves(job: Job, tasks: Sequence[_Task], fractions: Sequence[float]) -> Iterator[tuple[int, GroupCurve]]:
    """Yield the costs of groups with their numbers, as they come."""
    workers, threads = job.request.execution.workers, job.request.timing.threads
    own = job if workers.alone else for_workers([job])[0]
    for done, found in enumerate(workers.each(_curve, (own, tuple(fractions)), tasks, threads)):
        job.progress("sensitivity", done / len(tasks))
        yield found


def _curve(shared: tuple[Job, Sequence[float]], task: _Task) -> GroupCurve:
    """Return the costs of one group at the allowed widths that are nearest to some fractions."""
    (job, fractions), curve = shared, task.curve
    group = next(g for g in job.selection.groups if g.name == task.group)
    (ladder,) = job.budget.ladders(job.analysis, [group])
    allowed = np.array([rung[0] for rung in ladder.rungs])
    widths = sorted({int(allowed[np.abs(allowed - group.size * (1 - f)).argmin()]) for f in fractions}, reverse=True)
    costs = CostModel(job.analysis, [group])
    change = None
    if task.measure and job.calibrated is not None:
        change = tuple(_change(job, group, curve, width) for width in widths)
    return GroupCurve(
        name=group.name,
        layer=task.layer,
        channels=group.size,
        widths=tuple(widths),
        loss=tuple(float(curve.loss[group.size - width]) for width in widths),
        macs=tuple(costs.removed([width], "macs") for width in widths),
        params=tuple(costs.removed([width], "params") for width in widths),
        change=change,
    )


def _change(job: Job, group: Group, curve: Curve, width: int) -> float:
    assert job.calibrated is not None  # the caller has asked
    analysis: Analysis = job.analysis
    plan = make_plan(analysis, {group.name: np.sort(curve.order[group.size - width :])})
    error = job.calibrated.change(apply(analysis, plan)).error
    if error is None:
        raise PlanError("the model has no float output that could be compared. Leave --change out.")
    return error
