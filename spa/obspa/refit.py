"""Reconstruction: refit every reader behind removed channels, so that it gives what it gave in the dense network.

Layers are refitted one by one in topological order. The targets are the layer's outputs in the dense network; the
inputs are those that the pruned and so far refitted network gives it (asymmetric). At a residual sum the target
includes what the other branch has lost. Each fit is a damped least squares in closed form,

    Ŵ = (Cov(T, X') + λ W) (Cov(X', X') + λ I)⁻¹,   b̂ = E[T] − Ŵ E[X'].

Where a residual branch went, the constant in its place is fitted (:mod:`spa.obspa.constants`); where a detour went, a
scale and a shift (:mod:`spa.obspa.detours`).

The producer of removed channels is refitted together with their reader, see :mod:`spa.obspa.producers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np
from onnx import ModelProto

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis, Branch, Detour
from spa.coupling.plan import Plan, dropped
from spa.model.graph import Node
from spa.model.marks import marks_around
from spa.obspa.constants import LostBranch
from spa.obspa.detours import LostDetour
from spa.obspa.readers import kind_of
from spa.obspa.readers.base import DEFAULT_SETTINGS, FitSettings, ReaderKind, Reconstruction
from spa.obspa.resume import refit
from spa.progress import Progress, silent
from spa.running.journal import NOTHING_KEPT, Journal
from spa.running.memory import give_back
from spa.running.stream import Feeds, Stream

Draft = tuple[Plan, ModelProto]


def reconstruct(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    settings: FitSettings = DEFAULT_SETTINGS,
    threads: int = 2,
    nodes: Set[int] | None = None,
    progress: Progress = silent,
) -> Stream:
    """Refit the readers of a pruned model in place.

    Args:
        analysis: the dense model.
        plan: the kept channels.
        pruned: the model that surgery made; its weights are replaced.
        batches: the calibration inputs.
        settings: the options of the fits.
        threads: the number of onnxruntime's threads.
        nodes: indices (in the dense network) of the nodes to refit; all by default.
        progress: called with a stage and the fraction of it that is done.

    Returns:
        The pruned network's stream, which has recorded every edit.
    """
    return reconstruct_together(analysis, [(plan, pruned)], batches, settings, threads, nodes, progress)[0]


def reconstruct_together(
    analysis: Analysis,
    drafts: Sequence[Draft],
    batches: Sequence[Feeds],
    settings: FitSettings = DEFAULT_SETTINGS,
    threads: int = 2,
    nodes: Set[int] | None = None,
    progress: Progress = silent,
    journals: Sequence[Journal] = (),
) -> list[Stream]:
    """Refit the readers of several pruned models in place, beside one run of the dense network.

    Each comes out as :func:`reconstruct` alone would leave it.

    Args:
        analysis: the dense model.
        drafts: plans, and the models that surgery made of them.
        batches: the calibration inputs.
        settings: the options of the fits.
        threads: the number of onnxruntime's threads.
        nodes: indices (in the dense network) of the nodes to refit; all by default.
        progress: called with a stage and the fraction of it that is done.
        journals: for each network what keeps its refits; refits that are kept are repeated.

    Returns:
        The pruned networks' streams.
    """
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    repairs = []
    for (plan, pruned), journal in zip(drafts, journals or [NOTHING_KEPT] * len(drafts), strict=True):
        reconstruction = Reconstruction(
            analysis=analysis,
            kept=analysis.kept(plan.masks(analysis)),
            dense=dense,
            pruned=Stream(pruned, analysis.graph.base, batches, threads),
            rng=np.random.default_rng(settings.seed),
            settings=settings,
        )
        repairs.append((reconstruction, dict(_refits(reconstruction, nodes)), journal))
    for index in sorted({index for _, refits, _ in repairs for index in refits}):
        node = dense.graph.nodes[index]
        progress("reconstruct", index / len(dense.graph.nodes))
        dense.after(node)
        for reconstruction, refits, journal in repairs:
            if index in refits:
                kind, pruned_node = refits[index]
                reconstruction.pruned.before(pruned_node)
                refit(journal, kind, reconstruction, node, pruned_node)
                give_back()
    return [reconstruction.pruned for reconstruction, _, _ in repairs]


def _refits(reconstruction: Reconstruction, nodes: Set[int] | None) -> Iterator[tuple[int, tuple[ReaderKind, Node]]]:
    """Prepare the refits of a pruned network; yield by the dense node's index the reader's kind and the pruned node."""
    dense, pruned = reconstruction.dense, reconstruction.pruned
    gone = lost_parts(reconstruction.analysis, reconstruction.kept)
    for node, pruned_node in layers(reconstruction.analysis, reconstruction.kept, dense, pruned):
        kind = gone.get(node.index) or kind_of(pruned.graph, pruned_node)
        if kind is not None and kind.may_refit(reconstruction, node, pruned_node):
            kind.prepare(reconstruction, node, pruned_node)
            if nodes is None or node.index in nodes:
                yield node.index, (kind, pruned_node)


def layers(analysis: Analysis, kept: Kept, dense: Stream, pruned_stream: Stream) -> Iterator[tuple[Node, Node]]:
    """Yield each reader whose inputs pruning has changed, as it is in the dense and in the pruned network.

    The ends of parts that went are among them.
    """
    around = marks_around(analysis.graph)
    for index in _changed(analysis, kept):
        node = dense.graph.nodes[index]
        pruned_node = pruned_stream.graph.producer.get(next(o for o in node.outputs if o))
        counted = _is_counted(around.get(index, ()))
        if pruned_node is not None and counted and dense.sees(node) and pruned_stream.sees(pruned_node):
            yield node, pruned_node


def _is_counted(marks: Sequence[Node]) -> bool:
    """Tell whether bodies run as often in both networks: as data decide, they would have other samples in each."""
    return all(m.op in ("ScanEnter", "IfThen") or bool(m.attributes.get("counted")) for m in marks)


def left_out(analysis: Analysis, kept: Kept) -> Iterator[tuple[Node, str]]:
    """Yield the readers in loops and branches that pruning changes and nothing refits, with the reason, a clause."""
    around = marks_around(analysis.graph)
    stream = Stream(analysis.graph.model, analysis.graph.base, ()) if around else None
    for index in _changed(analysis, kept) if stream is not None else ():
        node = analysis.graph.nodes[index]
        if stream is None or index not in around or kind_of(analysis.graph, node) is None:
            continue
        why = stream.why_unseen(node)
        if why is None and not _is_counted(around[index]):
            why = "lies in a loop that runs as often as data decide"
        if why is not None:
            yield node, why


def lost_parts(analysis: Analysis, kept: Kept) -> dict[int, LostBranch | LostDetour]:
    """Return by the index of its end what a part that went has become."""
    gone = dropped(analysis, kept)
    found: dict[int, LostBranch | LostDetour] = {b.end: LostBranch(b) for b in gone if isinstance(b, Branch)}
    return found | {d.end: LostDetour(d) for d in gone if isinstance(d, Detour)}


def _changed(analysis: Analysis, kept: Kept) -> list[int]:
    """Return the indices of the readers whose inputs pruning has changed, directly or through earlier layers."""
    laws, ends = analysis.laws, lost_parts(analysis, kept).keys()
    cut = [i for i, law in laws.items() if any(kept.size(r.expr) != r.expr.size for r in law.reads)]
    return sorted(i for i in analysis.graph.behind({*cut, *ends}) if i in laws and (laws[i].reads or i in ends))
