"""Graphs written by hand, in ONNX's text form: what the torch exporters do not write. Needs no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from models.builders.quiet import quiet


class Weights:
    """Random initializers from one seed, collected by name."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def weight(self, **shapes: tuple[int, ...]) -> Weights:
        """Add weights that keep the variance of what passes (a matrix's fan-in is axis 0)."""
        for name, shape in shapes.items():
            fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
            self.tensors[name] = self.random.normal(0, (1.5 / fan_in) ** 0.5, shape).astype(np.float32)
        return self

    def bias(self, **sizes: int) -> Weights:
        """Add vectors around zero."""
        self.tensors |= {k: self.random.normal(0, 0.2, n).astype(np.float32) for k, n in sizes.items()}
        return self

    def scale(self, **sizes: int) -> Weights:
        """Add positive vectors around one."""
        self.tensors |= {k: self.random.uniform(0.5, 1.5, n).astype(np.float32) for k, n in sizes.items()}
        return self

    def batch_norm(self, **sizes: int) -> Weights:
        """Add scale, bias, mean and var for each BatchNormalization."""
        for name, size in sizes.items():
            self.scale(**{f"{name}.scale": size, f"{name}.var": size})
            self.bias(**{f"{name}.bias": size, f"{name}.mean": size})
        return self

    def model(self, text: str, opset: int, ir: int = 10, domains: str = "") -> onnx.ModelProto:
        """Parse a graph and give it these initializers.

        Args:
            text: the graph, and perhaps functions, without the model's header.
            opset: of the default domain.
            ir: IR version.
            domains: further opset imports, such as `, "com.microsoft": 1`.
        """
        model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}{domains}]>\n{text}')
        for name, value in self.tensors.items():
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        for i, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{i}"
        return model


def _bn(name: str) -> str:
    return ", ".join(f'"{name}.{part}"' for part in ("scale", "bias", "mean", "var"))


RESIDUAL = f"""
residual (float[batch, 3, 12, 12] input) => (float[batch, 7] logits) {{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (input, "conv1.weight")
    b1 = BatchNormalization (c1, {_bn("bn1")})
    r1 = Relu (b1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r1, "conv2.weight")
    b2 = BatchNormalization (c2, {_bn("bn2")})
    r2 = Relu (b2)
    c3 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r2, "conv3.weight", "conv3.bias")
    a3 = Add (c3, r1)
    r3 = Relu (a3)
    p3 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r3)
    c4 = Conv <kernel_shape = [1, 1]> (p3, "conv4.weight", "conv4.bias")
    h4 = HardSwish (c4)
    g = GlobalAveragePool (h4)
    f = Flatten (g)
    logits = Gemm <transB = 1> (f, "fc.weight", "fc.bias")
}}
"""


def _residual_weights() -> Weights:
    weights = Weights(1).weight(**{"conv1.weight": (10, 3, 3, 3), "conv2.weight": (14, 10, 3, 3)})
    weights.weight(**{"conv3.weight": (10, 14, 3, 3), "conv4.weight": (18, 10, 1, 1), "fc.weight": (7, 18)})
    weights.bias(**{"conv3.bias": 10, "conv4.bias": 18, "fc.bias": 7})
    return weights.batch_norm(bn1=10, bn2=14)


def handmade_residual() -> onnx.ModelProto:
    """Build a residual CNN with BatchNorm."""
    return _residual_weights().model(RESIDUAL, 17, ir=8)


def handmade_residual_fp16() -> onnx.ModelProto:
    """Build the residual CNN in half precision, inputs and outputs too."""
    weights = _residual_weights()
    weights.tensors = {name: value.astype(np.float16) for name, value in weights.tensors.items()}
    return weights.model(RESIDUAL.replace("float[", "float16["), 17, ir=8)


def handmade_grouped() -> onnx.ModelProto:
    """Build grouped, depthwise (two outputs per input) and transposed grouped convolutions, PRelu, AveragePool."""
    weights = Weights(2).weight(w1=(15, 3, 3, 3), w2=(20, 3, 3, 3), w3=(40, 1, 3, 3), w4=(40, 7, 2, 2), w5=(14, 6))
    weights.bias(b1=15, b2=20, b3=40, b4=14, b5=6).scale(slope=15)
    weights.tensors["slope"] = (weights.tensors["slope"] - 0.4).reshape(15, 1, 1)
    return weights.model(
        """
grouped (float[batch, 3, 10, 10] input) => (float[batch, 6] logits) {
    low = Constant <value = float {-1.0}> ()
    high = Constant <value = float {2.0}> ()
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (input, w1, b1)
    r1 = PRelu (c1, slope)
    c2 = Conv <group = 5, kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r1, w2, b2)
    r2 = LeakyRelu <alpha = 0.2> (c2)
    c3 = Conv <group = 20, kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (r2, w3, b3)
    r3 = Relu (c3)
    c4 = ConvTranspose <group = 2, kernel_shape = [2, 2], strides = [2, 2]> (r3, w4, b4)
    r4 = Clip (c4, low, high)
    p4 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (r4)
    g = ReduceMean <keepdims = 0, axes = [2, 3]> (p4)
    logits = Gemm (g, w5, b5)
}
""",
        13,
        ir=7,
    )


def handmade_group_norm() -> onnx.ModelProto:
    """Build GroupNormalization of opset 21, InstanceNormalization, Mish, Resize and Concat."""
    weights = Weights(3).weight(w1=(12, 3, 3, 3), w2=(20, 12, 3, 3), w3=(9, 32, 1, 1), w4=(5, 9, 3, 3))
    weights.bias(b1=12, b2=20, b3=9, b4=5, n1b=12, n2b=20, n3b=9).scale(n1=12, n2=20, n3=9)
    weights.tensors["twice"] = np.array([1, 1, 2, 2], np.float32)
    return weights.model(
        """
group_norm (float[batch, 3, 8, 8] input) => (float[batch, 5, 8, 8] map) {
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (input, w1, b1)
    g1 = GroupNormalization <num_groups = 3> (c1, n1, n1b)
    r1 = Mish (g1)
    c2 = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (r1, w2, b2)
    g2 = GroupNormalization <num_groups = 4, epsilon = 0.001> (c2, n2, n2b)
    r2 = Gelu <approximate = "tanh"> (g2)
    u2 = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric">
        (r2, , twice)
    k = Concat <axis = 1> (u2, r1)
    c3 = Conv <kernel_shape = [1, 1]> (k, w3, b3)
    i3 = InstanceNormalization (c3, n3, n3b)
    r3 = Selu (i3)
    map = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r3, w4, b4)
}
""",
        21,
    )


def handmade_rms_attention() -> onnx.ModelProto:
    """Build for opset 23: RMSNormalization, RotaryEmbedding and grouped-query Attention, and a SwiGLU."""
    weights = Weights(4).weight(embedding=(31, 22), wq=(22, 48), wk=(22, 16), wv=(22, 16), wo=(48, 22))
    weights.weight(w_gate=(22, 38), w_up=(22, 38), w_down=(38, 22), head=(22, 31)).scale(n1=22, n2=22, n3=22)
    weights.tensors["embedding"] *= 4
    angles = np.arange(16)[:, None] / 100.0 ** (np.arange(4) / 4)
    weights.tensors |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return weights.model(
        """
rms_attention (int64[batch, sequence] tokens, int64[batch, sequence] positions)
    => (float[batch, sequence, 31] logits) {
    x = Gather (embedding, tokens)
    x1 = RMSNormalization <epsilon = 0.00001> (x, n1)
    q = MatMul (x1, wq)
    k = MatMul (x1, wk)
    v = MatMul (x1, wv)
    qr = RotaryEmbedding <num_heads = 6> (q, cos, sin, positions)
    kr = RotaryEmbedding <num_heads = 2> (k, cos, sin, positions)
    y = Attention <is_causal = 1, q_num_heads = 6, kv_num_heads = 2> (qr, kr, v)
    o = MatMul (y, wo)
    x2 = Add (x, o)
    x3 = RMSNormalization <epsilon = 0.00001> (x2, n2)
    gate = MatMul (x3, w_gate)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    up = MatMul (x3, w_up)
    hidden = Mul (silu, up)
    down = MatMul (hidden, w_down)
    x4 = Add (x2, down)
    x5 = RMSNormalization <epsilon = 0.00001> (x4, n3)
    logits = MatMul (x5, head)
}
""",
        23,
        ir=11,
    )


def handmade_contrib() -> onnx.ModelProto:
    """Build a BERT layer as onnxruntime's transformer optimizer leaves it: com.microsoft's fused operators."""
    weights = Weights(5).weight(embedding=(29, 24), w_qkv=(24, 72), wo=(24, 24), w1=(24, 42), w2=(42, 24), head=(24, 5))
    weights.bias(b_qkv=72, bo=24, b1=42, b2=24, b_head=5, n0b=24, n1b=24, n2b=24).scale(n0=24, n1=24, n2=24)
    weights.tensors["embedding"] *= 4
    return weights.model(
        """
contrib (int64[batch, sequence] tokens, int32[batch, sequence] mask) => (float[batch, 5] logits) {
    e = Gather (embedding, tokens)
    x = LayerNormalization (e, n0, n0b)
    a = com.microsoft.Attention <num_heads = 4> (x, w_qkv, b_qkv, mask)
    o = MatMul (a, wo)
    x1 = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (o, x, n1, n1b, bo)
    h = MatMul (x1, w1)
    g = com.microsoft.BiasGelu (h, b1)
    y = MatMul (g, w2)
    x2 = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (y, x1, n2, n2b, b2)
    p = ReduceMean <keepdims = 0, axes = [1]> (x2)
    t = com.microsoft.FastGelu (p)
    logits = Gemm (t, head, b_head)
}
""",
        17,
        ir=8,
        domains=', "com.microsoft": 1',
    )


