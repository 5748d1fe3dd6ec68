"""Models are brought into a form that can be analysed, and compute the same: order, constants, branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.errors import ModelError
from spa.model.bodies import nested
from spa.model.io import Source, load
from spa.model.simplify import simplified
from spa.running.runtime import load_session
from tests.oracle import Net, distance, random_array


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def simple(model: ModelProto) -> ModelProto:
    return simplified(Source(model)).model


def same_outputs(a: ModelProto, b: ModelProto, *shapes: Sequence[int]) -> bool:
    feeds = {
        info.name: random_array(*shape, seed=i)
        for i, (info, shape) in enumerate(zip(a.graph.input, shapes, strict=False))
    }
    left, right = (load_session(m).run(None, feeds) for m in (a, b))
    return all(distance(x, y) <= 1e-6 for x, y in zip(left, right, strict=True))


# -- order ------------------------------------------------------------------------------------------------------------


def two_layers() -> ModelProto:
    net = Net()
    return net.model(net.matmul(net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, 11)), 11, 3))


def test_nodes_in_any_order_are_sorted_and_pruned() -> None:
    model, mixed = two_layers(), two_layers()
    del mixed.graph.node[:]
    mixed.graph.node.extend(reversed(model.graph.node))
    before = mixed.SerializeToString()
    result = spa.prune(mixed, criterion="l2", ratio=0.3, round_to=1)
    assert ops(result.model) == ops(model)
    assert mixed.SerializeToString() == before
    assert result.prove().holds


def test_nodes_inside_a_branch_are_sorted_before_what_they_take_from_outside_is_told() -> None:
    model = with_branch("x", [helper.make_node("Relu", ["h"], ["p"]), helper.make_node("Neg", ["x"], ["h"])])
    loaded = load(model).model
    assert [n.op_type for n in then_branch(loaded.graph.node[0]).node] == ["Neg", "Relu"]


def test_nodes_that_read_each_other_in_a_circle_are_refused() -> None:
    model = two_layers()
    model.graph.node[0].input[0] = model.graph.node[2].output[0]
    with pytest.raises(ModelError, match=r"reads what is computed from its own output\. Export"):
        load(model)


# -- constants --------------------------------------------------------------------------------------------------------


def weight_norm(rows: int = 11, columns: int = 7, opset: int = 21) -> ModelProto:
    net = Net(opset=opset)
    hidden = net.node("Relu", net.matmul(net.input("x", ["n", 5]), 5, rows))
    v, g = net.weight(rows, columns, name="v"), net.constant(np.full((1, columns), 2.0), "g")
    axes = [net.constant(np.asarray([0]))] if opset >= 18 else []
    norm = net.node("ReduceL2", v, *axes, keepdims=1, **({} if axes else {"axes": [0]}))
    net.nodes.append(helper.make_node("Mul", [net.node("Div", v, norm), g], ["w"]))
    return net.model(net.node("MatMul", hidden, "w"))


@pytest.mark.parametrize("opset", [13, 21])
def test_a_normalised_weight_is_pruned_without_rescaling_what_is_kept(opset: int) -> None:
    model = weight_norm(opset=opset)
    result = spa.prune(model, criterion="l2", ratio=0.4, round_to=1)
    assert same_outputs(model, result.source.model, (3, 5))
    assert result.prove().holds
    kept = result.plan.parameters["w"][0]
    dense = numpy_helper.to_array(next(t for t in result.source.model.graph.initializer if t.name == "w"))
    pruned = numpy_helper.to_array(next(t for t in result.model.graph.initializer if t.name == "w"))
    assert np.array_equal(pruned, dense[list(kept)])


def test_a_shared_constant_behind_a_cast_is_cut_for_each_use() -> None:
    net = Net()
    bias = net.node("Cast", net.constant(np.linspace(-1, 1, 32, dtype=np.float16)), to=TensorProto.FLOAT)
    hidden = net.node("Relu", net.node("Add", net.matmul(net.input("x", ["n", 5]), 5, 32, bias=False), bias))
    model = net.model(net.node("Add", net.matmul(hidden, 32, 32, bias=False), bias))
    result = spa.prune(model, criterion="l2", ratio=0.4, round_to=1)
    assert result.prove().holds
    assert same_outputs(model, result.source.model, (3, 5))


def test_a_table_that_is_an_output_layer_too_stays_one() -> None:
    net = Net()
    table = net.constant(random_array(64, 32), "table")
    x = net.node("Gather", table, net.input("ids", ["n", "s"], TensorProto.INT64))
    model = net.model(net.node("MatMul", net.matmul(x, 32, 32), net.node("Transpose", table)))
    assert ops(simple(model)) == ops(model)
    half = net.node("Cast", net.constant(random_array(64, 32).astype(np.float16), "half"), to=TensorProto.FLOAT)
    y = net.node("Gather", half, "ids")
    model = net.model(net.node("MatMul", y, net.node("Transpose", half)))
    assert "Transpose" in ops(simple(model))


def test_integers_that_a_file_stores_for_large_weights_stay() -> None:
    net = Net()
    stored = np.arange(64 * 32).reshape(64, 32).astype(np.int8)
    cast = net.node("Cast", net.constant(stored), to=TensorProto.FLOAT)
    quantised = net.node("DequantizeLinear", net.constant(stored), net.constant(np.float32(0.1)))
    x = net.input("x", ["n", 64])
    model = net.model(net.node("MatMul", x, cast), net.node("MatMul", x, net.node("Transpose", quantised, perm=[0, 1])))
    assert ops(simple(model)) == ops(model)


def test_what_rules_and_refits_see_through_stays_and_weights_keep_their_names_and_axes() -> None:
    net = Net()
    bias = net.constant(np.linspace(0, 1, 7), "bias")
    weight = net.node("Transpose", net.constant(random_array(7, 5), "fc.weight"))
    hidden = net.node("Add", net.node("MatMul", net.input("x", ["n", 5]), weight), bias)
    row = net.node("Unsqueeze", bias, net.constant(np.asarray([0])))
    model = net.model(net.node("Mul", net.node("Add", hidden, net.node("Identity", net.node("Identity", bias))), row))
    assert ops(simple(model)) == ops(model)


@pytest.mark.parametrize("ir_version", [3, 10])
def test_weights_stored_as_halves_keep_their_names(ir_version: int) -> None:
    net = Net(opset=9 if ir_version == 3 else 21)
    half = net.constant(random_array(7, 5).astype(np.float16), "fc.weight")
    weight = net.node("Transpose", net.node("Cast", half, to=TensorProto.FLOAT))
    model = net.model(net.matmul(net.node("MatMul", net.input("x", ["n", 5]), weight), 7, 3))
    model.ir_version = ir_version
    listed = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer]
    (model.graph.input if ir_version == 3 else model.graph.value_info).extend(listed)
    folded = simple(model)
    assert ops(folded) == ["Transpose", "MatMul", "MatMul", "Add"]
    (stored,) = [t for t in folded.graph.initializer if t.name == "fc.weight"]
    assert (stored.data_type, list(stored.dims)) == (TensorProto.FLOAT, [7, 5])
    onnx.checker.check_model(folded, full_check=True)
    assert same_outputs(model, folded, (3, 5))


def test_what_a_caller_may_replace_stays() -> None:
    model = weight_norm()
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [11, 7]))
    assert ops(simple(model)) == ops(model)


def test_a_file_of_ir_3_lists_folded_weights_among_its_inputs() -> None:
    model = weight_norm(opset=8)
    model.ir_version = 3
    model.graph.input.extend(helper.make_tensor_value_info(t.name, 1, t.dims) for t in model.graph.initializer)
    folded = simple(model)
    onnx.checker.check_model(folded, full_check=True)
    assert "w" in {info.name for info in folded.graph.input}
    assert "v" not in {info.name for info in folded.graph.input}


CONSTANTS = {
    "a": np.asarray([[0.25, -1.5, 2.0], [3.0, 0.5, -0.75]], np.float32),
    "b": np.asarray([[1.5, 2.0, -0.5]], np.float32),
    "p": np.asarray([[0.5, 1.5, 2.5], [3.5, 0.1, 7.0]], np.float32),
    "t": np.asarray([[True, False, True], [False, True, True]]),
    "u": np.asarray([[True, True, False], [False, False, True]]),
    "m": np.asarray([[1.0, 2.0], [3.0, 4.0], [-5.0, 6.0]], np.float32),
    "i0": np.asarray([0]),
    "i1": np.asarray([1]),
    "two": np.asarray([2, 1]),
    "shape": np.asarray([3, 2]),
    "wide": np.asarray([2, 3]),
    "picks": np.asarray([1, 0, 1]),
    "low": np.float32(-0.5),
    "high": np.float32(1.0),
}
EXPRESSIONS = [
    *((op, "a", {}) for op in "Abs Ceil Exp Floor Identity Neg Relu Sigmoid Sign Tanh Flatten Transpose".split()),
    *((op, "p", {}) for op in "Log Reciprocal Sqrt".split()),
    *((op, "a b", {}) for op in "Add Sub Mul Div Max Min Equal Greater GreaterOrEqual Less LessOrEqual".split()),
    *((f"Reduce{op}", "a i1", {}) for op in "L1 L2 Max Mean Min Prod Sum SumSquare".split()),
    *((op, "t u", {}) for op in "And Or Xor".split()),
    ("Not", "t", {}),
    ("Pow", "p b", {}),
    ("Clip", "a low high", {}),
    ("MatMul", "a m", {}),
    ("Where", "t a p", {}),
    ("Concat", "a p", {"axis": 1}),
    ("Gather", "a picks", {"axis": 1}),
    ("Slice", "a i0 i1 i1", {}),
    ("Split", "a", {"axis": 0, "num_outputs": 2}),
    ("Reshape", "a shape", {}),
    ("Squeeze", "b i0", {}),
    ("Unsqueeze", "a i1", {}),
    ("Expand", "b wide", {}),
    ("Tile", "b two", {}),
    ("Cast", "a", {"to": TensorProto.INT8}),
    ("CastLike", "a t", {}),
]


@pytest.mark.parametrize(("op", "operands", "attributes"), EXPRESSIONS, ids=[e[0] for e in EXPRESSIONS])
def test_every_operator_is_folded_to_what_onnxruntime_computes(
    op: str, operands: str, attributes: dict[str, int]
) -> None:
    net = Net()
    names = [net.constant(CONSTANTS[name], name) for name in operands.split()]
    result = net.node(op, *names, outputs=2 if op == "Split" else 1, **attributes)
    result = result[1] if op == "Split" else result
    model = net.model(net.node("Add", net.input("x", [1]), net.node("Cast", result, to=TensorProto.FLOAT)))
    folded = simple(model)
    assert ops(folded) == ["Add"]
    assert same_outputs(model, folded, (1,))


# -- branches ---------------------------------------------------------------------------------------------------------


def with_branch(read: str, nodes: list[onnx.NodeProto]) -> ModelProto:
    """If an input says so, some nodes that compute ``p``, else the input itself."""
    result, other = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "pq")
    then = helper.make_graph(nodes, "then", [], [result])
    otherwise = helper.make_graph([helper.make_node("Identity", [read], ["q"])], "else", [], [other])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise)
    inputs = [helper.make_tensor_value_info("x", 1, ["n", 3]), helper.make_tensor_value_info("flag", 9, [])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def then_branch(node: onnx.NodeProto) -> onnx.GraphProto:
    return next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")


def squeezed(declared: list[int | str], *, bound: int | None = None, size: int = 1) -> ModelProto:
    """Between two layers, what a squeeze of the second axis is exported as: an If on its size."""
    net = Net()
    x = net.input("x", declared)
    if bound is not None:
        x = net.node("Slice", x, *(net.constant(np.asarray([v])) for v in (0, bound, 1)))
    hidden = net.node("Relu", net.matmul(x, 5, 11))
    extent = net.node("Gather", net.node("Shape", hidden), net.constant(np.int64(1)))
    condition = net.node("Equal", extent, net.constant(np.int64(size)))
    net.constant(np.asarray([1]), "axis")
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "pq"]
    squeeze = [helper.make_node("Squeeze", [hidden, "axis"], ["relu_9"]), helper.make_node("Neg", ["relu_9"], ["p"])]
    then = helper.make_graph(squeeze, "t", [], out[:1])
    other = helper.make_graph([helper.make_node("Neg", [hidden], ["q"])], "e", [], out[1:])
    net.nodes.append(helper.make_node("If", [condition], ["f"], then_branch=then, else_branch=other))
    end = net.matmul("f", 11, 3, bias=False)
    graph = helper.make_graph(
        net.nodes, "g", net.inputs, [helper.make_tensor_value_info(end, 1, None)], list(net.weights.values())
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(("width", "op"), [(1, "Squeeze"), (4, "Neg")])
def test_an_if_on_a_size_that_is_known_is_the_branch_that_runs(width: int, op: str) -> None:
    model = squeezed(["n", width, 5])
    assert "If" not in ops(simple(model))
    assert op in ops(simple(model))
    assert "Equal" not in ops(simple(model))
    assert width > 1 or same_outputs(model, simple(model), (3, width, 5))  # onnxruntime refuses what does not run
    result = spa.prune(model, criterion="l2", ratio=0.4, round_to=1)
    assert not result.report.barriers
    assert result.prove().holds


@pytest.mark.parametrize("declared", [["n", "s", 5], ["n", "height", 5]])
def test_an_if_on_a_size_that_follows_the_input_stays(declared: list[int | str]) -> None:
    assert "If" in ops(simple(squeezed(declared)))


def test_an_if_on_the_lesser_of_a_size_and_a_bound_stays() -> None:
    assert "If" in ops(simple(squeezed(["n", "s", 5], bound=7)))
    assert "If" in ops(simple(squeezed(["n", "s", 5], bound=7, size=7)))


def test_an_if_on_data_stays_and_one_on_a_constant_goes() -> None:
    model = with_branch("x", [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["p"])])
    assert ops(nested(simple(model))) == ["If"]
    del model.graph.input[1]
    for value, expected in ((True, ["Neg", "Relu"]), (False, ["Identity"])):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), "flag"))
        assert ops(simple(model)) == expected
        assert same_outputs(model, simple(model), (2, 3))
        del model.graph.initializer[:]


def test_names_of_a_branch_that_others_bear_and_weights_inside_it_are_kept_apart() -> None:
    weight = numpy_helper.from_array(random_array(3, 3), "w")
    inner = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["p"])]
    model = with_branch("x", inner)
    then_branch(model.graph.node[0]).initializer.append(weight)
    twice = onnx.NodeProto()
    twice.CopyFrom(model.graph.node[0])
    twice.output[0] = "z"
    then_branch(twice).initializer[0].CopyFrom(numpy_helper.from_array(random_array(3, 3, seed=5), "w"))
    model.graph.node.append(twice)
    model.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "flag"))
    flat = simple(model)
    assert ops(flat) == ["MatMul", "Relu", "MatMul", "Relu"]
    assert same_outputs(model, flat, (2, 3))


def test_an_if_inside_a_branch_is_inlined_after_it() -> None:
    inner = with_branch("x", [helper.make_node("Neg", ["x"], ["p"])]).graph.node[0]
    inner.output[0] = "p2"
    for graph in (attribute.g for attribute in inner.attribute):
        graph.node[0].output[0] = graph.output[0].name = f"inner_{graph.output[0].name}"
    model = with_branch("x", [inner, helper.make_node("Relu", ["p2"], ["p"])])
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "flag"))
    assert ops(simple(model)) == ["Neg", "Relu"]


def test_a_branch_that_returns_what_lies_outside_passes_it_on() -> None:
    model = with_branch("x", [])
    then_branch(model.graph.node[0]).output[0].name = "x"
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "flag"))
    assert ops(simple(model)) == ["Identity"]


def test_nodes_that_nothing_reads_keep_what_they_read() -> None:
    model = with_branch("x", [helper.make_node("Neg", ["x"], ["p"])])
    model.graph.node.append(helper.make_node("Relu", ["x"], ["h"]))
    model.graph.node.append(helper.make_node("Abs", ["h"], ["unread"]))
    twin = onnx.NodeProto()
    twin.CopyFrom(model.graph.node[0])
    twin.output[0] = "z"
    model.graph.node.append(twin)
    model.graph.node.append(helper.make_node("Not", ["flag"], ["other"]))
    model.graph.node.append(helper.make_node("Tanh", ["z"], ["unread too"]))
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "flag"))
    flat = simple(model)
    assert ops(flat) == ["Neg", "Relu", "Abs", "Neg", "Tanh"]
    assert same_outputs(model, flat, (2, 3))


def test_a_mark_of_two_networks_in_a_file_is_no_mark() -> None:
    model = onnx.load("models/digits_vgg.onnx")
    model.metadata_props.add(key="spa.alternatives", value="bm8gbW9kZWw=")
    assert spa.prune(model, ratio=0.3, criterion="l2").report.reached == pytest.approx(0.3, abs=0.02)
