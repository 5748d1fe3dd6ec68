"""Reshaping, permuting, joining, cutting, picking and padding: every rule and axis against the masked original.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from spa.algebra.axes import leaves
from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.model.versions import newest_opset
from tests.oracle import Data, Indices, Net, check, freedom, random_array, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def scalar(value: int) -> np.ndarray:
    return np.asarray(value)


def floats(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def picks(*shape: int, limit: int) -> np.ndarray:
    """Constant indices without repeats along the last axis."""
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(limit), (*shape[:-1], 1))
    return rng.permuted(rows, axis=-1)[..., : shape[-1]].copy()


CASES: Cases = {
    "reshape allowzero": ("2 (2 3) | 2 2 3", lambda: wrap("Reshape", Data(2, 6), [2, 2, 3], allowzero=1)),
    "reshape op7": ("2 (2 3) | 2 2 3", lambda: wrap("Reshape", Data(2, 6), [2, 2, 3], opset=7)),
    "reshape dyn -1": ("2! 5 (2 3) | 2! 5 2 3", lambda: wrap("Reshape", Data(2, 5, 6, dynamic=[0]), [-1, 5, 2, 3])),
    "reshape dyn 0": ("2! 5 (2 3) | 2! 5 2 3", lambda: wrap("Reshape", Data(2, 5, 6, dynamic=[0]), [0, 5, 2, 3])),
    "flatten op7": ("2 3 5 | 2 (3 5)", lambda: wrap("Flatten", Data(2, 3, 5), opset=7)),
    "transpose": ("2 3 5 | 5 3 2", lambda: wrap("Transpose", Data(2, 3, 5))),
    "transpose perm": ("2 3 5 | 3 5 2", lambda: wrap("Transpose", Data(2, 3, 5), perm=[1, 2, 0])),
    "squeeze": ("2 1 5 | 2 5", lambda: wrap("Squeeze", Data(2, 1, 5), [1])),
    "squeeze none": ("3 1 5 | 3 5", lambda: wrap("Squeeze", Data(3, 1, 5))),
    "squeeze none 2": ("2 1 2 | 2 2", lambda: wrap("Squeeze", Data(2, 1, 2))),
    "squeeze op11": ("2 1 5 | 2 5", lambda: wrap("Squeeze", Data(2, 1, 5), axes=[-2], opset=11)),
    "unsqueeze": ("2 5 | 1 2 5 1", lambda: wrap("Unsqueeze", Data(2, 5), [0, -1])),
    "unsqueeze op11": ("2 5 | 1 2 1 5", lambda: wrap("Unsqueeze", Data(2, 5), axes=[0, 2], opset=11)),
    "concat": ("2 3 5 | 2 7 5 | 2 3+7 5", lambda: wrap("Concat", Data(2, 3, 5), Data(2, 7, 5), axis=1)),
    "concat 3 neg": ("2 3 | 2 7 | 2 3+7+5", lambda: wrap("Concat", Data(2, 3), Data(2, 7), weight(2, 5), axis=-1)),
    "concat same twice": ("2 3 | 2 3 | 2+2 3", lambda: wrap("Concat", Data(2, 3), Data(2, 3), axis=0)),
    "split": ("2 3+7 | 2 3 | 2 7", lambda: wrap("Split", Data(2, 10), [3, 7], axis=1, outputs=2)),
    "split equal": ("2 3+3+3 | 2 3 | 2 3 | 2 3", lambda: wrap("Split", Data(2, 9), axis=-1, outputs=3, opset=13)),
    "split num": ("2 3+3+3 | 2 3 | 2 3 | 2 3", lambda: wrap("Split", Data(2, 9), axis=1, outputs=3, num_outputs=3)),
    "split num uneven": (
        "2 3!+3!+2! | 2 3! | 2 3! | 2 2!",
        lambda: wrap("Split", Data(2, 8), axis=1, outputs=3, num_outputs=3),
    ),
    "split op11": ("2 4+5 | 2 4 | 2 5", lambda: wrap("Split", Data(2, 9), axis=1, outputs=2, split=[4, 5], opset=11)),
    "split op7 eq": ("2 3+3+3 | 2 3 | 2 3 | 2 3", lambda: wrap("Split", Data(2, 9), axis=1, outputs=3, opset=7)),
    "slice": ("3 2+7+2 | 3 7", lambda: wrap("Slice", Data(3, 11), [2], [9], [1])),
    "slice open": ("3 4+7 | 3 7", lambda: wrap("Slice", Data(3, 11), [4], [2**62], [1])),
    "slice neg": ("3 6+3+2 | 3 3", lambda: wrap("Slice", Data(3, 11), [-5], [-2], [-1])),
    "slice toneg": ("3 7+4 | 3 7", lambda: wrap("Slice", Data(3, 11), [0], [-4], [1])),
    "slice clip neg": ("3 4+7 | 3 4", lambda: wrap("Slice", Data(3, 11), [-100], [4], [1])),
    "slice noaxes": ("1+3+1 3+7+1 | 3 7", lambda: wrap("Slice", Data(5, 11), [1, 3], [4, 10])),
    "slice step2": ("3 (6 2!) | 3 6", lambda: wrap("Slice", Data(3, 12), [0], [12], [1], [2])),
    "slice step2 off": ("3 (6 2!) | 3 6", lambda: wrap("Slice", Data(3, 12), [1], [2**62], [1], [2])),
    "slice step3 in": ("3 (3 3!)+4 | 3 3", lambda: wrap("Slice", Data(3, 13), [2], [11], [1], [3])),
    "slice step2 odd": ("3 11! | 3 6!", lambda: wrap("Slice", Data(3, 11), [0], [11], [1], [2])),
    "slice reverse": ("3 11! | 3 11!", lambda: wrap("Slice", Data(3, 11), [-1], [-(2**62)], [1], [-1])),
    "slice one": ("3 4+1+6 | 3 1", lambda: wrap("Slice", Data(3, 11), [4], [5], [1])),
    "slice full": ("3 11 | 3 11", lambda: wrap("Slice", Data(3, 11), [0], [11], [1])),
    "slice op7": ("3 2+7+2 | 3 7", lambda: wrap("Slice", Data(3, 11), starts=[2], ends=[9], axes=[1], opset=7)),
    "slice empty": ("3! 11! | 3! 0!", lambda: wrap("Slice", Data(3, 11), [4], [4], [1], ranks=[2])),
    "slice2axes": ("2+4+1 7+4 | 4 4", lambda: wrap("Slice", Data(7, 11), [2, -4], [6, 2**62], [0, 1], [1, 1])),
    "gather one": ("3 4+1+6 | 3", lambda: wrap("Gather", Data(3, 11), scalar(4), axis=1)),
    "gather run": ("3 4+4+3 | 3 4", lambda: wrap("Gather", Data(3, 11), [4, 5, 6, 7], axis=1)),
    "gather perm": ("3 5+6 | 3 6+5", lambda: wrap("Gather", Data(3, 11), [5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4], axis=1)),
    "gather neg": ("3 2+6+2+1 | 3 2+2", lambda: wrap("Gather", Data(3, 11), [-3, -2, 0, 1], axis=-1)),
    "gather repeat": ("3 3+1+2 | 3 3+3+1", lambda: wrap("Gather", Data(3, 6), [0, 1, 2, 0, 1, 2, 3], axis=-1)),
    "gather rep_interleave": (
        "3 1+1+1+1 | 3 1+1+1+1+1+2!+1",
        lambda: wrap("Gather", Data(3, 4), [0, 0, 1, 1, 2, 2, 3, 3], axis=-1),
    ),
    "gather 2d": ("3 (3 4) | 3 3 4", lambda: wrap("Gather", Data(3, 12), np.arange(12).reshape(3, 4), axis=-1)),
    "gather computed": ("11! 5 | 4! 5", lambda: wrap("Gather", Data(11, 5), Indices((4,), 11))),
    "gather computed2d": ("2! 3! 5", lambda: wrap("Gather", weight(11, 5), Indices((2, 3), 11))),
    "gatherelems": (
        "3! 5! 7! | 3! 5! 2!",
        lambda: wrap("GatherElements", Data(3, 5, 7), Indices((3, 5, 2), 7), axis=2),
    ),
    "gatherelems const": (
        "3! 5! 7! | 3! 5! 2!",
        lambda: wrap("GatherElements", Data(3, 5, 7), picks(3, 5, 2, limit=7), axis=2),
    ),
    "gatherelems short": (
        "3! 5! 7! | 2! 5! 2!",
        lambda: wrap("GatherElements", Data(3, 5, 7), Indices((2, 5, 2), 7), axis=2),
    ),
    "gathernd": ("3! 5! 7 | 4! 7", lambda: wrap("GatherND", Data(3, 5, 7), Indices((4, 2), 3))),
    "gathernd1": ("3! 5 7 | 4! 5 7", lambda: wrap("GatherND", Data(3, 5, 7), Indices((4, 1), 3))),
    "gathernd batch": (
        "3! 5! 7 | 3! 4! 7",
        lambda: wrap("GatherND", Data(3, 5, 7), Indices((3, 4, 1), 5), batch_dims=1),
    ),
    "gathernd const": ("3! 5! 7 | 2! 7", lambda: wrap("GatherND", Data(3, 5, 7), np.asarray([[0, 1], [2, 3]]))),
    "scatternd": (
        "3! 5 7 | 2! 5 7 | 3! 5 7",
        lambda: wrap("ScatterND", Data(3, 5, 7), np.asarray([[1], [2]]), Data(2, 5, 7)),
    ),
    "scatternd2": (
        "3! 5! 7 | 2! 7 | 3! 5! 7",
        lambda: wrap("ScatterND", Data(3, 5, 7), np.asarray([[1, 2], [2, 0]]), Data(2, 7), opset=11),
    ),
    "scatternd idx": (
        "3! 5 7 | 2! 5 7 | 3! 5 7",
        lambda: wrap("ScatterND", Data(3, 5, 7), Indices((2, 1), 3), Data(2, 5, 7), reduction="add"),
    ),
    "scatterelems": (
        "3! 5! 7! | 3! 5! 2! | 3! 5! 7!",
        lambda: wrap("ScatterElements", Data(3, 5, 7), Indices((3, 5, 2), 7), Data(3, 5, 2), axis=2, reduction="add"),
    ),
    "scatter op9": (
        "3! 5! 7! | 3! 5! 2! | 3! 5! 7!",
        lambda: wrap("Scatter", Data(3, 5, 7), picks(3, 5, 2, limit=7), Data(3, 5, 2), axis=2, opset=9),
    ),
    "tensorscatter": (
        "2! 3 5! 7 | 2! 3 2! 7 | 2! 3 5! 7",
        lambda: wrap("TensorScatter", Data(2, 3, 5, 7), Data(2, 3, 2, 7), Indices((2,), 3), opset=24),
    ),
    "pad": ("2 7 5 5 | 2 7 1+5+1 1+5+1", lambda: wrap("Pad", Data(2, 7, 5, 5), [0, 0, 1, 1, 0, 0, 1, 1])),
    "pad channels": ("2 7 | 2 3+7+2", lambda: wrap("Pad", Data(2, 7), [0, 3, 0, 2])),
    "pad value": ("2 7 | 2 3+7", lambda: wrap("Pad", Data(2, 7), [0, 3, 0, 0], floats(1.5).reshape(()))),
    "pad axes": ("2 7 3 | 2 2+7+3 3", lambda: wrap("Pad", Data(2, 7, 3), [2, 3], None, [-2])),
    "pad crop": ("3 7! | 3 5!", lambda: wrap("Pad", Data(3, 7), [0, -2, 0, 0])),
    "pad wrap": ("2 7 5! | 2 7 8!", lambda: wrap("Pad", Data(2, 7, 5), [0, 0, 2, 0, 0, 1], mode="wrap")),
    "pad op7": ("2 7 | 2 3+7+2", lambda: wrap("Pad", Data(2, 7), pads=[0, 3, 0, 2], value=0.5, opset=7)),
    "expand": ("3 1 5 | 3 7 5", lambda: wrap("Expand", Data(3, 1, 5), [3, 7, 5])),
    "expand rank": ("5 | 3 5", lambda: wrap("Expand", Data(5), [3, 5])),
    "expand ones": ("3 5 | 3 5", lambda: wrap("Expand", Data(3, 5), [1, 1])),
    "expand short": ("3 5 | 3 5", lambda: wrap("Expand", Data(3, 5), [5])),
    "tile": ("3 5 | (2 3) (3 5)", lambda: wrap("Tile", Data(3, 5), [2, 3])),
    "tile 1": ("3 5 | 3 5", lambda: wrap("Tile", Data(3, 5), [1, 1], opset=7)),
    "d2s op7": (
        "2 (2! 2! 3) 3 5 | 2 3 (3 2!) (5 2!)",
        lambda: wrap("DepthToSpace", Data(2, 12, 3, 5), blocksize=2, opset=7),
    ),
    "s2d": ("2 3 (2 2!) (3 2!) | 2 (2! 2! 3) 2 3", lambda: wrap("SpaceToDepth", Data(2, 3, 4, 6), blocksize=2)),
    "resize scales": ("2 3 5! 5! | 2 3 10! 10!", lambda: wrap("Resize", Data(2, 3, 5, 5), None, floats(1, 1, 2, 2))),
    "resize roi": (
        "2 3 5! 5! | 2 3 10! 10!",
        lambda: wrap("Resize", Data(2, 3, 5, 5), floats(), floats(1, 1, 2, 2), mode="linear", opset=11),
    ),
    "resize sizes": (
        "2 3 5! 5! | 2 3 7! 9!",
        lambda: wrap("Resize", Data(2, 3, 5, 5), None, None, [2, 3, 7, 9], mode="linear"),
    ),
    "resize axes": ("2 3 5! 5! | 2 3 7! 9!", lambda: wrap("Resize", Data(2, 3, 5, 5), None, None, [7, 9], axes=[2, 3])),
    "resize keep": (
        "2 3 5! 5! | 2 3 7! 7!",
        lambda: wrap(
            "Resize", Data(2, 3, 5, 5), None, None, [7, 9], axes=[2, 3], keep_aspect_ratio_policy="not_larger"
        ),
    ),
    "resize crop": (
        "2! 3! 5! 5! | 2! 3! 5! 5!",
        lambda: wrap(
            "Resize",
            Data(2, 3, 5, 5),
            floats(0, 0, 0.1, 0.1, 1, 1, 0.8, 0.8),
            None,
            [2, 3, 5, 5],
            coordinate_transformation_mode="tf_crop_and_resize",
            mode="linear",
        ),
    ),
    "resize op10": ("2 3 5! 5! | 2 3 10! 10!", lambda: wrap("Resize", Data(2, 3, 5, 5), floats(1, 1, 2, 2), opset=10)),
    "upsample op9": (
        "2 3 5! 5! | 2 3 10! 10!",
        lambda: wrap("Upsample", Data(2, 3, 5, 5), floats(1, 1, 2, 2), opset=9),
    ),
    "upsample op7": (
        "2 3 5! 5! | 2 3 10! 10!",
        lambda: wrap("Upsample", Data(2, 3, 5, 5), scales=[1.0, 1.0, 2.0, 2.0], opset=7),
    ),
    "reverseseq": ("5! 3! 7 | 5! 3! 7", lambda: wrap("ReverseSequence", Data(5, 3, 7), Indices((3,), 5))),
    "trilu": ("2 5! 7! | 2 5! 7!", lambda: wrap("Trilu", Data(2, 5, 7))),
    "trilu k": ("2 5! 7! | 2 5! 7!", lambda: wrap("Trilu", Data(2, 5, 7), scalar(1), upper=0)),
    "pad reflect": ("2 7 5! | 2 7 8!", lambda: wrap("Pad", Data(2, 7, 5), [0, 0, 2, 0, 0, 1], mode="reflect")),
    "pad edge": ("2 7 5! | 2 7 8!", lambda: wrap("Pad", Data(2, 7, 5), [0, 0, 2, 0, 0, 1], mode="edge")),
    "d2s DCR": (
        "2 (2! 2! 3) 3 5 | 2 3 (3 2!) (5 2!)",
        lambda: wrap("DepthToSpace", Data(2, 12, 3, 5), blocksize=2, mode="DCR"),
    ),
    "d2s CRD": (
        "2 (3 2! 2!) 3 5 | 2 3 (3 2!) (5 2!)",
        lambda: wrap("DepthToSpace", Data(2, 12, 3, 5), blocksize=2, mode="CRD"),
    ),
}
if newest_opset() >= 28:  # the lowest versions of onnx and onnxruntime do not know it
    CASES["s2d CRD op28"] = (
        "2 3 (2 2!) (3 2!) | 2 (3 2! 2!) 2 3",
        lambda: wrap("SpaceToDepth", Data(2, 3, 4, 6), blocksize=2, mode="CRD", opset=28),
    )

RESHAPES: dict[str, tuple[tuple[int, ...], list[int], str]] = {
    "two axes merge": ((2, 3, 5), [2, 15], "2 3 5 | 2 (3 5)"),
    "an axis splits": ((2, 15), [2, 3, 5], "2 (3 5) | 2 3 5"),
    "an axis splits with a free size": ((2, 12), [2, 3, -1], "2 (3 4) | 2 3 4"),
    "a zero copies": ((2, 3, 5), [0, -1], "2 3 5 | 2 (3 5)"),
    "zeros in the middle": ((2, 6, 5), [0, 0, 5], "2 6 5 | 2 6 5"),
    "regrouping keeps what both share": ((2, 6, 4), [2, 4, 6], "2 (2 3!) (2! 2) | 2 (2 2!) (3! 2)"),
    "regrouping refines": ((12, 2), [4, 6], "(4 3) 2 | 4 (3 2)"),
    "coprime sizes freeze": ((2, 3), [3, 2], "2! 3! | 3! 2!"),
    "everything in a row": ((2, 3, 5), [-1], "2 3 5 | (2 3 5)"),
    "axes of one index come": ((2, 3), [1, 2, 1, 3, 1], "2 3 | 1 2 1 3 1"),
    "axes of one index go": ((1, 2, 1, 3), [2, 3], "1 2 1 3 | 2 3"),
    "heads": ((2, 5, 6), [2, 5, 2, 3], "2 5 (2 3) | 2 5 2 3"),
}
FLATTENS = {0: "1 (2 3 5)", 1: "2 (3 5)", 2: "(2 3) 5", 3: "(2 3 5) 1", -1: "(2 3) 5"}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


@pytest.mark.parametrize("name", RESHAPES)
def test_a_reshape_is_a_row_major_view(name: str) -> None:
    before, after, expected = RESHAPES[name]
    verify(wrap("Reshape", Data(*before), after), expected)


@pytest.mark.parametrize("axis", FLATTENS)
def test_a_flatten_is_two_products(axis: int) -> None:
    verify(wrap("Flatten", Data(2, 3, 5), axis=axis), f"2 3 5 | {FLATTENS[axis]}")


# -- shapes that the graph computes ---------------------------------------------------------------------------------


def attention_like(opset: int = 17, computed: bool = True) -> ModelProto:
    """[n 12] → heads by a Reshape whose shape is Shape → Gather → Unsqueeze → Concat."""
    net = Net(opset)
    x = net.input("x", ["n", "s", 3])
    h = net.matmul(x, 3, 12, name="heads")
    if computed:
        shape = net.node("Shape", h)
        sizes = [net.node("Gather", shape, net.constant(np.int64(i)), axis=0) for i in (0, 1)]
        pieces = [net.node("Unsqueeze", size, net.constant(np.asarray([0]))) for size in sizes]
        target = net.node("Concat", *pieces, net.constant(np.asarray([3])), net.constant(np.asarray([4])), axis=0)
    else:
        target = net.constant(np.asarray([0, 0, 3, 4]))
    split = net.node("Transpose", net.node("Sigmoid", net.node("Reshape", h, target)), perm=[0, 2, 1, 3])
    summed = net.node("Einsum", split, net.weight(3, 4, 2, name="reader"), equation="bhsd,hdo->bso")
    return net.model(summed)


@pytest.mark.parametrize("computed", [False, True])
def test_heads_and_head_dimensions_are_free_where_the_shape_is_computed(computed: bool) -> None:
    found = check(attention_like(computed=computed))
    assert sorted(g.size for g in found.groups) == [3, 4]
    shape = found.pruned.graph.output[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["n", "s", 2]


def test_a_size_that_comes_from_a_pruned_axis_follows_it() -> None:
    """x.view(n, x.shape[1] // 2, 2): the shape is computed from the channels themselves."""
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 14)
    shape = net.node("Shape", h)
    zero, one = net.constant(np.asarray([0])), net.constant(np.asarray([1]))
    batch, channels = (net.node("Gather", shape, i, axis=0) for i in (zero, one))
    half = net.node("Div", channels, net.constant(np.asarray([2])))
    target = net.node("Concat", batch, half, net.constant(np.asarray([2])), axis=0)
    split = net.node("Sigmoid", net.node("Reshape", h, target))
    found = check(net.model(net.node("Einsum", split, net.weight(7, 2, 3), equation="nab,abo->no")))
    assert sorted(g.size for g in found.groups) == [2, 7]
    assert {n.op_type for n in found.pruned.graph.node} >= {"Shape", "Gather", "Reshape"}


def test_a_tensor_filled_from_a_shape_follows_the_pruned_axis() -> None:
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 7)
    ones = net.node("ConstantOfShape", net.node("Shape", h))
    joined = net.node("Concat", net.node("Sigmoid", h), net.node("Add", ones, h), axis=1)
    found = check(net.model(net.gemm(joined, 14, 2)))
    assert [g.size for g in found.groups] == [7]


def test_a_filled_tensor_of_constant_shape_is_pruned() -> None:
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 7)
    half = net.node("ConstantOfShape", net.constant(np.asarray([1, 7])), value=helper_tensor(0.5))
    found = check(net.model(net.gemm(net.node("Sigmoid", net.node("Mul", h, half)), 7, 2)))
    assert [g.size for g in found.groups] == [7]


def helper_tensor(value: float) -> TensorProto:
    return TensorProto(data_type=TensorProto.FLOAT, dims=[1], float_data=[value])


def test_an_expand_to_a_computed_shape_is_pruned() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    h = net.gemm(x, 3, 7)
    token = net.weight(1, 7)
    token = net.node("Expand", token, net.node("Shape", h))
    found = check(net.model(net.gemm(net.node("Sigmoid", net.node("Concat", token, h, axis=0)), 7, 2)))
    assert [g.size for g in found.groups] == [7]


