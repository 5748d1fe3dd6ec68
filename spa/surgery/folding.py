"""Fold the constants that stand for residual branches into what comes before them, where that changes nothing.

Cases, for ``y = Add(x, c)`` with c in the place of a branch:

1. c is zero: what reads y reads x.
2. Nothing but the Add reads x. Then c goes into a bias that nothing else reads: that of a Conv, a Gemm, a
   BatchNormalization or a LayerNormalization that makes x, or a constant of c's shape that an Add adds; through a sum
   of two tensors into the one or the other, where nothing but the sum reads it.

In both the Add goes. Everywhere else (behind an activation, say) it stays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import Analysis, Detour
from spa.coupling.plan import Plan, dropped
from spa.model.graph import Graph, Node, names_read, replace_nodes
from spa.surgery.scales import fold_scale

BIASES = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization", "LayerNormalization")  # whose third operand is one


def fold(analysis: Analysis, plan: Plan, pruned: ModelProto, outside: Collection[str] = ()) -> None:
    """Fold constants in place.

    Args:
        analysis: the dense network.
        plan: what the network was pruned by.
        pruned: the pruned and repaired network.
        outside: initializers without data, which stay as they are.
    """
    gone = dropped(analysis, analysis.kept(plan.masks(analysis)))
    for part in gone:
        name = analysis.graph.nodes[part.end].outputs[0]
        graph = Graph(pruned, analysis.graph.base)
        if isinstance(part, Detour):
            rank = len(analysis.points.first.shape[part.source])
            if name in graph.producer:  # not folded by an earlier call
                fold_scale(pruned, graph, graph.producer[name], part.axes[0], rank, outside)
            continue
        node = graph.producer[name]
        stand_ins = [n for n in node.inputs if n in graph.initializers and n not in analysis.graph.constants]
        if node.op == "Add" and len(stand_ins) == 1:
            ranks = {n: len(shape) for n, shape in analysis.points.first.shape.items()}
            _Fold(graph, ranks, outside).take_out(node, stand_ins[0])


class _Fold:
    """One constant's way into what comes before it.

    Args:
        graph: the pruned network.
        ranks: of its tensors.
        outside: initializers that stay as they are.
    """

    def __init__(self, graph: Graph, ranks: Mapping[str, int], outside: Collection[str]) -> None:
        self.graph, self.ranks, self.outside = graph, ranks, outside

    def take_out(self, node: Node, constant: str) -> None:
        """Remove an Add of a constant if one of the cases holds."""
        skip = next(n for n in node.inputs if n != constant)
        value, output = self.graph.array(constant), node.outputs[0]
        own = self._is_read_by(skip, node)
        if value.any():
            if own and self._absorb(skip, value, self.ranks.get(output)):  # Case 2
                self._bypass(node, skip, output, own)
        elif own or not (output in self.graph.outputs or self._is_captured(output)):  # Case 1
            self._bypass(node, skip, output, own)

    def _absorb(self, name: str, value: np.ndarray, rank: int | None) -> bool:
        """Add a constant to a tensor by the bias of what makes it (case 2); return False where there is none."""
        maker = self.graph.producer.get(name)
        if maker is None or maker.domain or len(maker.outputs) > 1 or rank is None or self.ranks.get(name) != rank:
            return False
        if maker.op in BIASES:
            weighed = maker.op == "Gemm" and maker.attributes.get("beta", 1.0) != 1.0
            bias = maker.inputs[2] if len(maker.inputs) > 2 and not weighed else ""
            behind = 0 if maker.op == "LayerNormalization" else rank - 2  # axes that follow that of the channels
            return self._shift(bias, value, behind)
        if maker.op != "Add":
            return False
        if any(n in self.graph.constants for n in maker.inputs):
            return any(self._shift(n, value) for n in maker.inputs)
        return any(self._is_read_by(n, maker) and self._absorb(n, value, rank) for n in maker.inputs)

    def _shift(self, name: str, value: np.ndarray, behind: int = 0) -> bool:
        """Add to a constant that one node reads; return False if it is none, or broadcasts in another way.

        Args:
            name: the constant.
            value: what is added to it.
            behind: the number of axes that broadcasting takes to follow those of the constant.
        """
        tensor = self.graph.initializers.get(name)
        alone = len(self.graph.users.get(name, ())) == 1 and not self._is_captured(name)
        if tensor is None or name in self.outside or name in self.graph.outputs or not alone:
            return False
        old = self.graph.array(name)
        if _core(old.shape + (1,) * behind) != _core(value.shape):
            return False
        tensor.CopyFrom(numpy_helper.from_array(old + value.reshape(old.shape).astype(old.dtype), name))
        self.graph.forget(name)
        return True

    def _is_captured(self, name: str) -> bool:
        return any(name in names for names in self.graph.captured.values())

    def _is_read_by(self, name: str, node: Node) -> bool:
        """Return whether nothing but one node reads a tensor, once."""
        users = self.graph.users.get(name, ())
        alone = [user.index for user, _ in users] == [node.index]
        return alone and name in self.graph.producer and name not in self.graph.outputs and not self._is_captured(name)

    def _bypass(self, node: Node, skip: str, output: str, own: bool) -> None:
        """Remove a node whose output is its operand, which gets the output's name where nothing else reads it."""
        model = self.graph.model.graph
        if own:
            maker = self.graph.producer[skip]
            maker.proto.output[list(maker.proto.output).index(skip)] = output
        else:
            for user, operand in self.graph.users.get(output, ()):
                user.proto.input[operand] = skip
        replace_nodes(model, [n for i, n in enumerate(model.node) if i != node.index])
        gone = skip if own else output
        for info in [i for i in model.value_info if i.name == gone]:
            model.value_info.remove(info)
        used = names_read(model)
        for tensor in [t for t in model.initializer if t.name in node.inputs and t.name not in used]:
            model.initializer.remove(tensor)
            for info in [i for i in model.input if i.name == tensor.name]:  # before IR version 4
                model.input.remove(info)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes that broadcasting adds in front."""
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape
