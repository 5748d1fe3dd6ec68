"""Pooling and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.pytorch.operators import given, ints, number, operator, wants
from spa.exporters.pytorch.operators.linear import pad_spatial, paddings
from spa.model.graph import Node

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _windows(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[tuple[Any, Any]], list[Any]]:
    """Return kernel, strides, dilations, paddings, and the places that ``ceil_mode`` adds behind these.

    The last window must begin before the padding behind ends (the specification's clarification of opset 19).
    """
    kernel = node.attributes["kernel_shape"]
    rank = len(kernel)
    strides = node.attributes.get("strides", [1] * rank)
    dilations = node.attributes.get("dilations", [1] * rank)
    pads = paddings(node, x.shape[2:], kernel)
    more = [0] * rank
    if node.attributes.get("ceil_mode", 0) and node.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        for i, n in enumerate(x.shape[2:]):
            span = (kernel[i] - 1) * dilations[i] + 1
            count = -(-(n + sum(pads[i]) - span) // strides[i]) + 1
            count -= (count - 1) * strides[i] >= n + pads[i][0]
            more[i] = max((count - 1) * strides[i] + span - n - sum(pads[i]), 0)
    return kernel, strides, dilations, pads, more


def _ending(pads: Sequence[tuple[Any, Any]], more: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(before, after + extra) for (before, after), extra in zip(pads, more, strict=True)]


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Any:
    """Return maxima of windows; output 1 says where they lay, counted through the whole tensor."""
    kernel, strides, dilations, pads, more = _windows(node, x)
    wide = x if x.is_floating_point() else x.to(torch.float32)
    filled = pad_spatial(wide, _ending(pads, more), -torch.inf)
    pool = MAX_POOLS[len(kernel)]
    if not wants(node, 1):
        return pool(filled, kernel, strides, 0, dilations).to(x.dtype)
    y, places = pool(filled, kernel, strides, 0, dilations, return_indices=True)
    return y.to(x.dtype), _positions(node, places, x.shape, filled.shape, pads)


def _positions(
    node: Node, places: Tensor, shape: Sequence[int], filled: Sequence[int], pads: Sequence[tuple[int, int]]
) -> Tensor:
    """Turn places in a padded plane into places in the tensor, row by row, or column by column within a plane."""
    at = [
        coordinate - before
        for coordinate, (before, _) in zip(torch.unravel_index(places, filled[2:]), pads, strict=True)
    ]
    axes = list(range(2, len(shape)))
    step, plane = 1, torch.zeros_like(places)
    for axis in axes if node.attributes.get("storage_order", 0) else reversed(axes):
        plane = plane + at[axis - 2] * step
        step *= shape[axis]
    count = torch.arange(shape[0] * shape[1], device=places.device).reshape(*shape[:2], *[1] * len(axes))
    return plane + count * step


def _dilated(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Return all windows [n c *t *k]."""
    rank = len(kernel)
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, (k - 1) * dilation + 1, stride)[..., ::dilation]
    return x.flatten(-rank)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Divide sums of windows by the number of their places; padding counts where ``count_include_pad`` says so."""
    kernel, strides, dilations, pads, more = _windows(node, x)
    counted = torch.ones_like(x[:1, :1])
    if node.attributes.get("count_include_pad", 0):
        counted = pad_spatial(counted, pads, 1.0)
        counted = pad_spatial(counted, [(0, extra) for extra in more])
    else:
        counted = pad_spatial(counted, _ending(pads, more))
    filled = pad_spatial(x, _ending(pads, more))
    if any(d > 1 for d in dilations):
        return _dilated(filled, kernel, strides, dilations).sum(-1) / _dilated(counted, kernel, strides, dilations).sum(
            -1
        )
    pool = AVERAGE_POOLS[len(kernel)]
    return pool(filled, kernel, strides) / pool(counted, kernel, strides)


@operator("LpPool")
def lp_pool(node: Node, x: Tensor) -> Tensor:
    """Return norms of windows."""
    kernel, strides, dilations, pads, more = _windows(node, x)
    windows = _dilated(pad_spatial(x, _ending(pads, more)), kernel, strides, dilations)
    return torch.linalg.vector_norm(windows, node.attributes.get("p", 2), -1)


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: Node, x: Tensor) -> Tensor:
    """Return a statistic of each channel over all places."""
    axes = list(range(2, x.ndim))
    match node.op:
        case "GlobalAveragePool":
            return x.mean(axes, keepdim=True)
        case "GlobalMaxPool":
            return x.amax(axes, keepdim=True)
    return torch.linalg.vector_norm(x, node.attributes.get("p", 2), axes, keepdim=True)


def _extreme(x: Tensor, axes: list[int], keep: bool, least: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, least).to(torch.bool)
    return (torch.amin if least else torch.amax)(x, axes, keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x.square(), axes, keep).to(_real(x)).sqrt().to(x.dtype),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log().to(x.dtype),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x.to(_real(x)), axes, keep).to(x.dtype) if axes else x,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, least=False) if axes else x,
    "ReduceMean": lambda x, axes, keep: x.to(_real(x)).mean(axes, keep).to(x.dtype) if axes else x,
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, least=True) if axes else x,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x.square(), axes, keep),
}


def _real(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float64


@operator(*REDUCTIONS, host=(1,))
def reduce(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    """Reduce over axes, an attribute in older versions; none means all, or none where the node says so."""
    listed = given(node, axes, "axes") or []
    if not listed and not node.attributes.get("noop_with_empty_axes", 0):
        listed = list(range(x.ndim))
    return REDUCTIONS[node.op](x, [a % x.ndim for a in listed], bool(node.attributes.get("keepdims", 1)))


@operator("ArgMax", "ArgMin")
def arg(node: Node, x: Tensor) -> Tensor:
    """Return the position of the first extreme along ``axis``, or of the last."""
    axis, keep = node.attributes.get("axis", 0), bool(node.attributes.get("keepdims", 1))
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    if node.attributes.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
    return function(x, axis, keep)


@operator("TopK", host=(1,))
def top_k(node: Node, x: Tensor, k: Any = None) -> tuple[Tensor, Tensor]:
    """Return extremes along ``axis`` in order; of equal ones the first, as a stable sort says."""
    axis = node.attributes.get("axis", -1)
    count = node.attributes["k"] if k is None else ints(k)[0]
    values, places = torch.sort(x, dim=axis, descending=bool(node.attributes.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@operator("CumSum", "CumProd", host=(1,))
def cumulate(node: Node, x: Tensor, axis: Any) -> Tensor:
    """Sum or multiply from either end on, with or without each element itself."""
    at = int(number(axis))
    x = x.flip(at) if node.attributes.get("reverse", 0) else x
    if node.attributes.get("exclusive", 0):
        first = torch.full_like(x.narrow(at, 0, 1), 0 if node.op == "CumSum" else 1)
        x = torch.cat([first, x.narrow(at, 0, x.shape[at] - 1)], at)
    y = (torch.cumsum if node.op == "CumSum" else torch.cumprod)(x, at, dtype=x.dtype)
    return y.flip(at) if node.attributes.get("reverse", 0) else y


@operator("Trilu", host=(1,))
def trilu(node: Node, x: Tensor, k: Any = None) -> Tensor:
    """Return the upper or lower triangle of the last two axes."""
    diagonal = 0 if k is None else int(number(k))
    return (torch.triu if node.attributes.get("upper", 1) else torch.tril)(x, diagonal)


@operator("Det")
def det(node: Node, x: Tensor) -> Tensor:
    """Return determinants of the last two axes."""
    return torch.linalg.det(x)