def test_a_class_token_expanded_over_the_batch_is_pruned() -> None:
    net = Net()
    x = net.input("x", ["n", 5, 3])
    h = net.matmul(x, 3, 7)
    batch = net.node("Gather", net.node("Shape", h), net.constant(np.asarray([0])), axis=0)
    rest = net.constant(np.asarray([-1, -1]))
    target = net.node("Concat", batch, rest, axis=0)
    ones = net.node(
        "ConstantOfShape", net.constant(np.asarray([3])), value=TensorProto(data_type=7, dims=[1], int64_data=[1])
    )
    target = net.node("Where", net.node("Equal", target, net.node("Neg", ones)), ones, target)
    token = net.node("Expand", net.weight(1, 1, 7), target)
    joined = net.node("Concat", token, h, axis=1)
    found = check(net.model(net.matmul(net.node("Sigmoid", joined), 7, 2)))
    assert [g.size for g in found.groups] == [7]


def test_slices_whose_bounds_come_from_the_channels_are_pruned() -> None:
    """torch.chunk of a traced model: starts and ends are arithmetic on the size."""
    net = Net(13)
    h = net.gemm(net.input("x", ["n", 3]), 3, 14)
    one, two = net.constant(np.asarray([1])), net.constant(np.asarray([2]))
    size = net.node("Gather", net.node("Shape", h), one, axis=0)
    half = net.node("Div", net.node("Add", size, one), two)
    a = net.node("Slice", h, net.constant(np.asarray([0])), half, one)
    b = net.node("Slice", h, half, net.node("Mul", half, two), one)
    gated = net.node("Mul", a, net.node("Sigmoid", b))
    found = check(net.model(net.gemm(gated, 7, 2)))
    assert [g.size for g in found.groups] == [7]


