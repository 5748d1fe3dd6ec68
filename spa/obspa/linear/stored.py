"""Change a layer's constants in a stream, and what has been computed from them already."""

from __future__ import annotations

import numpy as np

from spa.model.decoded import Constant, Grid
from spa.obspa.linear.base import Linear
from spa.running.stream import Stream

Array = np.ndarray


def store(stream: Stream, lin: Linear, matrix: Array) -> None:
    """Replace a layer's weights, and what has been computed from them already.

    Integers are rounded to their grid, whose scales grow where the weights would be cut off.

    Args:
        stream: the network.
        lin: the layer.
        matrix: (blocks, outputs, inputs).
    """
    value = lin.laid_out(matrix, stream.graph)
    if isinstance(lin.weights, Grid):
        _grow(stream, lin, lin.weights, value)
    stream.replace(lin.weight, lin.weights.encoded(stream.graph, value))
    _renew(stream, lin.weights)


def _grow(stream: Stream, lin: Linear, weights: Grid, value: Array) -> None:
    """Let the scales of integers grow so that floats fit on their grid, where nothing else reads these scales.

    Those of an integer bias grow with them: runtimes take them to be the products of the scales of inputs and weights.
    """
    graph, added = stream.graph, lin.added
    growth = weights.excess(graph, value)
    scales = [weights.scale_name]
    if isinstance(added, Grid):
        by_output = lin.as_matrix(np.broadcast_to(growth, value.shape), graph)
        if growth.size > 1 and (by_output != by_output[:, :, :1]).any():
            return
        scales.append(added.scale_name)
    sizes = {graph.array(name).size for name in scales}
    if growth.max() <= 1 or sizes != {growth.size} or any(len(graph.users[name]) != 1 for name in scales):
        return
    bias = added.value(graph) if isinstance(added, Grid) else None
    for name in scales:
        old = graph.array(name)
        stream.replace(name, np.asarray(old * growth.reshape(old.shape), old.dtype))
    if added is not None and bias is not None:
        replace(stream, added, bias)


def replace(stream: Stream, constant: Constant, value: Array) -> None:
    """Give a constant other floats, of its own shape, in a stream."""
    stream.replace(constant.name, constant.encoded(stream.graph, value))
    _renew(stream, constant)


def _renew(stream: Stream, constant: Constant) -> None:
    """Compute anew what a stream has computed from a constant: its decoded floats, and their transposes."""
    graph, found = stream.graph, {constant.decoded} - stream.graph.constants.keys()
    found |= {u.outputs[0] for u, _ in graph.users[constant.decoded] if u.op == "Transpose" and not u.domain}
    for batch in stream.live:
        for name in found:
            if name in batch:
                value = constant.value(graph, batch.dtype(name))
                batch[name] = value if name == constant.decoded else value.T
