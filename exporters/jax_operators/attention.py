"""Attention and rotary embeddings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper

from spa.exporters.jax_operators import Array, Call, number_type, operator
from spa.exporters.jax_operators.normalisation import masked_softmax
from spa.model.graph import Node

MS = "com.microsoft::"


def heads_of(x: Array, count: int) -> Array:
    """Return [b s (h d)] as [b h s d]."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def _joined(x: Array) -> Array:
    """Return [b h s d] as [b s (h d)]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


@operator("Attention")
def attention(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    past_k: Array | None = None,
    past_v: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, ...]:
    """Compute softmax(softcap(Q Kᵀ scale) + mask) V with grouped heads, a cache, causal masks and windows.

    Spec: https://onnx.ai/onnx/operators/onnx__Attention.html.
    """
    packed = q.ndim == 3
    if packed:
        q = heads_of(q, call.attr("q_num_heads"))
        k, v = (heads_of(t, call.attr("kv_num_heads")) for t in (k, v))
    k = k if past_k is None else jnp.concatenate([past_k, k], 2)
    v = v if past_v is None else jnp.concatenate([past_v, v], 2)
    present, repeats = (k, v), q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(t, repeats, 1) if repeats > 1 else t for t in (k, v))
    scale = call.attr("scale", q.shape[-1] ** -0.5) ** 0.5
    products = jnp.einsum("bhqd,bhkd->bhqk", q * np.asarray(scale, q.dtype), k * np.asarray(scale, q.dtype))
    cap = call.attr("softcap", 0.0)
    capped = cap * jnp.tanh(products / cap) if cap else products
    before = 0 if past_k is None else past_k.shape[2]
    offset = before if lengths is None else (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    biased = capped + _bias(call, q, k.shape[2], mask, offset, lengths)
    wide = biased
    if call.attr("softmax_precision"):
        wide = biased.astype(number_type(helper.tensor_dtype_to_np_dtype(call.attr("softmax_precision"))))
    weights = masked_softmax(wide).astype(q.dtype)
    y = jnp.matmul(weights, v)
    shown = (products, capped, biased, weights)[call.attr("qk_matmul_output_mode", 0)]
    return (_joined(y) if packed else y, *present, shown)


def _bias(call: Call, q: Array, keys: int, mask: Array | None, offset: Any, lengths: Array | None) -> Array:
    """Return what is added to the scores: the mask, and minus infinity where a query may not see a key."""
    total = jnp.zeros((), q.dtype)
    if mask is not None:
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        boolean = mask.dtype == np.bool_
        mask = jnp.pad(mask, missing, constant_values=False if boolean else -np.inf)
        total = jnp.where(mask, 0.0, -np.inf).astype(q.dtype) if boolean else mask
    at = np.arange(q.shape[2])[:, None] + offset
    key = np.arange(keys)
    allowed: list[Array] = []
    if call.attr("is_causal", 0):
        allowed.append(key <= at)
    if call.attr("left_window_size", -1) >= 0:
        allowed.append(at - key <= call.attr("left_window_size"))
    if call.attr("right_window_size", -1) >= 0:
        allowed.append(key - at <= call.attr("right_window_size"))
    if lengths is not None:
        allowed.append(key < lengths.reshape(-1, 1, 1, 1))
    for seen in allowed:
        total = jnp.where(seen, total, -np.inf)
    return total.astype(q.dtype)


def _rotated(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Turn X [.. r], pair by pair, by angles [.. r/2]; pairs are neighbours, or lie half the axis apart."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    real, imaginary = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return jnp.stack([real, imaginary], -1).reshape(x.shape)
    return jnp.concatenate([real, imaginary], -1)


@operator("RotaryEmbedding")
def rotary_embedding(call: Call, x: Array, cos: Array, sin: Array, positions: Array | None = None) -> Array:
    """Turn the first dimensions of each head by angles from caches."""
    packed = x.ndim == 3
    x = heads_of(x, call.attr("num_heads")) if packed else x
    if positions is not None:
        cos, sin = (jnp.take(t, positions, axis=0) for t in (cos, sin))
    size = call.attr("rotary_embedding_dim", 0) or x.shape[-1]
    cos, sin = (t[:, None, :, : size // 2] for t in (cos, sin))
    turned = _rotated(x[..., :size], cos, sin, bool(call.attr("interleaved", 0)))
    y = jnp.concatenate([turned, x[..., size:]], -1)
    return _joined(y) if packed else y


def _contrib_refusal(node: Node) -> str | None:
    extra = [i for i, name in enumerate(node.inputs) if name and i > 3]
    if extra:
        return f"its operand {extra[0]} (caches, biases) is not computed"
    return "rotary embeddings within it are not computed" if node.attributes.get("do_rotary") else None


@operator(MS + "Attention", refusal=_contrib_refusal)
def contrib_attention(call: Call, x: Array, w: Array, bias: Array, mask: Array | None = None) -> Array:
    """Project to queries, keys and values by one weight, then compute attention.

    Spec: onnxruntime's ContribOperators.md. The mask has the keys' flags [b k] or [b q k], or their number [b].
    """
    heads = call.attr("num_heads")
    sizes = call.attr("qkv_hidden_sizes") or [w.shape[1] // 3] * 3
    q, k, v = (heads_of(t, heads) for t in jnp.split(x @ w + bias, np.cumsum(sizes)[:2], -1))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * call.attr("scale", q.shape[-1] ** -0.5)
    if mask is not None:
        flags = mask if mask.ndim > 1 else np.arange(k.shape[2]) < mask[:, None]
        flags = flags[:, None, None, :] if flags.ndim == 2 else flags[:, None]
        scores = scores + jnp.where(flags != 0, 0.0, call.attr("mask_filter_value", -10000.0)).astype(x.dtype)
    if call.attr("unidirectional", 0):
        scores = jnp.where(np.tri(q.shape[2], dtype=bool), scores, call.attr("mask_filter_value", -10000.0))
    return _joined(jnp.matmul(masked_softmax(scores), v))


def _multi_head_refusal(node: Node) -> str | None:
    extra = [i for i, name in enumerate(node.inputs) if name and i not in (0, 1, 2, 3, 5)]
    missing = len(node.inputs) < 3 or not node.inputs[2]
    if missing:
        return "its queries, keys and values are packed"
    return f"its operand {extra[0]} (masks, caches) is not computed" if extra else None


@operator(MS + "MultiHeadAttention", refusal=_multi_head_refusal)
def multi_head_attention(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    _: None = None,
    scores_bias: Array | None = None,
) -> Array:
    """Compute attention of projections, with one bias for all three. Spec: onnxruntime's ContribOperators.md."""
    if bias is not None:
        cuts = np.cumsum([q.shape[-1], k.shape[-1]])
        q, k, v = (t + b for t, b in zip((q, k, v), jnp.split(bias, cuts), strict=True))
    q, k, v = (heads_of(t, call.attr("num_heads")) for t in (q, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * call.attr("scale", q.shape[-1] ** -0.5)
    scores = scores if scores_bias is None else scores + scores_bias
    if call.attr("unidirectional", 0):
        scores = jnp.where(np.tri(q.shape[2], dtype=bool), scores, -np.inf)
    return _joined(jnp.matmul(masked_softmax(scores), v))