def test_interleaved_halves_stay_together() -> None:
    """Rotary embedding as GPT-J writes it: x[..., ::2] and x[..., 1::2]."""
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 14)
    end, axis, step = net.constant(np.asarray([2**62])), net.constant(np.asarray([1])), net.constant(np.asarray([2]))
    even, odd = (net.node("Slice", h, net.constant(np.asarray([i])), end, axis, step) for i in (0, 1))
    stacked = [
        net.node("Unsqueeze", e, net.constant(np.asarray([-1])))
        for e in (net.node("Neg", odd), net.node("Sigmoid", even))
    ]
    both = net.node("Flatten", net.node("Concat", *stacked, axis=-1))
    found = check(net.model(net.gemm(both, 14, 2)))
    assert [g.size for g in found.groups] == [7]


def test_rotated_halves_stay_together() -> None:
    """Rotary embedding as Llama writes it: cat(-x[d/2:], x[:d/2])."""
    net = Net()
    h = net.gemm(net.input("x", ["n", 3]), 3, 14)
    first, second = net.node("Split", h, net.constant(np.asarray([7, 7])), axis=1, outputs=2)
    turned = net.node("Concat", net.node("Neg", second), first, axis=1)
    both = net.node("Add", net.node("Mul", h, net.weight(14)), net.node("Mul", turned, net.weight(14)))
    found = check(net.model(net.gemm(net.node("Sigmoid", both), 14, 2)))
    assert [g.size for g in found.groups] == [7]


