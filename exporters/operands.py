"""Operands of operators that take many, under the formal names of their schemas.

The interpreters (:mod:`spa.exporters.pytorch.operators`, :mod:`spa.exporters.jax_operators`) hand a function its
operands in the order of the node's inputs, with None for those left out. A function of many binds them by name:
``q = QLinearConv(*operands)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # of the interpreter's framework


class Recurrent(NamedTuple):
    """RNN, GRU and LSTM: d directions, t steps, batch b, g gates of h units. The last two operands are the LSTM's.

    Spec: https://onnx.ai/onnx/operators/onnx__LSTM.html.

    Attributes:
        x: [t b i].
        w: [d (g h) i].
        r: [d (g h) h].
        b: [d (2 g h)], of the inputs and of the states.
        sequence_lens: [b].
        initial_h: [d b h].
        initial_c: [d b h].
        p: peepholes [d (3 h)].
    """

    x: Array
    w: Array
    r: Array
    b: Array | None = None
    sequence_lens: Array | None = None
    initial_h: Array | None = None
    initial_c: Array | None = None
    p: Array | None = None


class QLinearConv(NamedTuple):
    """Spec: https://onnx.ai/onnx/operators/onnx__QLinearConv.html."""

    x: Array
    x_scale: Array
    x_zero: Array
    w: Array
    w_scale: Array
    w_zero: Array
    y_scale: Array
    y_zero: Array
    b: Array | None = None


class QLinearBinary(NamedTuple):
    """QLinearMatMul, and onnxruntime's QLinearAdd and QLinearMul, whose zero points may be missing.

    Spec: https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html, ContribOperators.md#com.microsoft.QLinearAdd.
    """

    a: Array
    a_scale: Array
    a_zero: Array | None
    b: Array
    b_scale: Array
    b_zero: Array | None
    y_scale: Array
    y_zero: Array | None = None


class QGemm(NamedTuple):
    """Spec: ContribOperators.md#com.microsoft.QGemm. Without a scale for it the result is a float."""

    a: Array
    a_scale: Array
    a_zero: Array
    b: Array
    b_scale: Array
    b_zero: Array
    c: Array | None = None
    y_scale: Array | None = None
    y_zero: Array | None = None


class EmbedLayerNormalization(NamedTuple):
    """Spec: ContribOperators.md#com.microsoft.EmbedLayerNormalization.

    Attributes:
        input_ids: [b s].
        segment_ids: [b s].
        word_embedding: [words c].
        position_embedding: [places c].
        segment_embedding: [segments c].
        gamma: [c].
        beta: [c].
        mask: [b s].
        position_ids: [b s] or [1 s].
    """

    input_ids: Array
    segment_ids: Array | None
    word_embedding: Array
    position_embedding: Array
    segment_embedding: Array | None
    gamma: Array
    beta: Array
    mask: Array | None = None
    position_ids: Array | None = None


class MultiHeadAttention(NamedTuple):
    """Spec: ContribOperators.md#com.microsoft.MultiHeadAttention.

    Attributes:
        query: [b s (h d)]; packed [b s h 3 d].
        key: [b t (h d)], [b h t d]; packed with the values [b t h 2 d].
        value: [b t (h e)] or [b h t e].
        bias: [(h d) + (h d) + (h e)].
        key_padding_mask: [b], [b t] or [b s t].
        attention_bias: [b h s t], or 1 for b or h.
        past_key: [b h p d].
        past_value: [b h p e].
    """

    query: Array
    key: Array | None = None
    value: Array | None = None
    bias: Array | None = None
    key_padding_mask: Array | None = None
    attention_bias: Array | None = None
    past_key: Array | None = None
    past_value: Array | None = None


class GroupQueryAttention(NamedTuple):
    """Spec: ContribOperators.md#com.microsoft.GroupQueryAttention.

    Attributes:
        query: [b s (k r d)]; packed [b s (k r d)+(k d)+(k d)].
        key: [b s (k d)].
        value: [b s (k d)].
        past_key: [b k p d].
        past_value: [b k p d].
        seqlens_k: [b], the number of places less one.
        total_sequence_length: a number.
        cos_cache: [places half].
        sin_cache: [places half].
    """

    query: Array
    key: Array | None
    value: Array | None
    past_key: Array | None
    past_value: Array | None
    seqlens_k: Array
    total_sequence_length: Array
    cos_cache: Array | None = None
    sin_cache: Array | None = None
