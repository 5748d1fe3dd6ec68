"""The steps of a pruning one by one, for research: score, plan, apply, repair.

:func:`spa.prune` does all of them. Between two steps everything is plain data: scores are arrays by group name, a plan
is kept indices by group name, models are messages of ONNX.

>>> import spa
>>> analysis = spa.analyze("models/digits_resnet.onnx")
>>> scores = spa.score(analysis, criterion="l1")
>>> plan = spa.plan(analysis, scores, ratio=0.3)
>>> pruned = spa.apply(analysis, plan)
>>> repaired = spa.repair(analysis, plan, pruned, data="models/digits_train.npz", samples=64)
>>> spa.verify(pruned, repaired).same_interface
True
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onnx import ModelProto

from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan, make_plan
from spa.criteria import criterion
from spa.criteria.answers import Answer, Removal, checked_answer, scored_groups
from spa.errors import PlanError
from spa.job import prepare
from spa.model.alternatives import is_rewritten, reunited
from spa.progress import Progress, silent
from spa.request import Request
from spa.surgery.apply import apply as applied
from spa.surgery.folding import fold

OWN = "your own"  # stands for the criterion in messages about scores that somebody brings
__all__ = ["apply", "criterion", "plan", "repair", "score"]


def score(analysis: Analysis, *, request: Request | None = None, progress: Progress = silent, **options: Any) -> Answer:
    """Score the channels of every group that may be pruned.

    Args:
        analysis: from :func:`spa.analyze`.
        request: what to do; the options below change it.
        progress: called with a stage and the share of it that is done.
        **options: the fields of :class:`spa.Request` on scoring, constraints and inputs: ``criterion``, ``norm``,
            ``agg``, ``ignore``, ``cross_norm``, ``data``, ``samples``, ``seed`` …

    Returns:
        By group name an array (channels,), float64, higher where a channel matters more; for criteria that estimate
        what each width costs (``obspa``) :class:`spa.criteria.Curves`; for ``zero`` the
        :class:`spa.criteria.Removal` itself.

    Raises:
        PlanError: no group can be pruned under the request, the criterion is unknown or lacks what it needs.
        ModelError: onnxruntime cannot run the model, where the criterion needs that.

    >>> import spa
    >>> analysis = spa.analyze("models/digits_vgg.onnx")
    >>> scores = spa.score(analysis, criterion="l2")
    >>> all(scores[group.name].shape == (group.size,) for group in analysis.free)
    True
    """
    job = prepare(analysis, Request.of(request, **options), progress=progress)
    if job.scoring_needs_inputs:
        job.calibrate()
    return job.answer


def plan(analysis: Analysis, scores: Answer, *, request: Request | None = None, **options: Any) -> Plan:
    """Choose the channels to keep, by scores and a budget.

    Args:
        analysis: from :func:`spa.analyze`.
        scores: from :func:`score`, or your own: by group name an array (channels,), higher where a channel matters
            more. Groups without scores keep everything.
        request: what to do; the options below change it.
        **options: the fields of :class:`spa.Request` on the goal and constraints: ``ratio``, ``of``, ``ranking``,
            ``round_to``, ``min_width``, ``equal``, ``ignore``, ``cross_norm``.

    Raises:
        PlanError: the ratio cannot be reached; or the goal is a change of the outputs or a latency, which takes runs of
            pruned networks.

    >>> import numpy as np
    >>> import spa
    >>> analysis = spa.analyze("models/digits_vgg.onnx")
    >>> rng = np.random.default_rng(0)
    >>> random = {group.name: rng.random(group.size) for group in analysis.free}
    >>> spa.plan(analysis, random, ratio=0.3).removes
    True
    """
    job = prepare(analysis, Request.of(request, **options))
    goal = job.request.goal
    if goal.kind in ("plan", "distortion", "metric") or goal.unit == "latency":
        raise PlanError("a plan by scores takes a ratio of macs, params or channels. Use spa.prune for other goals.")
    scores = checked_answer(scores, job.selection.groups, OWN)
    if isinstance(scores, Removal):
        return scores.plan
    job.selection = replace(job.selection, groups=scored_groups(scores, job.selection.groups, OWN))
    choice, _ = job.choose(job.budget, answer=scores)
    return make_plan(analysis, choice.kept)


def apply(analysis: Analysis, plan: Plan) -> ModelProto:
    """Apply a plan to a copy of the model. The same model and plan give the same bytes.

    Args:
        analysis: the model, which is not changed.
        plan: the channels to keep.

    Returns:
        The pruned model.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedError: an integer that follows the input cannot be restated.
        InvariantError: the pruned graph contradicts the algebra (a bug of ours).
    """
    return reunited(applied(analysis, plan))


def repair(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    *,
    request: Request | None = None,
    progress: Progress = silent,
    **options: Any,
) -> ModelProto:
    """Refit what remains of a pruned model, so that it does what the removed channels did.

    Args:
        analysis: of the dense model.
        plan: the plan that was applied.
        pruned: the model after :func:`apply`, which stays as it is.
        request: what to do; the options below change it.
        progress: called with a stage and the share of it that is done.
        **options: the fields of :class:`spa.Request` on inputs and repair: ``data``, ``samples``, ``reconstruct``
            (``full`` unless given), ``seed``, ``threads`` …

    Returns:
        A repaired copy.

    Raises:
        PlanError: the data, the plan or the pruned model does not fit the analysis.
        ModelError: onnxruntime cannot run the model.
    """
    request = Request.of(request, **options)
    how = "full" if request.repair.reconstruct == "auto" else request.repair.reconstruct
    job = prepare(analysis, Request.of(request, plan=plan), progress=progress)
    cut = applied(analysis, plan)
    if not isinstance(pruned, ModelProto) or _shapes(pruned) != _shapes(reunited(cut)):
        raise PlanError(
            "the pruned model is not what this plan makes of the analysed one. Give what spa.apply returns."
        )
    if is_rewritten(cut):  # `pruned` is in the file's form
        given = {tensor.name: tensor for tensor in pruned.graph.initializer}
        for tensor in cut.graph.initializer:
            tensor.CopyFrom(given[tensor.name])
    else:
        cut.CopyFrom(pruned)
    if how != "none":
        job.calibrate().reconstruct([(plan, cut)], how)
        fold(analysis, plan, cut)
    return reunited(cut)


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
