"""Detours from one tensor to another of the same axes, for which a scale and a shift might do.

Without one, y = f(x) becomes y = a x + b, a number each per channel, which goes into the layer before or after. Cases:

1. an activation: what is computed element by element between two layers;
2. a depthwise convolution that keeps the shape, with the activation behind it;
3. a gate: y = x g(x), where g has layers (squeeze and excite).

Of the first, only those are listed that cost something: onnxruntime fuses others into the layer before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spa.coupling.branches import regions
from spa.model.graph import Graph, Node
from spa.model.marks import marks_around
from spa.model.traits import Trait, traits

Shapes = Mapping[str, tuple[int, ...]]
# What onnxruntime computes as a part of the layer before.
FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
KINDS = ("activation", "depthwise", "gate")
AFFINE = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True)
class Stretch:
    """The nodes of one detour.

    Attributes:
        kind: ``activation``, ``depthwise`` or ``gate``.
        source: the tensor that it leads from.
        target: the tensor that it leads to.
        nodes: indices of the nodes that nothing else needs, in topological order.
    """

    kind: str
    source: str
    target: str
    nodes: tuple[int, ...]

    @property
    def end(self) -> int:
        """The index of the node that makes the target."""
        return self.nodes[-1]


def stretches(graph: Graph, shapes: Shapes, constant: set[str]) -> Iterator[Stretch]:
    """Find the detours of a network, in the order of where they begin.

    Args:
        graph: the network.
        shapes: by tensor.
        constant: the tensors that are computed from constants alone.
    """
    walk = _Walk(graph, shapes, constant)
    gates = {r.skip: r for r in regions(graph, shapes, constant, "Mul") if walk.has_layers(r.nodes)}
    for node in graph.nodes:
        if node.index in walk.inside_bodies or len(node.outputs) != 1 or constant.issuperset(node.outputs):
            continue
        if _is_depthwise(graph, shapes, node):
            nodes, target = walk.pointwise(node.outputs[0])
            target = target or node.outputs[0]
            if target not in graph.outputs:
                yield Stretch("depthwise", node.inputs[0], target, (node.index, *nodes))
        nodes, target = ((), "") if walk.is_pointwise(node) else walk.pointwise(node.outputs[0])
        if target and target not in graph.outputs and _is_layer(node) and walk.is_worth_it(nodes):
            yield Stretch("activation", node.outputs[0], target, nodes)
        gate = gates.get(node.outputs[0])
        if gate is not None and gate.sum.outputs[0] not in graph.outputs:
            yield Stretch("gate", gate.skip, gate.sum.outputs[0], (*gate.nodes, gate.sum.index))


def _is_layer(node: Node) -> bool:
    return Trait.PRODUCT in traits(node.key)


def _is_depthwise(graph: Graph, shapes: Shapes, node: Node) -> bool:
    if node.op != "Conv" or node.domain or node.inputs[1] not in graph.constants:
        return False
    shape = shapes.get(node.inputs[0], (1, 1))
    one_each = node.attributes.get("group", 1) == shape[1] == graph.constants[node.inputs[1]].dims[0]
    return one_each and shapes.get(node.outputs[0]) == shape and shape[1] > 1


class _Walk:
    """Walks over what is computed element by element.

    Args:
        graph: the network.
        shapes: by tensor.
        constant: the tensors that are computed from constants alone.
    """

    def __init__(self, graph: Graph, shapes: Shapes, constant: set[str]) -> None:
        self.graph, self.shapes, self.constant = graph, shapes, constant
        self.inside_bodies = marks_around(graph).keys()
        self._captured = {name for names in graph.captured.values() for name in names}

    def is_pointwise(self, node: Node) -> bool:
        """Return whether each element of a node's output is a function of the elements at the same place."""
        kinds = traits(node.key)
        by_element = Trait.UNARY in kinds or Trait.BROADCASTING in kinds or node.key == "BatchNormalization"
        alike = len({self.shapes.get(n) for n in (*self.varying(node), *node.outputs)}) == 1
        return by_element and len(node.outputs) == 1 and alike and Trait.RANDOM not in kinds

    def varying(self, node: Node) -> list[str]:
        """Return the operands of a node that are no constants."""
        return [n for n in node.inputs if n and n not in self.constant]

    def pointwise(self, source: str) -> tuple[tuple[int, ...], str]:
        """Return the nodes that compute element by element from a tensor alone, and what they lead to.

        The second is empty where they lead to nothing, or to several tensors.
        """
        inside, found, todo = {source}, set[int](), {n.index for n, _ in self.graph.users.get(source, ())}
        while todo:  # not by networkx: a node counts once all of its operands do
            node = self.graph.nodes[min(todo)]
            todo.discard(node.index)
            if self.is_pointwise(node) and inside.issuperset(self.varying(node)):
                inside.update(node.outputs)
                found.add(node.index)
                todo |= {n.index for n, _ in self.graph.users.get(node.outputs[0], ())} - found
        ends = [n for n in inside - {source} if self._is_read_outside(n, found)]
        return (tuple(sorted(found)), ends[0]) if len(ends) == 1 else ((), "")

    def _is_read_outside(self, name: str, nodes: set[int]) -> bool:
        users = {n.index for n, _ in self.graph.users.get(name, ())}
        return bool(users - nodes) or not users or name in self.graph.outputs or name in self._captured

    def has_layers(self, nodes: Sequence[int]) -> bool:
        """Return whether there are layers with weights among nodes outside of loops."""
        layers = [n for n in (self.graph.nodes[i] for i in nodes) if _is_layer(n)]
        return bool(layers) and self.inside_bodies.isdisjoint(nodes)

    def is_worth_it(self, nodes: Sequence[int]) -> bool:
        """Return whether onnxruntime would spend time on an activation."""
        found = [self.graph.nodes[i] for i in nodes]
        real = [n for n in found if not (n.key == "BatchNormalization" or self._is_affine(n))]
        return len(real) > 1 or any(n.key not in FUSED for n in real)

    def _is_affine(self, node: Node) -> bool:
        by_constant = node.op != "Div" or node.inputs[1] in self.constant
        return node.key in AFFINE and len(self.varying(node)) == 1 and by_constant
