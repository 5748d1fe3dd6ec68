"""Lossless compaction: channels that are always zero, always the same, or read by nobody are removed, precisely these.

Networks trained with structured sparsity (group lasso, OTO, masks, gates) have many. From the weights alone:

1. *Forward* (:mod:`spa.zero.facts`): which elements of which tensors are the same for every input. Zero rows of weights
   leave the bias, a zero scale of a BatchNormalization leaves its shift, a gate of zero leaves zero; functions of
   constants are constants.
2. *Backward* (:mod:`spa.zero.needs`): which elements matter to any output. What is constant does not, nor what meets
   zero weights alone in the rows that matter themselves; so whole chains come to nothing at once.
3. A channel of a group goes if no node needs it. Where a constant other than zero goes, what its readers made of it
   goes into their biases.

The outputs stay the same but for the rounding of sums, for every finite input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis, Group
from spa.coupling.plan import Plan, make_plan
from spa.model.graph import Graph, Node
from spa.zero.facts import Facts, Site
from spa.zero.known import Known, constant
from spa.zero.laws import LAWS, product, usable
from spa.zero.needs import Needs

Array = np.ndarray
__all__ = ["Compaction", "lossless"]


@dataclass(frozen=True)
class Compaction:
    """What can go without a trace.

    Attributes:
        plan: the kept channels, for :func:`spa.surgery.apply.apply`; empty where nothing can go.
        biases: the whole bias of a Conv or Gemm that takes over constants, by its output; (channels,) or, of a Gemm,
            whatever broadcasts to its output.
        shifts: what is to be added to the output of a node without a bias, by its name; broadcasts to it.
    """

    plan: Plan
    biases: Mapping[str, Array]
    shifts: Mapping[str, Array]

    def fold(self, pruned: ModelProto, base: Path | None = None) -> None:
        """Put the constants in the place of the channels that went.

        Args:
            pruned: what surgery made by the plan; changed in place.
            base: the folder of its external data.
        """
        graph = Graph(pruned, base)
        for output, bias in self.biases.items():
            if output in graph.producer:
                _set_bias(graph, graph.producer[output], bias)
        made = []
        for output, shift in self.shifts.items():
            if output in graph.producer and not _move_addend(graph, output, shift):
                made.append((graph.producer[output], shift))
        for node, shift in sorted(made, key=lambda m: -m[0].index):
            _add_after(graph, node, shift)


def lossless(analysis: Analysis, groups: Sequence[Group] | None = None) -> Compaction:
    """Find the channels whose removal changes nothing but the rounding of sums.

    Args:
        analysis: the model.
        groups: those that may lose channels, all by default. Groups that are frozen or cross a normalisation lose
            none; where all channels of a group could go, the first stays, for there are no empty tensors.

    Returns:
        The plan, and the constants to fold into the model that surgery makes by it.
    """
    facts = Facts(analysis, LAWS)
    needs = Needs(facts).read
    kept = {}
    for group in analysis.groups if groups is None else groups:
        if group.frozen is None and not group.crossings:
            needed = needs.get(group.dim, np.zeros(group.size, bool))
            kept[group.name] = np.flatnonzero(needed) if needed.any() else np.zeros(1, int)
    plan = make_plan(analysis, kept)
    biases: dict[str, Array] = {}
    shifts: dict[str, Array] = {}
    masks = analysis.kept(plan.masks(analysis))
    for index in sorted(analysis.laws):
        _fold(facts, index, masks, biases, shifts)
    return Compaction(plan, biases, shifts)


def _fold(facts: Facts, index: int, kept: Kept, biases: dict[str, Array], shifts: dict[str, Array]) -> None:
    """What a node made of the constants that go."""
    law = facts.analysis.laws[index]
    site = Site(facts, law.node)
    if law.node.op not in ("Conv", "Gemm", "MatMul", "Einsum") or law.node.domain or law.barrier:
        return
    for operand, axes in enumerate(law.inputs[:2]):  # of which one is constant
        lost = _lost(site, operand, axes, kept) if site.value(operand) is None else None
        if lost is None:
            continue
        operands = [site.known(0), site.known(1)]
        operands[operand] = lost
        made = product(site, *operands)
        output, out_axes = law.node.outputs[0], law.outputs[0] or ()
        bias = site.known(2) if site.has(2) else constant(np.zeros(()))
        beta = site.attr("beta", 1.0)
        if law.node.op in ("MatMul", "Einsum") or not bias.mask.all() or not beta:
            shifts[output] = _sliced(made.value, out_axes, kept).astype(lost.value.dtype)
        elif law.node.op == "Conv":
            total = np.broadcast_to(bias.value + made.value.reshape(-1), made.value.size)
            biases[output] = _sliced(total, out_axes[1:2], kept).astype(lost.value.dtype)
        else:
            biases[output] = _sliced(bias.value + made.value / beta, out_axes, kept).astype(lost.value.dtype)


def _lost(site: Site, operand: int, axes: Axes | None, kept: Kept) -> Known | None:
    """The constants among the channels that go, zeros elsewhere; None where all are zero."""
    known = usable(site, operand)
    gone = np.zeros((1,) * known.value.ndim, bool)
    for axis, expr in enumerate(axes or ()):
        if kept.size(expr) != expr.size:
            gone = gone | ~np.expand_dims(kept.mask(expr), tuple(i for i in range(known.value.ndim) if i != axis))
    gone = gone & known.other
    return Known(np.where(gone, known.value, 0), np.ones_like(gone)) if gone.any() else None


def _sliced(value: Array, axes: Axes, kept: Kept) -> Array:
    """The part of what broadcasts to a tensor that the pruned tensor has."""
    for axis, expr in enumerate(axes[::-1], 1):
        if axis <= value.ndim and value.shape[-axis] == expr.size != kept.size(expr):
            value = np.compress(kept.mask(expr), value, axis=value.ndim - axis)
    return value


# -- the model that surgery made ---------------------------------------------------------------------------------------


def _set_bias(graph: Graph, node: Node, bias: Array) -> None:
    if len(node.inputs) > 2 and _replace(graph, node.inputs[2], bias):
        return
    bias = bias.reshape(bias.shape[-1:]) if bias.size == bias.shape[-1] else bias
    name = _fresh(graph, f"{node.outputs[0]}_bias")
    graph.model.graph.initializer.append(numpy_helper.from_array(bias, name))
    del node.proto.input[2:]
    node.proto.input.append(name)
    graph.adopt(node, graph.model.graph.initializer[-1], 2)


def _move_addend(graph: Graph, output: str, shift: Array) -> bool:
    """Change the constant that is added next, where it is nobody else's."""
    users = graph.users.get(output, ())
    if len(users) != 1 or users[0][0].op != "Add" or users[0][0].domain or output in graph.outputs:
        return False
    add, operand = users[0]
    name = add.inputs[1 - operand]
    return name in graph.constants and _replace(graph, name, graph.array(name) + shift)


def _add_after(graph: Graph, node: Node, shift: Array) -> None:
    output = node.outputs[0]
    before, name = _fresh(graph, f"{output}_unshifted"), _fresh(graph, f"{output}_shift")
    graph.model.graph.initializer.append(numpy_helper.from_array(shift, name))
    node.proto.output[0] = before
    add: NodeProto = helper.make_node("Add", [before, name], [output], name=f"{before}_Add")
    graph.model.graph.node.insert(node.index + 1, add)


def _replace(graph: Graph, name: str, value: Array) -> bool:
    """Give a constant another value of its size, where one node reads it and nobody else."""
    captured = any(name in names for names in graph.captured.values())
    if name not in graph.constants or len(graph.users[name]) != 1 or name in graph.outputs or captured:
        return False
    tensor = graph.constants[name]
    if value.size != np.prod(tensor.dims):
        return False
    tensor.CopyFrom(numpy_helper.from_array(value.reshape(tuple(tensor.dims)), tensor.name))
    graph.forget(name)
    return True


def _fresh(graph: Graph, name: str) -> str:
    taken = graph.users.keys() | graph.constants.keys() | graph.producer.keys()
    while name in taken:
        name += "_"
    return name
