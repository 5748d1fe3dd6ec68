"""Resize and Upsample: along each axis a known matrix, or known picks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from spa.exporters.jax_operators import Array, Call, operator, positive
from spa.model.graph import Node


def _refusal(node: Node) -> str | None:
    if node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "tf_crop_and_resize is not computed"
    return None


@operator("Resize", "Upsample", static=[1, 2, 3], refusal=_refusal)
def resize(call: Call, x: Array, *operands: Array) -> Array:
    """Interpolate to other sizes. Spec: https://onnx.ai/onnx/operators/onnx__Resize.html."""
    axes = [positive(a, x.ndim) for a in call.attr("axes", range(x.ndim))]
    scales, sizes = _targets(call, x, axes, operands)
    for axis, scale, size in zip(axes, scales, sizes, strict=True):
        if size == x.shape[axis] and scale == 1:
            continue
        places = _places(call, x.shape[axis], size, scale)
        if call.attr("mode", "nearest") == "nearest":
            x = jnp.take(x, _nearest(call, places, x.shape[axis]), axis)
        else:
            matrix = _weights(call, places, x.shape[axis], min(scale, 1.0) if call.attr("antialias", 0) else 1.0)
            x = jnp.moveaxis(jnp.tensordot(x, matrix.astype(x.dtype), [[axis], [1]]), -1, axis)
    return x


def _targets(call: Call, x: Array, axes: list[int], operands: tuple[Array, ...]) -> tuple[list[float], list[int]]:
    """Return the scale and the size of each axis."""
    if call.node.op == "Upsample" or call.node.version < 11:
        scales = call.attr("scales") or call.known(operands[0], "the scales").tolist()
        return scales, [int(x.shape[a] * s) for a, s in zip(axes, scales, strict=True)]
    _, factors, target = (*operands, None, None, None)[:3]
    if target is None:
        scales = call.known(factors, "the scales").tolist()
        return scales, [int(np.floor(x.shape[a] * s)) for a, s in zip(axes, scales, strict=True)]
    sizes = call.ints("sizes", target)
    scales = [n / x.shape[a] for a, n in zip(axes, sizes, strict=True)]
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        scale = min(scales) if policy == "not_larger" else max(scales)
        scales, sizes = [scale] * len(axes), [int(np.floor(scale * x.shape[a] + 0.5)) for a in axes]
    return scales, sizes


def _places(call: Call, before: int, after: int, scale: float) -> np.ndarray:
    """Return where each output lies among the inputs."""
    out, old = np.arange(after, dtype=np.float64), call.node.version < 11
    length = scale * before
    match call.attr("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"):
        case "align_corners":
            return np.zeros(after) if length == 1 else out * (before - 1) / (length - 1)
        case "asymmetric":
            return out / scale
        case "pytorch_half_pixel":
            return np.full(after, -0.5) if length == 1 else (out + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            return before / 2 * (1 - after / length) + (out + 0.5) / scale - 0.5
        case _:
            return (out + 0.5) / scale - 0.5


def _nearest(call: Call, places: np.ndarray, size: int) -> np.ndarray:
    default = "floor" if call.node.version < 11 else "round_prefer_floor"
    match call.attr("nearest_mode", default):
        case "floor":
            picks = np.floor(places)
        case "ceil":
            picks = np.ceil(places)
        case "round_prefer_ceil":
            picks = np.floor(places + 0.5)
        case _:
            picks = np.ceil(places - 0.5)
    return np.clip(picks, 0, size - 1).astype(np.int64)


def _weights(call: Call, places: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Return the matrix [output input] of interpolation; a scale below one widens the kernel (antialias)."""
    cubic = call.attr("mode", "nearest") == "cubic"
    reach = 2 if cubic else 1
    width = int(np.ceil(reach / scale)) + 1
    taps = np.floor(places).astype(np.int64)[:, None] + np.arange(-width, width + 1)
    distance = np.abs(taps - places[:, None]) * scale
    weights = _cubic(distance, call.attr("cubic_coeff_a", -0.75)) if cubic else np.clip(1 - distance, 0, None)
    if call.attr("exclude_outside", 0):
        weights = np.where((taps >= 0) & (taps < size), weights, 0)
    weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((len(places), size))
    np.add.at(matrix, (np.arange(len(places))[:, None], np.clip(taps, 0, size - 1)), weights)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
