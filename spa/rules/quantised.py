"""Quantised tensors and the integer operators: scales and zero points follow the channels that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from spa.algebra.axes import UNIT, Expr, concat, product
from spa.algebra.notation import apply
from spa.algebra.op import Barrier, Op, Read
from spa.rules import rule
from spa.rules.linear import gemm_axes, matmul_axes
from spa.rules.recurrent import CELL
from spa.rules.reductions import POOL


@rule(*["QuantizeLinear", "DequantizeLinear", "com.microsoft::QuantizeLinear", "com.microsoft::DequantizeLinear"])
def quantise(op: Op) -> None:
    """Round each element; scale and zero point are scalars, or lie along `axis`, whole or in blocks.

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
            op.unify(whole, product(blocks, op.opaque(whole.size // blocks.size, "scales it in blocks")))
        else:
            op.freeze(whole, "scales it in uneven blocks")
            op.freeze(blocks, "scales it in uneven blocks")


rule(
    "DynamicQuantizeLinear",
    "x[~*s] -> y[*s], y_scale[], y_zero_point[]",
    doc="Scale and zero point are taken from the extremes of the whole tensor. "
    "Spec: https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html.",
)


def _zero_points(op: Op, of: Mapping[int, int], along: int = 0) -> None:
    """State which operand holds the zero of each reading operand, and along which of its axes."""
    op.reads = [replace(r, zero=of.get(r.operand), zero_axis=along) for r in op.reads]


def _per_channel(op: Op, operands: list[int], channels: Expr) -> None:
    """State that scales, zero points and biases that are vectors lie along the channels."""
    for operand in operands:
        if op.has(operand):
            given = op.axes(operand)
            if given and given[-1].size != 1:
                op.unify(given[-1], channels)


@rule("ConvInteger")
def integer_conv(op: Op) -> None:
    """Convolve integers; the weights' zero points may differ by output channel.

    Spec: https://onnx.ai/onnx/operators/onnx__ConvInteger.html.
    """
    apply(op, "x[n (g i) *s], w[(g o) i *k] -> y[n (g o) *t]; group = g else 1; macs = n g o i *t *k")
    _zero_points(op, {0: 2, 1: 3})
    _per_channel(op, [3], (op.outputs[0] or ())[1])


@rule("QLinearConv")
def quantised_conv(op: Op) -> None:
    """Convolve quantised tensors; the weights' scales and zero points may differ by output channel.

    Spec: https://onnx.ai/onnx/operators/onnx__QLinearConv.html.
    """
    apply(
        op,
        "x[n (g i) *s], x_scale, x_zero_point, w[(g o) i *k], w_scale, w_zero_point, y_scale, y_zero_point, "
        "B?[(g o)] -> y[n (g o) *t]; group = g else 1; macs = n g o i *t *k",
    )
    _zero_points(op, {0: 2, 3: 5})
    _per_channel(op, [4, 5], (op.outputs[0] or ())[1])


@rule("com.microsoft::QLinearConv")
def quantised_conv_last(op: Op) -> None:
    """Convolve like QLinearConv, with the channels of data last where `channels_last` says so; kernels lie as ever.

    Spec: ContribOperators.md#com.microsoft.QLinearConv.
    """
    if not op.attr("channels_last", 0):
        quantised_conv(op)
        return
    apply(
        op,
        "x[n *s (g i)], x_scale, x_zero_point, w[(g o) i *k], w_scale, w_zero_point, y_scale, y_zero_point, "
        "B?[(g o)] -> y[n *t (g o)]; group = g else 1; macs = n g o i *t *k",
    )
    _zero_points(op, {0: 2, 3: 5})
    _per_channel(op, [4, 5], (op.outputs[0] or ())[-1])


@rule(
    *["QLinearMatMul", "MatMulInteger", "com.microsoft::MatMulIntegerToFloat", "com.microsoft::DynamicQuantizeMatMul"]
)
def integer_matmul(op: Op) -> None:
    """Contract integers as MatMul does; scales and zero points may differ by row on the left, by column on the right.

    Spec: https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html.
    """
    right, zeros, rows, columns = {
        "QLinearMatMul": (3, {0: 2, 3: 5}, [1, 2], [4, 5]),
        "MatMulInteger": (1, {0: 2, 1: 3}, [2], [3]),
        "MatMulIntegerToFloat": (1, {0: 4, 1: 5}, [2, 4], [3, 5, 6]),
        "DynamicQuantizeMatMul": (1, {1: 3}, [], [2, 3, 4]),
    }[op.node.op]
    result = matmul_axes(op, 0, right)
    _zero_points(op, zeros, along=-1)
    op.reads = [replace(r, zero_axis=-2) if r.operand == 0 else r for r in op.reads]
    if len(op.axes(right)) > 1:
        _per_channel(op, columns, result[-1])
    if len(op.axes(0)) > 1:
        _per_channel(op, [i for i in rows if op.has(i) and len(op.axes(i)) == 1], op.axes(0)[-2])
    if op.node.op == "DynamicQuantizeMatMul":
        for e in op.axes(0):
            op.cross(e)
    op.set(0, result)


@rule("com.microsoft::QGemm")
def quantised_gemm(op: Op) -> None:
    """Contract integers as Gemm does. Spec: ContribOperators.md#com.microsoft.QGemm."""
    rows, columns, _ = gemm_axes(op, 0, 3)
    _zero_points(op, {0: 2, 3: 5}, along=0 if op.attr("transB", 0) else -1)
    _per_channel(op, [4, 5, 6], columns)
    if op.has(6) and len(op.axes(6)) == 2 and op.axes(6)[0].size != 1:
        op.unify(op.axes(6)[0], rows)
    op.set(0, (rows, columns))


@rule("com.microsoft::MatMulNBits")
def packed_matmul(op: Op) -> None:
    """Contract A[.. k] with weights packed as B[n blocks bytes]: rows n go one by one, k in whole blocks.

    accuracy_level and bits do not matter. Zero points of less than a byte share bytes, so that they fix the blocks.

    Spec: ContribOperators.md#com.microsoft.MatMulNBits.
    """
    if op.attr("weight_prepacked", 0):
        raise Barrier("its weights are packed for one kind of device")
    x, (n, blocks, packed) = op.axes(0), op.axes(1)
    op.freeze(packed, "packs a block along it")
    size = op.attr("block_size")
    if x[-1].size == blocks.size * size and not op.has(4):
        op.unify(x[-1], product(blocks, op.opaque(size, "scales it in blocks")))
        op.reads.append(Read(x[-1], 0, len(x) - 1))
    else:
        op.freeze(x[-1], "regroups it")
        op.freeze(blocks, "regroups it")
    for operand in (2, 3):
        if op.has(operand):
            _along_rows(op, op.axes(operand), n, blocks)
    if op.has(5):
        op.unify(op.axes(5)[0], n)
    op.set(0, (*x[:-1], n))
    op.tie_attribute("N", n)
    op.tie_attribute("K", x[-1])
    op.count_macs(*x, n)


def _along_rows(op: Op, given: tuple[Expr, ...], n: Expr, blocks: Expr) -> None:
    """Tie scales or zero points [n blocks] or [(n blocks)]; those that share bytes fix the blocks."""
    each = math.prod(e.size for e in given) // n.size
    if each != blocks.size:
        op.freeze(blocks, "packs its zero points into shared bytes")
        blocks = op.opaque(each, "packs zero points along it")
    if len(given) == 1:
        op.unify(given[0], product(n, blocks))
    else:
        op.unify(given[0], n)
        op.unify(given[1], blocks)


@rule("com.microsoft::DynamicQuantizeLSTM")
def quantised_lstm(op: Op) -> None:
    """Run an LSTM of transposed integer weights; each step quantises data and hidden units by their extremes.

    Scales lie along directions, or gates, too.

    Spec: ContribOperators.md#com.microsoft.DynamicQuantizeLSTM.
    """
    w, r = ("[d (4 h)]" if op.has(i) and len(op.axes(i)) == 2 else "[d]" for i in (8, 10))
    apply(
        op,
        "X[s ~b ~i], W[d i (4 h)], R[d ~h! (4 h)], B?[d (8 h)], sequence_lens?[b], initial_h?[d b h], "
        f"initial_c?[d b h], P?[d (3 h)], W_scale{w}, W_zero_point{w}, R_scale{r}, R_zero_point{r} "
        f"-> Y[s d b h], Y_h[d b h], Y_c[d b h]; {CELL}; macs = s b d 4 h i + s b d 4 h h",
    )


rule(
    *["com.microsoft::QLinearAdd", "com.microsoft::QLinearMul"],
    "A[...], A_scale, A_zero_point?, B[...], B_scale, B_zero_point?, C_scale, C_zero_point? -> C[...]",
    doc="Two operands broadcast, each with its scale and zero point. "
    "Spec: ContribOperators.md#com.microsoft.QLinearAdd.",
)
rule(
    "com.microsoft::QLinearWhere",
    "condition[...], X[...], x_scale, x_zero_point, Y[...], y_scale, y_zero_point, z_scale, z_zero_point -> Z[...]",
    doc="A condition and two operands broadcast. Spec: ContribOperators.md#com.microsoft.QLinearWhere.",
)
rule(
    *["com.microsoft::QLinearSigmoid", "com.microsoft::QLinearLeakyRelu"],
    "X[*s], X_scale, X_zero_point?, Y_scale, Y_zero_point? -> Y[*s]",
    doc="An element-wise function passes all axes. Spec: ContribOperators.md#com.microsoft.QLinearSigmoid.",
)


@rule("com.microsoft::QLinearSoftmax")
def quantised_softmax(op: Op) -> None:
    """Normalise over `axis`; as the standard's before opset 13 over all axes from it on.

    Spec: ContribOperators.md#com.microsoft.QLinearSoftmax.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    for e in [axes[axis]] if op.attr("opset") >= 13 else axes[axis:]:
        op.cross(e)
    op.set(0, axes)


@rule("com.microsoft::QLinearReduceMean")
def quantised_mean(op: Op) -> None:
    """Average over `axes`, or over all. Spec: ContribOperators.md#com.microsoft.QLinearReduceMean."""
    axes = op.axes(0)
    gone = {op.positive(a, len(axes)) for a in op.attr("axes") or range(len(axes))}
    for i in gone:
        op.cross(axes[i])
    op.set(0, [UNIT if i in gone else e for i, e in enumerate(axes) if op.attr("keepdims") or i not in gone])


POOL_LAST = "X[n *s c] -> Y[n *t c]"

rule(
    "com.microsoft::NhwcMaxPool",
    POOL_LAST,
    doc="Positions are pooled; batch and channels pass, which lie last. "
    "Spec: ContribOperators.md#com.microsoft.NhwcMaxPool.",
)


@rule("com.microsoft::QLinearGlobalAveragePool", "com.microsoft::QLinearAveragePool")
def quantised_pool(op: Op) -> None:
    """Pool positions; batch and channels pass. `channels_last` says where channels are.

    Spec: ContribOperators.md#com.microsoft.QLinearAveragePool.
    """
    apply(op, POOL_LAST if op.attr("channels_last", 0) else POOL)


@rule("com.microsoft::QLinearConcat")
def quantised_concat(op: Op) -> None:
    """Join operands 2, 5, 8 ... along `axis`, each followed by its scale and zero point.

    Spec: ContribOperators.md#com.microsoft.QLinearConcat.
    """
    given = [op.axes(i) for i in range(2, len(op.inputs), 3)]
    axis = op.positive(op.attr("axis"), len(given[0]))
    for other in given[1:]:
        for i, (a, b) in enumerate(zip(given[0], other, strict=True)):
            if i != axis:
                op.unify(a, b)
    result = list(given[0])
    result[axis] = concat(*(a[axis] for a in given))
    op.set(0, result)
