"""Lossless compaction: remove the channels that are always zero, always the same, or not read, and no others.

Networks trained with structured sparsity (group lasso, OTO, masks, gates) have many. From the weights alone:

1. *Forward* (:mod:`spa.zero.facts`): find which elements of which tensors are the same for every input. Zero rows of
   weights leave the bias, a zero scale of a BatchNormalization leaves its shift, a gate of zero leaves zero; functions
   of constants are constants.
2. *Backward* (:mod:`spa.zero.needs`): find which elements matter to any output. Constants do not, nor does what is
   multiplied by zero weights alone in the rows that matter; so whole chains of layers vanish in one pass.
3. A channel of a group is removed if no node needs it. If it is a constant other than zero, its contribution moves into
   the biases of its readers.

The outputs stay the same, up to the rounding of sums, for every finite input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis, Branch, Group
from spa.coupling.plan import Plan, make_plan
from spa.model.graph import Graph, Node
from spa.model.traits import Trait, traits
from spa.zero.facts import Facts, Site
from spa.zero.known import Known, constant
from spa.zero.needs import Needs
from spa.zero.transfer import TRANSFERS
from spa.zero.transfer.products import foldable, sum_of_products

Array = np.ndarray
__all__ = ["Compaction", "lossless"]


@dataclass(frozen=True)
class Compaction:
    """A plan that changes nothing, and the constants that readers take over.

    Attributes:
        plan: the kept channels, for :func:`spa.surgery.apply.apply`; empty if nothing can be removed.
        biases: by a node's output, the new bias of a Conv (channels,) or of a Gemm (broadcasts to its output).
        shifts: by a node's output, what is to be added to it; for nodes without a bias that could take it over.
        branches: by a sum's output, its operand that a residual branch was, and the constant that the branch gave.
    """

    plan: Plan
    biases: Mapping[str, Array]
    shifts: Mapping[str, Array]
    branches: Mapping[str, tuple[int, Array]] = field(default_factory=dict)

    def fold(self, pruned: ModelProto, base: Path | None = None) -> None:
        """Add the contributions of the removed constants to the biases of their readers.

        Args:
            pruned: the model that surgery made by the plan; changed in place.
            base: the folder of its external data.
        """
        graph = Graph(pruned, base)
        for output, (operand, value) in self.branches.items():
            if output in graph.producer:
                _replace(graph, graph.producer[output].inputs[operand], value)
        for output, bias in self.biases.items():
            if output in graph.producer:
                _set_bias(graph, graph.producer[output], bias)
        additions = []
        for output, shift in self.shifts.items():
            if output in graph.producer and not _move_addend(graph, output, shift):
                additions.append((graph.producer[output], shift))
        for node, shift in sorted(additions, key=lambda a: -a[0].index):
            _add_after(graph, node, shift)


def lossless(analysis: Analysis, groups: Sequence[Group] | None = None, branches: Sequence[Branch] = ()) -> Compaction:
    """Find the channels whose removal changes nothing but the rounding of sums.

    Args:
        analysis: the model.
        groups: the groups that may lose channels; all by default. Groups that are frozen or cross a normalisation
            lose none. If all channels of a group could go, the first stays: tensors cannot be empty.
        branches: the residual branches that may go, where what they add is the same for every input.

    Returns:
        The plan, and the constants to fold into the model that surgery makes by it.
    """
    facts = Facts(analysis, TRANSFERS)
    needs = Needs(facts).read
    kept = {}
    for group in analysis.groups if groups is None else groups:
        if group.frozen is None and not group.crossings:
            needed = needs.get(group.dim, np.zeros(group.size, bool))
            kept[group.name] = np.flatnonzero(needed) if needed.any() else np.zeros(1, int)
    constants = {b: value for b in branches if (value := _constant_of(facts, b)) is not None}
    kept |= {branch.name: np.zeros(0, int) for branch in constants}
    plan = make_plan(analysis, kept)
    biases: dict[str, Array] = {}
    shifts: dict[str, Array] = {}
    masks = analysis.kept(plan.masks(analysis))
    for index in sorted(analysis.laws):
        _fold(facts, index, masks, biases, shifts)
    left = {}
    for branch, value in constants.items():
        name = analysis.graph.nodes[branch.sum].outputs[0]
        left[name] = branch.operand, _sliced(value, analysis.axes[name], masks)
    return Compaction(plan, biases, shifts, left)


def _constant_of(facts: Facts, branch: Branch) -> Array | None:
    """Return what a branch adds, with one element along the axes that it does not vary along; None if that varies."""
    addend = facts.graph.nodes[branch.sum].inputs[branch.operand]
    known = facts.of(addend)
    if known is None or not known.mask.all():
        return None
    sizes = [expr.size if i in branch.axes else 1 for i, expr in enumerate(facts.analysis.axes[addend])]
    value = known.value.reshape((1,) * (len(sizes) - known.value.ndim) + known.value.shape)
    if any(n > m for n, m in zip(value.shape, sizes, strict=True)):
        return None
    return np.broadcast_to(value, sizes).copy()


def _fold(facts: Facts, index: int, kept: Kept, biases: dict[str, Array], shifts: dict[str, Array]) -> None:
    """Add the contribution of removed constants to a node's output, to ``biases`` or ``shifts``."""
    law = facts.analysis.laws[index]
    site = Site(facts, law.node)
    if Trait.PRODUCT not in traits(law.node.key) or law.node.op == "ConvTranspose" or law.barrier:
        return
    for operand, axes in enumerate(law.inputs[:2]):  # one of them is constant
        removed = _removed_constants(site, operand, axes, kept) if site.value(operand) is None else None
        if removed is None:
            continue
        operands = [site.known(0), site.known(1)]
        operands[operand] = removed
        contribution = sum_of_products(site, *operands)
        output, out_axes = law.node.outputs[0], law.outputs[0] or ()
        bias = site.known(2) if site.has(2) else constant(np.zeros(()))
        beta = site.attr("beta", 1.0)
        if law.node.op in ("MatMul", "Einsum") or not bias.mask.all() or not beta:
            shifts[output] = _sliced(contribution.value, out_axes, kept).astype(removed.value.dtype)
        elif law.node.op == "Conv":
            total = np.broadcast_to(bias.value + contribution.value.reshape(-1), contribution.value.size)
            biases[output] = _sliced(total, out_axes[1:2], kept).astype(removed.value.dtype)
        else:
            biases[output] = _sliced(bias.value + contribution.value / beta, out_axes, kept).astype(removed.value.dtype)


