"""Fused operators of onnxruntime (``com.microsoft``) that are neither attention nor quantised, and barriers.

Spec of all: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Those that are an operator of
the standard with something fused into it are registered beside that operator.
"""

from __future__ import annotations

from spa.algebra.notation import apply
from spa.algebra.op import Op
from spa.rules import rule, unsupported

MS = "com.microsoft::"

rule(
    MS + "SkipLayerNormalization",
    "input[... ~c], skip[... c], gamma[c], beta?[c], bias?[c] -> output[... c], mean[... 1], inv_std_var[... 1], "
    "input_skip_bias_sum[... c]",
    doc="Normalise a sum as LayerNormalization does. Spec: ContribOperators.md#com.microsoft.SkipLayerNormalization.",
)
rule(
    MS + "SkipSimplifiedLayerNormalization",
    "input[... ~c], skip[... c], gamma[c], bias?[c] -> output[... c], mean[... 1], inv_std_var[... 1], "
    "input_skip_bias_sum[... c]",
    doc="Normalise a sum as RMSNormalization does. "
    "Spec: ContribOperators.md#com.microsoft.SkipSimplifiedLayerNormalization.",
)


@rule("SimplifiedLayerNormalization")
def simplified_layer_norm(op: Op) -> None:
    """Normalise like RMSNormalization, of which it is onnxruntime's old name, in the default domain.

    Spec: https://onnx.ai/onnx/operators/onnx__RMSNormalization.html.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    for e in axes[axis:]:
        op.cross(e)
    op.broadcast([0, 1])
    op.set(1, [*axes[:axis], *(op.dim(1) for _ in axes[axis:])])


rule(
    MS + "EmbedLayerNormalization",
    "input_ids[... s], segment_ids?[... s], word_embedding[v ~c], position_embedding[p c], segment_embedding?[q c], "
    "gamma[c], beta[c], mask?[... s], position_ids?[... s] -> output[... s c], mask_index[...], embedding_sum[... s c]"
    "; frozen v p q s: looks it up by index",
    doc="Sum up three embeddings and normalise. Spec: ContribOperators.md#com.microsoft.EmbedLayerNormalization.",
)
rule(
    MS + "QEmbedLayerNormalization",
    "input_ids[... s], segment_ids?[... s], word_embedding_quant[v ~c], position_embedding_quant[p c], "
    "segment_embedding?[q c], gamma_quant[c], beta_quant[c], mask?[... s] -> layernorm_out[... s c], "
    "mask_index_out[...]; frozen v p q s: looks it up by index",
    doc="Embed as EmbedLayerNormalization does, from integer tables with one scale and zero point each. "
    "Spec: ContribOperators.md#com.microsoft.QEmbedLayerNormalization.",
)


@rule(MS + "GroupNorm", MS + "SkipGroupNorm")
def group_norm_last(op: Op) -> None:
    """Normalise groups of channels, which lie last by default, of a sum with a skip [n c] or [n .. c] and a bias.

    Spec: ContribOperators.md#com.microsoft.SkipGroupNorm.
    """
    x = "n {}*s (g c)" if op.attr("channels_last", 1) else "n (g c) {}*s"
    skip = f", skip{'[n (g c)]' if op.has(3) and len(op.axes(3)) == 2 else ''}, bias?[(g c)]"
    sum_of = f", S[{x.format('')}]" if op.node.op == "SkipGroupNorm" else ""
    line = f"X[{x.replace(' c)', ' ~c)').format('~')}], gamma[(g c)], beta[(g c)]{skip if sum_of else ''}"
    apply(op, f"{line} -> Y[{x.format('')}]{sum_of}; groups = g")
    if op.has(3) and len(op.axes(3)) > 2:
        op.broadcast([0, 3])


rule(
    MS + "GatedRMSNorm",
    "X[... (r c)], scale[~c], gate[... (r c)] -> Y[... (r c)]",
    doc="Normalise each run of the scale's size, and multiply it by an activation of a gate. "
    "Spec: ContribOperators.md#com.microsoft.GatedRMSNorm.",
)


@rule(MS + "BiasSoftmax")
def bias_softmax(op: Op) -> None:
    """Normalise a sum over all axes from `axis` on; is_inner_broadcast says where the bias has axes of one index.

    Spec: ContribOperators.md#com.microsoft.BiasSoftmax.
    """
    axes = op.axes(0)
    for e in axes[op.positive(op.attr("axis", 1), len(axes)) :]:
        op.cross(e)
    op.broadcast([0, 1])


rule(
    MS + "BiasSplitGelu",
    "X[n s d+d], bias[d+d] -> Y[n s d]",
    doc="Multiply the first half of the channels by Gelu of the second. "
    "Spec: ContribOperators.md#com.microsoft.BiasSplitGelu.",
)
rule(
    MS + "BiasDropout",
    "data[...], bias[...], residual?[...], ratio?, training_mode? -> output[...], mask[...]",
    doc="Drop elements of a sum, and add a residual. Spec: ContribOperators.md#com.microsoft.BiasDropout.",
)
rule(
    MS + "BitmaskBiasDropout",
    "data[...], bias[...], residual?[...], ratio?, training_mode? -> output[...], mask[*m]",
    doc="Drop elements as BiasDropout does; the mask of bits has axes of its own. "
    "Spec: ContribOperators.md#com.microsoft.BitmaskBiasDropout.",
)
rule(
    MS + "GatedAdd",
    "A[...], B[...], gate[...] -> C[...]",
    doc="Add a gated operand; everything broadcasts. Spec: ContribOperators.md#com.microsoft.GatedAdd.",
)
rule(
    MS + "MulInteger",
    "A[...], A_zero_point?, B[...], B_zero_point? -> C[...]",
    doc="Multiply integers, which broadcast; zero points are scalars. "
    "Spec: ContribOperators.md#com.microsoft.MulInteger.",
)
rule(
    MS + "ScaledSiLU",
    "X[*s], scale? -> Y[*s]",
    doc="Pass all axes; the scale is a scalar. Spec: ContribOperators.md#com.microsoft.ScaledSiLU.",
)
rule(
    MS + "CDist",
    "A[m k!], B[n k!] -> C[m n]; macs = m n k",
    doc="Measure distances between all rows of two matrices: a sum over k, to which two zeros add nothing. "
    "Spec: ContribOperators.md#com.microsoft.CDist.",
)
rule(
    MS + "NhwcFusedConv",
    "X[n *s (g i)], W[(g o) i *k], B?[(g o)], Z?[n *t (g o)] -> Y[n *t (g o)]; group = g else 1; "
    "macs = n g o i *t *k; frozen *t: uses it as a spatial axis",
    doc="Convolve as FusedConv does, with the channels of data last; kernels lie as ever. "
    "Spec: ContribOperators.md#com.microsoft.NhwcFusedConv.",
)


_BITS = "its weights are packed in blocks of bits"
_TOKENS = "its tokens are packed"
_DATA = "its places are addressed by data"
_STATE = "channels are not traced through its state"
_SUBGRAPHS = "channels are not traced through its subgraphs"
_FUSED = "the layers fused into it are not traced"
_EARLY = "it is an early form of an operator of the standard; export with a newer opset"
_ORDERED = "its integers are laid out for one kind of device"
_ELEMENTS = "its result depends on the values and places of all elements"

for key, reason in {
    **dict.fromkeys(["MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE", "MatMulNBitsMlp"], _BITS),
    **dict.fromkeys(["MatMulNBitsQkv", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"], _BITS),
    **dict.fromkeys(["DequantizeBFP", "QuantizeBFP"], _BITS),
    **dict.fromkeys(["PackedAttention", "PackedMultiHeadAttention", "PagedAttention", "SparsePagedAttention"], _TOKENS),
    **dict.fromkeys(["RemovePadding", "RestorePadding", "PackedSparseAttentionIndexer"], _TOKENS),
    **dict.fromkeys(["SparseAttention", "SparseAttentionIndexer", "DynamicSparseAttention"], _DATA),
    **dict.fromkeys(["LongformerAttention", "CropAndResize", "MRotaryEmbedding"], _DATA),
    **dict.fromkeys(["DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "DecoderAttention"], _STATE),
    **dict.fromkeys(["CausalConvWithState", "VarlenCausalConvWithState", "LinearAttention", "GatedDeltaNet"], _STATE),
    "AttnLSTM": _STATE,
    **dict.fromkeys(["BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"], _SUBGRAPHS),
    **dict.fromkeys(["GemmaRotaryEmbedding", "GatedRelativePositionBias", "RelativePositionBias"], _FUSED),
    **dict.fromkeys(["EngramGate", "HyperConnectionPreMix", "HyperConnectionPostMix", "BranchwiseRMSNorm"], _FUSED),
    **dict.fromkeys(["LinearAttentionGate", "FusedMatMulActivation", "WordConvEmbedding", "TorchEmbedding"], _FUSED),
    **dict.fromkeys(["GatherND", "Pad", "Range", "Trilu", "Unique", "GridSample", "ExpandDims"], _EARLY),
    **dict.fromkeys(["Rfft", "Irfft", "MaxpoolWithMask", "ConvTransposeWithDynamicPads", "BitmaskDropout"], _EARLY),
    **dict.fromkeys(["QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization"], _ORDERED),
    **dict.fromkeys(["QOrderedLongformerAttention", "QOrderedMatMul", "QuantizeWithOrder"], _ORDERED),
    **dict.fromkeys(["DequantizeWithOrder", "NhwcConv", "GemmFloat8", "SparseToDenseMatMul", "EPContext"], _ORDERED),
    **dict.fromkeys(["Inverse", "DynamicTimeWarping", "UnfoldTensor", "MurmurHash3", "IsAllFinite"], _ELEMENTS),
    **dict.fromkeys(["NGramRepeatBlock", "NGramHashMapping", "VarlenNGramHashMapping"], _ELEMENTS),
    **dict.fromkeys(["ComplexMul", "ComplexMulConj", "BifurcationDetector"], _ELEMENTS),
}.items():
    unsupported(MS + key, reason)

_BLOCKED = "its channels are laid out in blocks for one kind of device; save the model at a lower optimisation level"
for key in [
    *["AveragePool", "Conv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReorderInput", "ReorderOutput"],
    "Upsample",
]:
    unsupported(f"com.microsoft.nchwc::{key}", _BLOCKED)
