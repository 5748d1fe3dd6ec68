"""Shapes of operators that ONNX has no schema for. Spec: onnxruntime/docs/ContribOperators.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from spa.model.graph import Node
from spa.model.shape_registry import Shape, contrib_shape

Shapes = Sequence["Shape | None"]
Outputs = list[tuple[int, Shape]]


def _of(shapes: Shapes, operand: int) -> Shape:
    shape = shapes[operand] if operand < len(shapes) else None
    return shape or ()


MS = "com.microsoft::"


@contrib_shape(
    *(MS + n for n in ["Gelu", "QuickGelu", "FastGelu", "BiasGelu", "RotaryEmbedding", "GroupNorm", "QLinearSigmoid"]),
    *(MS + n for n in ["QLinearLeakyRelu", "QLinearSoftmax", "GatedRMSNorm", "ScaledSiLU", "BiasSoftmax"]),
    *(MS + n for n in ["BiasDropout", "SkipGroupNorm", "MoE", "QMoE", "LongformerAttention", "BranchwiseRMSNorm"]),
    *(MS + n for n in ["MRotaryEmbedding", "QOrderedGelu", "QOrderedLayerNormalization"]),
)
def like_first(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return outputs like the first operand; BiasDropout's mask, too."""
    first = (dtypes[0], _of(shapes, 0))
    return [first, (TensorProto.BOOL, first[1]) if node.op == "BiasDropout" else first]


