"""Reconstruction: refit every reader behind removed channels, so that it gives what it gave in the dense network.

Layers are refitted one by one in topological order. The targets are the layer's outputs in the dense network; the
inputs are those that the pruned and so far refitted network gives it (asymmetric). At a residual sum the target
includes what the other branch has lost. Each fit is a damped least squares in closed form,

    Ŵ = (Cov(T, X') + λ W) (Cov(X', X') + λ I)⁻¹,   b̂ = E[T] − Ŵ E[X'].

The producer of removed channels is refitted together with their reader, see :mod:`spa.obspa.producers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np
from onnx import ModelProto

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.model.graph import Node
from spa.model.marks import marks_around
from spa.obspa.readers import kind_of
from spa.obspa.readers.base import DEFAULT_SETTINGS, FitSettings, Reconstruction
from spa.progress import Progress, silent
from spa.running.memory import give_back
from spa.running.stream import Feeds, Stream


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
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    pruned_stream = Stream(pruned, analysis.graph.base, batches, threads)
    reconstruction = Reconstruction(
        analysis=analysis,
        kept=kept,
        dense=dense,
        pruned=pruned_stream,
        rng=np.random.default_rng(settings.seed),
        settings=settings,
    )
    changed = []
    for node, pruned_node in layers(analysis, kept, dense, pruned_stream):
        kind = kind_of(pruned_stream.graph, pruned_node)
        if kind is not None and kind.may_refit(reconstruction, node, pruned_node):
            kind.prepare(reconstruction, node, pruned_node)
            changed.append((kind, node, pruned_node))
    for kind, node, pruned_node in changed:
        if nodes is not None and node.index not in nodes:
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        pruned_stream.before(pruned_node)
        kind.refit(reconstruction, node, pruned_node)
        give_back()
    return pruned_stream


def layers(analysis: Analysis, kept: Kept, dense: Stream, pruned_stream: Stream) -> Iterator[tuple[Node, Node]]:
    """Yield each reader whose inputs pruning has changed, as it is in the dense and in the pruned network."""
    around = marks_around(analysis.graph)
    for index in _changed(analysis, kept):
        node = dense.graph.nodes[index]
        pruned_node = pruned_stream.graph.producer.get(next(o for o in node.outputs if o))
        # A body that ran as often as the weights have it would have other samples in the two networks.
        counted = all(m.op == "ScanEnter" or m.attributes.get("counted") for m in around.get(index, ()))
        if pruned_node is not None and counted and dense.sees(node) and pruned_stream.sees(pruned_node):
            yield node, pruned_node


def _changed(analysis: Analysis, kept: Kept) -> list[int]:
    """Return the indices of the readers whose inputs pruning has changed, directly or through earlier layers."""
    laws = analysis.laws
    cut = [i for i, law in laws.items() if any(kept.size(r.expr) != r.expr.size for r in law.reads)]
    return sorted(i for i in analysis.graph.behind(cut) if i in laws and laws[i].reads)
