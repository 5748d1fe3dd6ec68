"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.pytorch.operators import MS, along, operator
from spa.exporters.pytorch.operators.elementwise import ACTIVATIONS
from spa.model.graph import Graph, Node

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def paddings(node: Node, size: Sequence[Any], kernel: Sequence[int]) -> list[tuple[Any, Any]]:
    """Return places added before and after each spatial axis, by ``pads`` or ``auto_pad``.

    Args:
        node: a convolution or pooling.
        size: of the spatial axes.
        kernel: its size.
    """
    rank = len(kernel)
    auto_pad = node.attributes.get("auto_pad", "NOTSET")
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    if auto_pad == "NOTSET":
        pads = node.attributes.get("pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    strides = node.attributes.get("strides", [1] * rank)
    dilations = node.attributes.get("dilations", [1] * rank)
    result = []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // stride) - 1) * stride + (k - 1) * dilation + 1 - n, 0)
        small = total // 2
        result.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
    return result


def pad_spatial(x: Tensor, pads: Sequence[tuple[Any, Any]], value: float = 0.0) -> Tensor:
    """Pad the last axes; F.pad counts from the last one."""
    if not any(p for pair in pads for p in pair):
        return x
    return F.pad(x, [p for pair in reversed(pads) for p in pair], value=value)


@operator("Conv")
def conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Convolve X[n (g i) *s] with W[(g o) i *k] → [n (g o) *t]."""
    rank = w.ndim - 2
    pads = paddings(node, x.shape[2:], w.shape[2:])
    even = all(before == after for before, after in pads)
    return CONVOLUTIONS[rank](
        x if even else pad_spatial(x, pads),
        w,
        b,
        node.attributes.get("strides", [1] * rank),
        [before for before, _ in pads] if even else [0] * rank,
        node.attributes.get("dilations", [1] * rank),
        node.attributes.get("group", 1),
    )


@operator("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Map X[n (g i) *s] by W[(g i) o *k] → [n (g o) *t]: all places, less those that padding takes away."""
    rank = w.ndim - 2
    attributes = node.attributes
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    extra = attributes.get("output_padding", [0] * rank)
    whole = [
        stride * (n - 1) + (k - 1) * dilation + 1
        for n, k, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
    ]
    y = TRANSPOSED[rank](x, w, None, strides, 0, 0, attributes.get("group", 1), dilations)
    cuts = _cuts(node, x.shape[2:], whole, strides, extra)
    y = pad_spatial(y, [(0, max(end - n, 0)) for (_, end), n in zip(cuts, y.shape[2:], strict=True)])
    for axis, (start, end) in enumerate(cuts, start=2):
        y = y.narrow(axis, start, end - start)
    return y if b is None else y + along(b, 1, y.ndim)


def _cuts(
    node: Node, size: Sequence[Any], whole: Sequence[Any], strides: Sequence[int], extra: Sequence[int]
) -> list[tuple[Any, Any]]:
    """Return where each axis of all places begins and ends; the end may lie behind them."""
    rank = len(whole)
    auto_pad = node.attributes.get("auto_pad", "NOTSET")
    target = node.attributes.get("output_shape")
    if target is None and auto_pad in ("NOTSET", "VALID"):
        pads = node.attributes.get("pads", [0] * 2 * rank)
        return [(pads[i], whole[i] + extra[i] - pads[rank + i]) for i in range(rank)]
    target = [n * s for n, s in zip(size, strides, strict=True)] if target is None else target[-rank:]
    cuts = []
    for wanted, all_places, more in zip(target, whole, extra, strict=True):
        total = max(all_places + more - wanted, 0)
        start = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        cuts.append((start, start + wanted))
    return cuts


@operator("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Compute alpha A B + beta C, each of A and B perhaps transposed."""
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    y = (a.T if node.attributes.get("transA") else a) @ (b.T if node.attributes.get("transB") else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


@operator("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, broadcast over leading axes."""
    return torch.matmul(a, b)


@operator(MS + "FusedMatMul", MS + "TransposeMatMul")
def fused_matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Multiply perhaps transposed matrices, and scale. Spec: ContribOperators.md#com.microsoft.FusedMatMul."""
    at = node.attributes
    a = a.movedim(0, -2) if at.get("transBatchA") else a
    b = b.movedim(0, -2) if at.get("transBatchB") else b
    a = a.mT if at.get("transA") else a
    b = b.mT if at.get("transB") else b
    return at.get("alpha", 1.0) * torch.matmul(a, b)


@operator("Einsum")
def einsum(node: Node, *operands: Tensor) -> Tensor:
    """Sum products by ONNX's letters, which are PyTorch's."""
    return torch.einsum(node.attributes["equation"], *operands)


def _fused(node: Node, y: Tensor) -> Tensor:
    name = node.attributes.get("activation", "")
    if not name:
        return y
    parameters = node.attributes.get("activation_params", [])
    if name in ACTIVATIONS:
        return ACTIVATIONS[name](y, *parameters)
    return {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}[name](y)


def _unknown_activation(node: Node, graph: Graph) -> str | None:
    name = node.attributes.get("activation", "")
    covered = name in ("", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")
    return None if covered else f"the activation {name!r}"


@operator(MS + "FusedConv", limit=_unknown_activation)
def fused_conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Convolve, add a residual, and activate."""
    y = conv(node, x, w, b)
    return _fused(node, y if z is None else y + z)


@operator(MS + "FusedGemm", limit=_unknown_activation)
def fused_gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Compute Gemm, and activate."""
    return _fused(node, gemm(node, a, b, c))
