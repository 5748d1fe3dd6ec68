"""Disguises of a network, as exporters write them: weights behind operators, layers in branches, nodes out of order."""

from __future__ import annotations

import random

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FEWEST = 2  # elements of a weight that is worth a disguise


def disguised(model: ModelProto, seed: int) -> ModelProto:
    """Return another network of the same form, some of whose parts an exporter did not simplify."""
    rng = random.Random(seed)
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    nodes: list[NodeProto] = []
    for tensor in list(graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= FEWEST and rng.random() < 0.4:
            nodes += _computed(copy, tensor, rng)
    condition = numpy_helper.from_array(np.asarray(True), "always")
    graph.initializer.append(condition)
    for node in graph.node:
        nodes.append(_branched(node, rng) if rng.random() < 0.15 and len(node.output) == 1 else node)
    if rng.random() < 0.5:
        rng.shuffle(nodes)
    copies = [NodeProto() for _ in nodes]
    for target, node in zip(copies, nodes, strict=True):
        target.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
    return copy


def _computed(model: ModelProto, tensor: TensorProto, rng: random.Random) -> list[NodeProto]:
    """Store a weight in another form, and return the nodes that compute it from that."""
    name, value = tensor.name, numpy_helper.to_array(tensor)
    stored = f"{name}_stored"
    match rng.randrange(4):
        case 0:
            value = value.astype(np.float16)
            nodes = [helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)]
        case 1:
            value = value.T
            nodes = [helper.make_node("Transpose", [stored], [name])]
        case 2:
            value = -value
            nodes = [helper.make_node("Neg", [stored], [name])]
        case _:
            nodes = [
                helper.make_node("ReduceMax", [stored], [f"{name}_greatest"], keepdims=0),
                helper.make_node("Abs", [f"{name}_greatest"], [f"{name}_norm"]),
                helper.make_node("Div", [stored, f"{name}_norm"], [name]),
            ]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), stored))
    return nodes


def _branched(node: NodeProto, rng: random.Random) -> NodeProto:
    """Put a node into the branch of an If that runs."""
    inner, other = NodeProto(), helper.make_node("Identity", [next(n for n in node.input if n)], ["elsewhere"])
    inner.CopyFrom(node)
    inner.output[0] = "inside"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("inside", "elsewhere")]
    then, otherwise = helper.make_graph([inner], "then", [], ends[:1]), helper.make_graph([other], "else", [], ends[1:])
    return helper.make_node("If", ["always"], list(node.output), then_branch=then, else_branch=otherwise)
