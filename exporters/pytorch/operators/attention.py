"""Attention of the standard and of onnxruntime, and rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spa.exporters.operands import GroupQueryAttention, MultiHeadAttention
from spa.exporters.pytorch.operators import MS, dtype_of, operator, wants
from spa.model.graph import Graph, Node


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [b s (h d)] as [b h s d]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return [b h s d] as [b s (h d)]."""
    return x.transpose(1, 2).flatten(2)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Multiply queries [b (k r) s d] by keys [b k t d], each of which r queries share."""
    factor = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return (q * factor) @ (_shared(k, q.shape[1]) * factor).mT


def _shared(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _causal(rows: Any, columns: Any, offset: Any, device: torch.device) -> Tensor:
    """Tell which places each query may see: those up to its own, which is ``offset`` behind its number."""
    row = torch.arange(rows, device=device)[:, None]
    return torch.arange(columns, device=device) <= row + offset


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, scores, -torch.inf)


def _capped(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores


def _weights(scores: Tensor) -> Tensor:
    """Compute softmax; rows in which nothing is allowed are zero, as ONNX says."""
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)


@operator("Attention", fixed=(3, 4, 5, 6))
def attention(
    node: Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Any:
    """Compute softmax(softcap(Q Kᵀ scale) + mask) V. Spec: https://onnx.ai/onnx/operators/onnx__Attention.html."""
    at, flat = node.attributes, q.ndim == 3
    if flat:
        q = split_heads(q, at["q_num_heads"])
        k, v = (split_heads(x, at["kv_num_heads"]) for x in (k, v))
    past = 0 if past_k is None else past_k.shape[2]
    k = k if past_k is None else torch.cat([past_k, k], 2)
    v = v if past_v is None else torch.cat([past_v, v], 2)
    precision = dtype_of(at["softmax_precision"]) if "softmax_precision" in at else q.dtype
    raw = _scores(q, k, at.get("scale"))
    capped = _capped(raw, at.get("softcap", 0.0))
    offset = past if lengths is None or past_k is not None else (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    scores = _biased(capped, mask)
    behind = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None] - offset
    for most, away in (
        (0 if at.get("is_causal", 0) else -1, behind),
        (at.get("right_window_size", -1), behind),
        (at.get("left_window_size", -1), -behind),
    ):
        scores = scores if most < 0 else _masked(scores, away <= most)
    if lengths is not None:
        scores = _masked(scores, torch.arange(k.shape[2], device=q.device) < lengths.reshape(-1, 1, 1, 1))
    weights = _weights(scores.to(precision)).to(q.dtype)
    y = weights @ _shared(v, q.shape[1])
    seen = (raw, capped, scores, weights)[at.get("qk_matmul_output_mode", 0)]
    return (join_heads(y) if flat else y, k, v, seen)[: len(node.outputs)]


