"""Fused operators of onnxruntime (``com.microsoft``) that are neither attention nor quantised, and barriers."""

from __future__ import annotations

from spa.notation import apply
from spa.op import Op
from spa.rules import rule, unsupported


@rule("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def skip_layer_norm(op: Op) -> None:
    """LayerNormalization of a sum; everything broadcasts. Output 3 is the sum."""
    op.cross(op.axes(0)[-1])
    op.broadcast([i for i in range(len(op.inputs)) if op.has(i)])
    op.set(3, op.outputs[0] or ())


@rule("SimplifiedLayerNormalization")
def simplified_layer_norm(op: Op) -> None:
    """RMSNormalization under onnxruntime's old name, in the default domain."""
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    for e in axes[axis:]:
        op.cross(e)
    op.broadcast([0, 1])


@rule("com.microsoft::EmbedLayerNormalization")
def embed_layer_norm(op: Op) -> None:
    """The sum of three embeddings, normalised. Output 1 is a mask index, output 2 the sum."""
    line = (
        "input_ids[b s], segment_ids?[b s], word_embedding[v ~c], position_embedding[p c], segment_embedding?[q c], "
        "gamma[c], beta[c], mask?[b s], position_ids?[a s] -> output[b s c], mask_index[b], embedding_sum[b s c]"
    )
    letters = apply(op, line)
    for letter in ("v", "p", "q"):
        if letter in letters:
            op.freeze(letters[letter], "looked up by")


@rule("com.microsoft::GroupNorm")
def group_norm_last(op: Op) -> None:
    """GroupNormalization with the channels last. Spec: ContribOperators.md#com.microsoft.GroupNorm."""
    groups = op.attr("groups")
    letters = apply(op, "X[n *s (g c)], gamma[(g c)], beta[(g c)] -> Y[n *s (g c)]", {"g": groups})
    op.cross(letters["c"])
    op.tie_attribute("groups", letters["g"])


for key, reason in {
    "MatMulBnb4": "its weights are packed in blocks of bits",
    "GatherBlockQuantized": "its weights are packed in blocks of bits",
    "QMoE": "its weights are packed in blocks of bits",
    "MoE": "its experts are picked by data",
    "QAttention": "its packed integer projection is not traced",
    "DynamicQuantizeLSTM": "its packed integer gates are not traced",
    "PackedAttention": "its tokens are packed",
    "PackedMultiHeadAttention": "its tokens are packed",
    "SparseAttention": "its blocks are addressed by data",
    "SkipGroupNorm": "its fused sum is not traced",
    "NhwcConv": "its layout is onnxruntime's own; export before layout optimisation",
    "NhwcFusedConv": "its layout is onnxruntime's own; export before layout optimisation",
    "BeamSearch": "channels are not traced through its subgraphs",
    "GreedySearch": "channels are not traced through its subgraphs",
    "Sampling": "channels are not traced through its subgraphs",
}.items():
    unsupported(f"com.microsoft::{key}", reason)
