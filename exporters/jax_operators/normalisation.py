"""Normalisations and softmax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spa.exporters.jax_operators import Array, Call, along, operator, positive, widened
from spa.model.graph import Node

MS = "com.microsoft::"


def _training(node: Node) -> str | None:
    return "it is in training mode" if node.attributes.get("training_mode") or len(node.outputs) > 1 else None


@operator("BatchNormalization", refusal=_training)
def batch_normalization(call: Call, x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Array:
    """Normalise by running statistics, which are not trained: no gradient reaches them."""
    mean, var = jax.lax.stop_gradient(jnp.asarray(mean)), jax.lax.stop_gradient(jnp.asarray(var))
    factor = scale * jax.lax.rsqrt(var + call.attr("epsilon", 1e-5))
    return (x * along(factor, 1, x.ndim) + along(bias - mean * factor, 1, x.ndim)).astype(x.dtype)


def _standardised(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    """Return the standardised values, the mean, and one over the deviation; in float32 at least."""
    x = widened(x)
    mean = jnp.mean(x, axes, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axes, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


@operator("InstanceNormalization")
def instance_normalization(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    """Normalise each channel of each example."""
    y, _, _ = _standardised(x, tuple(range(2, x.ndim)), call.attr("epsilon", 1e-5))
    return (y * along(scale, 1, x.ndim) + along(bias, 1, x.ndim)).astype(x.dtype)


@operator("LayerNormalization")
def layer_normalization(call: Call, x: Array, scale: Array, bias: Array | None = None) -> tuple[Array, Array, Array]:
    """Normalise over all axes from ``axis`` on."""
    axes = tuple(range(positive(call.attr("axis", -1), x.ndim), x.ndim))
    y, mean, inverse = _standardised(x, axes, call.attr("epsilon", 1e-5))
    y = y.astype(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(call: Call, x: Array, scale: Array) -> tuple[Array, Array]:
    """Divide by the root of the mean square, over all axes from ``axis`` on."""
    axes = tuple(range(positive(call.attr("axis", -1), x.ndim), x.ndim))
    wide = widened(x)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axes, keepdims=True) + call.attr("epsilon", 1e-5))
    return (wide * inverse).astype(x.dtype) * scale, inverse


@operator(MS + "SkipLayerNormalization", MS + "SkipSimplifiedLayerNormalization")
def skip_layer_normalization(
    call: Call, x: Array, skip: Array, gamma: Array, beta: Array | None = None, bias: Array | None = None
) -> tuple[Array | None, ...]:
    """Normalise a sum as LayerNormalization (or RMSNormalization, which has no beta); return both."""
    simplified = call.node.op == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, beta) if simplified else (beta, bias)
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.attr("epsilon", 1e-12)
    if simplified:
        wide = widened(total)
        y = (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)).astype(total.dtype) * gamma
    else:
        y = _standardised(total, (total.ndim - 1,), epsilon)[0].astype(total.dtype) * gamma
    return y if beta is None else y + beta, None, None, total


@operator("GroupNormalization")
def group_normalization(call: Call, x: Array, scale: Array, bias: Array) -> Array:
    """Normalise groups of channels; before opset 21, scale and bias are of groups."""
    groups = call.attr("num_groups")
    split = x.reshape(x.shape[0], groups, -1)
    y = _standardised(split, (2,), call.attr("epsilon", 1e-5))[0].astype(x.dtype)
    if call.node.version < 21:
        return (y * along(scale, 1, 3) + along(bias, 1, 3)).reshape(x.shape)
    return y.reshape(x.shape) * along(scale, 1, x.ndim) + along(bias, 1, x.ndim)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Array) -> Array:
    """Subtract the mean, and divide by the deviation and a small number."""
    axes = tuple(call.attr("axes", [0, 2, 3]))
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred / (jnp.sqrt(jnp.mean(jnp.square(centred), axes, keepdims=True)) + 1e-9)


@operator("LpNormalization")
def lp_normalization(call: Call, x: Array) -> Array:
    """Divide by a norm along an axis."""
    axis = call.attr("axis", -1)
    if call.attr("p", 2) == 1:
        norm = jnp.sum(jnp.abs(x), axis, keepdims=True)
    else:
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis, keepdims=True))
    return jnp.where(norm == 0, jnp.zeros_like(x), x / jnp.where(norm == 0, 1, norm))


@operator("LRN")
def local_response_normalization(call: Call, x: Array) -> Array:
    """Divide by a power of the mean square of neighbouring channels."""
    count = call.attr("size")
    before = (count - 1) // 2
    window, pads = [1] * x.ndim, [(0, 0)] * x.ndim
    window[1], pads[1] = count, (before, count - 1 - before)
    squares = jax.lax.reduce_window(jnp.square(x), 0.0, jax.lax.add, window, (1,) * x.ndim, pads)
    base = call.attr("bias", 1.0) + call.attr("alpha", 1e-4) / count * squares
    return x / base ** call.attr("beta", 0.75)


@operator("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: Call, x: Array) -> Array:
    """Compute softmax along an axis; before opset 13, over all axes from it on."""
    old = call.node.version < 13
    axis = positive(call.attr("axis", 1 if old else -1), x.ndim)
    flat = x.reshape(math.prod(x.shape[:axis]), -1) if old else x
    axis = 1 if old else axis
    if call.node.op == "Hardmax":
        y = jax.nn.one_hot(jnp.argmax(flat, axis), flat.shape[axis], axis=axis, dtype=x.dtype)
    else:
        y = (jax.nn.softmax if call.node.op == "Softmax" else jax.nn.log_softmax)(flat, axis)
    return y.reshape(x.shape).astype(x.dtype)


def masked_softmax(scores: Array, axis: int = -1) -> Array:
    """Compute softmax in which a row of minus infinities gives zeros, with finite gradients."""
    dead = jnp.all(scores == -np.inf, axis, keepdims=True)
    return jnp.where(dead, 0.0, jax.nn.softmax(jnp.where(dead, 0.0, scores), axis))
