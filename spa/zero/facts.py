"""The forward pass: which elements of which tensors are the same for every input, by abstract interpretation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from spa.coupling.analysis import Analysis
from spa.errors import ModelError
from spa.model.graph import Graph, Node
from spa.model.traits import Trait, traits
from spa.running.runtime import load_session, run
from spa.zero.known import Known, constant, shrunk, uniform

Array = np.ndarray
Law = Callable[["Site"], "Sequence[Known | None] | None"]


class Facts:
    """What is known of the tensors of a model, from its weights alone."""

    def __init__(self, analysis: Analysis, laws: Mapping[str, Law]) -> None:
        self.analysis, self.graph = analysis, analysis.graph
        self._found: dict[str, Known | None] = {}
        for index, law in sorted(analysis.laws.items()):
            node = analysis.graph.nodes[index]
            find = laws.get(node.key)
            if law.barrier or find is None or analysis.is_constant(node.outputs[0]):
                continue
            site = Site(self, node)
            for name, known in zip(node.outputs, find(site) or (), strict=False):
                if name and known is not None and known.mask.any():
                    self._found[name] = shrunk(uniform(known, self.open_axes(name)))

    def of(self, name: str) -> Known | None:
        """What is known of a tensor, or None where that is nothing."""
        if name not in self._found:
            self._found[name] = self._constant(name)
        return self._found[name]

    def value(self, name: str) -> Array | None:
        """A tensor's value, where all of it is known and made of constants alone."""
        known = self.of(name) if name in self.graph.constants or self.analysis.is_constant(name) else None
        return known.value if known is not None else None

    def static(self, name: str) -> Array | None:
        """The value of a constant or of a small tensor that does not follow the input, or None."""
        first, second = self.analysis.points.first.value, self.analysis.points.second.value
        if name in first:
            return first[name] if name in second and np.array_equal(first[name], second[name]) else None
        return self.value(name)

    def open_axes(self, name: str) -> list[int]:
        """The axes whose size follows the input."""
        first, second = (walk.shape.get(name, ()) for walk in (self.analysis.points.first, self.analysis.points.second))
        return [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]

    def _constant(self, name: str) -> Known | None:
        if name in self.graph.constants:
            return constant(self.graph.array(name))
        if name in self.analysis.points.first.computed:
            value = self.static(name)
            return None if value is None else constant(np.asarray(value))
        node = self.graph.producer.get(name)
        if node is None or not self.analysis.is_constant(name) or Trait.RANDOM in traits(node.key):
            return None
        operands = [self.value(n) if n else None for n in node.inputs]
        if any(n and o is None for n, o in zip(node.inputs, operands, strict=True)):
            return None
        made = evaluate(self.graph, node, operands)
        return None if made is None else constant(made[node.outputs.index(name)])


class Site:
    """One node, as the laws of known values see it."""

    def __init__(self, facts: Facts, node: Node) -> None:
        self.facts, self.node = facts, node
        self._walk = facts.analysis.points.first

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.node.attributes.get(name, default)

    def has(self, operand: int) -> bool:
        """Whether an optional operand is given."""
        return operand < len(self.node.inputs) and bool(self.node.inputs[operand])

    def shape(self, operand: int) -> tuple[int, ...]:
        """An operand's shape at the first of the two input sizes."""
        return self._walk.shape[self.node.inputs[operand]]

    def out_shape(self, output: int = 0) -> tuple[int, ...]:
        """An output's shape at the first of the two input sizes."""
        return self._walk.shape[self.node.outputs[output]]

    def known(self, operand: int) -> Known:
        """What is known of an operand."""
        rank = len(self.shape(operand))
        found = self.facts.of(self.node.inputs[operand])
        return found if found is not None else Known(self._ones(operand, rank), np.zeros((1,) * rank, dtype=bool))

    def value(self, operand: int) -> Array | None:
        """An operand's value, where it is made of constants alone."""
        return self.facts.value(self.node.inputs[operand]) if self.has(operand) else None

    def static(self, operand: int) -> Array | None:
        """An operand's value, where it does not follow the input."""
        return self.facts.static(self.node.inputs[operand]) if self.has(operand) else None

    def full(self, operand: int, known: Known) -> Known:
        """The same, with every index of every axis."""
        shape = self.shape(operand)
        return Known(np.broadcast_to(known.value, shape), np.broadcast_to(known.mask, shape))

    def filled(self, operand: int) -> Array:
        """An operand with ones for what is not known."""
        known = self.known(operand)
        return np.where(known.mask, known.value, np.ones((), known.value.dtype))

    def evaluate(self, operands: Sequence[Array | None]) -> list[Array] | None:
        """What the operator makes of other operands, or None where it does not run by itself."""
        return evaluate(self.facts.graph, self.node, operands)

    def _ones(self, operand: int, rank: int) -> Array:
        dtype = self._walk.dtype[self.node.inputs[operand]]
        return np.ones((1,) * rank, helper.tensor_dtype_to_np_dtype(dtype))


def evaluate(graph: Graph, node: Node, operands: Sequence[Array | None]) -> list[Array] | None:
    """Run one node by itself; None where onnxruntime cannot."""
    feeds = {n: np.ascontiguousarray(o) for n, o in zip(node.inputs, operands, strict=True) if n and o is not None}
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(o.dtype), o.shape) for n, o in feeds.items()
    ]
    proto = NodeProto()
    proto.CopyFrom(node.proto)
    outputs = [helper.make_empty_tensor_value_info(o) for o in node.outputs if o]
    model = helper.make_model(
        helper.make_graph([proto], "one", inputs, outputs), opset_imports=graph.model.opset_import
    )
    model.ir_version = graph.model.ir_version
    try:
        made = iter(run(load_session(model, threads=1), feeds))
    except ModelError:
        return None
    return [np.asarray(next(made)) if o else np.zeros(()) for o in node.outputs]