def _biased(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a mask that is true where places count, or is added, to scores; one too short allows no more."""
    if mask is None:
        return scores
    missing = scores.shape[-1] - mask.shape[-1] if mask.shape[-1] != 1 else 0
    if mask.dtype == torch.bool:
        mask = torch.nn.functional.pad(mask, [0, missing], value=False) if missing else mask
        return _masked(scores, mask)
    return scores + (torch.nn.functional.pad(mask, [0, missing], value=-torch.inf) if missing else mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int) -> Tensor:
    """Rotate pairs of the first ``size`` entries of the last axis of [b s h d] by angles [b s half]."""
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = cos[..., None, : size // 2], sin[..., None, : size // 2]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        pairs = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    return torch.cat([pairs, rest], -1)


@operator("RotaryEmbedding", fixed=(1, 2, 3))
def rotary(node: Node, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotate by caches [p half] at positions [b s], or by angles [b s half]."""
    at = node.attributes
    if positions is not None:
        cos, sin = (v[positions.long()] for v in (cos, sin))
    return _rotated(x, cos, sin, at.get("num_heads", 0), at.get("rotary_embedding_dim", 0), at.get("interleaved", 0))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int, interleaved: int) -> Tensor:
    flat = x.ndim == 3
    if flat:
        d = x.shape[2] // heads if heads else 2 * cos.shape[-1]
        parts = x.reshape(*x.shape[:2], x.shape[2] // d, d)
    else:
        parts = x.transpose(1, 2)
    y = rotate(parts, cos, sin, bool(interleaved), size or parts.shape[-1])
    return y.flatten(2) if flat else y.transpose(1, 2)


@operator(
    MS + "RotaryEmbedding",
    fixed=(1, 2, 3),
    limit=lambda node, graph: "a packed batch" if node.attributes.get("is_packed_batching", 0) else None,
)
def rotary_contrib(node: Node, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by caches [p half]; positions are those of all tokens [b s], or that of the first."""
    at = node.attributes
    if positions.numel() == 1:
        steps = x.shape[1] if x.ndim == 3 else x.shape[2]
        positions = positions.reshape(1, 1) + torch.arange(steps, device=x.device)
    cos, sin = (v[positions] for v in (cos, sin))
    size = at.get("rotary_embedding_dim", 0)
    return _rotated(x, cos, sin, at.get("num_heads", 0), size, at.get("interleaved", 0))


def _key_mask(mask: Tensor | None, rows: Any, columns: Any) -> Tensor | None:
    """Turn marks of keys [b t], [b s t] or [b 1 s t], or lengths [b], into what each query may see."""
    if mask is None:
        return None
    if mask.ndim == 1:
        return (torch.arange(columns, device=mask.device) < mask[:, None])[:, None, None]
    visible = mask != 0
    if mask.ndim == 2:
        return visible[:, None, None]
    return visible[:, None] if mask.ndim == 3 else visible[:, :, :rows, :columns]


def _attend(
    node: Node, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, offset: Any
) -> tuple[Tensor, Tensor]:
    """Return outputs [b s (h e)] and scores of [b h s d], [b h t d], [b h t e]; marks add ``mask_filter_value``."""
    at = node.attributes
    scores = _scores(q, k, at.get("scale") or None)
    scores = scores if bias is None else scores + bias
    if allowed is not None:
        scores = scores + torch.where(allowed, 0.0, at.get("mask_filter_value", -10000.0)).to(scores.dtype)
    if at.get("unidirectional", 0):
        scores = _masked(scores, _causal(q.shape[2], k.shape[2], offset, q.device))
    return join_heads(torch.softmax(scores, -1) @ v), scores


def _attention_limit(node: Node, graph: Graph) -> str | None:
    for name in ("past_present_share_buffer", "do_rotary"):
        if node.attributes.get(name, 0):
            return name
    return None


@operator(MS + "Attention", fixed=(3, 4, 5, 6), limit=_attention_limit)
def packed_attention(
    node: Node,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    past_length: Tensor | None = None,
) -> Any:
    """Compute attention of projections by one weight [i (h d)+(h d)+(h e)]; the cache is [2 b h t d].

    Spec: ContribOperators.md#com.microsoft.Attention.
    """
    each = node.attributes.get("qkv_hidden_sizes") or [w.shape[1] // 3] * 3
    projected = x @ w if b is None else x @ w + b
    q, k, v = (split_heads(part, node.attributes["num_heads"]) for part in projected.split(each, -1))
    before = 0
    if past is not None:
        before = past.shape[3]
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = _attend(node, q, k, v, _key_mask(mask, q.shape[2], k.shape[2]), bias, before)
    return (y, torch.stack([k, v])) if wants(node, 1) else y


@operator(
    MS + "MultiHeadAttention",
    fixed=(4, 5, 6, 7),
    limit=lambda node, graph: (
        "a cache that is shared with its output" if len(node.inputs) > 8 and any(node.inputs[8:]) else None
    ),
)
def multi_head(node: Node, *operands: Tensor | None) -> Any:
    """Compute attention of projections, separate or packed as [b s h 3 d], or as q [b s h d] and [b t h 2 d]."""
    heads, o = node.attributes["num_heads"], MultiHeadAttention(*operands)
    q, k, v = o.query, o.key, o.value
    if q.ndim == 5:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif k is not None and k.ndim == 5:
        k, v = (part.flatten(2) for part in k.unbind(3))
    if k is None or v is None:
        raise ValueError(f"{node.label}: keys or values are missing")
    if o.bias is not None:
        of_q, of_k, of_v = o.bias.split([q.shape[-1], q.shape[-1], o.bias.shape[0] - 2 * q.shape[-1]])
        q = q + of_q
        k, v = (k + of_k, v + of_v) if k.ndim == 3 else (k, v)
    q = split_heads(q, heads)
    k, v = (split_heads(x, heads) if x.ndim == 3 else x for x in (k, v))
    before = 0 if o.past_key is None else o.past_key.shape[2]
    k = k if o.past_key is None else torch.cat([o.past_key, k], 2)
    v = v if o.past_value is None else torch.cat([o.past_value, v], 2)
    allowed = _key_mask(o.key_padding_mask, q.shape[2], k.shape[2])
    y, scores = _attend(node, q, k, v, allowed, o.attention_bias, before)
    return (y, k, v, scores)[: len(node.outputs)]


def _group_query_limit(node: Node, graph: Graph) -> str | None:
    at = node.attributes
    if at.get("local_window_size", -1) != -1:
        return "a local window"
    if at.get("smooth_softmax", 0) or any(node.inputs[9:]):
        return "positions, biases or sinks of its own"
    return None


@operator(MS + "GroupQueryAttention", fixed=(3, 4, 5, 6, 7, 8), limit=_group_query_limit)
def group_query(node: Node, *operands: Tensor | None) -> Any:
    """Compute causal attention in which r query heads share a key, perhaps packed as [b s (k r d)+(k d)+(k d)].

    Rows must not be padded.
    """
    at, o = node.attributes, GroupQueryAttention(*operands)
    q, k, v, cos, sin = o.query, o.key, o.value, o.cos_cache, o.sin_cache
    heads, shared = at["num_heads"], at["kv_num_heads"]
    if k is None or v is None:
        d = q.shape[2] // (heads + 2 * shared)
        q, k, v = q.split([heads * d, shared * d, shared * d], -1)
    before = 0 if o.past_key is None else o.past_key.shape[2]
    if at.get("do_rotary", 0) and cos is not None and sin is not None:
        places = (before + torch.arange(q.shape[1], device=q.device))[None]
        interleaved = at.get("rotary_interleaved", 0)
        q = _rotated(q, cos[places], sin[places], heads, 2 * cos.shape[-1], interleaved)
        k = _rotated(k, cos[places], sin[places], shared, 2 * cos.shape[-1], interleaved)
    q, k, v = split_heads(q, heads), split_heads(k, shared), split_heads(v, shared)
    k = k if o.past_key is None else torch.cat([o.past_key, k], 2)
    v = v if o.past_value is None else torch.cat([o.past_value, v], 2)
    scores = _capped(_scores(q, k, at.get("scale") or None), at.get("softcap", 0.0))
    scores = _masked(scores, _causal(q.shape[2], k.shape[2], before, q.device))
    y = join_heads(torch.softmax(scores, -1) @ _shared(v, heads))
    return (y, k, v)[: len(node.outputs)]
