"""Integers that stand for floats. Rounding has no slope: no gradient passes it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from onnx import helper

from spa.exporters.jax_operators import Array, Call, along, operator, positive
from spa.exporters.jax_operators.windows import convolution, windows
from spa.exporters.operands import QGemm, QLinearBinary, QLinearConv
from spa.model.graph import Node

MS = "com.microsoft::"


def _spread(call: Call, x: Array, value: Array | None, axis: int = 1) -> Array | None:
    """Shape a scale or zero point to broadcast: of all, of each index of an axis, or of each block of one."""
    if value is None or value.size == 1:
        return None if value is None else value.reshape(())
    axis = positive(call.attr("axis", axis), x.ndim)
    if call.attr("block_size", 0):
        repeated = jnp.repeat(jnp.asarray(value), call.attr("block_size"), axis)
        return repeated[(slice(None),) * axis + (slice(x.shape[axis]),)]
    return along(value, axis, x.ndim)


def quantised(x: Array, scale: Array, zero: Array | None, dtype: np.dtype) -> Array:
    """Return round(x / scale) + zero point, clipped to the type; halves go to even."""
    bounds = jnp.iinfo(dtype)
    shifted = jnp.round(x / scale) + (0 if zero is None else zero.astype(jnp.float32))
    return jnp.clip(shifted, bounds.min, bounds.max).astype(dtype)


def dequantised(x: Array, scale: Array, zero: Array | None) -> Array:
    """Return (x - zero point) scale."""
    wide = x.astype(jnp.int32) if zero is None else x.astype(jnp.int32) - zero.astype(jnp.int32)
    return wide.astype(scale.dtype) * scale


def _integers(node: Node) -> str | None:
    kind = node.attributes.get("output_dtype", 0)
    if kind and not np.issubdtype(helper.tensor_dtype_to_np_dtype(kind), np.integer):
        return "only integers are computed"
    return None


@operator("QuantizeLinear", MS + "QuantizeLinear", refusal=_integers)
def quantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """Quantise floats, to uint8 by default."""
    kind = call.attr("output_dtype", 0)
    dtype = zero.dtype if zero is not None else helper.tensor_dtype_to_np_dtype(kind) if kind else np.dtype(np.uint8)
    return quantised(x, _spread(call, x, scale), _spread(call, x, zero), dtype)


@operator("DequantizeLinear", MS + "DequantizeLinear")
def dequantize_linear(call: Call, x: Array, scale: Array, zero: Array | None = None) -> Array:
    """Return what integers stand for."""
    return dequantised(jnp.asarray(x), _spread(call, x, scale), _spread(call, x, zero))


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Array) -> tuple[Array, Array, Array]:
    """Quantise to uint8 over the range of the data."""
    low, high = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0)
    scale = (high - low) / 255
    safe = jnp.where(scale == 0, 1, scale)
    zero = jnp.clip(jnp.round(-low / safe), 0, 255).astype(jnp.uint8)
    return quantised(x, safe, zero, np.dtype(np.uint8)), scale, zero


def _shifted(x: Array, zero: Array | None, axis: int) -> Array:
    """Return integers less their zero point, as int32."""
    wide = jnp.asarray(x).astype(jnp.int32)
    if zero is None:
        return wide
    return wide - (zero.reshape(()) if zero.size == 1 else along(zero, axis, x.ndim)).astype(jnp.int32)


@operator("ConvInteger")
def conv_integer(call: Call, x: Array, w: Array, x_zero: Array | None = None, w_zero: Array | None = None) -> Array:
    """Convolve integers, in int32."""
    at = windows(call, x.shape[2:], w.shape[2:])
    return convolution(_shifted(x, x_zero, 1), _shifted(w, w_zero, 0), at, call.attr("group", 1))


@operator("QLinearConv")
def qlinear_conv(call: Call, *operands: Array | None) -> Array:
    """Convolve integers, and quantise the result."""
    q = QLinearConv(*operands)
    y = conv_integer(call, q.x, q.w, q.x_zero, q.w_zero)
    y = y if q.b is None else y + along(q.b, 1, y.ndim)
    scale = q.x_scale * q.w_scale
    scale = scale.reshape(()) if scale.size == 1 else along(scale, 1, y.ndim)
    return quantised(y.astype(jnp.float32) * scale, q.y_scale.reshape(()), q.y_zero.reshape(()), q.y_zero.dtype)


def _rows(x: Array, zero: Array | None, rows: bool) -> Array:
    """Return a matrix less its zero point, of all or of each row (else column), as int32."""
    wide = jnp.asarray(x).astype(jnp.int32)
    if zero is None:
        return wide
    zero = zero[..., None] if rows and zero.ndim == 1 and zero.size > 1 else zero
    return wide - zero.astype(jnp.int32)


@operator("MatMulInteger")
def matmul_integer(call: Call, a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None) -> Array:
    """Multiply matrices of integers, in int32."""
    return jnp.matmul(_rows(a, a_zero, True), _rows(b, b_zero, False))


@operator("QLinearMatMul")
def qlinear_matmul(call: Call, *operands: Array | None) -> Array:
    """Multiply matrices of integers, and quantise the result."""
    q = QLinearBinary(*operands)
    rows = q.a_scale[..., None] if q.a_scale.ndim == 1 and q.a_scale.size > 1 else q.a_scale
    y = matmul_integer(call, q.a, q.b, q.a_zero, q.b_zero).astype(jnp.float32) * (rows * q.b_scale)
    return quantised(y, q.y_scale, q.y_zero, q.y_zero.dtype)


@operator(MS + "QGemm")
def qgemm(call: Call, *operands: Array | None) -> Array:
    """Compute Gemm of integers; the result is float32 where it has no scale."""
    q = QGemm(*operands)
    left, right = _rows(q.a, q.a_zero, False), _rows(q.b, q.b_zero, bool(call.attr("transB", 0)))
    left = left.T if call.attr("transA", 0) else left
    right = right.T if call.attr("transB", 0) else right
    product = jnp.matmul(left, right) if q.c is None else jnp.matmul(left, right) + q.c
    y = product.astype(jnp.float32) * (q.a_scale * q.b_scale * call.attr("alpha", 1.0))
    return y if q.y_scale is None or q.y_zero is None else quantised(y, q.y_scale, q.y_zero, q.y_zero.dtype)


@operator(MS + "QLinearAdd", MS + "QLinearMul")
def qlinear_binary(call: Call, *operands: Array | None) -> Array:
    """Add or multiply what integers stand for, and quantise the result."""
    q = QLinearBinary(*operands)
    left, right = dequantised(q.a, q.a_scale, q.a_zero), dequantised(q.b, q.b_scale, q.b_zero)
    y = left + right if call.node.op == "QLinearAdd" else left * right
    return quantised(y, q.y_scale, q.y_zero, q.a.dtype)


@operator(MS + "QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    call: Call, x: Array, x_scale: Array, x_zero: Array, y_scale: Array, y_zero: Array
) -> Array:
    """Return the mean over all spatial axes of what integers stand for, quantised."""
    axes = tuple(range(1, x.ndim - 1)) if call.attr("channels_last", 0) else tuple(range(2, x.ndim))
    y = jnp.mean(dequantised(x, x_scale, x_zero), axes, keepdims=True)
    return quantised(y, y_scale, y_zero, x.dtype)
