"""The public functions: analyse and prune."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from onnx import ModelProto, TensorProto

from spa import criteria
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.cost import Cost, CostModel, count_parameters, group_shares
from spa.coupling.plan import Plan
from spa.doors import FrameworkModel, convert_result, import_model
from spa.errors import PlanError
from spa.frameworks.kinds import ONE_HEAD_SIZE, kind_of
from spa.job import GATE, OBSPA, ZERO, Clock, Job, Outcome, calibrate, inputs, reconstruction, running
from spa.model.graph import Graph
from spa.model.io import Source, load
from spa.progress import Progress, silent
from spa.report import GroupReport, Report
from spa.running.memory import peak_resident
from spa.widths.budget import Budget
from spa.widths.equal import HEADS, equal_sets
from spa.widths.sparsity import suggested_ratio

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from spa.calibration.data import Calibration


@dataclass(frozen=True)
class Result:
    """A pruned model and how it came about.

    Attributes:
        model: the pruned model.
        plan: which channels were kept.
        report: what it cost and what was left alone.
        analysis: the dense model's groups.
        source: where the dense model came from.
        origin: the framework's model that was given, where it was one.
    """

    model: ModelProto
    plan: Plan
    report: Report
    analysis: Analysis
    source: Source
    origin: FrameworkModel | None = None

    @property
    def pruned(self) -> Any:
        """The pruned model as the kind of object that was given; see :meth:`to`."""
        kind = None if self.origin is None else self.origin.imported.kind
        return self.to(kind if kind in ("torch", "keras", "jax") else "onnx")

    def to(self, target: str) -> Any:
        """The pruned model for a framework, compared with the ONNX model.

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
            SpaError: the model failed its checks, or the file cannot be written.
        """
        from spa.exporters.onnx import write

        external = any(t.data_location == TensorProto.EXTERNAL for t in self.source.model.graph.initializer)
        pruned = Source(self.model, self.source.path, self.source.base)
        write(pruned, path, force=force, external=external, name="the pruned model")

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
    ratio: float | str | None = None,
    of: str = "macs",
    max_distortion: float | None = None,
    latency_ms: float | None = None,
    ranking: str = "global",
    criterion: str = "obspa",
    data: Any = None,
    samples: int = 512,
    labels: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reconstruct: str | bool | None = None,
    recover: int = 0,
    norm: str = "mean",
    agg: str = "mean",
    ignore: Sequence[str] = (),
    round_to: int = 8,
    min_width: int = 1,
    cross_norm: bool = False,
    equal: Sequence[str] | None = None,
    seed: int = 0,
    threads: int = 2,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    plan: Plan | None = None,
    gradients: Mapping[str, Any] | None = None,
    hessian_gradients: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    convert_options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Result:
    """Remove channels from a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``; or a model of
            PyTorch, Keras or JAX, an object or a path (see :func:`spa.convert`). It is not changed.
        ratio: the fraction to remove, between 0 and 1, or ``"auto"``, as much as the PQ index of the weights suggests
            (:mod:`spa.widths.sparsity`); 0.5 by default.
        of: of what: ``macs``, ``params``, ``channels`` or ``latency``, in onnxruntime on this machine.
        max_distortion: instead of a ratio: remove as much as changes the outputs by no more than this, measured on the
            inputs after reconstruction as mean squared change over variance; 0.01 is hardly noticed.
        latency_ms: the latency that the pruned network shall have, in milliseconds, instead of a ratio.
        ranking: ``global``, ``uniform`` or ``isomorphic`` (see :class:`spa.widths.budget.Budget`).
        criterion: how channels are scored: ``obspa``, by what their removal costs after all other channels have made
            up for it; one of :func:`spa.criteria.activation_names`, by the weights and what they are multiplied with;
            of :func:`spa.criteria.gradient_names`, by a loss's derivatives; ``gate``, by what gates of the channels do
            to the outputs, estimated by running the model; of :func:`spa.criteria.names`, by the weights alone; or
            ``zero``: precisely the channels whose removal changes nothing, whatever the budget.
        data: inputs to learn from: a file (``.npz``, ``.npy``), a folder, an iterable of feeds, or None, which makes
            them up (see :func:`spa.calibration.data.read_data`).
        samples: how many inputs to use at most.
        labels: the name of the labels in the data; they are used for nothing but the reported accuracy.
        mean: what is subtracted from images (of a folder, or made up), per channel.
        std: what they are then divided by.
        reconstruct: how what remains is made to do what went: ``full`` (or True) refits all layers, ``bias`` moves
            their means alone, ``none`` (or False) leaves them as they were; ``auto`` (or None) is ``full`` with
            ``obspa``, ``bias`` with ``flap``, else ``none``.
        recover: epochs of a short training in PyTorch by the dense model's outputs on the same inputs, without labels.
        norm: how scores are normalised within a parameter; ``flap`` always standardises them.
        agg: how the scores of a group's parameters are combined.
        ignore: shell patterns; groups are left alone where a parameter, a node or an operator matches.
        round_to: widths become multiples of this, which runtimes like.
        min_width: no group becomes narrower.
        cross_norm: prune groups over which a normalisation takes statistics, too (residual streams of transformers).
        equal: what keeps the same share of its channels: shell patterns, each for the groups of which it matches a
            place, ``tensor[axis]``; and the word ``heads`` for the head sizes of each attention, of which classes of
            PyTorch and JAX know one. By default ``heads`` for models of these, else nothing
            (see :mod:`spa.widths.equal`).
        seed: of everything random.
        threads: of onnxruntime and of linear algebra, while calibrating and timing.
        batch: the size of open batch axes while timing.
        sizes: of other open axes while timing (see :func:`spa.running.bench.bench`).
        plan: keep exactly what this plan says; the options above that choose are then ignored.
        gradients: by initializer, from any framework, for ``snip`` and ``taylor``; mean squared ones for ``fisher``.
            Without them PyTorch takes the derivatives of the cross-entropy on labelled data.
        hessian_gradients: the Hessian times the gradient, by initializer, for ``crop`` and ``grasp``.
        example_inputs: what a framework's model is called with, where tracing needs it.
        convert_options: further options of its importer (see :func:`spa.convert`).
        progress: called with the stage and the share of it that is done, while calibrating.

    Returns:
        The pruned model, the plan and a report.

    Raises:
        ModelError: the model is malformed.
        UnsupportedError: it is valid, but not covered.
        PlanError: nothing can be pruned, or not as much as asked for.
    """
    clock = Clock()
    came = import_model(model, example_inputs, convert_options or {}) if kind_of(model, convert_options) else None
    if came is not None:
        clock("convert")
    source = load(model if came is None else came.imported.model)
    clock("load")
    analysis = couple(Graph(source.model, source.base))
    clock("analyse")
    criteria.check(criterion, norm, agg, extra=(OBSPA, GATE, ZERO))
    of = _unit(ratio, of, latency_ms, max_distortion)
    how = reconstruction(reconstruct, criterion if plan is None else None)
    chosen, skipped = (
        (list(analysis.prunable), []) if plan is not None else _choose_groups(analysis, ignore, cross_norm)
    )
    equal = (HEADS,) if equal is None and came is not None and came.kind in ONE_HEAD_SIZE else tuple(equal or ())
    together = equal_sets(analysis, chosen, equal) if plan is None else ()
    number = ratio if isinstance(ratio, int | float) else 0.5
    budget = Budget(number, of, ranking, round_to, min_width, together)
    if plan is None and ratio == "auto" and max_distortion is None:
        budget = replace(budget, ratio=suggested_ratio(analysis, chosen, budget))
    derived = criterion in criteria.gradient_names() and gradients is None and hessian_gradients is None
    looks = derived or max_distortion is not None or criterion in (OBSPA, GATE, *criteria.activation_names())
    given = calibrated = dense_accuracy = None
    if (plan is None and looks) or recover > 0 or how != "none":
        given = inputs(analysis, data, labels, samples, seed, mean, std)
        dense_accuracy = _accuracy(source.model, source, given, threads)
        calibrated = calibrate(analysis, given, data is None, threads, seed, progress)
        clock("calibrate")
    marks = None if given is None else given.labels
    job = Job(analysis, chosen, criterion, norm, agg, seed, how, calibrated, marks, gradients, hessian_gradients, clock)
    outcome = job.run(budget, plan, latency_ms, max_distortion, (threads, batch, sizes or {}))
    if recover > 0:
        outcome = job.recovered(outcome, recover)
    requested: dict[str, Any] = {"plan": True}
    if plan is None:
        asked = {"latency_ms": latency_ms, "max_distortion": max_distortion}
        requested = {k: v for k, v in asked.items() if v is not None} or {"ratio": budget.ratio}
        requested |= {"of": of, "ranking": ranking, "criterion": criterion, "round_to": round_to}
        requested |= {"norm": norm, "agg": agg, "ignore": list(ignore), "min_width": min_width}
        requested |= {"cross_norm": cross_norm, "seed": seed} | ({"equal": list(equal)} if equal else {})
    if given is not None:
        requested |= {"reconstruct": how, "recover": recover}
    accuracies = [dense_accuracy, _accuracy(outcome.model, source, given, threads)]
    report = _report(analysis, chosen, skipped, outcome, source, requested, clock.seconds)
    report = _with_origins(report, outcome, given, accuracies, came)
    if calibrated is not None and how != "none":
        report = replace(report, notes=(*report.notes, *calibrated.notes()))
    return Result(outcome.model, outcome.plan, report, analysis, source, came)


def _accuracy(model: ModelProto, source: Source, given: Calibration | None, threads: int) -> float | None:
    """Top-1 in percent, where there are labels."""
    if given is None or given.labels is None:
        return None
    from spa.obspa.pipeline import accuracy

    with running():
        return accuracy(model, source.base, given, threads)


def _with_origins(
    report: Report,
    outcome: Outcome,
    given: Calibration | None,
    accuracies: list[float | None],
    came: FrameworkModel | None,
) -> Report:
    """The report with what is to be said of the framework's model and of the inputs."""
    if came is not None:
        report = replace(report, notes=(*came.imported.notes, *report.notes))
    if given is None:
        return report
    calibration: dict[str, Any] = {"source": given.source, "samples": given.samples, **outcome.changes}
    if given.labels is not None:
        calibration["accuracy"] = accuracies
    return replace(report, calibration=calibration, notes=(*given.notes, *report.notes))


