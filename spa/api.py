"""The public functions: analyse and prune, and what comes of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from spa.coupling.analysis import Analysis, Part, couple
from spa.coupling.cost import Cost, CostModel, count_parameters, group_fractions
from spa.coupling.plan import Plan
from spa.doors import FrameworkModel, convert_result, import_model
from spa.errors import PlanError
from spa.frameworks.kinds import equal_by_default, kind_of
from spa.frameworks.modules import named
from spa.goals import reach
from spa.job import Job, Outcome, prepare
from spa.model.alternatives import condition_of, is_rewritten, reunited
from spa.model.diagnosis import diagnosed
from spa.model.graph import Graph
from spa.model.halves import is_separated
from spa.model.io import Source, load
from spa.model.simplify import simplified
from spa.model.slices import Slices
from spa.progress import Clock, Progress, silent
from spa.report import BranchReport, GroupReport, Report
from spa.report.environment import environment
from spa.report.layers import layer_names
from spa.request import Request, options
from spa.request.option import default_of
from spa.running.memory import peak_resident
from spa.running.obstacle import obstacle
from spa.running.windows import is_large

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from spa.surgery.proof import Proof


CURVE_POINTS = 9  # of each loss curve in a report


@dataclass(frozen=True, repr=False)
class Result:
    """A pruned model and how it came about.

    Attributes:
        model: the pruned model.
        plan: which channels were kept.
        report: what it cost and what was left alone.
        request: what was asked for.
        analysis: the dense model's groups.
        source: where the dense model came from.
        origin: the framework's model that was given, where it was one.
        slices: what initializers of ``model`` without data stand for, by name; of :func:`prune_file` alone.
    """

    model: ModelProto
    plan: Plan
    report: Report
    request: Request
    analysis: Analysis
    source: Source
    origin: FrameworkModel | None = None
    slices: Mapping[str, Slices] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the costs before and after in one line."""
        from spa.report.text import one_line

        return f"<spa.Result: {one_line(self.report)}>"

    def _repr_html_(self) -> str:
        """Return a small table, which notebooks show."""
        from spa.report.html import summary

        return summary(self.report)

    @property
    def pruned(self) -> Any:
        """The pruned model as the kind of object that was given; see :meth:`to`."""
        kind = None if self.origin is None else self.origin.imported.kind
        return self.to(kind if kind in ("torch", "keras", "jax") else "onnx")

    def to(self, target: str) -> Any:
        """Convert the pruned model for a framework, and compare it with the ONNX model.

        Args:
            target: ``onnx`` (a ModelProto), ``graphsurgeon``, ``torch`` (the class of the module that was given with
                narrower weights, or the graph as a trainable module; a warning says where and why parts of the class
                stay wider, or why it is the graph), ``keras`` (the Keras model that was given,
                rebuilt with narrower layers) or ``jax`` (the pytree or module that was given with narrower weights,
                or ``(function, parameters)``).

        Raises:
            PlanError: no such target.
            UnsupportedError: the framework is not installed, or cannot express the model; says what stands in the way.
        """
        return convert_result(self, target)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Check the pruned model and write it; nothing is left behind on failure.

        Args:
            path: the ``.onnx`` file to write.
            force: allow overwriting the dense model's own file.

        Raises:
            SpaError: the model failed its checks, or a file cannot or must not be written.
        """
        from spa.exporters.onnx import write

        sizes = {} if is_separated(self.source.model) else self.analysis.points.chosen  # whose inputs are others
        external = self.source.keeps_outside
        pruned = replace(self.source, model=self.model, sizes=sizes, macs=self.report.after.macs, slices=self.slices)
        with diagnosed(self.source):
            write(pruned, path, force=force, external=external, name="the pruned model")

    def to_graphsurgeon(self) -> gs.Graph:
        """Return the pruned model as an onnx-graphsurgeon graph."""
        import onnx_graphsurgeon as gs

        return gs.import_onnx(self.model)

    def prove(self, **options: Any) -> Proof:
        """Prove on random inputs that this plan's network, before repair, computes what the masked original computes.

        Args:
            **options: of :func:`spa.prove`: ``seeds``, ``seed``, ``threads``, ``sizes``, ``tolerance``.

        Raises:
            PlanError: every pruned group crosses a normalisation, so that there is nothing to prove.
            ModelError: onnxruntime cannot run the model.

        >>> import spa
        >>> result = spa.prune("models/digits_resnet.onnx", ratio=0.3, criterion="l2")
        >>> proof = result.prove()
        >>> proof.holds, proof.effect > 0.01
        (True, True)
        """
        from spa.surgery.proof import prove as prove_plan

        return prove_plan(self.analysis, self.plan, **options)


def analyze(
    model: Any,
    *,
    example_inputs: Any = None,
    convert_options: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Analysis:
    """Find the groups of coupled channels of a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto``, an onnx-graphsurgeon ``Graph``, or a model of
            PyTorch, Keras or JAX, an object or a path (see :func:`spa.convert`).
        example_inputs: what a framework's model is called with, where tracing needs it.
        convert_options: further options of its importer (see :func:`spa.convert`).
        sizes: of open axes, by the axis' name or by ``input[axis]``: MACs are counted, and inputs made up, at these.

    Returns:
        The analysis: ``groups``, each with its size, places, readers, writers, and the reason where it is frozen.

    Raises:
        ModelError: the model is malformed.
        UnsupportedError: its opset is out of range.

    >>> import spa
    >>> analysis = spa.analyze("models/digits_resnet.onnx")
    >>> max(group.size for group in analysis.groups)
    128
    """
    source, _ = opened(model, example_inputs, convert_options or {}, Clock())
    with diagnosed(source):
        return couple(Graph(source.model, source.base), sizes)


def prove(model: Any, plan: Plan | str | os.PathLike[str], **options: Any) -> Proof:
    """Prove on random inputs that a plan's network computes what the masked original computes, before any repair.

    The equation is that of :mod:`spa.surgery.masking`, run by onnxruntime on your own network.

    Args:
        model: the dense model (see :func:`spa.analyze`).
        plan: the channels that are kept, or the path of a plan.
        **options: ``seeds`` (3), ``seed`` (0), ``threads`` (2), ``sizes`` of open axes, ``tolerance`` (1e-5; 2e-3 for
            networks of half precision or with quantised operators).

    Raises:
        PlanError: the plan does not fit the model, or every group in it crosses a normalisation.
        ModelError: onnxruntime cannot run the model.

    >>> import spa
    >>> result = spa.prune("models/digits_vgg.onnx", ratio=0.3, criterion="l2")
    >>> spa.prove("models/digits_vgg.onnx", result.plan).holds
    True
    """
    from spa.surgery.proof import prove as prove_plan

    return prove_plan(
        analyze(model, sizes=options.get("sizes")),
        plan if isinstance(plan, Plan) else Plan.load(os.fspath(plan)),
        **options,
    )


def prune(
    model: Any,
    *,
    request: Request | None = None,
    example_inputs: Any = None,
    convert_options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Result:
    """Remove channels from a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``; or a model of
            PyTorch, Keras or JAX, an object or a path (see :func:`spa.convert`). It is not changed.
        request: what to do; the options below change it.
        example_inputs: what a framework's model is called with, where tracing needs it.
        convert_options: further options of its importer (see :func:`spa.convert`).
        progress: called with the stage and the share of it that is done, while calibrating.
        **options: the fields of :class:`spa.Request`:

    Returns:
        The pruned model, the plan and a report.

    Raises:
        ModelError: the model is malformed.
        UnsupportedError: it is valid, but not covered.
        PlanError: nothing can be pruned, or not as much as asked for; or the options contradict each other.

    >>> import spa
    >>> result = spa.prune("models/digits_resnet.onnx", ratio=0.3, criterion="l2")
    >>> 0.29 < result.report.reached < 0.31
    True
    """
    if not isinstance(request, Request | None):
        raise PlanError(f"request is a {type(request).__name__}. Give a spa.Request; Request.from_toml reads a file.")
    request = Request.of(request, **named(model, options))
    request.refuse_idle_timing()
    clock = Clock()
    source, framework_model = opened(model, example_inputs, convert_options or {}, clock)
    return _pruned(source, framework_model, request, progress, clock)


def prune_file(path: str | os.PathLike[str], request: Request, progress: Progress = silent) -> Result:
    """Remove channels from a model in a file, with the weights left there as long as nothing needs to be run.

    Args:
        path: an ``.onnx`` file, which must not change until the result is saved; or a framework's.
        request: what to do.
        progress: as for :func:`prune`.

    Returns:
        As :func:`prune`; but large weights of ``model`` may be placeholders, whose values ``slices`` describe and
        :meth:`Result.save` copies from file to file.

    Raises:
        SpaError: as :func:`prune`.
    """
    request.refuse_idle_timing()
    clock = Clock()
    source, framework_model = opened(path, None, {}, clock, lazily=True)
    return _pruned(source, framework_model, request, progress, clock, lazily=framework_model is None)


def _pruned(
    source: Source,
    framework_model: FrameworkModel | None,
    request: Request,
    progress: Progress,
    clock: Clock,
    lazily: bool = False,
) -> Result:
    clock("load")
    with diagnosed(source):
        analysis = couple(Graph(source.model, source.base), request.timing.sizes)
        clock("analyse")
        equal = () if framework_model is None else equal_by_default(framework_model.kind, framework_model.source)
        job = prepare(analysis, request, equal=equal, progress=progress, clock=clock)
        job.lazy = lazily and job.runs_nothing and not is_rewritten(source.model)
        if not job.lazy:
            source = source.embedded()
        outcome = reach(job)
        if job.calibrated is None:
            source = replace(source, obstacle=obstacle(analysis.graph))
        report = report_of(job, outcome, source, framework_model)
    model = reunited(outcome.model)
    return Result(model, outcome.plan, report, request, analysis, source, framework_model, outcome.slices)


def _document_options(function: Any) -> None:
    """Write the fields of a request into a function's signature and docstring, where ``help`` shows them."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    fields = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for _, f in options()]
    function.__signature__ = signature.replace(parameters=[*own, *fields])
    lines = [
        f"            {f.name}: {f.metadata['help']}." + (f" Default: {default_of(f)}." if default_of(f) else "")
        for _, f in options()
    ]
    function.__doc__ = function.__doc__.replace(
        "the fields of :class:`spa.Request`:\n", "\n".join(["the fields of :class:`spa.Request`:", *lines, ""])
    )


