"""The public functions: analyse and prune."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from onnx import ModelProto, TensorProto

from spa import criteria, surgery
from spa.budget import Budget, choose
from spa.cost import Cost, CostModel, count_parameters, group_shares
from spa.coupling import Analysis, Group, couple
from spa.errors import PlanError
from spa.graph import Graph
from spa.io import Source, load
from spa.plan import Plan, make_plan
from spa.report import GroupReport, Report

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


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
    ratio: float = 0.5,
    of: str = "macs",
    ranking: str = "global",
    criterion: str = "l2",
    norm: str = "mean",
    agg: str = "mean",
    ignore: Sequence[str] = (),
    round_to: int = 8,
    min_width: int = 1,
    cross_norm: bool = False,
    seed: int = 0,
    plan: Plan | None = None,
) -> Result:
    """Remove channels from a model.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``; not changed.
        ratio: the fraction to remove, between 0 and 1.
        of: of what: ``macs``, ``params`` or ``channels``.
        ranking: ``global``, ``uniform`` or ``isomorphic`` (see :class:`spa.budget.Budget`).
        criterion: how channels are scored (see :func:`spa.criteria.names`).
        norm: how scores are normalised within a parameter.
        agg: how the scores of a group's parameters are combined.
        ignore: shell patterns; groups are left alone where a parameter, a node or an operator matches.
        round_to: widths become multiples of this, which runtimes like.
        min_width: no group becomes narrower.
        cross_norm: prune groups over which a normalisation takes statistics, too (residual streams of transformers).
        seed: of the criterion ``random``.
        plan: keep exactly what this plan says; the options above are then ignored.

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
    requested: dict[str, Any] = {"plan": True}
    if plan is None:
        budget = Budget(ratio, of, ranking, round_to, min_width)
        requested = {
            "ratio": ratio,
            "of": of,
            "ranking": ranking,
            "criterion": criterion,
            "round_to": round_to,
        }
        requested |= {"norm": norm, "agg": agg, "ignore": list(ignore), "min_width": min_width}
        requested |= {"cross_norm": cross_norm, "seed": seed}
        if not chosen:
            raise PlanError(_nothing(analysis, skipped))
        scores = criteria.score(analysis, chosen, criterion, norm, agg, seed)
        clock("score")
        choice = choose(analysis, chosen, scores, budget)
        notes = choice.notes
        plan = make_plan(analysis, choice.kept)
        clock("choose")
    else:
        chosen, skipped = list(analysis.prunable), []
    pruned = surgery.apply(analysis, plan)
    clock("prune")
    report = _report(analysis, chosen, skipped, plan, pruned, source, requested, notes, clock.seconds)
    return Result(pruned, plan, report, analysis, source)


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
    dense = getattr(before, unit)
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
