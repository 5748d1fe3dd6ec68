"""Build large networks with random weights for `scale.py`.

    python benchmarks/scale_models.py NAME FOLDER

Writes FOLDER/model.onnx, and FOLDER/model.onnx.data where the weights lie outside. Deterministic: the same name gives
the same bytes. Memory stays bounded where weights lie outside, since they are written as they are drawn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

ALIGNMENT = 4096
DRAWN = 2**26  # bytes of random weights at a time
SMALL = 1024  # bytes of weights that stay in the message


@dataclass
class Builder:
    """A network in the making.

    Attributes:
        element: the type of its weights and activations.
        data: the file that large weights go to, or None to keep all in the message.
        nodes: so far.
        weights: so far.
    """

    element: int = TensorProto.FLOAT
    data: BinaryIO | None = None
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.Generator(np.random.SFC64(0)))

    def add(self, operator: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Add a node of one output, which has the node's name."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, values: Any, element: int | None = None) -> str:
        """Add a small constant of the network's type, or of another."""
        dtype = helper.tensor_dtype_to_np_dtype(self.element if element is None else element)
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, name: str, *shape: int, element: int | None = None, gain: float = 1.0) -> str:
        """Add random weights: bytes, or numbers between a half and the whole of a bound, of either sign."""
        element = self.element if element is None else element
        tensor = TensorProto(name=name, data_type=element, dims=shape)
        fan_in = math.prod(shape) // shape[0] if len(shape) == 4 else shape[0]
        length = math.prod(shape) * helper.tensor_dtype_to_np_dtype(element).itemsize
        draw = self._drawer(element, gain * fan_in**-0.5)
        if self.data is None or length < SMALL:
            tensor.raw_data = draw(length)
        else:
            self.data.write(b"\0" * (-self.data.tell() % ALIGNMENT))
            entries = {"location": Path(self.data.name).name, "offset": self.data.tell(), "length": length}
            for start in range(0, length, DRAWN):
                self.data.write(draw(min(DRAWN, length - start)))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name

    def _drawer(self, element: int, bound: float) -> Callable[[int], bytes]:
        """Return what draws so many bytes of weights: random signs and fractions under one exponent."""
        kinds = {TensorProto.FLOAT: (np.uint32, np.float32, 23), TensorProto.FLOAT16: (np.uint16, np.float16, 10)}
        if element not in kinds:
            return self.random.bytes
        integer, number, fraction = kinds[element]
        low = 2.0 ** math.floor(math.log2(bound))
        exponent = np.asarray(low, number).view(integer)
        mask = integer((1 << (8 * np.dtype(integer).itemsize - 1)) | ((1 << fraction) - 1))

        def draw(length: int) -> bytes:
            bits = np.frombuffer(self.random.bytes(length), integer) & mask
            return (bits | exponent).tobytes()

        return draw

    def model(self, inputs: dict[str, tuple[int, list[Any]]], output: str, shape: list[Any]) -> onnx.ModelProto:
        """Put the network together."""
        values = [helper.make_tensor_value_info(n, element, dims) for n, (element, dims) in inputs.items()]
        result = helper.make_tensor_value_info(output, self.element, shape)
        graph = helper.make_graph(self.nodes, "scale", values, [result], self.weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


# -- decoders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer: RMS norms, attention, a gated linear unit.

    Attributes:
        layers: how many.
        width: of the residual stream.
        inner: the width of the gated linear unit.
        heads: of attention, 64 or 128 wide.
        tokens: in the vocabulary.
        int4: whether matrices are MatMulNBits of 4 bits in blocks of 32.
    """

    layers: int
    width: int
    inner: int
    heads: int
    tokens: int = 32000
    int4: bool = False

    def build(self, b: Builder) -> onnx.ModelProto:
        """Build the network."""
        b.constant("two", 2)
        b.constant("tiny", 1e-5)
        b.constant("scale", (self.width // self.heads) ** -0.5)
        b.constant("split", [0, 0, self.heads, self.width // self.heads], TensorProto.INT64)
        b.constant("join", [0, 0, -1], TensorProto.INT64)
        x = b.add("Gather", [b.weight("embed", self.tokens, self.width), "ids"], "embedded")
        for layer in range(self.layers):
            x = b.add("Add", [x, self._attention(b, self._norm(b, x, f"{layer}.n1"), f"{layer}.attn")], f"{layer}.a")
            x = b.add("Add", [x, self._gated(b, self._norm(b, x, f"{layer}.n2"), f"{layer}.mlp")], f"{layer}.m")
        logits = b.add("MatMul", [self._norm(b, x, "norm"), b.weight("head", self.width, self.tokens)], "logits")
        return b.model({"ids": (TensorProto.INT64, ["batch", "sequence"])}, logits, ["batch", "sequence", self.tokens])

    def _norm(self, b: Builder, x: str, name: str) -> str:
        mean = b.add("ReduceMean", [b.add("Pow", [x, "two"], f"{name}.sq")], f"{name}.mean", axes=[-1])
        root = b.add("Sqrt", [b.add("Add", [mean, "tiny"], f"{name}.eps")], f"{name}.root")
        scale = b.constant(f"{name}.weight", np.ones(self.width))
        return b.add("Mul", [b.add("Div", [x, root], f"{name}.div"), scale], f"{name}.out")

    def _linear(self, b: Builder, x: str, name: str, inputs: int, outputs: int) -> str:
        if not self.int4:
            return b.add("MatMul", [x, b.weight(f"{name}.weight", inputs, outputs)], name)
        codes = b.weight(f"{name}.codes", outputs, inputs // 32, 16, element=TensorProto.UINT8)
        scales = b.weight(f"{name}.scales", outputs * inputs // 32, gain=0.1 * outputs**0.5)
        sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": 32}
        return b.add("MatMulNBits", [x, codes, scales], name, "com.microsoft", **sizes)

    def _attention(self, b: Builder, x: str, name: str) -> str:
        parts = {}
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            y = self._linear(b, x, f"{name}.{part}", self.width, self.width)
            y = b.add("Reshape", [y, "split"], f"{name}.{part}.heads")
            parts[part] = b.add("Transpose", [y], f"{name}.{part}.t", perm=order)
        scores = b.add("Mul", [b.add("MatMul", [parts["q"], parts["k"]], f"{name}.qk"), "scale"], f"{name}.scaled")
        mixed = b.add("MatMul", [b.add("Softmax", [scores], f"{name}.p", axis=-1), parts["v"]], f"{name}.pv")
        mixed = b.add("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
        joined = b.add("Reshape", [mixed, "join"], f"{name}.joined")
        return self._linear(b, joined, f"{name}.o", self.width, self.width)

    def _gated(self, b: Builder, x: str, name: str) -> str:
        gate = self._linear(b, x, f"{name}.gate", self.width, self.inner)
        gate = b.add("Mul", [gate, b.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        up = self._linear(b, x, f"{name}.up", self.width, self.inner)
        return self._linear(b, b.add("Mul", [gate, up], f"{name}.gated"), f"{name}.down", self.inner, self.width)


# -- networks of images ----------------------------------------------------------------------------------------------

IMAGE = {"image": (TensorProto.FLOAT, ["batch", 3, 224, 224])}


def _convolution(b: Builder, x: str, name: str, sizes: tuple[int, int, int], stride: int = 1) -> str:
    """Add a convolution of (inputs, outputs, kernel) sizes and its BatchNormalization."""
    inputs, outputs, kernel = sizes
    weight = b.weight(f"{name}.weight", outputs, inputs, kernel, kernel)
    x = b.add("Conv", [x, weight], f"{name}.conv", pads=[kernel // 2] * 4, strides=[stride] * 2)
    ranges = {"scale": (0.5, 1.5), "bias": (-0.1, 0.1), "mean": (-0.1, 0.1), "var": (0.5, 1.5)}
    ends = [b.constant(f"{name}.{key}", b.random.uniform(*r, outputs)) for key, r in ranges.items()]
    return b.add("BatchNormalization", [x, *ends], f"{name}.norm")


def _dense(b: Builder, x: str, name: str, inputs: int, outputs: int) -> str:
    bias = b.constant(f"{name}.bias", np.zeros(outputs))
    return b.add("Gemm", [x, b.weight(f"{name}.weight", inputs, outputs), bias], name)


def resnet50(b: Builder) -> onnx.ModelProto:
    """Build a ResNet-50 (He et al., CVPR 2016), 102 MB."""
    x = b.add("Relu", [_convolution(b, "image", "stem", (3, 64, 7), 2)], "stem.relu")
    x = b.add("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            name, stride = f"{stage}.{block}", 2 if stage and not block else 1
            y = b.add("Relu", [_convolution(b, x, f"{name}.a", (inputs, width, 1))], f"{name}.a.relu")
            y = b.add("Relu", [_convolution(b, y, f"{name}.b", (width, width, 3), stride)], f"{name}.b.relu")
            y = _convolution(b, y, f"{name}.c", (width, 4 * width, 1))
            if not block:
                x = _convolution(b, x, f"{name}.short", (inputs, 4 * width, 1), stride)
            x = b.add("Relu", [b.add("Add", [x, y], f"{name}.add")], f"{name}.out")
            inputs = 4 * width
    x = b.add("Flatten", [b.add("GlobalAveragePool", [x], "pool")], "flat")
    return b.model(IMAGE, _dense(b, x, "head", inputs, 1000), ["batch", 1000])


def vgg16(b: Builder) -> onnx.ModelProto:
    """Build a VGG-16 with BatchNormalization (Simonyan and Zisserman, ICLR 2015), 553 MB."""
    x, inputs = "image", 3
    for stage, (width, layers) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for layer in range(layers):
            x = b.add("Relu", [_convolution(b, x, f"{stage}.{layer}", (inputs, width, 3))], f"{stage}.{layer}.relu")
            inputs = width
        x = b.add("MaxPool", [x], f"{stage}.pool", kernel_shape=[2, 2], strides=[2, 2])
    x = b.add("Flatten", [x], "flat")
    x = b.add("Relu", [_dense(b, x, "fc1", 49 * 512, 4096)], "fc1.relu")
    x = b.add("Relu", [_dense(b, x, "fc2", 4096, 4096)], "fc2.relu")
    return b.model(IMAGE, _dense(b, x, "fc3", 4096, 1000), ["batch", 1000])


def vit(b: Builder, layers: int = 12, width: int = 768, heads: int = 12) -> onnx.ModelProto:
    """Build a ViT-B/16 (Dosovitskiy et al., ICLR 2021) without class token, 346 MB."""
    kernel = b.weight("patch.weight", width, 3, 16, 16)
    x = b.add("Conv", ["image", kernel], "patch", strides=[16, 16])
    b.constant("tokens", [0, width, -1], TensorProto.INT64)
    b.constant("split", [0, 0, heads, width // heads], TensorProto.INT64)
    b.constant("join", [0, 0, -1], TensorProto.INT64)
    b.constant("scale", (width // heads) ** -0.5)
    x = b.add("Transpose", [b.add("Reshape", [x, "tokens"], "flat")], "sequence", perm=[0, 2, 1])
    x = b.add("Add", [x, b.weight("positions", 1, 196, width)], "placed")
    for layer in range(layers):
        x = b.add("Add", [x, _vit_attention(b, _layer_norm(b, x, f"{layer}.n1", width), f"{layer}")], f"{layer}.a")
        y = _linear(b, _layer_norm(b, x, f"{layer}.n2", width), f"{layer}.fc1", width, 4 * width)
        half = b.add("Mul", [y, b.add("Sigmoid", [y], f"{layer}.sigmoid")], f"{layer}.silu")
        x = b.add("Add", [x, _linear(b, half, f"{layer}.fc2", 4 * width, width)], f"{layer}.m")
    pooled = b.add("ReduceMean", [_layer_norm(b, x, "norm", width)], "pooled", axes=[1], keepdims=0)
    return b.model(IMAGE, _dense(b, pooled, "head", width, 1000), ["batch", 1000])


def _layer_norm(b: Builder, x: str, name: str, width: int) -> str:
    ends = [b.constant(f"{name}.weight", np.ones(width)), b.constant(f"{name}.bias", np.zeros(width))]
    return b.add("LayerNormalization", [x, *ends], name)


def _linear(b: Builder, x: str, name: str, inputs: int, outputs: int) -> str:
    y = b.add("MatMul", [x, b.weight(f"{name}.weight", inputs, outputs)], f"{name}.product")
    return b.add("Add", [y, b.constant(f"{name}.bias", np.zeros(outputs))], name)


def _vit_attention(b: Builder, x: str, name: str, width: int = 768) -> str:
    parts = {}
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = b.add("Reshape", [_linear(b, x, f"{name}.{part}", width, width), "split"], f"{name}.{part}.heads")
        parts[part] = b.add("Transpose", [y], f"{name}.{part}.t", perm=order)
    scores = b.add("Mul", [b.add("MatMul", [parts["q"], parts["k"]], f"{name}.qk"), "scale"], f"{name}.scaled")
    mixed = b.add("MatMul", [b.add("Softmax", [scores], f"{name}.p", axis=-1), parts["v"]], f"{name}.pv")
    mixed = b.add("Transpose", [mixed], f"{name}.back", perm=[0, 2, 1, 3])
    return _linear(b, b.add("Reshape", [mixed, "join"], f"{name}.joined"), f"{name}.o", width, width)


# -- names -----------------------------------------------------------------------------------------------------------

DECODERS = {
    "decoder_125m": Decoder(layers=12, width=768, inner=2048, heads=12),
    "decoder_0.2b": Decoder(layers=12, width=1024, inner=2816, heads=16),
    "decoder_1b": Decoder(layers=19, width=2048, inner=5632, heads=32),
    "decoder_7b": Decoder(layers=32, width=4096, inner=11008, heads=32),
    "decoder_7b_int4": Decoder(layers=32, width=4096, inner=11008, heads=32, int4=True),
}
IMAGES: dict[str, Callable[[Builder], onnx.ModelProto]] = {"resnet50": resnet50, "vgg16": vgg16, "vit_b_16": vit}


def write(name: str, folder: Path) -> None:
    """Build a network and write it into a new folder."""
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    if name in IMAGES:
        path.write_bytes(IMAGES[name](Builder()).SerializeToString(deterministic=True))
        return
    with open(folder / "model.onnx.data", "wb") as data:
        model = DECODERS[name].build(Builder(TensorProto.FLOAT16, data))
    path.write_bytes(model.SerializeToString(deterministic=True))


def main() -> None:
    """Write the network that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*DECODERS, *IMAGES])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.name, options.folder)


if __name__ == "__main__":
    main()
