"""Reconstruction: every linear layer after a cut is refitted so that it does what it did in the dense network.

Layer by layer in topological order. The target is what the layer gives in the dense network, the inputs are what the
network pruned and refitted so far gives it (asymmetric), and at a residual sum the target includes what the other
branch has lost. Each fit is a closed-form least squares with the mean moved into the bias. The layer before a cut is
refitted with its reader, see `spa.obspa.producers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import numpy as np
from onnx import ModelProto

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.model.graph import Node
from spa.obspa.readers import kind_of
from spa.obspa.readers.base import DEFAULT_SETTINGS, FitSettings, Reconstruction
from spa.running.stream import Feeds, Stream


def reconstruct(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    settings: FitSettings = DEFAULT_SETTINGS,
    threads: int = 2,
    nodes: Set[int] | None = None,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Stream:
    """Refit the readers of a pruned model in place.

    Args:
        analysis: the dense model.
        plan: what was pruned.
        pruned: the model that surgery gave; its weights are replaced.
        batches: calibration inputs.
        settings: how fits are made.
        threads: of onnxruntime.
        nodes: the only nodes (by index in the dense network) to refit; all by default.
        progress: called with a stage and the share that is done.

    Returns:
        The pruned network's stream, which knows every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    small = Stream(pruned, analysis.graph.base, batches, threads)
    at = Reconstruction(analysis, kept, dense, small, np.random.default_rng(settings.seed), settings)
    changed = []
    for node, twin in layers(analysis, kept, dense, small):
        kind = kind_of(small.graph, twin)
        if kind is not None and kind.may_refit(at, node, twin):
            kind.prepare(at, node, twin)
            changed.append((kind, node, twin))
    for kind, node, twin in changed:
        if nodes is not None and node.index not in nodes:
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        small.before(twin)
        kind.refit(at, node, twin)
    return small


def layers(analysis: Analysis, kept: Kept, dense: Stream, small: Stream) -> Iterator[tuple[Node, Node]]:
    """Yield the nodes that read what pruning has changed, in the dense and in the pruned network."""
    for index in _changed(analysis, kept):
        node = dense.graph.nodes[index]
        twin = small.graph.producer.get(next(o for o in node.outputs if o))
        if twin is not None:
            yield node, twin


def _changed(analysis: Analysis, kept: Kept) -> list[int]:
    """Return nodes with weights that read something which pruning has changed."""
    changed: set[str] = set()
    found = []
    for index in sorted(analysis.laws):
        law = analysis.laws[index]
        cut = any(kept.size(r.expr) != r.expr.size for r in law.reads)
        if cut or changed.intersection(law.node.inputs):
            changed.update(law.node.outputs)
            if law.reads:
                found.append(index)
    return found