@contrib_shape(*(MS + n for n in ["BiasAdd", "QLinearAdd", "QLinearMul", "QLinearWhere", "GatedAdd", "MulInteger"]))
def broadcast(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Broadcast the operands; quantised ones are followed by their scales and zero points."""
    operands = {"BiasAdd": (0, 1, 2), "GatedAdd": (0, 1, 2), "QLinearWhere": (0, 1, 4), "MulInteger": (0, 2)}
    data = operands.get(node.op, (0, 3))
    dtype = TensorProto.INT32 if node.op == "MulInteger" else dtypes[data[1]]
    return [(dtype, tuple(np.broadcast_shapes(*(_of(shapes, i) for i in data))))]


@contrib_shape(MS + "SkipLayerNormalization", MS + "SkipSimplifiedLayerNormalization")
def skip_layer_norm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return the normalised sum, two statistics for each row, and the sum."""
    x = _of(shapes, 0)
    return [(dtypes[0], x), (TensorProto.FLOAT, (*x[:-1], 1)), (TensorProto.FLOAT, (*x[:-1], 1)), (dtypes[0], x)]


@contrib_shape(MS + "BitmaskBiasDropout")
def bitmask(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return an output like the first operand, and a mask of one bit for each element."""
    x = _of(shapes, 0)
    return [(dtypes[0], x), (TensorProto.UINT32, (-(-math.prod(x) // 32),))]


@contrib_shape("SimplifiedLayerNormalization")
def simplified_layer_norm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return an output like X, and one statistic for each row."""
    x = _of(shapes, 0)
    axis = node.attributes.get("axis", -1) % len(x)
    return [(dtypes[0], x), (TensorProto.FLOAT, (*x[:axis], *(1 for _ in x[axis:])))]


@contrib_shape(MS + "EmbedLayerNormalization", MS + "QEmbedLayerNormalization")
def embed_layer_norm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [b s c], [b] and [b s c]."""
    ids, width = _of(shapes, 0), _of(shapes, 2)[-1]
    dtype = dtypes[8] if node.op == "QEmbedLayerNormalization" else dtypes[2]
    return [(dtype, (*ids, width)), (TensorProto.INT32, ids[:1]), (dtype, (*ids, width))]


@contrib_shape(MS + "BiasSplitGelu")
def bias_split_gelu(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return half of the channels."""
    x = _of(shapes, 0)
    return [(dtypes[0], (*x[:-1], x[-1] // 2))]


@contrib_shape(MS + "CDist")
def distances(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [m n]."""
    return [(dtypes[0], (_of(shapes, 0)[0], _of(shapes, 1)[0]))]


@contrib_shape(MS + "QuantizeLinear", MS + "DequantizeLinear")
def quantise(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Keep the shape; the type is the zero point's, or the scale's."""
    quantised = dtypes[2] if len(dtypes) > 2 and dtypes[2] else TensorProto.UINT8
    return [(quantised if node.op == "QuantizeLinear" else dtypes[1], _of(shapes, 0))]


def _matmul(a: Shape, b: Shape) -> Shape:
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    rows = () if len(a) == 1 else left[-2:-1]
    columns = () if len(b) == 1 else right[-1:]
    return (*np.broadcast_shapes(left[:-2], right[:-2]), *rows, *columns)


def _swapped(shape: Shape, swap: bool) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if swap and len(shape) > 1 else shape


@contrib_shape(MS + "FusedMatMul", MS + "TransposeMatMul", MS + "GemmFastGelu", MS + "MatMulIntegerToFloat")
@contrib_shape(MS + "DynamicQuantizeMatMul")
def matmul(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Multiply as numpy.matmul does, operands transposed on request."""
    a = _swapped(_of(shapes, 0), bool(node.attributes.get("transA", 0)))
    b = _swapped(_of(shapes, 1), bool(node.attributes.get("transB", 0)))
    return [(dtypes[2] if node.op == "MatMulIntegerToFloat" else dtypes[0], _matmul(a, b))]


@contrib_shape(MS + "FusedGemm", MS + "QGemm")
def gemm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Multiply two matrices; B is operand 3 of QGemm, whose result is float without an output scale."""
    quantised = node.op == "QGemm"
    a = _swapped(_of(shapes, 0), bool(node.attributes.get("transA", 0)))
    b = _swapped(_of(shapes, 3 if quantised else 1), bool(node.attributes.get("transB", 0)))
    scaled = len(dtypes) > 7 and dtypes[7]
    return [(dtypes[0] if scaled or not quantised else TensorProto.FLOAT, (a[0], b[1]))]


@contrib_shape(MS + "MatMulBnb4")
def packed_matmul_by_attribute(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [.. N], or [.. K] where the weights are not transposed."""
    columns = node.attributes["N" if node.attributes.get("transB", 1) else "K"]
    return [(dtypes[0], (*_of(shapes, 0)[:-1], columns))]


@contrib_shape(MS + "GatherBlockQuantized")
def packed_gather(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Gather from data whose last axis may hold several numbers in a byte."""
    data, a = list(_of(shapes, 0)), node.attributes
    if dtypes[0] == TensorProto.UINT8:
        data[-1] *= 8 // a.get("bits", 4)
    axis = a.get("gather_axis", 0) % len(data)
    return [(dtypes[2], (*data[:axis], *_of(shapes, 1), *data[axis + 1 :]))]


@contrib_shape(MS + "DynamicQuantizeLSTM")
def quantised_lstm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return Y[s d b h], Y_h[d b h] and Y_c[d b h]."""
    (steps, batch, _), directions = _of(shapes, 0), _of(shapes, 1)[0]
    last = (directions, batch, node.attributes["hidden_size"])
    return [(dtypes[0], (steps, *last)), (dtypes[0], last), (dtypes[0], last)]


@contrib_shape(MS + "MatMulNBits")
def packed_matmul(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [.. n]; n comes from the weights, so that the walk over a pruned graph finds the new size."""
    return [(dtypes[0], (*_of(shapes, 0)[:-1], _of(shapes, 1)[0]))]


def _extents(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return the number of positions of a window along each axis: (size + pads - dilated kernel) / stride + 1.

    The quotient is rounded down, or up with `ceil_mode`; with `auto_pad` SAME it is size / stride, rounded up.
    """
    rank, a = len(sizes), node.attributes
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    pads, round_up = a.get("pads") or [0] * (2 * rank), a.get("ceil_mode", 0)
    mode = a.get("auto_pad", "NOTSET")
    extents = []
    for i, size in enumerate(sizes):
        reach = (kernel[i] - 1) * dilations[i] + 1
        padded = size + (pads[i] + pads[i + rank] if mode == "NOTSET" else 0)
        steps = -((reach - padded) // strides[i]) if round_up else (padded - reach) // strides[i]
        if round_up and steps * strides[i] >= size + pads[i]:
            steps -= 1  # a window must start inside
        extents.append(-(-size // strides[i]) if mode.startswith("SAME") else steps + 1)
    return extents


@contrib_shape(MS + "FusedConv")
def fused_conv(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [n o *t]."""
    x, w = _of(shapes, 0), _of(shapes, 1)
    return [(dtypes[0], (x[0], w[0], *_extents(node, x[2:], w[2:])))]


@contrib_shape(MS + "NhwcConv", MS + "NhwcFusedConv", MS + "QLinearConv")
def conv_last(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [n *t o]; for QLinearConv only with `channels_last`, [n o *t] otherwise."""
    quantised = node.op == "QLinearConv"
    x, w = _of(shapes, 0), _of(shapes, 3 if quantised else 1)
    dtype = dtypes[7] if quantised else dtypes[0]
    if quantised and not node.attributes.get("channels_last", 0):
        return [(dtype, (x[0], w[0], *_extents(node, x[2:], w[2:])))]
    return [(dtype, (x[0], *_extents(node, x[1:-1], w[2:]), w[0]))]


@contrib_shape(MS + "QLinearAveragePool", MS + "NhwcMaxPool")
def pool(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Pool the spatial axes."""
    x, kernel = _of(shapes, 0), node.attributes["kernel_shape"]
    if node.op == "NhwcMaxPool" or node.attributes.get("channels_last", 0):
        return [(dtypes[0], (x[0], *_extents(node, x[1:-1], kernel), x[-1]))]
    return [(dtypes[0], (*x[:2], *_extents(node, x[2:], kernel)))]


@contrib_shape(MS + "QLinearReduceMean")
def mean(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Reduce axes to one, or remove them without `keepdims`."""
    x = _of(shapes, 0)
    reduced = {a % len(x) for a in node.attributes.get("axes") or range(len(x))}
    keep = node.attributes.get("keepdims", 1)
    return [(dtypes[0], tuple(1 if i in reduced else n for i, n in enumerate(x) if keep or i not in reduced))]


@contrib_shape(MS + "QLinearGlobalAveragePool")
def global_pool(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Reduce all spatial axes to one."""
    x = _of(shapes, 0)
    ones = (1,) * (len(x) - 2)
    return [(dtypes[0], (x[0], *ones, x[-1]) if node.attributes.get("channels_last", 0) else (*x[:2], *ones))]


@contrib_shape(MS + "QLinearConcat")
def concat(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Concatenate operands 2, 5, 8 ... along `axis`."""
    parts = [_of(shapes, i) for i in range(2, len(shapes), 3)]
    axis = node.attributes["axis"]
    result = list(parts[0])
    result[axis] = sum(part[axis] for part in parts)
    return [(dtypes[2], tuple(result))]


@contrib_shape(MS + "MultiHeadAttention")
def multi_head(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [b s (h e)], the caches [b h steps d] and [b h steps e], and the scores [b h s steps]."""
    q, k, v, past = (_of(shapes, i) for i in (0, 1, 2, 6))
    heads = node.attributes["num_heads"]
    batch, rows = q[:2]
    d = q[4] if len(q) == 5 else q[2] // heads
    e = v[3] if len(v) == 4 else v[2] // heads if v else d
    steps = (k[2] if len(k) == 4 else k[1] if k else rows) + (past[2] if past else 0)
    caches = [(batch, heads, steps, d), (batch, heads, steps, e)]
    return [(dtypes[0], shape) for shape in [(batch, rows, heads * e), *caches, (batch, heads, rows, steps)]]


@contrib_shape(MS + "Attention", MS + "QAttention")
def packed_attention(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [b s (h e)] and the cache [2 b h steps d]; of QAttention, floats like its bias."""
    quantised = node.op == "QAttention"
    x, weights, past = _of(shapes, 0), _of(shapes, 1), _of(shapes, 8 if quantised else 4)
    sizes = node.attributes.get("qkv_hidden_sizes") or [weights[1] // 3] * 3
    heads, dtype = node.attributes["num_heads"], dtypes[2] if quantised else dtypes[0]
    steps = x[1] + (past[3] if past else 0)
    return [(dtype, (x[0], x[1], sizes[2])), (dtype, (2, x[0], heads, steps, sizes[0] // heads))]


@contrib_shape(MS + "GroupQueryAttention")
def group_query(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return [b s (k r d)] and the caches, which grow by the new steps."""
    q, past = _of(shapes, 0), _of(shapes, 3)
    heads, kv = node.attributes["num_heads"], node.attributes["kv_num_heads"]
    packed = not _of(shapes, 1)
    size = q[2] // (heads + 2 * kv if packed else heads)
    steps = q[1] + (past[2] if past else 0)
    cache = (dtypes[0], (q[0], kv, steps, size))
    return [(dtypes[0], (q[0], q[1], heads * size)), cache, cache]


@contrib_shape("GroupNormalization", "MeanVarianceNormalization")
def group_norm(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> list[tuple[int, Shape]]:
    """Return an output like the input; being functions, these operators have no shape inference in ONNX."""
    return [(dtypes[0], shapes[0] or ())]


@contrib_shape("GreaterOrEqual", "LessOrEqual")
def comparison(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Broadcast the operands; before version 16 these operators have no shape inference in ONNX."""
    return [(TensorProto.BOOL, tuple(np.broadcast_shapes(_of(shapes, 0), _of(shapes, 1))))]


@contrib_shape("Compress")
def compress(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return an output whose compressed axis depends on data; before version 11 ONNX does not tell its shape."""
    x, axis = list(_of(shapes, 0)), node.attributes.get("axis")
    if axis is None:
        return [(dtypes[0], (-1,))]
    x[axis] = -1
    return [(dtypes[0], tuple(x))]


@contrib_shape("MaxUnpool", by_value=True)
def unpooled(node: Node, shapes: Shapes, dtypes: Sequence[int], values: Sequence[np.ndarray | None]) -> Outputs:
    """Return the shape that an operand gives, which onnx's own inference does not read, or that of what was pooled."""
    x = _of(shapes, 0)
    if len(shapes) > 2 and shapes[2] is not None:
        given = values[2]
        return [(dtypes[0], (-1,) * len(x) if given is None else tuple(int(n) for n in np.ravel(given)))]
    kernel = node.attributes["kernel_shape"]
    strides = node.attributes.get("strides") or [1] * len(kernel)
    pads = node.attributes.get("pads") or [0] * 2 * len(kernel)
    sides = zip(x[2:], kernel, strides, pads[: len(kernel)], pads[len(kernel) :], strict=True)
    return [(dtypes[0], (*x[:2], *((n - 1) * stride + k - a - b for n, k, stride, a, b in sides)))]
