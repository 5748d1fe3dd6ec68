"""Quantised tensors. Integers travel as floats, so that gradients pass straight through the rounding.

The straight-through estimator: Y. Bengio et al., Estimating or propagating gradients through stochastic neurons
(arXiv 1308.3432), section 4. The types of zero points say what range the integers have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa.exporters.operands import QGemm, QLinearBinary, QLinearConv
from spa.exporters.pytorch.operators import MS, along, dtype_of, operator, unknown_dtype
from spa.exporters.pytorch.operators.layout import concat
from spa.exporters.pytorch.operators.linear import conv
from spa.exporters.pytorch.operators.pooling import average_pool
from spa.model.graph import Graph, Node


def rounded(x: Tensor) -> Tensor:
    """Return the nearest integers, with the gradient of x."""
    return x + (torch.round(x) - x).detach()


def _spread(vector: Tensor, x: Tensor, axis: int, block: int = 0) -> Tensor:
    """Shape a scale or zero point to broadcast: one, one by index of an axis, or one by block of it."""
    if block:
        return vector.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return along(vector, axis, x.ndim) if vector.ndim == 1 and vector.numel() > 1 else vector.reshape(-1)[0]


def quantise(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, dtype: Any = None, block: int = 0) -> Tensor:
    """Return round(x / scale) + zero, within the range of the zero point's type, as floats."""
    info = torch.iinfo(dtype or (torch.uint8 if zero is None else zero.dtype))
    offset = 0.0 if zero is None else _spread(zero.to(x.dtype), x, axis, block)
    return (rounded(x / _spread(scale.to(x.dtype), x, axis, block)) + offset).clamp(info.min, info.max)


