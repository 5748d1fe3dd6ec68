"""Element-wise operators: all unary and all broadcasting ones against the masked original.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from spa.rules.elementwise import BROADCASTING, UNARY
from tests.oracle import Data, Net, check, freedom, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def floats(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


CASES: Cases = {
    "dropout": ("5 7 | 5 7", lambda: wrap("Dropout", Data(5, 7), opset=13)),
    "dropout mask": ("5 7 | 5 7", lambda: wrap("Dropout", Data(5, 7), outputs=2, read=[0], opset=7)),
    "castlike": ("5 7 | 5 7", lambda: wrap("CastLike", Data(5, 7), floats(1))),
    "cast": ("5 7 | 5 7", lambda: wrap("Cast", Data(5, 7), to=TensorProto.DOUBLE, cast=True)),
    "pow": ("2 5 7 | 5 1 | 2 5 7", lambda: wrap("Pow", Data(2, 5, 7, positive=True), Data(5, 1))),
    "mod": ("2 5 7 | 2 5 7", lambda: wrap("Mod", Data(2, 5, 7, positive=True), weight(7, positive=True), fmod=1)),
    "clip": ("2 5 7 | 2 5 7", lambda: wrap("Clip", Data(2, 5, 7), floats(0).reshape(()), floats(1).reshape(()))),
    "clip7": ("2 5 7 | 2 5 7", lambda: wrap("Clip", Data(2, 5, 7), min=0.0, max=1.0, opset=7)),
    "where": (
        "2 5 7 | 7 | 2 5 7",
        lambda: wrap("Where", np.asarray([[True], [False], [True], [True], [False]]), Data(2, 5, 7), Data(7)),
    ),
    "add scalar": ("2 5 7 | 2 5 7", lambda: wrap("Add", Data(2, 5, 7), floats(1).reshape(()))),
    "add const": ("2 5 7 | 2 5 7", lambda: wrap("Add", Data(2, 5, 7), weight(5, 1))),
    "mul stretch": ("2 1 7 | 2 5 1 | 2 5 7", lambda: wrap("Mul", Data(2, 1, 7), Data(2, 5, 1))),
    "max3": ("2 5 7 | 7 | 2 5 7", lambda: wrap("Max", Data(2, 5, 7), Data(7), weight(5, 1))),
    "sum1": ("2 5 | 2 5", lambda: wrap("Sum", Data(2, 5))),
    "prelu c": ("2 5 7 | 2 5 7", lambda: wrap("PRelu", Data(2, 5, 7), weight(5, 1))),
    "add op7": ("2 5 7 | 2 5 7", lambda: wrap("Add", Data(2, 5, 7), weight(5, 1), opset=7)),
}
# Tested by themselves: they take integers or booleans, or values from a range that random data does not keep to.
SPECIAL_UNARY = {"Cast", "Not", "BitwiseNot", "BitCast", "Acos", "Asin", "Atanh", "Acosh", "IsInf", "IsNaN"}
LOGICAL = ["And", "Or", "Xor"]
BITWISE = ["BitwiseAnd", "BitwiseOr", "BitwiseXor"]
SPECIAL_BINARY = {*LOGICAL, *BITWISE, "BitShift", "Where", "Clip", "Mod", "Pow", "Equal"}
COMPARISONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
POSITIVE = {"Log", "Reciprocal", "Sqrt"}


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


@pytest.mark.parametrize("name", [u for u in UNARY if "::" not in u and u not in SPECIAL_UNARY])
def test_a_unary_operator_passes_all_axes(name: str) -> None:
    version = max(12, onnx.defs.get_schema(name, 26).since_version)
    verify(wrap(name, Data(5, 7, positive=name in POSITIVE), opset=version), "5 7 | 5 7")


@pytest.mark.parametrize("name", [b for b in BROADCASTING if "::" not in b and b not in SPECIAL_BINARY])
def test_a_broadcasting_operator_unifies_trailing_axes(name: str) -> None:
    model = wrap(name, Data(2, 5, 7), Data(5, 1), opset=16, cast=name in COMPARISONS)
    verify(model, "2 5 7 | 5 1 | 2 5 7")


@pytest.mark.parametrize("opset", [13, 15])
@pytest.mark.parametrize("name", ["GreaterOrEqual", "LessOrEqual"])
def test_a_comparison_without_shape_inference_in_its_version_passes_all_axes(name: str, opset: int) -> None:
    verify(wrap(name, Data(2, 5, 7), Data(5, 1), opset=opset, shapes=[(2, 5, 7)], cast=True), "2 5 7 | 5 1 | 2 5 7")


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int32])
def test_constants_of_one_value_per_channel_that_an_operator_makes_pass_all_axes(dtype: type) -> None:
    net = Net()
    values = net.constant(np.arange(7).astype(dtype) if dtype != np.bool_ else np.arange(7) % 3 == 0)
    made = net.node("Not", values) if dtype == np.bool_ else net.node("Cast", values, to=TensorProto.UINT8)
    mask = made if dtype == np.bool_ else net.node("Cast", made, to=TensorProto.BOOL)
    hidden = net.gemm(net.input("x", ["n", 3]), 3, 7)
    model = net.model(net.gemm(net.node("Where", mask, hidden, net.constant(0.0)), 7, 2))
    assert [g.size for g in check(model).groups] == [7]


def typed(op: str, operands: int, dtype: int, **attributes: object) -> ModelProto:
    """float channels → Cast → operator → Cast → reader."""
    net = Net(18)
    casts = []
    for i in range(operands):
        h = net.gemm(net.input(f"x{i}", ["n", 3]), 3, 7)
        h = net.node("Greater", h, net.constant(0.0)) if dtype == TensorProto.BOOL else net.node("Abs", h)
        casts.append(net.node("Cast", h, to=dtype))
    y = net.node(op, *casts, **attributes)
    return net.model(net.gemm(net.node("Cast", y, to=TensorProto.FLOAT), 7, 2))


@pytest.mark.parametrize("name", LOGICAL)
def test_logical_operators_pass_all_axes(name: str) -> None:
    assert [g.size for g in check(typed(name, 2, TensorProto.BOOL)).groups] == [7]


@pytest.mark.parametrize("name", BITWISE)
def test_bitwise_operators_pass_all_axes(name: str) -> None:
    assert [g.size for g in check(typed(name, 2, TensorProto.INT32)).groups] == [7]


def test_not_and_bitwise_not_and_shifts_pass_all_axes() -> None:
    assert [g.size for g in check(typed("Not", 1, TensorProto.BOOL)).groups] == [7]
    assert [g.size for g in check(typed("BitwiseNot", 1, TensorProto.INT32)).groups] == [7]
    assert [g.size for g in check(typed("BitShift", 2, TensorProto.UINT32, direction="LEFT")).groups] == [7]


@pytest.mark.parametrize("name", ["Acos", "Asin", "Atanh", "Acosh"])
def test_inverse_functions_pass_all_axes_within_their_range(name: str) -> None:
    net = Net()
    h = net.node("Sigmoid", net.gemm(net.input("x", ["n", 3]), 3, 7))
    h = net.node(name, net.node("Add", h, net.constant(1.0 if name == "Acosh" else -0.5)))
    assert [g.size for g in check(net.model(net.gemm(h, 7, 2))).groups] == [7]


def test_tests_for_numbers_pass_all_axes() -> None:
    for name in ("IsInf", "IsNaN"):
        net = Net()
        h = net.gemm(net.input("x", ["n", 3]), 3, 7)
        bad = net.node("Sqrt", h) if name == "IsNaN" else net.node("Log", net.node("Relu", h))
        y = net.node("Where", net.node(name, bad), h, net.node("Sigmoid", h))
        assert [g.size for g in check(net.model(net.gemm(y, 7, 2))).groups] == [7]


def test_equality_passes_all_axes() -> None:
    net = Net()
    h = net.node("Round", net.gemm(net.input("x", ["n", 3]), 3, 7))
    y = net.node("Cast", net.node("Equal", h, net.constant(0.0)), to=TensorProto.FLOAT)
    assert [g.size for g in check(net.model(net.gemm(y, 7, 2))).groups] == [7]


def test_a_bit_cast_of_equal_width_passes_all_axes() -> None:
    model = wrap("BitCast", Data(5, 7), opset=26, to=TensorProto.INT32, read=[])
    assert freedom(model) == {"X0": "5 7", "Y0": "5 7"}
