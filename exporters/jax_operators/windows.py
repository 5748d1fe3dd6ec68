"""Sliding windows: where they lie, convolutions and pools, of any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spa.exporters.jax_operators import Array, Call, along, operator
from spa.model.graph import Node

MS = "com.microsoft::"


@dataclass(frozen=True)
class Windows:
    """The windows that slide over spatial axes.

    Attributes:
        kernel: sizes of a window.
        strides: distances of windows.
        dilations: distances within a window.
        pads: (before, behind) of each axis; with ``ceil_mode`` as much behind as the last window needs.
        declared: (before, behind) without what ``ceil_mode`` added.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    declared: tuple[tuple[int, int], ...]


def windows(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Return a node's windows over spatial axes of these sizes. Spec: auto_pad, pads, ceil_mode of Conv and MaxPool."""
    rank = len(sizes)
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode, pads = call.attr("auto_pad", "NOTSET"), call.attr("pads") or [0] * 2 * rank
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        declared = list(zip(small, large, strict=True) if mode == "SAME_UPPER" else zip(large, small, strict=True))
    else:
        declared = [(0, 0)] * rank if mode == "VALID" else list(zip(pads[:rank], pads[rank:], strict=True))
    wanted = declared
    if call.attr("ceil_mode", 0):
        wanted = [_ceiled(*g, n, s, r) for g, n, s, r in zip(declared, sizes, strides, reach, strict=True)]
    return Windows(tuple(kernel), tuple(strides), tuple(dilations), tuple(wanted), tuple(declared))


def _ceiled(before: int, behind: int, size: int, stride: int, reach: int) -> tuple[int, int]:
    """Return pads with which the last window, begun within the data or the pad before it, is complete."""
    count = -(-(size + before + behind - reach) // stride) + 1
    if (count - 1) * stride >= size + before:
        count -= 1
    return before, max((count - 1) * stride + reach - size - before, behind)


# -- convolutions ----------------------------------------------------------------------------------------------------


def convolution(x: Array, w: Array, at: Windows, groups: int, expanded: Sequence[int] | None = None) -> Array:
    """Convolve X [n c *s] with w [o c/groups *k]; `expanded` are distances between the elements of x."""
    plain = tuple(range(x.ndim))
    return lax.conv_general_dilated(
        x,
        w,
        at.strides,
        at.pads,
        lhs_dilation=expanded,
        rhs_dilation=at.dilations,
        dimension_numbers=lax.ConvDimensionNumbers(plain, plain, plain),
        feature_group_count=groups,
    )


@operator("Conv")
def conv(call: Call, x: Array, w: Array, bias: Array | None = None) -> Array:
    """Convolve in groups."""
    y = convolution(jnp.asarray(x), jnp.asarray(w), windows(call, x.shape[2:], w.shape[2:]), call.attr("group", 1))
    return y if bias is None else y + along(bias, 1, y.ndim)


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Array, w: Array, bias: Array | None = None) -> Array:
    """Transpose a convolution: spread x by the strides, and convolve with the mirrored kernel w [i o/groups *k]."""
    groups, kernel, rank = call.attr("group", 1), w.shape[2:], x.ndim - 2
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    extra = call.attr("output_padding") or [0] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [
        (r - 1 - before, r - 1 - behind + e)
        for r, (before, behind), e in zip(reach, _cropped(call, x.shape[2:], reach, extra), extra, strict=True)
    ]
    split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).swapaxes(1, 2)
    mirrored = jnp.flip(split.reshape(-1, w.shape[0] // groups, *kernel), range(2, x.ndim))
    at = Windows(tuple(kernel), (1,) * rank, tuple(dilations), tuple(pads), tuple(pads))
    y = convolution(jnp.asarray(x), mirrored, at, groups, strides)
    return y if bias is None else y + along(bias, 1, y.ndim)


def _cropped(call: Call, sizes: Sequence[int], reach: Sequence[int], extra: Sequence[int]) -> list[tuple[int, int]]:
    """Return what a transposed convolution takes away (before, behind) of each axis."""
    rank = len(sizes)
    strides, mode = call.attr("strides") or [1] * rank, call.attr("auto_pad", "NOTSET")
    target = call.attr("output_shape")
    if target is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        target = [n * s for n, s in zip(sizes, strides, strict=True)]
    if target is None:
        pads = call.attr("pads") or [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    cropped = []
    for n, s, r, e, t in zip(sizes, strides, reach, extra, target[-rank:], strict=True):
        total = s * (n - 1) + e + r - t
        small, large = total // 2, total - total // 2
        cropped.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return cropped


@operator(MS + "FusedConv")
def fused_conv(call: Call, x: Array, w: Array, bias: Array | None = None, z: Array | None = None) -> Array:
    """Convolve, add, and activate."""
    y = conv(call, x, w, bias)
    return fused_activation(call, y if z is None else y + z)


def fused_activation(call: Call, y: Array) -> Array:
    """Return the activation that onnxruntime has fused into an operator."""
    first, second = [*call.attr("activation_params", []), None, None][:2]
    alpha = call.attr("activation_alpha", first)
    match call.attr("activation", ""):
        case "Relu":
            return jax.nn.relu(y)
        case "Tanh":
            return jnp.tanh(y)
        case "Sigmoid":
            return jax.nn.sigmoid(y)
        case "LeakyRelu":
            return jax.nn.leaky_relu(y, 0.01 if alpha is None else alpha)
        case "Clip":
            return jnp.clip(y, first, second)
        case "HardSigmoid":
            return jnp.clip(first * y + second, 0, 1)
        case _:
            return y


# -- pools -----------------------------------------------------------------------------------------------------------


def _sums(x: Array, at: Windows) -> Array:
    ones = (1, 1)
    zero = np.asarray(0, x.dtype)
    pads = ((0, 0), (0, 0), *at.pads)
    dilations = ones + at.dilations
    return lax.reduce_window(x, zero, lax.add, ones + at.kernel, ones + at.strides, pads, None, dilations)


def _maxima(x: Array, at: Windows) -> Array:
    """Return the largest of each window; dilated windows are gathered, as JAX has no derivative for them."""
    integers = np.issubdtype(x.dtype, np.integer)
    least = np.asarray(np.iinfo(x.dtype).min if integers else -np.inf, x.dtype)
    if all(d == 1 for d in at.dilations):
        ones = (1, 1)
        return lax.reduce_window(x, least, lax.max, ones + at.kernel, ones + at.strides, ((0, 0), (0, 0), *at.pads))
    x = jnp.pad(x, ((0, 0), (0, 0), *at.pads), constant_values=least)
    for axis, (k, s, d) in enumerate(zip(at.kernel, at.strides, at.dilations, strict=True), start=2):
        starts = np.arange(0, x.shape[axis] - (k - 1) * d, s)
        x = jnp.max(jnp.take(x, starts[:, None] + d * np.arange(k), axis), axis + 1)
    return x


def _counts(sizes: Sequence[int], at: Windows, with_pads: bool) -> list[np.ndarray]:
    """Count for each axis the elements of each window: the data's, or those of the declared pads, too."""
    counts = []
    rows = zip(sizes, at.kernel, at.strides, at.dilations, at.pads, at.declared, strict=True)
    for size, k, s, d, (before, behind), declared in rows:
        starts = np.arange(0, size + before + behind - (k - 1) * d, s) - before
        places = starts[:, None] + d * np.arange(k)
        low, high = (-declared[0], size + declared[1]) if with_pads else (0, size)
        counts.append(((places >= low) & (places < high)).sum(1))
    return counts


@operator("AveragePool")
def average_pool(call: Call, x: Array) -> Array:
    """Return the mean of each window, over the data alone or with the pads' zeros."""
    at = windows(call, x.shape[2:], call.attr("kernel_shape"))
    y = _sums(x, at)
    for axis, count in enumerate(_counts(x.shape[2:], at, bool(call.attr("count_include_pad", 0))), start=2):
        y = y / along(count.astype(x.dtype), axis, x.ndim)
    return y


def _indices(node: Node) -> str | None:
    return "its output of indices is not computed" if len(node.outputs) > 1 and node.outputs[1] else None


@operator("MaxPool", refusal=_indices)
def max_pool(call: Call, x: Array) -> Array:
    """Return the largest of each window."""
    return _maxima(jnp.asarray(x), windows(call, x.shape[2:], call.attr("kernel_shape")))


@operator("LpPool")
def lp_pool(call: Call, x: Array) -> Array:
    """Return a norm of each window."""
    p = call.attr("p", 2)
    return _sums(jnp.abs(x) ** p, windows(call, x.shape[2:], call.attr("kernel_shape"))) ** (1 / p)


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(call: Call, x: Array) -> Array:
    """Pool over all spatial axes."""
    axes = tuple(range(2, x.ndim))
    if call.node.op == "GlobalAveragePool":
        return jnp.mean(x, axes, keepdims=True)
    if call.node.op == "GlobalMaxPool":
        return jnp.max(x, axes, keepdims=True)
    p = call.attr("p", 2)
    return jnp.sum(jnp.abs(x) ** p, axes, keepdims=True) ** (1 / p)


@operator("Col2Im", static=[1, 2])
def col2im(call: Call, x: Array, image: Array, block: Array) -> Array:
    """Add columns [n (c *k) places] up at the places that their windows have in an image."""
    sizes, kernel = call.ints("image_shape", image), call.ints("block_shape", block)
    at = windows(call, sizes, kernel)
    channels = x.shape[1] // math.prod(kernel)
    places, shape = [], []
    for size, k, s, d, pad in zip(sizes, at.kernel, at.strides, at.dilations, at.pads, strict=True):
        starts = np.arange(0, size + sum(pad) - (k - 1) * d, s)
        places.append(d * np.arange(k)[:, None] + starts)
        shape.append(size + sum(pad))
    rank = len(kernel)
    columns = x.reshape(x.shape[0], channels, *kernel, *(p.shape[1] for p in places))
    index = [
        p.reshape([p.shape[0] if i == j else p.shape[1] if i == j + rank else 1 for i in range(2 * rank)])
        for j, p in enumerate(places)
    ]
    everywhere = (slice(None), slice(None))
    y = jnp.zeros((x.shape[0], channels, *shape), x.dtype).at[everywhere + tuple(index)].add(columns)
    return y[everywhere + tuple(slice(before, before + n) for (before, _), n in zip(at.pads, sizes, strict=True))]
