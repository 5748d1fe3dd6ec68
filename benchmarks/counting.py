"""Count the parameters of an ONNX file as PyTorch counts a module's, so that tables compare."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}


def parameters(model: onnx.ModelProto | str | Path) -> int:
    """Return the number of elements of the floating-point initializers.

    BatchNorm's running statistics are left out: PyTorch holds them as buffers, not as parameters. They are
    found behind an Identity too (the exporters' way to share equal initializers).
    """
    if not isinstance(model, onnx.ModelProto):
        model = onnx.load(model, load_external_data=False)
    graph = model.graph
    origin = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    statistics = set()
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            statistics |= {origin.get(name, name) for name in node.input[3:5]}
    sizes = [
        math.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type in _FLOATS and tensor.name not in statistics
    ]
    return sum(sizes)


def removed(before: int, after: int) -> float:
    """Return the per cent that is gone."""
    return round(100 * (1 - after / before), 2)