def test_a_channel_shuffle_is_a_product_read_in_another_order() -> None:
    net = Net()
    x = net.conv(net.input("x", ["n", 3, 5, 5]), 3, 12, (1, 1))
    tabled = net.node("Reshape", x, net.constant(np.asarray([0, 3, 4, 5, 5])))
    turned = net.node("Transpose", tabled, perm=[0, 2, 1, 3, 4])
    back = net.node("Sigmoid", net.node("Reshape", turned, net.constant(np.asarray([0, 12, 5, 5]))))
    found = check(net.model(net.conv(back, 12, 2)))
    assert sorted(g.size for g in found.groups) == [3, 4]


def test_an_axis_squeezed_without_being_named_survives_beside_one_pruned_to_one_index() -> None:
    for opset in (11, 13):
        model = wrap("Squeeze", Data(2, 1, 2), opset=opset)
        pruned = check(model).pruned
        (node,) = [n for n in pruned.graph.node if n.name == "tested"]
        assert len(node.input) == (1 if opset == 11 else 2)
        assert [a.name for a in node.attribute] == (["axes"] if opset == 11 else [])


def test_a_gather_of_a_frozen_axis_passes_the_others() -> None:
    model = wrap("Gather", Data(11, 7, plain=[0]), [3, 4, 5])
    assert freedom(model) == {"X0": "11! 7", "Y0": "3! 7"}
    check(model)


