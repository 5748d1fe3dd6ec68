"""Products of two activations as readers: the query and the key of an attention."""

from __future__ import annotations

from functools import partial

import numpy as np

from spa.coupling import Analysis
from spa.graph import Graph, Node
from spa.obspa.curves import Reader, Seen
from spa.obspa.moments import at_least_single
from spa.obspa.stream import Stream

Array = np.ndarray


def pair(graph: Graph, node: Node) -> tuple[str, str] | None:
    """The two activations that a MatMul multiplies, or None where the node is something else."""
    if node.op != "MatMul" or node.domain or any(n in graph.constants for n in node.inputs):
        return None
    return node.inputs[0], node.inputs[1]


def observe(analysis: Analysis, stream: Stream, node: Node) -> list[Seen]:
    """The product as a reader of the axis that it sums over.

    Index j adds q_j k_jᵀ to the product. With one weight of one for each index, the second moments of these terms are
    the elementwise product of QᵀQ and KᵀK, summed over samples and heads. The loss is relative to the product's energy.
    """
    axes = analysis.axes.get(node.inputs[0])
    if axes is None or len(axes) < 2 or len(analysis.axes.get(node.inputs[1], ())) < 2:
        return []
    h = np.zeros((axes[-1].size, axes[-1].size))
    for batch in stream.live:
        q, k = (at_least_single(batch[n]) for n in node.inputs)
        both = (q.swapaxes(-1, -2) @ q) * (k @ k.swapaxes(-1, -2))
        h += both.sum(axis=tuple(range(both.ndim - 2)), dtype=np.float64)
    energy = float(h.sum())
    w = np.full((1, 1, len(h)), 1 / np.sqrt(energy if energy > 0 else 1.0))
    return [Seen(partial(Reader, h[None], w), analysis.space.resolve(axes[-1]))]