def _removed_constants(site: Site, operand: int, axes: Axes | None, kept: Kept) -> Known | None:
    """Return the constants among the removed channels, with zeros elsewhere; None if all are zero."""
    known = foldable(site, operand)
    removed = np.zeros((1,) * known.value.ndim, bool)
    for axis, expr in enumerate(axes or ()):
        if kept.size(expr) != expr.size:
            removed = removed | ~np.expand_dims(kept.mask(expr), tuple(i for i in range(known.value.ndim) if i != axis))
    removed = removed & known.nonzero
    return Known(np.where(removed, known.value, 0), np.ones_like(removed)) if removed.any() else None


def _sliced(value: Array, axes: Axes, kept: Kept) -> Array:
    """Slice a value that broadcasts to a tensor as surgery slices the tensor."""
    for axis, expr in enumerate(axes[::-1], 1):
        if axis <= value.ndim and value.shape[-axis] == expr.size != kept.size(expr):
            value = np.compress(kept.mask(expr), value, axis=value.ndim - axis)
    return value


# -- editing the pruned model ------------------------------------------------------------------------------------------


def _set_bias(graph: Graph, node: Node, bias: Array) -> None:
    """Replace a node's bias, or give it one of its own if others read the old one."""
    if len(node.inputs) > 2 and _replace(graph, node.inputs[2], bias):
        return
    bias = bias.reshape(bias.shape[-1:]) if bias.size == bias.shape[-1] else bias
    name = _fresh(graph, f"{node.outputs[0]}_bias")
    graph.model.graph.initializer.append(numpy_helper.from_array(bias, name))
    del node.proto.input[2:]
    node.proto.input.append(name)
    graph.adopt(node, graph.model.graph.initializer[-1], 2)


def _move_addend(graph: Graph, output: str, shift: Array) -> bool:
    """Add to the constant that the next node adds; return False if there is none, or others read it."""
    users = graph.users.get(output, ())
    if len(users) != 1 or users[0][0].op != "Add" or users[0][0].domain or output in graph.outputs:
        return False
    add, operand = users[0]
    name = add.inputs[1 - operand]
    return name in graph.constants and _replace(graph, name, graph.array(name) + shift)


def _add_after(graph: Graph, node: Node, shift: Array) -> None:
    """Insert an Add behind a node."""
    output = node.outputs[0]
    before, name = _fresh(graph, f"{output}_unshifted"), _fresh(graph, f"{output}_shift")
    graph.model.graph.initializer.append(numpy_helper.from_array(shift, name))
    node.proto.output[0] = before
    add: NodeProto = helper.make_node("Add", [before, name], [output], name=f"{before}_Add")
    graph.model.graph.node.insert(node.index + 1, add)


def _replace(graph: Graph, name: str, value: Array) -> bool:
    """Give a constant another value of its size; return False if anything but one node reads it."""
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
    """Return a name that the graph does not use yet."""
    taken = graph.users.keys() | graph.constants.keys() | graph.producer.keys()
    while name in taken:
        name += "_"
    return name