_document_options(prune)


def opened(
    model: Any, example_inputs: Any, convert_options: Mapping[str, Any], clock: Clock, lazily: bool = False
) -> tuple[Source, FrameworkModel | None]:
    """Load a model, which is converted first where it is a framework's; ``lazily`` as in :func:`spa.model.io.load`."""
    if not kind_of(model, convert_options):
        source = load(model, lazily=lazily)
        with diagnosed(source):
            return simplified(source), None
    framework_model = import_model(model, example_inputs, convert_options)
    clock("convert")
    return simplified(load(framework_model.imported.model), fold=False), framework_model  # parameters keep their names


def report_of(job: Job, outcome: Outcome, source: Source, framework_model: FrameworkModel | None) -> Report:
    """Put together what is to be said of a pruning."""
    analysis, groups, branches = job.analysis, job.selection.groups, job.selection.branches
    costs = CostModel(analysis, (*groups, *branches))
    widths = [len(outcome.plan.kept.get(g.name, range(g.size))) for g in (*groups, *branches)]
    gone = [b for b, width in zip(branches, widths[len(groups) :], strict=True) if not width]
    before = _stored(analysis.graph, costs.evaluate(costs.sizes))
    after = _stored(Graph(outcome.model, source.base), costs.evaluate(widths))
    shares, curves = group_fractions(analysis), job.curves(outcome.candidate)
    return Report(
        before=before,
        after=after,
        requested=job.request.to_dict(),
        reached=_reached(job.request.goal.unit, before, after, outcome),
        groups=tuple(
            GroupReport(
                name=g.name,
                size=g.size,
                kept=0 if any(b.holds(g) for b in gone) else width,
                params=shares[g.name][0],
                macs=shares[g.name][1],
                crossings=g.crossings,
                loss=outcome.losses.get(g.name),
                curve=curves[g.name].sampled(CURVE_POINTS) if g.name in curves else (),
            )
            for g, width in zip(groups, widths[: len(groups)], strict=True)
        ),
        branches=tuple(_branches(job, outcome, gone)),
        frozen=tuple((g.name, g.size, g.frozen) for g in analysis.groups if g.frozen is not None and g.size > 1),
        skipped=job.selection.skipped,
        barriers=tuple(analysis.barriers.items()),
        notes=(
            *_alternatives(source.model),
            *job.selection.notes,
            *job.goal_notes,
            *job.input_notes,
            *(() if framework_model is None else framework_model.imported.notes),
            *outcome.notes,
            *job.repair_notes(outcome.plan),
            *_check_notes(outcome, source),
        ),
        seconds=job.clock.seconds,
        calibration=job.calibration_report(outcome),
        latency=None if outcome.latency is None else dict(outcome.latency),
        metric=outcome.metric,
        memory=peak_resident(),
        inputs=analysis.points.sizes[0],
        sizes=analysis.points.chosen,
        layers=layer_names(analysis),
        environment=environment(),
    )


