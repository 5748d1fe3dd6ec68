"""Nodes with constant weights, seen as one matrix product y = W x + b: rows of inputs, a matrix, rows of outputs."""

from __future__ import annotations

from spa.model.decoded import Constant, constant_behind, decoded_by
from spa.model.graph import Graph, Node
from spa.obspa.linear.base import Linear
from spa.obspa.linear.convolution import Convolution, TransposedConvolution
from spa.obspa.linear.matrix_product import Product
from spa.obspa.linear.stored import replace, store

__all__ = ["Linear", "linear", "readers_of", "replace", "store", "uses"]


def linear(graph: Graph, node: Node) -> Linear | None:
    """Return the node as a matrix product, or None if it is none.

    It must be a Conv, ConvTranspose or Gemm, a MatMul with one constant matrix, an Einsum with one constant, or a
    MatMulNBits. The weights are floats, or integers behind a DequantizeLinear; a Transpose may stand between a matrix
    and either.
    """
    if len(node.inputs) < 2:
        return None
    match node.key:
        case "Conv" | "ConvTranspose":
            lin = _convolution(graph, node)
        case "Gemm":
            lin = _gemm(graph, node)
        case "MatMul":
            lin = _matmul(graph, node)
        case "Einsum":
            lin = _einsum(graph, node)
        case "com.microsoft::MatMulNBits":
            lin = _packed(graph, node)
        case _:
            return None
    if lin is None or lin.weight in graph.outputs or lin.source in graph.constants:
        return None
    return lin


def _bias(graph: Graph, node: Node, operand: int = 2) -> Constant | None:
    """Return a layer's bias; a computed one has the name of what it is computed to."""
    name = node.inputs[operand] if len(node.inputs) > operand else ""
    return (constant_behind(graph, name) or Constant(name)) if name else None


def _convolution(graph: Graph, node: Node) -> Linear | None:
    weights = constant_behind(graph, node.inputs[1])
    if weights is None:
        return None
    kind = Convolution if node.op == "Conv" else TransposedConvolution
    return kind(
        node=node,
        source=node.inputs[0],
        weights=weights,
        added=_bias(graph, node),
        blocks=node.attributes.get("group", 1),
        input_axes=(1,),
        channel_axis=1,
    )


def _gemm(graph: Graph, node: Node) -> Linear | None:
    weights, transposed = _constant_matrix(graph, node.inputs[1])
    a = node.attributes
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if weights is None or not alpha or not beta:
        return None
    axes = (0, 1) if bool(a.get("transB", 0)) != transposed else (1, 0)
    contracted = (0,) if a.get("transA", 0) else (1,)
    return Product(
        node=node,
        source=node.inputs[0],
        weights=weights,
        added=_bias(graph, node),
        blocks=1,
        input_axes=contracted,
        channel_axis=-1,
        scale=alpha,
        bias_scale=beta,
        weight_axes=axes,
    )


def _matmul(graph: Graph, node: Node) -> Linear | None:
    weights, transposed = _constant_matrix(graph, node.inputs[1])
    if weights is not None:
        return Product(
            node=node,
            source=node.inputs[0],
            weights=weights,
            added=None,
            blocks=1,
            input_axes=(-1,),
            channel_axis=-1,
            weight_axes=(0, 1) if transposed else (1, 0),
        )
    weights, transposed = _constant_matrix(graph, node.inputs[0])
    if weights is None:
        return None
    return Product(
        node=node,
        source=node.inputs[1],
        weights=weights,
        added=None,
        blocks=1,
        input_axes=(-2,),
        channel_axis=-2,
        output_axes=(-2,),
        weight_axes=(1, 0) if transposed else (0, 1),
    )


def _packed(graph: Graph, node: Node) -> Linear | None:
    weights = decoded_by(graph, node, 1)
    if weights is None:
        return None
    return Product(
        node=node,
        source=node.inputs[0],
        weights=weights,
        added=_bias(graph, node, operand=5),
        blocks=1,
        input_axes=(-1,),
        channel_axis=-1,
        weight_axes=(0, 1),
    )


def _constant_matrix(graph: Graph, name: str) -> tuple[Constant | None, bool]:
    """Return the constant that an operand is or is the transpose of (None if neither), and whether it is transposed."""
    before = graph.producer.get(name)
    transposed = before is not None and before.op == "Transpose" and not before.domain and name not in graph.constants
    if before is not None and transposed:
        if name in graph.outputs or before.attributes.get("perm", [1, 0]) != [1, 0]:
            return None, True
        name = before.inputs[0]
    constant = constant_behind(graph, name)
    matrix = constant is not None and len(constant.shape(graph)) == 2
    return (constant if matrix else None), transposed


def _einsum(graph: Graph, node: Node) -> Linear | None:
    """Return an Einsum ``rows inputs, inputs outputs -> rows outputs``, the letters of each term in any order."""
    left, arrow, y = node.attributes["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    constants = [(i, c) for i, n in enumerate(node.inputs) if (c := constant_behind(graph, n)) is not None]
    if not arrow or "." in left or len(terms) != 2 or len(constants) != 1:
        return None
    position, weights = constants[0]
    if any(len(set(t)) != len(t) for t in terms):
        return None
    w, x = terms[position], terms[1 - position]
    inputs = [c for c in w if c in x and c not in y]
    outputs = [c for c in w if c in y and c not in x]
    rows = [c for c in x if c in y and c not in w]
    if not inputs or sorted(inputs + outputs) != sorted(w) or sorted(rows + inputs) != sorted(x):
        return None
    return Product(
        node=node,
        source=node.inputs[1 - position],
        weights=weights,
        added=None,
        blocks=1,
        input_axes=tuple(x.index(c) for c in inputs),
        channel_axis=y.index(outputs[0]) - len(y) if len(outputs) == 1 else None,
        output_axes=tuple(y.index(c) for c in outputs),
        weight_axes=tuple(w.index(c) for c in outputs + inputs),
        row_axes=tuple(y.index(c) for c in rows),
    )


def uses(graph: Graph, lin: Linear) -> list[Linear] | None:
    """Return all products that read the weights of one, itself included; None if anything else reads them.

    A product with the transposed weights counts as anything else: no fit of one matrix serves both.
    """
    if any(lin.weight in names for names in graph.captured.values()):
        return None
    products = []
    for user, _ in graph.users[lin.weight]:
        for node in _behind(graph, user):
            other = linear(graph, node)
            if other is None or other.weight != lin.weight or other.orientation != lin.orientation:
                return None
            products.append(other)
    return products


def readers_of(graph: Graph, name: str) -> list[Node]:
    """Return the nodes that read a constant, or the floats that it is decoded to."""
    return [node for user, _ in graph.users[name] for node in _behind(graph, user)]


def _behind(graph: Graph, user: Node) -> list[Node]:
    """Return what reads a constant's floats: its user, or those behind a DequantizeLinear and a Transpose."""
    nodes = [user]
    for op in ("DequantizeLinear", "Transpose"):
        if [n.op for n in nodes if not n.domain] == [op]:
            nodes = [u for u, _ in graph.users.get(nodes[0].outputs[0], ())]
    return nodes