def _quantised(format_name: str) -> onnx.ModelProto:
    """Build a CNN with a shortcut, quantised by onnxruntime (weights 7 bits in int8 per channel, activations uint8)."""
    with quiet():
        from onnxruntime import quantization

    shapes = {"conv1.weight": (10, 3, 3, 3), "conv2.weight": (14, 10, 3, 3), "conv3.weight": (10, 14, 1, 1)}
    weights = Weights(6).weight(**shapes, **{"fc.weight": (10, 7)})
    weights.bias(**{"conv1.bias": 10, "conv2.bias": 14, "conv3.bias": 10, "fc.bias": 7})
    model = weights.model(
        """
quantised (float[batch, 3, 12, 12] input) => (float[batch, 7] logits) {
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (input, "conv1.weight", "conv1.bias")
    r1 = Relu (c1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r1, "conv2.weight", "conv2.bias")
    r2 = Relu (c2)
    c3 = Conv <kernel_shape = [1, 1]> (r2, "conv3.weight", "conv3.bias")
    a3 = Add (c3, r1)
    p3 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a3)
    g = GlobalAveragePool (p3)
    f = Flatten (g)
    logits = Gemm (f, "fc.weight", "fc.bias")
}
""",
        17,
        ir=8,
    )

    class Reader(quantization.CalibrationDataReader):
        """Four batches of noise."""

        def __init__(self) -> None:
            noise = np.random.default_rng(6).normal(size=(4, 2, 3, 12, 12)).astype(np.float32)
            self.batches = iter([{"input": batch} for batch in noise])

        def get_next(self) -> dict[str, np.ndarray] | None:
            """Return the next batch, or none."""
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat[format_name],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # Without VNNI two products are summed in 16 bits (vpmaddubsw): 2 x 255 x 64 fits, 2 x 255 x 127 saturates.
            reduce_range=True,
        )
        return onnx.load(target)


def handmade_qdq() -> onnx.ModelProto:
    """Quantise in QDQ form: float operators between QuantizeLinear and DequantizeLinear."""
    return _quantised("QDQ")


def handmade_qlinear() -> onnx.ModelProto:
    """Quantise in operator form: QLinearConv, and com.microsoft's QLinearAdd and QGemm."""
    return _quantised("QOperator")


def handmade_function() -> onnx.ModelProto:
    """Build a model-local function with an attribute, called twice, which itself calls another one."""
    weights = Weights(7).weight(w1=(10, 3, 3, 3), w2=(10, 10, 3, 3), w3=(14, 10, 3, 3), w4=(14, 6))
    weights.bias(b1=10, b2=10, b3=14, b4=6)
    return weights.model(
        """
function (float[batch, 3, 10, 10] input) => (float[batch, 6] logits) {
    x1 = local.ConvAct <alpha = 0.1> (input, w1, b1)
    x2 = local.Residual <alpha = 0.3> (x1, w2, b2)
    x3 = local.ConvAct <alpha = 0.2> (x2, w3, b3)
    g = GlobalAveragePool (x3)
    f = Flatten (g)
    logits = Gemm (f, w4, b4)
}
<domain: "local", opset_import: ["": 17, "local": 1]>
ConvAct <alpha> (x, w, b) => (y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    y = LeakyRelu <alpha: float = @alpha> (c)
}
<domain: "local", opset_import: ["": 17, "local": 1]>
Residual <alpha> (x, w, b) => (y) {
    c = local.ConvAct <alpha: float = @alpha> (x, w, b)
    y = Add (x, c)
}
""",
        17,
        ir=8,
        domains=', "local": 1',
    )


