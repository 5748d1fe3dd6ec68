"""Quantised tensors and the integer operators: scales and zero points follow the channels that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spa.axes import Expr, concat, product
from spa.op import Op
from spa.rules import rule
from spa.rules.linear import convolution, gemm_axes, matmul_axes
from spa.rules.reductions import pool


@rule(*["QuantizeLinear", "DequantizeLinear", "com.microsoft::QuantizeLinear", "com.microsoft::DequantizeLinear"])
def quantise(op: Op) -> None:
    """Element-wise; scale and zero point are scalars, or lie along `axis`, whole or in blocks.

    Spec: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html.
    """
    axes = op.axes(0)
    for operand in (1, 2):
        if op.has(operand):
            given = op.axes(operand)
            if len(given) == 1 and given[0].size != 1:
                op.unify(given[0], axes[op.attr("axis", 1)])
            elif len(given) > 1:
                _blocks(op, axes, given)
    op.set(0, axes)


def _blocks(op: Op, axes: tuple[Expr, ...], scales: tuple[Expr, ...]) -> None:
    for whole, blocks in zip(axes, scales, strict=True):
        if whole.size == blocks.size:
            op.unify(whole, blocks)
        elif whole.size % blocks.size == 0:
            op.unify(whole, product(blocks, op.opaque(whole.size // blocks.size, "a block of")))
        else:
            op.freeze(whole, "unevenly blocked by")
            op.freeze(blocks, "unevenly blocked by")


@rule("DynamicQuantizeLinear")
def dynamic_quantise(op: Op) -> None:
    """Scale and zero point are taken from the extremes of the whole tensor."""
    axes = op.axes(0)
    for e in axes:
        op.cross(e)
    op.set(0, axes)
    op.set(1, ())
    op.set(2, ())


def _zero_points(op: Op, of: Mapping[int, int], along: int = 0) -> None:
    """Say which operand holds the zero of each reading operand, and along which of its axes."""
    op.reads = [replace(r, zero=of.get(r.operand), zero_axis=along) for r in op.reads]


def _per_channel(op: Op, operands: list[int], channels: Expr) -> None:
    """Scales, zero points and biases that are vectors lie along the channels."""
    for operand in operands:
        if op.has(operand):
            given = op.axes(operand)
            if given and given[-1].size != 1:
                op.unify(given[-1], channels)


@rule("ConvInteger")
def integer_conv(op: Op) -> None:
    """Convolution of integers; the weights' zero points may differ by output channel."""
    convolution(op, "x[n (g i) *s], w[(g o) i *k] -> y[n (g o) *t]")
    _zero_points(op, {0: 2, 1: 3})
    _per_channel(op, [3], (op.outputs[0] or ())[1])


@rule("QLinearConv")
def quantised_conv(op: Op) -> None:
    """Convolution of quantised tensors; the weights' scales and zero points may differ by output channel."""
    line = (
        "x[n (g i) *s], x_scale, x_zero_point, w[(g o) i *k], w_scale, w_zero_point, y_scale, y_zero_point, "
        "B?[(g o)] -> y[n (g o) *t]"
    )
    convolution(op, line, weights=3)
    _zero_points(op, {0: 2, 3: 5})
    _per_channel(op, [4, 5], (op.outputs[0] or ())[1])


@rule(
    *["QLinearMatMul", "MatMulInteger", "com.microsoft::MatMulIntegerToFloat", "com.microsoft::DynamicQuantizeMatMul"]
)
def integer_matmul(op: Op) -> None:
    """MatMul of integers; the right operand's scales, zero points and bias may differ by column."""
    right, zeros, vectors = {
        "QLinearMatMul": (3, {0: 2, 3: 5}, [4, 5]),
        "MatMulInteger": (1, {0: 2, 1: 3}, [3]),
        "MatMulIntegerToFloat": (1, {0: 4, 1: 5}, [3, 5, 6]),
        "DynamicQuantizeMatMul": (1, {1: 3}, [2, 3, 4]),
    }[op.node.op]
    result = matmul_axes(op, 0, right)
    _zero_points(op, zeros, along=-1)
    _per_channel(op, vectors, result[-1])
    if op.node.op == "DynamicQuantizeMatMul":
        for e in op.axes(0):
            op.cross(e)
    op.set(0, result)


@rule("com.microsoft::QGemm")
def quantised_gemm(op: Op) -> None:
    """Gemm of integers. Spec: ContribOperators.md#com.microsoft.QGemm."""
    rows, columns, _ = gemm_axes(op, 0, 3)
    _zero_points(op, {0: 2, 3: 5}, along=0 if op.attr("transB", 0) else -1)
    _per_channel(op, [4, 5, 6], columns)
    op.set(0, (rows, columns))


@rule("com.microsoft::QLinearAdd", "com.microsoft::QLinearMul")
def quantised_broadcast(op: Op) -> None:
    """Broadcasting of A (operand 0) and B (operand 3), each with its scale and zero point."""
    op.broadcast([0, 3])


@rule(*["com.microsoft::QLinearSigmoid", "com.microsoft::QLinearLeakyRelu"])
def quantised_unary(op: Op) -> None:
    """An element-wise function."""
    op.set(0, op.axes(0))


@rule("com.microsoft::QLinearSoftmax")
def quantised_softmax(op: Op) -> None:
    """Normalises over `axis`."""
    axes = op.axes(0)
    for e in axes[op.positive(op.attr("axis", -1), len(axes)) :]:
        op.cross(e)
    op.set(0, axes)


@rule("com.microsoft::QLinearGlobalAveragePool", "com.microsoft::QLinearAveragePool")
def quantised_pool(op: Op) -> None:
    """Batch and channels pass; positions are pooled. The channels are last where `channels_last` says so."""
    if not op.attr("channels_last", 0):
        pool(op)
        return
    axes = op.axes(0)
    for e in axes[1:-1]:
        op.freeze(e, "spatial axis of")
    op.set(0, [axes[0], *(op.opaque(n) for n in (op.out_shapes[0] or ())[1:-1]), axes[-1]])


@rule("com.microsoft::QLinearConcat")
def quantised_concat(op: Op) -> None:
    """The sum of operands 2, 5, 8 ... along `axis`, each followed by its scale and zero point."""
    given = [op.axes(i) for i in range(2, len(op.inputs), 3)]
    axis = op.positive(op.attr("axis"), len(given[0]))
    for other in given[1:]:
        for i, (a, b) in enumerate(zip(given[0], other, strict=True)):
            if i != axis:
                op.unify(a, b)
    result = list(given[0])
    result[axis] = concat(*(a[axis] for a in given))
    op.set(0, result)
