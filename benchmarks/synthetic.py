"""Write residual convolutional networks of any number of nodes and bytes, to see how cost grows.

    python benchmarks/synthetic.py FILE --blocks 100 --channels 16

Deterministic: the same numbers give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import onnx

CLASSES = 10
IMAGE = 8


def residual(blocks: int, channels: int, path: Path) -> dict[str, int]:
    """Write a network of `blocks` times (Conv, BatchNorm, Relu, Conv, BatchNorm, Add, Relu) and a classifier.

    Returns:
        Its numbers of nodes and bytes.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> str:
        values = rng.uniform(low, high, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def convolution(x: str, name: str, inputs: int, gain: float = 1.0) -> str:
        bound = (3 / (9 * inputs)) ** 0.5
        kernel = weight(f"{name}.weight", channels, inputs, 3, 3, low=-bound, high=bound)
        x = add("Conv", [x, kernel], f"{name}.conv", pads=[1] * 4)
        ranges = {
            "scale": (0.5 * gain, 1.5 * gain),
            "bias": (-0.1, 0.1),
            "mean": (-0.1, 0.1),
            "var": (0.5, 1.5),
        }
        statistics = [weight(f"{name}.{key}", channels, low=a, high=b) for key, (a, b) in ranges.items()]
        return add("BatchNormalization", [x, *statistics], f"{name}.norm")

    x = add("Relu", [convolution("input", "stem", 3)], "stem.relu")
    for index in range(blocks):
        inner = add("Relu", [convolution(x, f"{index}.a", channels)], f"{index}.relu")
        inner = convolution(inner, f"{index}.b", channels, gain=blocks**-0.5)  # or the sum overflows
        x = add("Relu", [add("Add", [x, inner], f"{index}.add")], f"{index}.out")
    x = add("Flatten", [add("GlobalAveragePool", [x], "pool")], "flat")
    add("Gemm", [x, weight("head.weight", channels, CLASSES), weight("head.bias", CLASSES)], "output")
    return _write(nodes, weights, path)


def _write(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], path: Path) -> dict[str, int]:
    import onnx
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, IMAGE, IMAGE])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "residual", [image], [scores], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return {"nodes": len(nodes), "bytes": path.stat().st_size}


def main() -> None:
    """Write the network that the command line describes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--channels", type=int, required=True)
    options = parser.parse_args()
    common.answer(residual(options.blocks, options.channels, options.path))


if __name__ == "__main__":
    main()