def _unit(ratio: float | str | None, of: str, latency_ms: float | None, max_distortion: float | None) -> str:
    """The budget's unit, where what is asked for makes sense together."""
    if isinstance(ratio, str) and ratio != "auto":
        raise PlanError(f"ratio is {ratio!r}. Give a number between 0 and 1, or 'auto'.")
    number = ratio if ratio != "auto" else None
    asked = {"ratio": number, "latency_ms": latency_ms, "max_distortion": max_distortion}
    if len(several := [f"{k}={v:g}" for k, v in asked.items() if isinstance(v, int | float)]) > 1:
        raise PlanError(f"{' and '.join(several)} are asked for together. Choose one.")
    for name in ("latency_ms", "max_distortion"):
        value = asked[name]
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise PlanError(f"{name} is {value:g}. Choose more than 0.")
    if of == "latency" and (ratio == "auto" or max_distortion is not None):
        raise PlanError("a budget of latency takes a number. Give a ratio or latency_ms, or another unit.")
    if latency_ms is None:
        return of
    if ratio == "auto" or of not in ("macs", "latency"):  # macs is the default
        what = "ratio 'auto'" if ratio == "auto" else f"a budget of {of}"
        raise PlanError(f"a latency of {latency_ms:g} ms and {what} are asked for together. Leave one of the two out.")
    return "latency"


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
    if not chosen:
        raise PlanError(_nothing(analysis, skipped))
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
    outcome: Outcome,
    source: Source,
    requested: dict[str, Any],
    seconds: dict[str, float],
) -> Report:
    costs = CostModel(analysis, [g.dim for g in chosen])
    widths = [len(outcome.plan.kept.get(g.name, range(g.size))) for g in chosen]
    before, after = costs.evaluate(costs.sizes), costs.evaluate(widths)
    before = Cost(*_stored(analysis.graph, before))
    after = Cost(*_stored(Graph(outcome.model, source.base), after))
    unit = requested.get("of", "macs")
    dense = getattr(before, unit, 0)  # a latency is measured, not counted
    reached = 1 - getattr(after, unit) / dense if dense else 0.0
    if (timed := outcome.latency) is not None:
        reached = 1 - timed["measured"] / timed["dense"]
    shares = group_shares(analysis)
    return Report(
        before,
        after,
        requested,
        reached,
        tuple(
            GroupReport(g.name, g.size, w, *shares[g.name], g.crossings, outcome.losses.get(g.name))
            for g, w in zip(chosen, widths, strict=True)
        ),
        tuple((g.name, g.size, g.frozen) for g in analysis.groups if g.frozen is not None and g.size > 1),
        tuple(skipped),
        tuple(analysis.barriers.items()),
        outcome.notes,
        seconds,
        latency=None if outcome.latency is None else dict(outcome.latency),
        memory=peak_resident(),
    )


def _stored(graph: Graph, cost: Cost) -> tuple[int, int, int, int]:
    params, size = count_parameters(graph)
    return params, cost.macs, size, cost.channels
