"""Normalisations and softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.operands import EmbedLayerNormalization
from spa.exporters.pytorch.operators import MS, operator, wants
from spa.model.graph import Node


@operator("BatchNormalization", fixed=(3, 4), modal=True)
def batch_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, training: bool = False
) -> Any:
    """Normalise; in training by the batch, which the running statistics follow (ONNX's momentum is the old's)."""
    epsilon, momentum = node.attributes.get("epsilon", 1e-5), node.attributes.get("momentum", 0.9)
    if not node.attributes.get("training_mode", 0):
        y = F.batch_norm(x, mean, variance, scale, bias, training, 1 - momentum, epsilon)
        return (y, mean, variance)[: len(node.outputs)]
    axes = [i for i in range(x.ndim) if i != 1]
    variance_now, mean_now = torch.var_mean(x, axes, correction=0)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return (
        y,
        momentum * mean + (1 - momentum) * mean_now.detach(),
        momentum * variance + (1 - momentum) * variance_now.detach(),
    )[: len(node.outputs)]


def _affine(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


@operator("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise each channel of each sample over its places."""
    return torch.group_norm(x, x.shape[1], scale, bias, node.attributes.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise groups of channels; scale and bias are per group before opset 21, per channel since."""
    groups, epsilon = node.attributes["num_groups"], node.attributes.get("epsilon", 1e-5)
    if node.version < 21:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return torch.group_norm(x, groups, scale, bias, epsilon)


@operator(MS + "GroupNorm")
def group_norm_last(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalise groups of channels, which lie last by default, perhaps followed by Swish."""
    last = node.attributes.get("channels_last", 1)
    x = x.movedim(-1, 1) if last else x
    y = torch.group_norm(
        x, node.attributes["groups"], scale.to(x.dtype), bias.to(x.dtype), node.attributes.get("epsilon", 1e-5)
    )
    y = F.silu(y) if node.attributes["activation"] else y
    return y.movedim(1, -1) if last else y


@operator("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Normalise over all axes from ``axis`` on; outputs 1 and 2 are the mean and the inverse deviation."""
    axis, epsilon = node.attributes.get("axis", -1) % x.ndim, node.attributes.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    if wants(node, 1) or wants(node, 2):
        variance, mean = torch.var_mean(x, list(range(axis, x.ndim)), correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + epsilon)
        return _affine((x - mean) * inverse, scale, bias), mean, inverse
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    return _affine(F.layer_norm(x, shape, None, None, epsilon), scale, bias)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(node: Node, x: Tensor, scale: Tensor) -> Any:
    """Divide by the root of the mean square over all axes from ``axis`` on; output 1 is the divisor's inverse."""
    axis, epsilon = node.attributes.get("axis", -1) % x.ndim, node.attributes.get("epsilon", 1e-5)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(list(range(axis, x.ndim)), keepdim=True) + epsilon)
    y = (wide * inverse).to(x.dtype) * scale
    return (y, inverse) if wants(node, 1) else y


@operator(MS + "SkipLayerNormalization")
def skip_layer_norm(
    node: Node, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """Normalise a sum, which is output 3; outputs 1 and 2 are the mean and the inverse deviation."""
    total = x + skip if bias is None else x + skip + bias
    epsilon = node.attributes.get("epsilon", 1e-12)
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = F.layer_norm(total, scale.shape, scale, shift, epsilon)
    return (y, mean, inverse, total)[: len(node.outputs)]


@operator(MS + "SkipSimplifiedLayerNormalization")
def skip_rms_norm(node: Node, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Divide a sum, which is output 3, by the root of its mean square."""
    total = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + node.attributes.get("epsilon", 1e-12))
    return (total * inverse * scale, None, inverse, total)[: len(node.outputs)]


@operator(MS + "EmbedLayerNormalization", fixed=(0, 1, 7, 8))
def embed_layer_norm(node: Node, *operands: Tensor | None) -> Any:
    """Normalise the sum of three embeddings, which is output 2. Output 1 counts the tokens of a mask."""
    o = EmbedLayerNormalization(*operands)
    words, segments, positions = o.input_ids, o.segment_ids, o.position_ids
    positions = torch.arange(words.shape[1], device=words.device)[None] if positions is None else positions
    total = F.embedding(words, o.word_embedding) + F.embedding(positions, o.position_embedding)
    if segments is not None and o.segment_embedding is not None:
        total = total + F.embedding(segments, o.segment_embedding)
    y = F.layer_norm(total, o.gamma.shape, o.gamma, o.beta, node.attributes.get("epsilon", 1e-12))
    counts = torch.zeros_like(words[:, 0]) if o.mask is None else o.mask.sum(-1)
    return (y, counts.to(torch.int32), total)[: len(node.outputs)]


@operator("LRN")
def local_response(node: Node, x: Tensor) -> Tensor:
    """Divide by a power of the sum of squares over neighbouring channels: (size - 1) // 2 before, the rest behind."""
    at = node.attributes
    size = at["size"]
    before = (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), (before, size - 1 - before)).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    base = at.get("bias", 1.0) + at.get("alpha", 1e-4) / size * squares
    return x / base ** at.get("beta", 0.75)


@operator("LpNormalization")
def lp_norm(node: Node, x: Tensor) -> Tensor:
    """Divide by the norm over ``axis``; zeros stay."""
    norm = torch.linalg.vector_norm(x, node.attributes.get("p", 2), node.attributes.get("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


@operator("MeanVarianceNormalization")
def mean_variance_norm(node: Node, x: Tensor) -> Tensor:
    """Standardise over ``axes``; the constant under the root is fixed by the specification."""
    variance, mean = torch.var_mean(x, node.attributes.get("axes", [0, 2, 3]), correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


def _rows(node: Node, x: Tensor, axis: int) -> Tensor:
    """Merge all axes from ``axis`` on, as operators did before opset 13."""
    return x.reshape(*x.shape[:axis], math.prod(x.shape[axis:]))


@operator("Softmax", "LogSoftmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Compute softmax over ``axis``; before opset 13 over all axes from it on."""
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    if node.version >= 13:
        return function(x, node.attributes.get("axis", -1))
    return function(_rows(node, x, node.attributes.get("axis", 1) % x.ndim), -1).reshape(x.shape)


@operator("Hardmax")
def hardmax(node: Node, x: Tensor) -> Tensor:
    """Return one at the first maximum, else zero."""
    axis = node.attributes.get("axis", -1 if node.version >= 13 else 1) % x.ndim
    rows = x.movedim(axis, -1) if node.version >= 13 else _rows(node, x, axis)
    best = F.one_hot(rows.argmax(-1), rows.shape[-1]).to(x.dtype)
    return best.movedim(-1, axis) if node.version >= 13 else best.reshape(x.shape)


@operator(MS + "BiasSoftmax")
def bias_softmax(node: Node, x: Tensor, bias: Tensor) -> Tensor:
    """Compute softmax of a sum over all axes from ``axis`` on; the bias broadcasts inside or outside of them."""
    axis = node.attributes.get("axis", 1) % x.ndim
    if not node.attributes.get("is_inner_broadcast", 1):
        bias = bias.reshape(*[1] * (x.ndim - bias.ndim), *bias.shape)
    return torch.softmax(_rows(node, x + bias, axis), -1).reshape(x.shape)
