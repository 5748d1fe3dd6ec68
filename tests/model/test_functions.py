"""Local functions are inlined, and what would end onnx's inliner is refused before."""

from typing import Any

import onnx
import pytest
from onnx import ModelProto, helper

from spa.errors import ModelError
from spa.model.functions import inlined

FLOAT = onnx.TensorProto.FLOAT


def function(name: str, *called: str) -> onnx.FunctionProto:
    """A function that calls others one after another."""
    names = ["x", *(f"t{i}" for i in range(1, len(called))), "y"]
    nodes = [
        helper.make_node(op, [a], [b], domain="" if op == "Relu" else "own")
        for op, a, b in zip(called, names[:-1], names[1:], strict=True)
    ]
    return helper.make_function("own", name, ["x"], ["y"], nodes, [helper.make_opsetid(d, 21) for d in ("", "own")])


def model_of(*functions: onnx.FunctionProto) -> ModelProto:
    node = helper.make_node(functions[0].name, ["input"], ["output"], domain="own")
    values = [helper.make_tensor_value_info(n, FLOAT, [2, 3]) for n in ("input", "output")]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid(d, 21) for d in ("", "own")]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def test_functions_that_call_others_are_inlined() -> None:
    model = inlined(model_of(function("f", "g", "Relu", "g"), function("g", "Relu", "Relu")))
    assert not model.functions and [n.op_type for n in model.graph.node] == ["Relu"] * 5
    onnx.checker.check_model(model)


def test_a_model_without_functions_is_the_same_message() -> None:
    model = model_of(function("f", "Relu"))
    del model.functions[:]
    assert inlined(model) is model


@pytest.mark.parametrize(
    ("version", "op", "attributes", "expected"),
    [
        (13, "Relu", {}, ["Relu"]),  # whose types alone have changed
        (11, "Softmax", {}, ["f"]),  # another axis by default
        (11, "Softmax", {"axis": 1}, ["f"]),  # and over all axes behind it
        (17, "ReduceMean", {"axes": [1]}, ["f"]),
    ],
)
def test_a_function_of_another_version_is_inlined_where_its_operators_mean_the_same(
    version: int, op: str, attributes: dict[str, Any], expected: list[str]
) -> None:
    node = helper.make_node(op, ["x"], ["y"], **attributes)
    other = helper.make_function("own", "f", ["x"], ["y"], [node], [helper.make_opsetid("", version)])
    assert [n.op_type for n in inlined(model_of(other)).graph.node] == expected
    assert other.opset_import[0].version == version


@pytest.mark.parametrize(
    "functions", [[function("f", "Relu", "f")], [function("f", "g"), function("g", "f")]], ids=["itself", "two"]
)
def test_a_circle_of_functions_is_refused(functions: list[onnx.FunctionProto]) -> None:
    with pytest.raises(ModelError, match="call each other in a circle: 'f'"):
        inlined(model_of(*functions))


def test_functions_that_would_expand_without_end_are_refused() -> None:
    doubling = [function(f"f{i}", f"f{i + 1}", f"f{i + 1}") for i in range(60)]
    with pytest.raises(ModelError, match=r"expand to 1\.15e\+18 nodes"):
        inlined(model_of(*doubling, function("f60", "Relu")))
