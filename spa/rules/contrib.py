"""Fused operators of onnxruntime (``com.microsoft``) that are neither attention nor quantised, and barriers.

Spec of all: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Those that are an operator of
the standard with something fused into it are registered beside that operator.
"""

from __future__ import annotations

from spa.algebra.axes import product
from spa.algebra.notation import apply
from spa.algebra.op import Op, Read
from spa.rules import rule, unsupported

MS = "com.microsoft::"


@rule(MS + "SkipLayerNormalization", MS + "SkipSimplifiedLayerNormalization")
def skip_layer_norm(op: Op) -> None:
    """LayerNormalization of a sum; everything broadcasts. Outputs 1 and 2 are statistics, output 3 is the sum."""
    op.cross(op.axes(0)[-1])
    op.broadcast([i for i in range(len(op.inputs)) if op.has(i)])
    result = op.outputs[0] or ()
    for output in (1, 2):
        op.set(output, [*result[:-1], op.dim(1)])
    op.set(3, result)


@rule("SimplifiedLayerNormalization")
def simplified_layer_norm(op: Op) -> None:
    """RMSNormalization under onnxruntime's old name, in the default domain."""
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    for e in axes[axis:]:
        op.cross(e)
    op.broadcast([0, 1])
    op.set(1, [*axes[:axis], *(op.dim(1) for _ in axes[axis:])])


@rule(MS + "EmbedLayerNormalization")
def embed_layer_norm(op: Op) -> None:
    """The sum of three embeddings, normalised. Output 1 is a mask index, output 2 the sum."""
    rows = "a" if op.has(8) and op.axes(8)[0].size == 1 else "b"
    line = (
        "input_ids[b s], segment_ids?[b s], word_embedding[v ~c], position_embedding[p c], segment_embedding?[q c], "
        f"gamma[c], beta[c], mask?[b s], position_ids?[{rows} s] "
        "-> output[b s c], mask_index?[b], embedding_sum?[b s c]"
    )
    _looked_up(op, line)


@rule(MS + "QEmbedLayerNormalization")
def quantised_embed_layer_norm(op: Op) -> None:
    """EmbedLayerNormalization of integer tables, each with one scale and zero point."""
    line = (
        "input_ids[b s], segment_ids?[b s], word_embedding_quant[v ~c], position_embedding_quant[p c], "
        "segment_embedding?[q c], gamma_quant[c], beta_quant[c], mask?[b s] -> layernorm_out[b s c], mask_index_out?[b]"
    )
    _looked_up(op, line)


def _looked_up(op: Op, line: str) -> None:
    """The rows of tables are looked up by values, and sequences by place."""
    letters = apply(op, line)
    for letter in ("v", "p", "q", "s"):
        if letter in letters:
            op.freeze(letters[letter], "looked up by")


@rule(MS + "GroupNorm", MS + "SkipGroupNorm")
def group_norm_last(op: Op) -> None:
    """GroupNormalization, of a sum with a skip [n c] or [n .. c] and a bias, with the channels last by default."""
    x = "[n *s (g c)]" if op.attr("channels_last", 1) else "[n (g c) *s]"
    skip = f", skip{'[n (g c)]' if op.has(3) and len(op.axes(3)) == 2 else ''}, bias?[(g c)]"
    sum_of = f", S?{x}" if op.node.op == "SkipGroupNorm" else ""
    line = f"X{x}, gamma[(g c)], beta[(g c)]{skip if sum_of else ''} -> Y{x}{sum_of}"
    letters = apply(op, line, {"g": op.attr("groups")})
    if op.has(3) and len(op.axes(3)) > 2:
        op.broadcast([0, 3])
    for e in (letters["c"], *(op.axes(0)[1:-1] if op.attr("channels_last", 1) else op.axes(0)[2:])):
        op.cross(e)
    op.tie_attribute("groups", letters["g"])


@rule(MS + "GatedRMSNorm")
def gated_rms_norm(op: Op) -> None:
    """RMSNormalization of each run of the scale's size, times an activation of a gate."""
    x, (c,) = op.axes(0), op.axes(1)
    op.unify(x[-1], product(op.dim(x[-1].size // c.size), c))
    op.cross(c)
    op.broadcast([0, 2])


@rule(MS + "BiasSoftmax")
def bias_softmax(op: Op) -> None:
    """Softmax of a sum, over all axes from `axis` on; is_inner_broadcast says where the bias has axes of one index."""
    axes = op.axes(0)
    for e in axes[op.positive(op.attr("axis", 1), len(axes)) :]:
        op.cross(e)
    op.broadcast([0, 1])


@rule(MS + "BiasSplitGelu")
def bias_split_gelu(op: Op) -> None:
    """The first half of the channels times Gelu of the second: X[n s d+d]."""
    apply(op, "X[n s d+d], bias[d+d] -> Y[n s d]")


@rule(MS + "BiasDropout", MS + "BitmaskBiasDropout")
def bias_dropout(op: Op) -> None:
    """Dropout of a sum, plus a residual; a mask of bits has axes of its own."""
    op.broadcast([i for i in (0, 1, 2) if op.has(i)])
    if op.node.op == "BiasDropout":
        op.set(1, op.outputs[0] or ())
    else:
        op.set_opaque(1)


@rule(MS + "GatedAdd", MS + "MulInteger")
def broadcasting(op: Op) -> None:
    """Broadcasting; the integers' zero points are scalars."""
    op.broadcast([0, 2] if op.node.op == "MulInteger" else [0, 1, 2])


@rule(MS + "ScaledSiLU")
def scaled_silu(op: Op) -> None:
    """An element-wise function, with a scalar scale."""
    op.set(0, op.axes(0))


@rule(MS + "CDist")
def distances(op: Op) -> None:
    """Distances between all rows of two matrices A[m k] and B[n k]: a sum over k, to which two zeros add nothing."""
    a, b = op.axes(0), op.axes(1)
    op.unify(a[1], b[1])
    op.reads += [Read(a[1], 0, 1), Read(b[1], 1, 1)]
    op.set(0, (a[0], b[0]))
    op.count_macs(a[0], b[0], a[1])


@rule(MS + "NhwcFusedConv")
def conv_last(op: Op) -> None:
    """FusedConv with the channels of data last; kernels lie as ever."""
    line = "X[n *s (g i)], W[(g o) i *k], B?[(g o)], Z?[n *t (g o)] -> Y[n *t (g o)]"
    letters = apply(op, line, {"g": op.attr("group", 1)})
    if "group" in op.node.attributes:
        op.tie_attribute("group", letters["g"])
    result = op.outputs[0] or ()
    for e in result[1:-1]:
        op.freeze(e, "spatial axis of")
    op.count_macs(*result, letters["i"], *op.axes(1)[2:])


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
    "MoE": "its experts are picked by data",
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
