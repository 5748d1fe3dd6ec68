"""Batch statistics: let the dense network normalise synthetic inputs by their own mean and variance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from spa.model.graph import Graph
from spa.running.stream import Feeds, Stream


def with_batch_statistics(graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> ModelProto | None:
    """Copy a network and replace the running statistics of its BatchNormalizations by those of some inputs.

    Synthetic inputs drive activations far from where real ones lie. Normalised by their own statistics, they leave each
    BatchNormalization with the mean and variance that real inputs have there.

    Args:
        graph: the network; not changed.
        batches: the inputs.
        threads: the number of onnxruntime's threads.

    Returns:
        The copy; None if the network has no BatchNormalization with statistics of its own.
    """
    if not any(node.op == "BatchNormalization" for node in graph.nodes):
        return None
    copy = ModelProto()
    copy.CopyFrom(graph.model)
    stream = Stream(copy, graph.base, batches, threads)
    replaced = False
    for node in stream.graph.nodes:
        if node.op != "BatchNormalization" or node.domain or len(node.inputs) < 5:
            continue
        names = node.inputs[3:5]
        known = all(n in stream.graph.constants and len(stream.graph.users[n]) == 1 for n in names)
        if not known or not stream.sees(node):
            continue
        stream.before(node)
        count, mean, square = 0, np.zeros(()), np.zeros(())
        for batch in stream.live:
            x = batch[node.inputs[0]]
            axes = (0, *range(2, x.ndim))
            mean = mean + x.sum(axis=axes, dtype=np.float64)
            square = square + np.square(x).sum(axis=axes, dtype=np.float64)
            count += x.size // x.shape[1]
        mean = mean / count
        variance = np.maximum(square / count - mean**2, 0)
        if not np.isfinite(variance).all():
            continue
        for name, value in zip(names, (mean, variance), strict=True):
            stream.replace(name, value.astype(stream.graph.array(name).dtype))
        replaced = True
    return copy if replaced else None
