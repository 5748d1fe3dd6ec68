from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from spa.errors import ModelError
from spa.model.graph import Graph, Node
from spa.model.shape_values import FOLDERS
from spa.model.two_points import two_points
from spa.running.runtime import load_session
from tests.oracle import IR, Net, check

STRIDE, KERNEL = 2, 3


def padded_to_same(*sizes: int | str, clip: str = "Clip") -> ModelProto:
    """A strided convolution whose "same" padding is computed from the input's size, as TensorFlow's is, beside a shortcut."""
    net = Net()
    x = net.input("x", ["n", 3, *sizes])
    spatial = net.node("Slice", net.node("Shape", x), net.constant([2]), net.constant([4]))
    size = net.node("Cast", spatial, to=TensorProto.FLOAT)
    steps = net.node("Sub", net.node("Ceil", net.node("Div", size, net.constant(2.0))), net.constant(1.0))
    covered = net.node("Add", net.node("Mul", steps, net.constant(2.0)), net.constant(3.0))
    missing = net.node("Sub", covered, size)
    missing = net.node(clip, missing, *([net.constant(0.0)] if clip == "Clip" else []))
    before = net.node("Floor", net.node("Div", missing, net.constant(2.0)))
    none = net.constant([0.0, 0.0])
    pads = net.node("Concat", none, before, none, net.node("Sub", missing, before), axis=0)
    padded = net.node("Pad", x, net.node("Cast", pads, to=TensorProto.INT64), name="padding")
    options = {"strides": [2, 2], "pads": [0, 0, 0, 0]}
    y = net.node("Add", net.conv(padded, 3, 7, **options), net.conv(x, 3, 7, (1, 1), **options))
    y = net.conv(net.node("Relu", y), 7, 5)
    return net.model(net.gemm(net.node("Flatten", net.node("GlobalAveragePool", y)), 5, 2))


@pytest.mark.parametrize("sizes", [(11, 14), ("height", "width")])
def test_padding_computed_from_the_inputs_size_is_known(sizes: tuple[int | str, ...]) -> None:
    model = padded_to_same(*sizes)
    found = two_points(Graph(model))
    padded = next(n for n in model.graph.node if n.op_type == "Pad").output[0]
    for walk, given in zip((found.first, found.second), found.sizes, strict=True):
        batch, channels, *spatial = given["x"]
        assert walk.shape[padded] == (batch, channels, *(n + (KERNEL - STRIDE) + n % STRIDE for n in spatial))
        assert not walk.open_axes
    check(model)


def test_a_contradiction_of_sizes_that_were_made_up_names_their_source() -> None:
    said = r"Add .*Incompatible dimensions\. The output shape of Pad 'padding' was made up, .* Make them constants\."
    with pytest.raises(ModelError, match=said):
        two_points(Graph(padded_to_same(11, 14, clip="Elu")))


BOUNDS = {
    "none": {},
    "lower": {"min": 1},
    "upper": {"max": 2},
    "both": {"min": -1, "max": 2},
    "crossed": {"min": 3, "max": 1},  # refused before version 11
}


CLIPS = [
    (version, dtype, bounds)
    for version, dtype in ((11, np.float32), (13, np.int64), (13, np.float32))
    for bounds in BOUNDS
]
CLIPS += [(6, np.float32, bounds) for bounds in BOUNDS if bounds != "crossed"]


@pytest.mark.parametrize(("version", "dtype", "bounds"), CLIPS)
def test_a_clipped_value_is_what_onnxruntime_says(version: int, dtype: Any, bounds: str) -> None:
    value = np.asarray([-3, 0, 1, 2, 5], dtype)
    given = BOUNDS[bounds]
    attributes = {name: float(bound) for name, bound in given.items()} if version < 11 else {}
    operands = [value, *(np.asarray(given[n], dtype) if n in given else None for n in ("min", "max") if version >= 11)]
    names = ["x", *(n if o is not None else "" for n, o in zip(("min", "max"), operands[1:], strict=False))]
    node = helper.make_node("Clip", names, ["y"], **attributes)
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    infos = [helper.make_tensor_value_info(n, kind, o.shape) for n, o in zip(names, operands, strict=True) if n]
    graph = helper.make_graph([node], "clip", infos, [helper.make_tensor_value_info("y", kind, value.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=IR)
    (wanted,) = load_session(model).run(None, {n: o for n, o in zip(names, operands, strict=True) if n})
    (result,) = FOLDERS["Clip"](Node(node, 0, version), operands) or []
    assert result.dtype == wanted.dtype
    np.testing.assert_array_equal(result, wanted)