def test_an_operator_whose_shape_depends_on_data_is_a_barrier() -> None:
    net = Net()
    x = net.input("x", ["n", 3])
    h = net.gemm(x, 3, 7)
    target = net.node(
        "Cast", net.node("Mul", net.node("Shape", net.node("NonZero", x)), net.constant(np.asarray([0, 1]))), to=7
    )
    y = net.node("Reshape", h, net.node("Add", target, net.input("shape", [2], TensorProto.INT64)))
    analysis = couple(Graph(net.model(net.node("ReduceSum", y))))
    assert all(g.frozen for g in analysis.groups)


def test_an_axis_whose_size_depends_on_data_is_frozen() -> None:
    net = Net()
    net.nodes.append(
        helper.make_node("ConstantOfShape", [net.input("shape", [2], TensorProto.INT64)], ["filled"], "fill")
    )
    analysis = couple(Graph(net.model(net.node("Relu", "filled"))))
    reasons = {analysis.space.reason(d) for e in analysis.axes["filled"] for d in leaves(analysis.space.resolve(e))}
    assert reasons == {"ConstantOfShape 'fill' gives it a size that depends on data"}


def test_padding_up_to_a_hop_is_not_removable_and_any_length_runs() -> None:
    """Sound of any length is padded up to a multiple of 50 and framed: how much is padding depends on it."""
    net = Net()
    x = net.input("sound", [1, "samples"])
    one, hop = net.constant(np.int64(1)), net.constant(np.int64(50))
    length = net.node("Gather", net.node("Shape", x), one, axis=0)
    whole = net.node("Mul", net.node("Div", net.node("Add", length, net.constant(np.int64(49))), hop), hop)
    missing = net.node("Unsqueeze", net.node("Sub", whole, length), net.constant(np.array([0])))
    pads = net.node("Concat", net.constant(np.zeros(3, np.int64)), missing, axis=0)
    frames = net.node("Reshape", net.node("Pad", x, pads), net.constant(np.array([-1, 50])))
    model = net.model(net.matmul(net.node("Relu", net.matmul(frames, 50, 7)), 7, 3))
    found = check(model, feeds=[{"sound": random_array(1, n, seed=n)} for n in (3, 50, 260)])
    assert [g.size for g in found.groups] == [7]


