"""Mutants of small valid models: what a broken exporter, a careless script or somebody hostile might hand in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import onnx.parser
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

EXTREMES = [0, 1, -1, 2, 3, -7, 100, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)]
SEEDS = {
    "perceptron": """
        net (float[n,7] x) => (float[n,13] y) {
            h = Gemm<transB=1>(x, w31x7, b31)
            r = Relu(h)
            y = Gemm<transB=1>(r, w13x31, b13)
        }""",
    "convolutions": """
        net (float[n,3,h,w] x) => (float[n,11] y) {
            a = Conv<pads=[1,1,1,1]>(x, w17x3x3x3)
            b = BatchNormalization(a, b17, b17, b17, p17)
            c = Relu(b)
            d = Conv<group=17, pads=[1,1,1,1]>(c, w17x1x3x3)
            e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
            f = GlobalAveragePool(e)
            g = Flatten(f)
            y = Gemm<transB=1>(g, w11x17, b11)
        }""",
    "heads": """
        net (float[n,t,6] x) => (float[n,t,6] y) {
            q = MatMul(x, w6x20)
            s = Shape(x)
            st = Slice(s, i0, i2, i0)
            to = Concat<axis=0>(st, i4, i5)
            r = Reshape(q, to)
            k = Transpose<perm=[0,2,1,3]>(r)
            kt = Transpose<perm=[0,1,3,2]>(k)
            l = MatMul(k, kt)
            p = Softmax<axis=-1>(l)
            o = MatMul(p, k)
            ot = Transpose<perm=[0,2,1,3]>(o)
            back = Concat<axis=0>(st, i20)
            m = Reshape(ot, back)
            z = MatMul(m, w20x6)
            y = Add(z, x)
        }""",
    "pieces": """
        net (float[n,12] x) => (float[n,5] y, float[n,k] t) {
            a = MatMul(x, w12x22)
            b, c = Split<axis=1>(a, i8and14)
            d = Sigmoid(b)
            e = Concat<axis=1>(d, c)
            f = Gather<axis=1>(e, places)
            g = Clip(f, zero, one)
            y = MatMul(g, w9x5)
            t, where = TopK<axis=1>(y, i2)
        }""",
    "memory": """
        net (float[t,n,5] x) => (float[t,1,n,9] y) {
            h, last, cell = LSTM<hidden_size=11>(x, w1x44x5, w1x44x11)
            s = Squeeze(h, i1)
            o = MatMul(s, w11x9)
            y = Unsqueeze(o, i1)
        }""",
    "branches": """
        net (float[n,7] x, bool c) => (float[n,13] y) {
            g = MatMul(x, w7x29)
            i = Relu(g)
            h = MatMul(i, w29x31)
            r = Tanh(h)
            y = If(c) <
                then_branch = yes () => (float[n,13] p) { p = MatMul(r, w31x13) },
                else_branch = no () => (float[n,13] q) { k = MatMul(r, w31x13) q = Neg(k) }
            >
        }""",
}
INTEGERS = {"i0": [0], "i1": [1], "i2": [2], "i4": [4], "i5": [5], "i20": [20], "i8and14": [8, 14]}


def seed_models() -> dict[str, ModelProto]:
    """Return the models that mutants are made of, by name."""
    return {name: _complete(onnx.parser.parse_graph(text)) for name, text in SEEDS.items()}


def _complete(graph: GraphProto) -> ModelProto:
    """Give a graph the weights that it names by their shapes."""
    rng = np.random.default_rng(0)
    read = dict.fromkeys(_names(graph))
    for name in read:
        if name in INTEGERS:
            value = np.asarray(INTEGERS[name])
        elif name == "places":
            value = np.asarray([0, 3, 5, 6, 8, 11, 14, 17, 21])
        elif name in ("zero", "one"):
            value = np.asarray(float(name == "one"), np.float32)
        elif name[0] in "wbp" and name[1:].replace("x", "").isdigit():
            value = rng.standard_normal([int(size) for size in name[1:].split("x")]).astype(np.float32)
            value = np.abs(value) + 1 if name[0] == "p" else value / 3
        else:
            continue
        graph.initializer.append(numpy_helper.from_array(value, name))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _names(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _names(attribute.g)


# -- mutations ---------------------------------------------------------------------------------------------------------


def _some_node(graph: GraphProto, rng: random.Random) -> NodeProto:
    node = rng.choice(graph.node)
    inner = [a.g for a in node.attribute if a.HasField("g") and a.g.node]
    return _some_node(rng.choice(inner), rng) if inner and rng.random() < 0.7 else node


def _operands(model: ModelProto, rng: random.Random) -> None:
    node = _some_node(model.graph, rng)
    names = [n for each in model.graph.node for n in (*each.input, *each.output)]
    match rng.randrange(5):
        case 0 if node.input:
            del node.input[rng.randrange(len(node.input))]
        case 1 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "nobody"])
        case 2:
            node.input.append(rng.choice(names))
        case 3 if node.output:
            del node.output[rng.randrange(len(node.output))]
        case _ if node.output:
            node.output[0] = rng.choice([*names, ""])


def _operator(model: ModelProto, rng: random.Random) -> None:
    node = _some_node(model.graph, rng)
    others = [s.name for s in onnx.defs.get_all_schemas()]
    node.op_type = rng.choice([*others, "NoSuchOperator", ""])
    node.domain = rng.choice([node.domain] * 3 + ["com.microsoft", "nobody"])


def _attribute(model: ModelProto, rng: random.Random) -> None:
    node = _some_node(model.graph, rng)
    if not node.attribute:
        node.attribute.append(helper.make_attribute(rng.choice(["axis", "perm", "to", "group"]), rng.choice(EXTREMES)))
        return
    attribute = rng.choice(node.attribute)
    match rng.randrange(5):
        case 0:
            node.attribute.remove(attribute)
        case 1:
            node.attribute.add().CopyFrom(attribute)
        case 2 if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(EXTREMES)
        case 3 if attribute.ints:
            attribute.ints.append(rng.choice(EXTREMES))
        case 4:
            attribute.type = rng.randrange(0, 15)
        case _:
            attribute.i = rng.choice(EXTREMES)


def _tensor(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    match rng.randrange(7):
        case 0:
            tensor.data_type = rng.randrange(0, 30)
        case 1:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 2 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(EXTREMES)
        case 3:
            model.graph.initializer.remove(tensor)
        case 4:
            model.graph.initializer.add().CopyFrom(tensor)
        case 5 if tensor.data_type == TensorProto.INT64 and tensor.raw_data and len(tensor.raw_data) % 8 == 0:
            values = np.frombuffer(tensor.raw_data, np.int64).copy()
            values[rng.randrange(values.size)] = rng.choice(EXTREMES)
            tensor.raw_data = values.tobytes()
        case _:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=rng.choice(["m.onnx", "../m.onnx", "none", "/dev/zero", ""]))


def _interface(model: ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    dims = value.type.tensor_type.shape.dim
    match rng.randrange(6):
        case 0 if dims:
            rng.choice(dims).dim_value = rng.choice(EXTREMES)
        case 1 if dims:
            del dims[rng.randrange(len(dims))]
        case 2:
            value.type.tensor_type.elem_type = rng.randrange(0, 25)
        case 3:
            value.ClearField("type")
        case 4:
            value.name = rng.choice(["", "nobody", *(o for n in model.graph.node for o in n.output)])
        case _:
            dims.add().dim_value = rng.choice(EXTREMES)


def _order(model: ModelProto, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    match rng.randrange(3):
        case 0:
            rng.shuffle(nodes)
        case 1:
            nodes.pop(rng.randrange(len(nodes)))
        case _:
            nodes.append(rng.choice(nodes))
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _versions(model: ModelProto, rng: random.Random) -> None:
    match rng.randrange(3):
        case 0:
            model.ir_version = rng.choice([0, 3, 4, 10, 99, 2**40])
        case 1:
            model.opset_import[0].version = rng.choice([1, 6, 7, 9, 11, 13, 18, 21, 99, -1])
        case _:
            model.opset_import.add(domain=rng.choice(["", "com.microsoft", "nobody"]), version=rng.choice([1, 13]))


MUTATIONS: tuple[Callable[[ModelProto, random.Random], None], ...] = (
    _operands,
    _operator,
    _attribute,
    _attribute,
    _tensor,
    _tensor,
    _interface,
    _order,
    _versions,
)


def mutant(seed: int) -> bytes:
    """Return the bytes of a mutant: one to three mutations of a model, and of some its bytes changed."""
    rng = random.Random(seed)
    models = seed_models()
    model = models[rng.choice(sorted(models))]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if model.graph.node and model.graph.initializer:
            rng.choice(MUTATIONS)(model, rng)
    content = bytearray(model.SerializeToString())
    if rng.random() < 0.15:
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)
