"""Bias compensation, the cheapest reconstruction: each layer after a cut gives the mean that it gave before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto

from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.criteria.activation import signal
from spa.obspa.affine import tail
from spa.obspa.linear import linear
from spa.obspa.refit import layers
from spa.obspa.shift import Shift
from spa.running.stream import Feeds, Stream, sliced


def compensate(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    threads: int = 2,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Stream:
    """Move the biases of a pruned model in place, by E[W x] of the dense network less E[W' x'] of the pruned one.

    FLAP (arXiv 2312.11983, section 4) adds W_:S E[x_S] of the removed inputs S. The same comes out here in the first
    layers after a cut; later ones make up for what the cut does to the means of the inputs that remain, too.

    Args:
        analysis: the dense model.
        plan: what was pruned.
        pruned: the model that surgery gave; its constants are replaced, and layers without a bias may get one.
        batches: calibration inputs.
        threads: of onnxruntime.
        progress: called with a stage and the share that is done.

    Returns:
        The pruned network's stream, which knows every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    small = Stream(pruned, analysis.graph.base, batches, threads)
    for node, twin in layers(analysis, kept, dense, small):
        lin = linear(small.graph, twin)
        if lin is None or lin.channel_axis is None:
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        small.after(twin)
        name, axis = twin.outputs[0], lin.channel_axis
        blocks, width, _ = lin.size(small.graph)
        shift = Shift.place(small, lin, tail(small.graph, twin, blocks * width, axis), [lin])
        if shift is None:
            continue
        before = signal((sliced(kept, analysis.axes.get(name), b[name]) for b in dense.live), axis)
        change = before.mean - signal((b[name] for b in small.live), axis).mean
        shift.move(change)
        if shift.name in twin.inputs:  # the layer has run already
            for batch in small.live:
                batch[name] += np.expand_dims(change, tuple(range(1, batch[name].ndim - axis % batch[name].ndim)))
    return small
