"""Computed integers: find the operands whose computed value is wrong after pruning, and compute the right one.

Integers such as Reshape's shape are often computed from the shapes of other tensors. Most follow pruned shapes by
themselves. The others are found by walking the pruned graph at the two points of the analysis: a value that should be
the same at both becomes a constant, one that follows the input is put together from its right entries and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from spa.algebra.axes import Kept
from spa.algebra.op import Tie
from spa.coupling.analysis import Analysis
from spa.errors import InvariantError, UnsupportedError
from spa.model.graph import Graph, Node
from spa.model.shapes import Override, Walk


def restated(tie: Tie, kept: Kept, old: np.ndarray) -> np.ndarray:
    """Return the value that the pruned node needs in place of an old one, of its type and, if possible, its shape."""
    value = np.asarray(tie.restate(kept, old))
    return value.astype(old.dtype).reshape(old.shape if value.size == old.size else value.shape)


# -- finding --------------------------------------------------------------------------------------------------------


@dataclass
class ComputedOperand:
    """An operand that is computed, before and after pruning.

    Attributes:
        node: the node that reads it.
        operand: its position.
        expected: the value that it should have, at each point of the analysis.
        actual: the value that the pruned graph computes, at each point.
        is_wrong: whether they differ at one of them.
    """

    node: Node
    operand: int
    expected: list[np.ndarray] = field(default_factory=list)
    actual: list[np.ndarray] = field(default_factory=list)

    is_wrong: bool = False

    def add(self, expected: np.ndarray, actual: np.ndarray) -> bool:
        """Note the values at the next point; return whether they differ there."""
        self.expected.append(expected)
        self.actual.append(actual)
        differs = actual.shape != expected.shape or not np.array_equal(actual, expected)
        self.is_wrong |= differs
        return differs


def wrong_operands(analysis: Analysis, kept: Kept, pruned: Graph) -> list[ComputedOperand]:
    """Walk the pruned graph; find the computed integers that differ from what the algebra expects.

    Args:
        analysis: the original model.
        kept: the indices to keep.
        pruned: the graph with its weights sliced and its stored integers restated.

    Raises:
        InvariantError: the pruned graph has a shape that the algebra does not expect (a bug of ours).
    """
    computed: dict[tuple[int, int], ComputedOperand] = {}
    checks = [_checker(analysis, kept, before, computed) for before in analysis.points.walks]
    after = analysis.points.again(pruned, checks)
    _check_shapes(analysis, kept, after[0])
    return [operand for _, operand in sorted(computed.items(), key=lambda item: item[0]) if operand.is_wrong]


def _checker(
    analysis: Analysis, kept: Kept, before: Walk, computed: dict[tuple[int, int], ComputedOperand]
) -> Override:
    """Return a check of each node: a computed operand must have its restated value, or its old one if it is data.

    Args:
        analysis: the original model.
        kept: the indices to keep.
        before: the walk over the original graph at the same point.
        computed: by (node index, operand); the check adds what it finds at the point.
    """

    def check(node: Node, walk: Walk) -> Mapping[int, np.ndarray]:
        law = analysis.laws.get(node.index)
        if law is None:
            return {}
        ties = {t.operand: t for t in law.ties if t.operand is not None}
        values = {}
        for operand, name in enumerate(law.node.inputs):
            if name not in before.computed:
                continue
            old = before.value[name]
            expected = restated(ties[operand], kept, old) if operand in ties else old
            actual = walk.value[node.inputs[operand]]
            found = computed.setdefault((node.index, operand), ComputedOperand(law.node, operand))
            if found.add(expected, actual):
                values[operand] = expected
        return values

    return check


def _check_shapes(analysis: Analysis, kept: Kept, walk: Walk) -> None:
    for name, axes in analysis.axes.items():
        expected = tuple(kept.size(e) for e in axes)
        if name in walk.shape and walk.shape[name] != expected and name not in analysis.points.first.value:
            raise InvariantError(
                f"after pruning, {name!r} has shape {walk.shape[name]}, the algebra expects {expected}. "
                "Please report this with the model and the plan."
            )


# -- correcting -----------------------------------------------------------------------------------------------------


@dataclass
class Correction:
    """The tensor that an operand reads instead of a wrong one, and its computation.

    Attributes:
        name: the tensor.
        constants: initializers to add.
        nodes: nodes to insert before the operand's reader.
    """

    name: str
    constants: dict[str, TensorProto] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)

    def add(self, name: str, value: np.ndarray) -> None:
        """Add a constant."""
        self.constants[name] = numpy_helper.from_array(value, name)

    def scale(self, name: str, factor: Fraction, result: str, dtype: np.dtype, fresh: Callable[[str], str]) -> None:
        """Multiply integers by a fraction of which they are multiples; nothing where it is one."""
        if factor == 1:
            return
        above, below, product = (fresh(f"{result}_{part}") for part in ("above", "below", "product"))
        self.add(above, np.asarray([factor.numerator], dtype))
        self.add(below, np.asarray([factor.denominator], dtype))
        self.nodes.append(helper.make_node("Mul", [name, above], [product]))
        self.nodes.append(helper.make_node("Div", [product, below], [result]))


def correct(wrong: ComputedOperand, fresh: Callable[[str], str]) -> Correction:
    """Compute the expected value: a constant, or the old value with its wrong entries replaced.

    Args:
        wrong: the operand.
        fresh: makes a tensor name that is not taken out of a stem.

    Raises:
        UnsupportedError: the value follows the input in a way that cannot be put together.
    """
    stem = f"{wrong.node.inputs[wrong.operand]}_pruned"
    first, last = wrong.expected[0], wrong.expected[-1]
    if first.shape == last.shape and np.array_equal(first, last):
        constant = Correction(fresh(stem))
        constant.add(constant.name, np.asarray(first, order="C"))
        return constant
    if all(np.array_equal(e.reshape(-1), np.arange(e.size)) for e in wrong.expected):
        return _counted(wrong, stem, fresh)
    return _concatenated(wrong, stem, fresh)


def _concatenated(wrong: ComputedOperand, stem: str, fresh: Callable[[str], str]) -> Correction:
    """Concatenate the entries that follow the input and constants.

    1. What follows the input and is right is taken from the old value.
    2. One wrong entry of a Reshape's shape is left to the runtime, as -1, where none is so already.
    3. What is wrong by one factor at all sizes is the old value times that.
    """
    first, last = wrong.expected[0], wrong.expected[-1]
    if first.ndim != 1 or first.shape != last.shape:
        raise _stuck(wrong)
    result = Correction(name="")
    pieces: list[str] = []
    old = wrong.node.inputs[wrong.operand]
    open_entry = wrong.node.op == "Reshape" and -1 not in first
    for k in range(first.size):
        follows_input = first[k] != last[k]
        factors = {Fraction(int(e[k]), int(a[k])) for a, e in zip(wrong.actual, wrong.expected, strict=True) if a[k]}
        piece = fresh(f"{stem}_{k}")
        if not follows_input:
            result.add(piece, np.asarray([first[k]], first.dtype))
        elif factors != {Fraction(1)} and open_entry:  # Case 2
            open_entry = False
            result.add(piece, np.asarray([-1], first.dtype))
        elif len(factors) == 1:  # Cases 1 and 3
            position = fresh(f"{stem}_{k}_at")
            result.add(position, np.asarray([k], np.int64))
            value = piece if factors == {Fraction(1)} else fresh(f"{stem}_{k}_old")
            result.nodes.append(helper.make_node("Gather", [old, position], [value], axis=0))
            result.scale(value, factors.pop(), piece, first.dtype, fresh)
        else:
            raise _stuck(wrong)
        pieces.append(piece)
    result.name = fresh(stem)
    result.nodes.append(helper.make_node("Concat", pieces, [result.name], axis=0))
    return result


def _counted(wrong: ComputedOperand, stem: str, fresh: Callable[[str], str]) -> Correction:
    """Count all indices of Gather's first operand, in the shape that is expected."""
    first, last = wrong.expected[0], wrong.expected[-1]
    if wrong.node.op != "Gather" or wrong.node.attributes.get("axis", 0) != 0:
        raise _stuck(wrong)
    shape = [int(a) if a == b else -1 for a, b in zip(first.shape, last.shape, strict=True)]
    if shape.count(-1) > 1:
        raise _stuck(wrong)
    names = {k: fresh(f"{stem}_{k}") for k in ("shape", "count", "to", "zero", "one")}
    counted = fresh(f"{stem}_all")
    result = Correction(fresh(stem))
    for key, value in (("zero", 0), ("one", 1), ("to", shape)):
        result.add(names[key], np.asarray(value, np.int64))
    result.nodes += [
        helper.make_node("Shape", [wrong.node.inputs[0]], [names["shape"]]),
        helper.make_node("Gather", [names["shape"], names["zero"]], [names["count"]], axis=0),
        helper.make_node("Range", [names["zero"], names["count"], names["one"]], [counted]),
        helper.make_node("Reshape", [counted, names["to"]], [result.name]),
    ]
    return result


def _stuck(wrong: ComputedOperand) -> UnsupportedError:
    return UnsupportedError(
        f"{wrong.node.label}: operand {wrong.operand} is computed from sizes that follow the input and that "
        "pruning changes. Leave its groups out with --ignore, or export the model with fixed input sizes."
    )
