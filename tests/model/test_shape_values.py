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


# (operator, operands, attributes): where Python, numpy and C++ go different ways.
FOLDED: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "division truncates towards zero": ("Div", [[7, -7, 7, -7, 6, -6, 0], [2, 2, -2, -2, 3, 3, -5]], {}),
    "division of floats": ("Div", [[7.0, -7.0, 1.0], [2.0, 2.0, -3.0]], {}),
    "the remainder has the divisor's sign": ("Mod", [[7, -7, 7, -7, 6], [3, 3, -3, -3, 3]], {}),
    "the remainder of fmod has the dividend's sign": ("Mod", [[7, -7, 7, -7, 6], [3, 3, -3, -3, 3]], {"fmod": 1}),
    "halves are rounded to even": ("Round", [[0.5, 1.5, 2.5, -0.5, -1.5, 2.4]], {}),
    "negative numbers are floored downwards": ("Floor", [[-1.5, 1.5]], {}),
    "negative numbers are ceiled upwards": ("Ceil", [[-1.5, 1.5]], {}),
    "a cast to integers truncates": ("Cast", [[-1.7, 1.7]], {"to": TensorProto.INT64}),
    "a slice from the end": ("Slice", [[2, 3, 5, 7, 11], [-2], [1000]], {}),
    "a slice backwards over the start": ("Slice", [[2, 3, 5, 7, 11], [-1], [-1000], [0], [-2]], {}),
    "a slice of the last axis": ("Slice", [[[2, 3, 5], [7, 11, 13]], [1], [3], [-1]], {}),
    "a range downwards": ("Range", [7, -4, -3], {}),
    "zeros in a shape stand for sizes": ("Reshape", [[[2, 3, 5], [7, 11, 13]], [0, 1, -1]], {}),
    "a split into unequal parts": ("Split", [[2, 3, 5, 7, 11]], {"outputs": 3, "num_outputs": 3}),
    "a split by sizes": ("Split", [[2, 3, 5, 7, 11], [1, 4]], {"outputs": 2}),
    "an index from the end": ("Gather", [[[2, 3], [5, 7]], [-1, 0]], {"axis": 1}),
    "new axes from the end": ("Unsqueeze", [[2, 3, 5], [-1, 0]], {}),
    "an axis dropped": ("Squeeze", [[[[2, 3, 5]]], [1]], {}),
    "all axes of one index dropped": ("Squeeze", [[[[2, 3, 5]]]], {}),
    "tiles": ("Tile", [[[2, 3], [5, 7]], [2, 3]], {}),
    "stretched axes": ("Expand", [[[2], [3]], [4, 1, 5]], {}),
    "a sum over one axis": ("ReduceSum", [[[2, 3, 5], [7, 11, 13]], [1]], {"keepdims": 0}),
    "a sum over no axis": ("ReduceSum", [[[2, 3, 5], [7, 11, 13]]], {"noop_with_empty_axes": 1}),
    "a product of everything": ("ReduceProd", [[[2, 3, 5], [7, 11, 13]]], {"keepdims": 0}),
    "a maximum": ("ReduceMax", [[[2, 3, 5], [7, 11, 1]], [0]], {}),
    "a minimum": ("ReduceMin", [[[2, 3, 5], [7, 11, 1]], [0]], {}),
    "powers": ("Pow", [[2, -3, 5], [3, 3, 2]], {}),
    "a choice": ("Where", [[True, False, True], [2, 3, 5], [7, 11, 13]], {}),
    "the least of several": ("Min", [[2, 9, 5], [3, 1, 4]], {}),
    "the greatest of several": ("Max", [[2, 9, 5], [3, 1, 4], [4, 4, 4]], {}),
    "part of a shape": ("Shape", [[[2, 3, 5], [7, 11, 13]]], {"start": -1}),
    "axes permuted": ("Transpose", [[[[2, 3, 5], [7, 11, 13]]]], {"perm": [2, 0, 1]}),
    "axes turned around": ("Transpose", [[[[2, 3, 5], [7, 11, 13]]]], {}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_value_is_what_onnxruntime_says(name: str) -> None:
    op, given, attributes = FOLDED[name]
    attributes = dict(attributes)
    operands = [np.asarray(g, np.float32 if np.asarray(g).dtype == np.float64 else None) for g in given]
    inputs, results = [f"x{i}" for i in range(len(operands))], [f"y{i}" for i in range(attributes.pop("outputs", 1))]
    node = helper.make_node(op, inputs, results, **attributes)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(o.dtype), o.shape)
        for n, o in zip(inputs, operands, strict=True)
    ]
    graph = helper.make_graph([node], "folded", infos, [helper.make_empty_tensor_value_info(r) for r in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=IR)
    wanted = load_session(model).run(None, dict(zip(inputs, operands, strict=True)))
    # Shape is told the shape itself.
    seen = [np.asarray(operands[0].shape)] if op == "Shape" else operands
    found = FOLDERS[op](Node(node, 0, 21), seen)
    assert found is not None
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