@pytest.mark.parametrize("how", ["twice", "split"])
def test_a_table_of_which_the_input_decides_what_is_read_stays_whole(how: str) -> None:
    """What is left of it here is read at another length; before, it could go, and longer sequences came out wrong."""
    net = Net(13)
    x = net.input("x", ["n", "t", 8])
    table, zero = net.weight(512, 8), net.constant(np.asarray([0]))
    length = net.node("Slice", net.node("Shape", x), net.constant(np.asarray([1])), net.constant(np.asarray([2])))
    rest = net.node("Sub", net.constant(np.asarray([512])), length)
    if how == "twice":  # as ALiBi's tables are read: all from the first position on, then the last ones
        end = net.constant(np.asarray([2**62]))
        everything = net.node("Slice", table, net.node("Min", length, zero), end, zero)
        some = net.node("Slice", everything, rest, end, zero)
    else:
        some, _ = net.node("Split", table, net.node("Concat", length, rest, axis=0), axis=0, outputs=2)
    h = net.node("Relu", net.matmul(net.node("Add", x, some), 8, 6))
    analysis = couple(Graph(net.model(net.matmul(h, 6, 3))))
    positions = [g for g in analysis.groups if any(p.tensor == table and p.axis == 0 for p in g.places)]
    assert positions
    assert all(g.frozen is not None and "follow" in g.frozen for g in positions)