def handmade_if() -> onnx.ModelProto:
    """Build an If whose branches read the outer graph's tensors and weights; the flag is an input."""
    weights = Weights(8).weight(w1=(10, 3, 3, 3), w2=(14, 10, 3, 3), w3=(14, 10, 1, 1), w4=(14, 6), w5=(12, 10, 3, 3))
    weights.weight(w6=(14, 12, 1, 1)).bias(b1=10, b2=14, b3=14, b4=6, b5=12, b6=14)
    return weights.model(
        """
branches (float[batch, 3, 10, 10] input, bool flag) => (float[batch, 6] logits) {
    c1 = Conv <pads = [1, 1, 1, 1]> (input, w1, b1)
    x = Relu (c1)
    y = If (flag) <
        then_branch = then_graph () => (float[batch, 14, 10, 10] then_y) {
            c5 = Conv <pads = [1, 1, 1, 1]> (x, w5, b5)
            r5 = Relu (c5)
            then_y = Conv (r5, w6, b6)
        },
        else_branch = else_graph () => (float[batch, 14, 10, 10] else_y) {
            else_y = Conv (x, w3, b3)
        }
    >
    c2 = Conv <pads = [1, 1, 1, 1]> (x, w2, b2)
    s = Add (y, c2)
    r = Relu (s)
    g = GlobalAveragePool (r)
    f = Flatten (g)
    logits = Gemm (f, w4, b4)
}
""",
        17,
        ir=8,
    )


def handmade_loop() -> onnx.ModelProto:
    """Build a Loop that applies one residual layer three times and collects what it saw."""
    weights = Weights(9).weight(w1=(5, 14), w2=(14, 19), w3=(19, 14), w4=(14, 6)).bias(b1=14, b2=19, b3=14, b4=6)
    weights.tensors |= {"times": np.array(3, np.int64), "always": np.array(True)}
    return weights.model(
        """
iterated (float[batch, 5] input) => (float[batch, 6] logits, float[batch, 14] mean) {
    h1 = Gemm (input, w1, b1)
    x = Tanh (h1)
    last, seen = Loop (times, always, x) <
        body = step (int64 i, bool go, float[batch, 14] state)
            => (bool more, float[batch, 14] next, float[batch, 14] record) {
            more = Identity (go)
            h2 = Gemm (state, w2, b2)
            r2 = Relu (h2)
            h3 = Gemm (r2, w3, b3)
            next = Add (state, h3)
            record = Tanh (next)
        }
    >
    mean = ReduceMean <keepdims = 0, axes = [0]> (seen)
    t = Tanh (last)
    logits = Gemm (t, w4, b4)
}
""",
        17,
        ir=8,
    )


def handmade_scan() -> onnx.ModelProto:
    """Build a Scan over the steps of a sequence: a plain recurrent cell."""
    weights = Weights(10).weight(w_in=(5, 11), w_x=(11, 14), w_h=(14, 14), w_out=(14, 6))
    weights.bias(b_in=11, b_h=14, b_out=6)
    return weights.model(
        """
scanned (float[7, batch, 5] input) => (float[batch, 6] logits, float[7, batch, 14] states) {
    p = MatMul (input, w_in)
    pb = Add (p, b_in)
    x = Relu (pb)
    step = Constant <value = int64 {0}> ()
    first = Gather (x, step)
    zero = MatMul (first, w_x)
    start = Tanh (zero)
    last, states = Scan <num_scan_inputs = 1, body = cell (float[batch, 14] h, float[batch, 11] xt)
        => (float[batch, 14] h_next, float[batch, 14] h_out) {
            a = MatMul (xt, w_x)
            r = MatMul (h, w_h)
            s = Add (a, r)
            sb = Add (s, b_h)
            h_next = Tanh (sb)
            h_out = Identity (h_next)
        }
    > (start, x)
    logits = Gemm (last, w_out, b_out)
}
""",
        17,
        ir=8,
    )


def handmade_old() -> onnx.ModelProto:
    """Build as in 2018: opset 8, IR 3, every initializer also an input, Upsample and Dropout."""
    weights = Weights(11).weight(w1=(10, 3, 3, 3), w2=(14, 10, 3, 3), w4=(41, 14), w5=(6, 41))
    weights.bias(b2=14, b4=41, b5=6).batch_norm(bn=10)
    return _with_inputs(
        weights.model(
            f"""
old (float[batch, 3, 9, 9] input) => (float[batch, 6] logits) {{
    c1 = Conv <kernel_shape = [3, 3], strides = [3, 3]> (input, w1)
    b1 = BatchNormalization (c1, {_bn("bn")})
    r1 = Relu (b1)
    u1 = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]> (r1)
    c2 = Conv <kernel_shape = [3, 3]> (u1, w2, b2)
    l2 = LRN <size = 3> (c2)
    s2 = Sigmoid (l2)
    g = GlobalMaxPool (s2)
    f = Flatten (g)
    h = Gemm <transB = 1> (f, w4, b4)
    r = Elu (h)
    d = Dropout <ratio = 0.5> (r)
    logits = Gemm <transB = 1> (d, w5, b5)
}}
""",
            8,
            ir=3,
        )
    )


def _with_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(kind)
    return model