def _branches(job: Job, outcome: Outcome, gone: Sequence[Part]) -> Iterator[BranchReport]:
    """Yield what is to be said of each residual branch that could go."""
    branches = job.selection.branches
    shares = zip(branches, *CostModel(job.analysis, branches).fractions(), strict=True)
    for branch, params, macs in shares:
        loss = outcome.losses.get(branch.name)
        yield BranchReport(name=branch.name, gone=branch in gone, params=params, macs=macs, loss=loss)


def _alternatives(model: ModelProto) -> tuple[str, ...]:
    """Say of two networks what was done with them."""
    condition = condition_of(model)
    if condition is None:
        return ()
    return (f"two networks, of which {condition!r} decides which one runs, were pruned together: MACs are of both",)


def _check_notes(outcome: Outcome, source: Source) -> Iterator[str]:
    """Say how the file is run before it takes its name, where that is not as a whole."""
    if source.obstacle is not None:
        yield f"the result has not been run: {source.obstacle}"
    elif (source.keeps_outside or outcome.slices) and is_large(outcome.model):
        yield "the result is too large to be run as a whole: before it is written it is run by windows of layers"


def _reached(unit: str, before: Cost, after: Cost, outcome: Outcome) -> float:
    """Return the fraction of the requested unit that was removed; a latency is measured, not counted."""
    if outcome.latency is not None:
        return float(1 - outcome.latency["measured"] / outcome.latency["dense"])
    dense = getattr(before, unit, 0)
    return 1 - getattr(after, unit) / dense if dense else 0.0


def _stored(graph: Graph, cost: Cost) -> Cost:
    """Return a cost with the parameters and bytes that are really in the file."""
    params, size = count_parameters(graph)
    return replace(cost, params=params, bytes=size)
