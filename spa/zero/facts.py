"""The forward pass: find which elements of which tensors are the same for every input.

This is abstract interpretation: each operator's transfer function (:mod:`spa.zero.transfer`) maps what is known of its
inputs to what is known of its outputs, once per node, in topological order.
"""

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
from spa.zero.known import Known, compressed, constant, uniform_along

Array = np.ndarray
Transfer = Callable[["Site"], "Sequence[Known | None] | None"]


class Facts:
    """The known elements of the tensors of a model, from its weights alone."""

    def __init__(self, analysis: Analysis, transfers: Mapping[str, Transfer]) -> None:
        self.analysis, self.graph = analysis, analysis.graph
        self._known: dict[str, Known | None] = {}
        for index, law in sorted(analysis.laws.items()):
            node = analysis.graph.nodes[index]
            transfer = transfers.get(node.key)
            if law.barrier or transfer is None or analysis.is_constant(node.outputs[0]):
                continue
            site = Site(self, node)
            for name, known in zip(node.outputs, transfer(site) or (), strict=False):
                if name and known is not None and known.mask.any():
                    self._known[name] = compressed(uniform_along(known, self.open_axes(name)))

    def of(self, name: str) -> Known | None:
        """Return what is known of a tensor, or None if nothing is."""
        if name not in self._known:
            self._known[name] = self._constant(name)
        return self._known[name]

    def value(self, name: str) -> Array | None:
        """Return the value of a tensor that is computed from constants alone; None for others."""
        known = self.of(name) if name in self.graph.constants or self.analysis.is_constant(name) else None
        return known.value if known is not None else None

    def static(self, name: str) -> Array | None:
        """Return the value of a constant, or of a small tensor that does not depend on the input's size; else None."""
        first, second = self.analysis.points.first.value, self.analysis.points.second.value
        if name in first:
            return first[name] if name in second and np.array_equal(first[name], second[name]) else None
        return self.value(name)

    def open_axes(self, name: str) -> list[int]:
        """Return the axes whose size depends on the input's size."""
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
        outputs = evaluate(self.graph, node, operands)
        return None if outputs is None else constant(outputs[node.outputs.index(name)])


class Site:
    """One node, as transfer functions see it."""

    def __init__(self, facts: Facts, node: Node) -> None:
        self.facts, self.node = facts, node
        self._walk = facts.analysis.points.first

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        return self.node.attributes.get(name, default)

    def has(self, operand: int) -> bool:
        """Return whether an optional operand is given."""
        return operand < len(self.node.inputs) and bool(self.node.inputs[operand])

    def shape(self, operand: int) -> tuple[int, ...]:
        """Return an operand's shape at the first of the two input sizes."""
        return self._walk.shape[self.node.inputs[operand]]

    def out_shape(self, output: int = 0) -> tuple[int, ...]:
        """Return an output's shape at the first of the two input sizes."""
        return self._walk.shape[self.node.outputs[output]]

    def known(self, operand: int) -> Known:
        """Return what is known of an operand."""
        rank = len(self.shape(operand))
        known = self.facts.of(self.node.inputs[operand])
        return known if known is not None else Known(self._ones(operand, rank), np.zeros((1,) * rank, dtype=bool))

    def value(self, operand: int) -> Array | None:
        """Return the value of an operand that is computed from constants alone; None for others."""
        return self.facts.value(self.node.inputs[operand]) if self.has(operand) else None

    def static(self, operand: int) -> Array | None:
        """Return the value of an operand that does not depend on the input's size; None for others."""
        return self.facts.static(self.node.inputs[operand]) if self.has(operand) else None

    def full(self, operand: int, known: Known) -> Known:
        """Broadcast what is known of an operand to the operand's shape."""
        shape = self.shape(operand)
        return Known(np.broadcast_to(known.value, shape), np.broadcast_to(known.mask, shape))

    def filled(self, operand: int) -> Array:
        """Return an operand with ones in the place of unknown elements."""
        known = self.known(operand)
        return np.where(known.mask, known.value, np.ones((), known.value.dtype))

    def evaluate(self, operands: Sequence[Array | None]) -> list[Array] | None:
        """Run the operator on other operands; return its outputs, or None if onnxruntime refuses."""
        return evaluate(self.facts.graph, self.node, operands)

    def _ones(self, operand: int, rank: int) -> Array:
        dtype = self._walk.dtype[self.node.inputs[operand]]
        return np.ones((1,) * rank, helper.tensor_dtype_to_np_dtype(dtype))


def evaluate(graph: Graph, node: Node, operands: Sequence[Array | None]) -> list[Array] | None:
    """Run one node by itself; return its outputs, or None if onnxruntime refuses."""
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
        results = iter(run(load_session(model, threads=1), feeds))
    except ModelError:
        return None
    return [np.asarray(next(results)) if o else np.zeros(()) for o in node.outputs]
