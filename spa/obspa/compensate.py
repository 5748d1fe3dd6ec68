"""Bias compensation, the cheapest repair: move the bias of each reader so that its mean output stays the same.

FLAP (arXiv 2312.11983, section 4) adds W_:S E[x_S] for the removed inputs S. In the first readers behind removed
channels the result here is the same; later ones also make up for how the means of their remaining inputs have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.criteria.activation import signal
from spa.obspa.affine import find_tail
from spa.obspa.bias_slot import BiasSlot
from spa.obspa.linear import linear
from spa.obspa.readers.base import FitSettings, Reconstruction
from spa.obspa.refit import layers, lost_parts
from spa.progress import Progress, silent
from spa.running.stream import Feeds, Stream, sliced


def compensate(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    threads: int = 2,
    progress: Progress = silent,
) -> Stream:
    """Add E[W x] of the dense network less E[W' x'] of the pruned one to the biases of a pruned model, in place.

    Args:
        analysis: the dense model.
        plan: the kept channels.
        pruned: the model that surgery made; its constants are replaced, and layers without a bias may get one.
        batches: the calibration inputs.
        threads: the number of onnxruntime's threads.
        progress: called with a stage and the fraction of it that is done.

    Returns:
        The pruned network's stream, which has recorded every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    pruned_stream = Stream(pruned, analysis.graph.base, batches, threads)
    settings = FitSettings(carriers=False)
    reconstruction = Reconstruction(analysis, kept, dense, pruned_stream, np.random.default_rng(0), settings)
    gone = lost_parts(analysis, kept)
    for node, pruned_node in layers(analysis, kept, dense, pruned_stream):
        if node.index in gone:
            dense.after(node)
            pruned_stream.before(pruned_node)
            gone[node.index].refit(reconstruction, node, pruned_node)
            continue
        lin = linear(pruned_stream.graph, pruned_node)
        if lin is None or lin.channel_axis is None:
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        pruned_stream.after(pruned_node)
        name, axis = pruned_node.outputs[0], lin.channel_axis
        blocks, width, _ = lin.size(pruned_stream.graph)
        slot = BiasSlot.find(
            pruned_stream, lin, find_tail(pruned_stream.graph, pruned_node, blocks * width, axis), [lin]
        )
        if slot is None:
            continue
        before = signal((sliced(kept, analysis.axes.get(name), b[name]) for b in dense.live), axis)
        change = before.mean - signal((b[name] for b in pruned_stream.live), axis).mean
        slot.move(change)
        if slot.vector.decoded in pruned_node.inputs:  # the layer has run already, its output must follow
            for batch in pruned_stream.live:
                batch[name] += np.expand_dims(change, tuple(range(1, batch[name].ndim - axis % batch[name].ndim)))
    return pruned_stream