def dequantise(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """Return (x - zero) scale."""
    wide = x.to(scale.dtype)
    shifted = wide if zero is None else wide - _spread(zero.to(scale.dtype), x, axis, block)
    return shifted * _spread(scale, x, axis, block)


def _coarse(node: Node, graph: Graph) -> str | None:
    """Refuse types that are no integers of whole bytes; smaller ones are covered where they are stored only."""
    codes = [node.attributes.get("output_dtype", 0)]
    codes += [graph.constants[n].data_type for n in node.inputs[2:3] if n in graph.constants]
    return next((unknown_dtype(c) for c in codes if c and unknown_dtype(c)), None)


@operator("QuantizeLinear", MS + "QuantizeLinear", fixed=(1, 2), limit=_coarse)
def quantise_linear(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Quantise floats. Spec: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html."""
    at = node.attributes
    dtype = dtype_of(at["output_dtype"]) if at.get("output_dtype", 0) else None
    return quantise(x, scale, zero, at.get("axis", 1), dtype, at.get("block_size", 0))


@operator("DequantizeLinear", MS + "DequantizeLinear", fixed=(0, 1, 2))
def dequantise_linear(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return what integers stand for. Spec: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html."""
    return dequantise(x, scale, zero, node.attributes.get("axis", 1), node.attributes.get("block_size", 0))


@operator("DynamicQuantizeLinear")
def dynamic_quantise(node: Node, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise by the extremes, zero included."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low).detach() / 255
    zero = torch.round((-low.detach() / scale).clamp(0, 255)).to(torch.uint8)
    return quantise(x, scale, zero), scale, zero


def _shifted(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    wide = x.to(torch.float32)
    return wide if zero is None else wide - _spread(zero.to(torch.float32), x, axis)


@operator("ConvInteger", fixed=(1, 2, 3))
def conv_integer(
    node: Node, x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """Convolve integers."""
    return conv(node, _shifted(x, x_zero, 1), _shifted(w, w_zero, 0)).round().to(torch.int32)


@operator("MatMulInteger", fixed=(1, 2, 3))
def matmul_integer(
    node: Node, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Multiply matrices of integers; zero points may differ by row on the left and by column on the right."""
    return (_shifted(a, a_zero, -2) @ _shifted(b, b_zero, -1)).round().to(torch.int32)


@operator("QLinearConv", fixed=range(1, 9))
def qlinear_conv(node: Node, *operands: Tensor | None) -> Tensor:
    """Convolve quantised tensors; biases are integers in units of both scales."""
    q = QLinearConv(*operands)
    bias = None if q.b is None else q.b.to(q.x_scale.dtype) * q.x_scale.reshape(-1)[0] * q.w_scale.reshape(-1)
    y = conv(node, dequantise(q.x, q.x_scale, q.x_zero), dequantise(q.w, q.w_scale, q.w_zero, 0), bias)
    return quantise(y, q.y_scale, q.y_zero)


@operator("QLinearMatMul", fixed=range(1, 8))
def qlinear_matmul(node: Node, *operands: Tensor | None) -> Tensor:
    """Multiply quantised matrices."""
    q = QLinearBinary(*operands)
    y = dequantise(q.a, q.a_scale, q.a_zero, -2) @ dequantise(q.b, q.b_scale, q.b_zero, -1)
    return quantise(y, q.y_scale, q.y_zero, -1)


@operator(MS + "QGemm", fixed=range(1, 9))
def qgemm(node: Node, *operands: Tensor | None) -> Tensor:
    """Compute Gemm of quantised tensors; the result is a float where no scale is given for it."""
    at, q = node.attributes, QGemm(*operands)
    left = dequantise(q.a, q.a_scale, q.a_zero)
    right = dequantise(q.b, q.b_scale, q.b_zero, 0 if at.get("transB", 0) else 1)
    y = (left.T if at.get("transA", 0) else left) @ (right.T if at.get("transB", 0) else right)
    y = at.get("alpha", 1.0) * y
    y = y if q.c is None else y + q.c.to(y.dtype) * q.a_scale.reshape(-1)[0] * q.b_scale.reshape(-1)
    return y if q.y_scale is None else quantise(y, q.y_scale, q.y_zero)


@operator(MS + "QLinearAdd", MS + "QLinearMul", fixed=(1, 2, 4, 5, 6, 7))
def qlinear_binary(node: Node, *operands: Tensor | None) -> Tensor:
    """Add or multiply quantised tensors."""
    q = QLinearBinary(*operands)
    left, right = dequantise(q.a, q.a_scale, q.a_zero), dequantise(q.b, q.b_scale, q.b_zero)
    return quantise(left + right if node.op == "QLinearAdd" else left * right, q.y_scale, q.y_zero)


@operator(
    MS + "QLinearGlobalAveragePool",
    MS + "QLinearAveragePool",
    MS + "QLinearSigmoid",
    MS + "QLinearLeakyRelu",
    fixed=range(1, 5),
)
def qlinear_unary(
    node: Node, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    """Apply a function to one quantised tensor, whose channels may lie last."""
    last = node.attributes.get("channels_last", 0)
    y = dequantise(x, x_scale, x_zero)
    y = y.movedim(-1, 1) if last else y
    match node.op:
        case "QLinearGlobalAveragePool":
            y = y.mean(list(range(2, y.ndim)), keepdim=True)
        case "QLinearAveragePool":
            y = average_pool(node, y)
        case "QLinearSigmoid":
            y = torch.sigmoid(y)
        case _:
            y = torch.nn.functional.leaky_relu(y, node.attributes.get("alpha", 0.01))
    return quantise(y.movedim(1, -1) if last else y, y_scale, y_zero)


@operator(MS + "QLinearConcat", fixed=range(64))
def qlinear_concat(node: Node, y_scale: Tensor, y_zero: Tensor, *operands: Tensor) -> Tensor:
    """Join quantised tensors, each followed by its scale and zero point, along ``axis``."""
    parts = [dequantise(x, scale, zero) for x, scale, zero in zip(*(operands[i::3] for i in range(3)), strict=True)]
    return quantise(concat(node, *parts), y_scale, y_zero)


@operator(MS + "MatMulIntegerToFloat", fixed=range(1, 7))
def matmul_integer_to_float(
    node: Node,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply quantised matrices; the result is a float."""
    y = dequantise(a, a_scale, a_zero, -2) @ dequantise(b, b_scale, b_zero, -1)
    return y if bias is None else y + bias


@operator(MS + "DynamicQuantizeMatMul", fixed=(1, 2, 3))
def dynamic_matmul(
    node: Node, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Multiply floats, quantised by their extremes, by a quantised matrix; the result is a float."""
    y, scale, zero = dynamic_quantise(node, a)
    return matmul_integer_to_float(node, y, b, scale, b_scale, zero, b_zero, bias)
