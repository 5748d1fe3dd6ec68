"""Quantised tensors and the integer operators: every axis against the masked original, scales and zero points included.

Integers are exact, so the oracle's usual tolerance holds: float noise could only show by tipping a rounding, which the
seeds avoid. How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.oracle import Data, Net, _produced, check, freedom, random_array, verify, weight, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]
F, U8, I8, I32 = np.float32, np.uint8, np.int8, np.int32


class Quantised(Data):
    """An activation, quantised to uint8 (or int8) with a zero point that is not zero."""

    def __init__(self, *shape: int, zero: Any = U8(113), scale: float = 0.03) -> None:
        super().__init__(*shape)
        self.zero, self.scale = zero, scale


def ints(*shape: int, dtype: Any = I8, low: int = -20, high: int = 20) -> np.ndarray:
    """Random integers.

    Weights that are multiplied as integers stay below 64: without VNNI onnxruntime sums two products in 16 bits.
    """
    return np.random.default_rng([*shape, high]).integers(low, high, shape).astype(dtype)


def scales(*shape: int) -> np.ndarray:
    """Random scales."""
    return (0.02 + np.abs(random_array(*shape)) / 50).astype(F)


def quantised(
    op: str,
    *operands: Any,
    shape: Sequence[int],
    domain: str = "",
    out: Any = U8,
    outputs: int = 1,
    **attributes: Any,
) -> ModelProto:
    """As :func:`wrap`, but Quantised operands are quantised and the first output is made float before it is read."""
    net = Net(**({"com_microsoft": 1} if domain else {}))
    names = []
    for position, operand in enumerate(operands):
        if operand is None:
            names.append("")
        elif isinstance(operand, Data):
            name = _produced(net, operand, position)
            if isinstance(operand, Quantised):
                name = net.node("QuantizeLinear", name, net.constant(F(operand.scale)), net.constant(operand.zero))
            names.append(name)
        else:
            names.append(net.constant(operand, f"C{position}"))
    net.nodes.append(
        helper.make_node(op, names, [f"Y{i}" for i in range(outputs)], name="tested", domain=domain, **attributes)
    )
    if out in (U8, I8):
        y = net.node("DequantizeLinear", "Y0", net.constant(F(0.1)), net.constant(out(9)))
    else:
        y = net.node("Cast", "Y0", to=TensorProto.FLOAT)
    for axis, size in enumerate(shape):
        if size != 1:
            y = net.project(y, axis, len(shape), size, 2)
    return net.model(y)


def contrib(op: str, *operands: Any, **options: Any) -> ModelProto:
    """A quantised operator of com.microsoft."""
    return quantised(op, *operands, domain="com.microsoft", **options)


X = (F(0.03), U8(113))  # scale and zero point of quantised data
Y = (F(0.1), U8(97))  # scale and zero point of outputs

ELEMENTS: Cases = {
    "QuantizeLinear": (
        "2 5 7 | 2 5 7",
        lambda: quantised("QuantizeLinear", Data(2, 5, 7), F(0.03), U8(113), shape=(2, 5, 7)),
    ),
    "QuantizeLinear per axis": (
        "2 5 7 | 2 5 7",
        lambda: quantised(
            "QuantizeLinear", Data(2, 5, 7), scales(5), ints(5, dtype=U8, low=90, high=120), shape=(2, 5, 7)
        ),
    ),
    "QuantizeLinear last axis": (
        "2 5 7 | 2 5 7",
        lambda: quantised("QuantizeLinear", Data(2, 5, 7), scales(7), shape=(2, 5, 7), axis=-1),
    ),
    "QuantizeLinear blocked": (
        "2 (3 5!) 7 | 2 (3 5!) 7",
        lambda: quantised(
            "QuantizeLinear",
            *(Data(2, 15, 7), scales(2, 3, 7), ints(2, 3, 7, dtype=U8, low=90, high=120)),
            shape=(2, 15, 7),
            axis=1,
            block_size=5,
        ),
    ),
    "QuantizeLinear blocked unevenly": (
        "2 14! 7 | 2 14! 7",
        lambda: quantised(
            "QuantizeLinear",
            *(Data(2, 14, 7), scales(2, 3, 7), ints(2, 3, 7, dtype=U8, low=90, high=120)),
            shape=(2, 14, 7),
            axis=1,
            block_size=5,
        ),
    ),
    "DequantizeLinear per axis": (
        "2 5 7 | 2 5 7",
        lambda: quantised(
            "DequantizeLinear",
            *(Quantised(2, 5, 7), scales(5), ints(5, dtype=U8, low=90, high=120)),
            shape=(2, 5, 7),
            out=F,
        ),
    ),
    "contrib QuantizeLinear": (
        "2 5 7 | 2 5 7",
        lambda: contrib("QuantizeLinear", Data(2, 5, 7), scales(5), ints(5, dtype=I8), shape=(2, 5, 7), out=I8, axis=1),
    ),
    "contrib DequantizeLinear": (
        "2 5 7 | 2 5 7",
        lambda: contrib("DequantizeLinear", Quantised(2, 5, 7), *X, shape=(2, 5, 7), out=F),
    ),
    "QLinearAdd": (
        "2 5 7 | 5 7 | 2 5 7",
        lambda: contrib("QLinearAdd", Quantised(2, 5, 7), *X, Quantised(5, 7), *X, *Y, shape=(2, 5, 7)),
    ),
    "QLinearMul": (
        "2 5 7 | 2 5 7",
        lambda: contrib(
            "QLinearMul", Quantised(2, 5, 7), *X, ints(5, 1, dtype=U8, low=0, high=250), *X, *Y, shape=(2, 5, 7)
        ),
    ),
    "QLinearWhere": (
        "2 5 7 | 5 7 | 2 5 7",
        lambda: contrib(
            "QLinearWhere",
            *(np.arange(14).reshape(2, 1, 7) % 3 > 0, Quantised(2, 5, 7), *X, Quantised(5, 7), *X, *Y),
            shape=(2, 5, 7),
        ),
    ),
    "QLinearSigmoid": (
        "2 5 7 | 2 5 7",
        lambda: contrib("QLinearSigmoid", Quantised(2, 5, 7), *X, F(1 / 256), U8(0), shape=(2, 5, 7)),
    ),
    "QLinearLeakyRelu": (
        "2 5 7 | 2 5 7",
        lambda: contrib("QLinearLeakyRelu", Quantised(2, 5, 7), *X, *Y, shape=(2, 5, 7), alpha=0.2),
    ),
    "QLinearSoftmax": (
        "2 5 7~ | 2 5 7~",
        lambda: contrib(
            "QLinearSoftmax", Quantised(2, 5, 7), *X, F(1 / 256), U8(0), shape=(2, 5, 7), axis=-1, opset=13
        ),
    ),
    "QLinearGlobalAveragePool": (
        "2 5 7! 3! | 2 5 1 1",
        lambda: contrib("QLinearGlobalAveragePool", Quantised(2, 5, 7, 3), *X, *Y, shape=(2, 5, 1, 1)),
    ),
    "QLinearGlobalAveragePool, channels last": (
        "2 7! 3! 5 | 2 1 1 5",
        lambda: contrib("QLinearGlobalAveragePool", Quantised(2, 7, 3, 5), *X, *Y, shape=(2, 1, 1, 5), channels_last=1),
    ),
    "QLinearAveragePool": (
        "2 5 7! 7! | 2 5 4! 4!",
        lambda: contrib(
            "QLinearAveragePool",
            *(Quantised(2, 5, 7, 7), *X, *Y),
            shape=(2, 5, 4, 4),
            kernel_shape=[2, 2],
            strides=[2, 2],
            ceil_mode=1,
        ),
    ),
    "QLinearAveragePool, channels last": (
        "2 7! 7! 5 | 2 4! 4! 5",
        lambda: contrib(
            "QLinearAveragePool",
            *(Quantised(2, 7, 7, 5), *X, *Y),
            shape=(2, 4, 4, 5),
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
            channels_last=1,
        ),
    ),
    "NhwcMaxPool": (
        "2 7! 7! 5 | 2 3! 3! 5",
        lambda: contrib("NhwcMaxPool", Quantised(2, 7, 7, 5), shape=(2, 3, 3, 5), kernel_shape=[3, 3], strides=[2, 2]),
    ),
    "QLinearConcat": (
        "2 3 7 | 2 5 7 | 2 3+5 7",
        lambda: contrib("QLinearConcat", *Y, Quantised(2, 3, 7), *X, Quantised(2, 5, 7), *X, shape=(2, 8, 7), axis=1),
    ),
}

PRODUCTS: Cases = {
    "ConvInteger": (
        "2 10 7! 7! | 2 6 5! 5!",
        lambda: quantised(
            "ConvInteger",
            *(Quantised(2, 10, 7, 7), ints(6, 10, 3, 3, dtype=U8, low=0, high=50), U8(113), U8(23)),
            shape=(2, 6, 5, 5),
            out=I32,
        ),
    ),
    "ConvInteger, symmetric": (
        "2 10 7! 7! | 2 6 5! 5!",
        lambda: quantised(
            "ConvInteger",
            Quantised(2, 10, 7, 7),
            ints(6, 10, 3, 3, dtype=U8, low=0, high=50),
            U8(113),
            shape=(2, 6, 5, 5),
            out=I32,
        ),
    ),
    "QLinearConv": (
        "2 10 7! 7! | 2 6 5! 5!",
        lambda: quantised(
            "QLinearConv",
            *(Quantised(2, 10, 7, 7), *X, ints(6, 10, 3, 3), scales(6), np.zeros(6, I8), *Y, ints(6, dtype=I32)),
            shape=(2, 6, 5, 5),
        ),
    ),
    "QLinearConv, grouped": (
        "2 (2 5) 7! 7! | 2 (2 3) 5! 5!",
        lambda: quantised(
            "QLinearConv",
            *(Quantised(2, 10, 7, 7), *X, ints(6, 5, 3, 3), F(0.03), I8(3), *Y),
            shape=(2, 6, 5, 5),
            group=2,
        ),
    ),
    "contrib QLinearConv": (
        "2 7! 7! 10 | 2 5! 5! 6",
        lambda: contrib(
            "QLinearConv",
            *(Quantised(2, 7, 7, 10), *X, ints(6, 10, 3, 3), scales(6), np.zeros(6, I8), *Y, ints(6, dtype=I32)),
            shape=(2, 5, 5, 6),
            channels_last=1,
        ),
    ),
    "contrib QLinearConv, depthwise": (
        "2 7! 7! 5 | 2 4! 4! 5",
        lambda: contrib(
            "QLinearConv",
            *(Quantised(2, 7, 7, 5), *X, ints(5, 1, 3, 3), scales(5), np.zeros(5, I8), *Y),
            shape=(2, 4, 4, 5),
            group=5,
            channels_last=1,
            pads=[1, 1, 1, 1],
            strides=[2, 2],
        ),
    ),
    "QLinearMatMul": (
        "2 5 7 | 2 5 3",
        lambda: quantised("QLinearMatMul", Quantised(2, 5, 7), *X, ints(7, 3), scales(3), ints(3), *Y, shape=(2, 5, 3)),
    ),
    "QLinearMatMul of data": (
        "2 5 7 | 2 7 3 | 2 5 3",
        lambda: quantised("QLinearMatMul", Quantised(2, 5, 7), *X, Quantised(2, 7, 3), *X, *Y, shape=(2, 5, 3)),
    ),
    "MatMulInteger": (
        "2 5 7 | 2 5 3",
        lambda: quantised(
            "MatMulInteger",
            *(Quantised(2, 5, 7), ints(7, 3), U8(113), ints(3)),
            shape=(2, 5, 3),
            out=I32,
        ),
    ),
    "MatMulInteger without zero points": (
        "5 7 | 5 3",
        lambda: quantised("MatMulInteger", Quantised(5, 7), ints(7, 3), shape=(5, 3), out=I32),
    ),
    "QGemm": (
        "5 7 | 5 3",
        lambda: contrib(
            "QGemm", Quantised(5, 7), *X, ints(3, 7), scales(3), ints(3), ints(3, dtype=I32), *Y, shape=(5, 3), transB=1
        ),
    ),
    "QGemm to float": (
        "5 7 | 5 3",
        lambda: contrib("QGemm", Quantised(5, 7), *X, ints(7, 3), F(0.02), I8(2), shape=(5, 3), out=F),
    ),
    "MatMulIntegerToFloat": (
        "2 5 7 | 2 5 3",
        lambda: contrib(
            "MatMulIntegerToFloat",
            *(Quantised(2, 5, 7), ints(7, 3), F(0.03), scales(3), U8(113), ints(3), weight(3)),
            shape=(2, 5, 3),
            out=F,
        ),
    ),
    "DynamicQuantizeMatMul": (
        "2~ 5~ 7~ | 2~ 5~ 3",
        lambda: contrib(
            "DynamicQuantizeMatMul",
            *(Data(2, 5, 7), ints(7, 3), scales(3), ints(3), weight(3)),
            shape=(2, 5, 3),
            out=F,
        ),
    ),
    "QAttention": (
        "2 5~ 13 | 2 5~ (3 7)",
        lambda: contrib(
            "QAttention",
            *(Quantised(2, 5, 13), ints(13, 63), weight(63), F(0.03), scales(63), None, U8(113), np.zeros(63, I8)),
            shape=(2, 5, 21),
            out=F,
            num_heads=3,
        ),
    ),
    "QAttention with a cache": (
        "2 5! 13 | 2! 2 3 4! 7 | 2 5! (3 7) | 2! 2 3 4!+5! 7",
        lambda: contrib(
            "QAttention",
            *(Quantised(2, 5, 13), ints(13, 63), weight(63), F(0.03), F(0.02), np.asarray([9, 7], I32)),
            *(U8(113), I8(3), Data(2, 2, 3, 4, 7)),
            shape=(2, 5, 21),
            out=F,
            num_heads=3,
            unidirectional=1,
            outputs=2,
        ),
    ),
}

PACKED: Cases = {
    "four bits": (
        "2 5 (3 16!) | 2 5 7",
        lambda: contrib(
            "MatMulNBits",
            *(Data(2, 5, 48), ints(7, 3, 8, dtype=U8, low=0, high=255), scales(7, 3), None, None, weight(7)),
            shape=(2, 5, 7),
            out=F,
            N=7,
            K=48,
            bits=4,
            block_size=16,
        ),
    ),
    "scales in a row": (
        "2 5 (3 16!) | 2 5 7",
        lambda: contrib(
            "MatMulNBits",
            *(Data(2, 5, 48), ints(7, 3, 8, dtype=U8, low=0, high=255), scales(21)),
            shape=(2, 5, 7),
            out=F,
            N=7,
            K=48,
            bits=4,
            block_size=16,
        ),
    ),
    "zero points that share bytes": (
        "2 5 (3! 16!) | 2 5 7",
        lambda: contrib(
            "MatMulNBits",
            *(Data(2, 5, 48), ints(7, 3, 8, dtype=U8, low=0, high=255), scales(7, 3)),
            ints(7, 2, dtype=U8, low=0, high=255),
            shape=(2, 5, 7),
            out=F,
            N=7,
            K=48,
            bits=4,
            block_size=16,
        ),
    ),
    "eight bits": (
        "2 5 (3 16!) | 2 5 7",
        lambda: contrib(
            "MatMulNBits",
            *(Data(2, 5, 48), ints(7, 3, 16, dtype=U8, low=0, high=255), scales(7, 3)),
            ints(7, 3, dtype=U8, low=100, high=150),
            shape=(2, 5, 7),
            out=F,
            N=7,
            K=48,
            bits=8,
            block_size=16,
        ),
    ),
    "a part of a block": (
        "2 5 41! | 2 5 7",
        lambda: contrib(
            "MatMulNBits",
            *(Data(2, 5, 41), ints(7, 3, 8, dtype=U8, low=0, high=255), scales(7, 3)),
            shape=(2, 5, 7),
            out=F,
            N=7,
            K=41,
            bits=4,
            block_size=16,
        ),
    ),
}

ALL = ELEMENTS | PRODUCTS | {f"MatMulNBits, {name}": case for name, case in PACKED.items()}


@pytest.mark.parametrize("name", ALL)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = ALL[name]
    verify(build(), expected)


def test_a_quantised_mean_crosses_what_it_reduces() -> None:
    # onnxruntime has no CPU kernel: analysis only.
    net = Net(com_microsoft=1)
    x = net.node("QuantizeLinear", _produced(net, Data(2, 5, 7), 0), net.constant(F(0.03)), net.constant(U8(113)))
    operands = [x, *(net.constant(v) for v in (*X, *Y))]
    net.nodes.append(
        helper.make_node(
            "QLinearReduceMean", operands, ["Y0"], name="tested", domain="com.microsoft", axes=[1], keepdims=0
        )
    )
    graph = helper.make_graph(
        net.nodes,
        "mean",
        net.inputs,
        [helper.make_tensor_value_info("Y0", TensorProto.UINT8, [2, 7])],
        list(net.weights.values()),
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    assert freedom(model) == {"X0": "2! 5~ 7!", "Y0": "2! 7!"}


@pytest.mark.parametrize(("op", "shape"), [("MatMulInteger", (7, 3)), ("ConvInteger", (3, 7, 1))])
def test_a_dynamic_scale_crosses_the_whole_tensor(op: str, shape: tuple[int, ...]) -> None:
    net = Net()
    data = Data(2, 5, 7) if op == "MatMulInteger" else Data(2, 7, 5)
    q, scale, zero = net.node("DynamicQuantizeLinear", _produced(net, data, 0), outputs=3)
    net.node(op, q, net.constant(ints(*shape, dtype=U8, low=0, high=60)), zero, net.constant(U8(30)))
    net.nodes[-1].output[0] = "Y0"
    y = net.node("Mul", net.node("Cast", "Y0", to=TensorProto.FLOAT), scale)
    for axis in range(3):
        y = net.project(y, axis, 3, (2, 5, 3)[axis] if op == "MatMulInteger" else (2, 3, 5)[axis], 2)
    expected = "2~ 5~ 7~ | 2~ 5~ 3" if op == "MatMulInteger" else "2~ 7~ 5! | 2~ 3 5!"
    verify(net.model(y), expected)


@pytest.mark.parametrize("each", [False, True])
def test_a_quantised_lstm_crosses_data_and_units(each: bool) -> None:
    h, lengths = 7, (1, 28) if each else (1,)
    model = wrap(
        "DynamicQuantizeLSTM",
        *(Data(5, 2, 3), ints(1, 3, 4 * h), ints(1, h, 4 * h), weight(1, 8 * h), None, None, None, weight(1, 3 * h)),
        *(scales(*lengths), np.zeros(lengths, I8), scales(*lengths), np.zeros(lengths, I8)),
        domain="com.microsoft",
        hidden_size=h,
        outputs=3,
        shapes=[(5, 1, 2, h), (1, 2, h), (1, 2, h)],
    )
    verify(model, "5! 2~ 3~ | 5! 1 2~ 7~ | 1 2~ 7~ | 1 2~ 7~")


# -- whole chains ---------------------------------------------------------------------------------------------------


def test_a_model_in_qdq_form_is_pruned_with_its_scales_and_zero_points() -> None:
    net = Net()
    x = net.node("QuantizeLinear", net.input("x", ["n", 3, 7, 7]), net.constant(F(0.03)), net.constant(U8(128)))
    x = net.node("DequantizeLinear", x, net.constant(F(0.03)), net.constant(U8(128)))
    h = net.node("Relu", _qdq_conv(net, x, 3, 11))
    h = net.node("QuantizeLinear", h, net.constant(F(0.01)), net.constant(U8(0)))
    h = net.node("DequantizeLinear", h, net.constant(F(0.01)), net.constant(U8(0)))
    model = net.model(_qdq_conv(net, h, 11, 5))
    pruned = check(model, fraction=0.4).pruned
    shapes = {t.name: tuple(t.dims) for t in pruned.graph.initializer}
    assert shapes["w11"] == (7, 3, 3, 3)
    assert shapes["w11.scale"] == shapes["w11.zero"] == shapes["b11"] == shapes["b11.scale"] == (7,)
    assert shapes["w5"] == (5, 7, 3, 3)
    assert shapes["w5.scale"] == (5,)


def _qdq_conv(net: Net, x: str, inputs: int, outputs: int) -> str:
    """A convolution whose int8 weights and int32 bias have scales per output channel."""
    names = {
        f"w{outputs}": ints(outputs, inputs, 3, 3),
        f"w{outputs}.scale": scales(outputs),
        f"w{outputs}.zero": ints(outputs),
        f"b{outputs}": ints(outputs, dtype=I32),
        f"b{outputs}.scale": scales(outputs) * F(0.03),
    }
    w, ws, wz, b, bs = (net.constant(value, name) for name, value in names.items())
    weights = net.node("DequantizeLinear", w, ws, wz, axis=0)
    return net.node("Conv", x, weights, net.node("DequantizeLinear", b, bs, axis=0), kernel_shape=[3, 3])


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("blocked", [False, True])
def test_weights_of_four_bits_are_sliced_and_packed_again(kind: int, blocked: bool) -> None:
    net = Net()
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    low = -8 if kind == TensorProto.INT4 else 0
    values = np.random.default_rng(3).integers(low, low + 16, (15, 7))
    net.weights["w"] = numpy_helper.from_array(values.astype(dtype), "w")
    zeros = np.random.default_rng(4).integers(low + 5, low + 9, (3, 7) if blocked else (7,))
    net.weights["z"] = numpy_helper.from_array(zeros.astype(dtype), "z")
    scale = net.constant(scales(*zeros.shape), "s")
    options = {"axis": 0, "block_size": 5} if blocked else {"axis": 1}
    w = net.node("DequantizeLinear", "w", scale, "z", **options)
    h = net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 15))
    model = net.model(net.gemm(net.node("Relu", net.node("MatMul", h, w)), 7, 2))
    checked = check(model, fraction=0.35)
    (tensor,) = [t for t in checked.pruned.graph.initializer if t.name == "w"]
    assert tensor.data_type == kind
    assert tuple(tensor.dims) == (10, 5)
    kept = {g.size: k for g, k in zip(checked.groups, checked.plan.kept.values(), strict=True)}
    assert kept.keys() == ({3, 7} if blocked else {15, 7})
    rows = np.concatenate([5 * k + np.arange(5) for k in kept[3]]) if blocked else kept[15]
    assert np.array_equal(numpy_helper.to_array(tensor).astype(int), values[np.ix_(rows, kept[7])])
