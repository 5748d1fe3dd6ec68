"""Change a layer's constants in a stream, and what has been computed from them already."""

from __future__ import annotations

import numpy as np

from spa.model.decoded import Constant
from spa.running.stream import Stream

Array = np.ndarray


def replace(stream: Stream, constant: Constant, value: Array) -> None:
    """Give a constant other floats, of its own shape, in a stream."""
    stream.replace(constant.name, constant.encoded(stream.graph, value))
    renewed(stream, constant)


def renewed(stream: Stream, constant: Constant) -> None:
    """Compute anew what a stream has computed from a constant: its decoded floats, and their transposes."""
    graph, found = stream.graph, {constant.decoded} - stream.graph.constants.keys()
    found |= {u.outputs[0] for u, _ in graph.users[constant.decoded] if u.op == "Transpose" and not u.domain}
    for batch in stream.live:
        for name in found:
            if name in batch:
                value = constant.value(graph, batch.dtype(name))
                batch[name] = value if name == constant.decoded else value.T
