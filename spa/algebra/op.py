"""One operator as its rule sees it, with what the rule says about it.

A rule is a function of an :class:`Op`. It reads the node's attributes, shapes and the axes of its operands, states
which axes are the same, and sets the axes of the outputs. It knows the algebra and nothing of graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa.algebra.axes import UNIT, Axes, Expr, Kept, Space, product
from spa.model.graph import Node

Restate = Callable[[Kept, Any], Any]
Consumer = tuple[str, int, "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Read:
    """A contraction: the indices of a dimension are summed over and disappear.

    Attributes:
        expr: the contracted axis.
        operand: the operand whose slices are zeroed to mask it (the weights, where there are any).
        axis: the axis of that operand.
        others: the (operand, axis) pairs on the other side of the contraction.
        zero: the operand that holds the value standing for zero (a zero point), for integer operators.
        zero_axis: the reading operand's axis along which a vector of zero points lies.
    """

    expr: Expr
    operand: int
    axis: int
    others: tuple[tuple[int, int], ...] = ()
    zero: int | None = None
    zero_axis: int = 0


@dataclass(frozen=True)
class Tie:
    """An integer operand or attribute that depends on sizes or indices of dimensions.

    Attributes:
        operand: the operand's position, or None for an attribute.
        attribute: the attribute's name, or None for an operand.
        restate: (kept, value now) → the value that the pruned node needs; entries that follow the input by
            themselves (0, -1, open ends) are returned as they are.
    """

    operand: int | None
    attribute: str | None
    restate: Restate


class Op:
    """One node as its rule sees it.

    Attributes:
        node: the node (operator, attributes, names).
        shapes: each operand's shape, None where it is absent.
        out_shapes: each output's shape, None where it is absent or unknown.
        values: each operand's value where it is a known small tensor, else None.
        second: the same at the other input size; equal for what does not follow the input.
        constant: for each operand whether it is computed from constants alone.
        consumers: for each output who reads it: (operator, operand, shape of its first output), of a graph output ("",
            0, None); None where that is not known.
        seen: the operands whose axes the rule has asked for; all others are control values, and freeze.
        outputs: what the rule has said: each output's axes.
    """

    def __init__(
        self,
        node: Node,
        space: Space,
        inputs: Sequence[Axes | None],
        out_shapes: Sequence[tuple[int, ...] | None],
        values: Sequence[np.ndarray | None] | None = None,
        constant: Sequence[bool] | None = None,
        second: Sequence[np.ndarray | None] | None = None,
        consumers: Sequence[Sequence[Consumer]] | None = None,
    ) -> None:
        self.node = node
        self.space = space
        self.inputs = list(inputs)
        self.shapes = [None if a is None else tuple(e.size for e in a) for a in inputs]
        self.out_shapes = list(out_shapes)
        self.values = list(values) if values is not None else [None] * len(self.inputs)
        self.constant = list(constant) if constant is not None else [False] * len(self.inputs)
        self.second = list(second) if second is not None else self.values
        self.consumers = consumers
        self.outputs: list[Axes | None] = [None] * len(self.out_shapes)
        self.seen: set[int] = set()
        self.reads: list[Read] = []
        self.ties: list[Tie] = []
        self.macs: list[Axes] = []

    # -- reading the node ----------------------------------------------------------------------------------------

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        return self.node.attributes.get(name, default)

    def has(self, operand: int) -> bool:
        """Return whether an optional operand is given."""
        return operand < len(self.inputs) and self.inputs[operand] is not None

    def axes(self, operand: int) -> Axes:
        """Return the axes of an operand; raise Barrier where it is missing."""
        axes = self.inputs[operand] if operand < len(self.inputs) else None
        self.seen.add(operand)
        if axes is None:
            raise Barrier(f"operand {operand} is missing")
        return axes

    def ints(self, name: str, operand: int, default: list[int] | None = None) -> list[int] | None:
        """Return an integer list that is an attribute in old versions and an operand in new ones.

        Raises:
            Barrier: the operand is computed from data, so its value is not known.
        """
        if self.has(operand):
            value = self.values[operand]
            if value is None:
                raise Barrier(f"its operand {name!r} is computed from data")
            return [int(v) for v in np.ravel(value)]
        return self.attr(name, default)

    def ints_elsewhere(self, name: str, operand: int) -> list[int] | None:
        """Return what :meth:`ints` returns, at the other input size; None where it is not known there."""
        if not self.has(operand):
            return self.ints(name, operand)
        value = self.second[operand]
        return None if value is None else [int(v) for v in np.ravel(value)]

    # -- saying the law ------------------------------------------------------------------------------------------

    def dim(self, size: int, frozen: str | None = None) -> Expr:
        """Make a dimension, frozen where a reason is given: a whole clause."""
        return self.space.dim(size, frozen)

    def opaque(self, size: int, reason: str = "computes it") -> Expr:
        """Make a frozen dimension, whose indices this operator does not trace; the reason is as in :meth:`freeze`."""
        return self.space.dim(size, f"{self.node.label} {reason}")

    def unify(self, a: Expr, b: Expr) -> None:
        """State that two axes are the same."""
        self.space.unify(a, b)

    def freeze(self, expr: Expr, reason: str) -> None:
        """State that no index of an axis can be removed.

        Args:
            expr: the axis.
            reason: what the operator does with it: a verb first, since users read the operator as its subject
                ("looks it up by index": "Gather 'choose' looks it up by index").
        """
        self.space.freeze(expr, f"{self.node.label} {reason}")

    def cross(self, expr: Expr) -> None:
        """State that statistics are taken over an axis."""
        self.space.cross(expr, self.node.label)

    def contract(self, *positions: tuple[int, int], zero: int | None = None) -> None:
        """State that the axes at these (operand, axis) positions are the same and are summed over.

        The reader is the first position whose operand is computed from constants alone, else the first of all.
        """
        first, *rest = positions
        expr = self.axes(first[0])[first[1]]
        for operand, axis in rest:
            self.unify(expr, self.axes(operand)[axis])
        reader = next((p for p in positions if self.constant[p[0]]), first)
        others = tuple(p for p in positions if p != reader)
        self.reads.append(Read(expr, reader[0], reader[1], others, zero))

    def set(self, output: int, axes: Sequence[Expr]) -> None:
        """State the axes of an output (ignored where the node does not produce it)."""
        if output < len(self.outputs):
            self.outputs[output] = tuple(axes)

    def set_opaque(self, output: int) -> None:
        """State that nothing is known of an output's axes."""
        if output < len(self.outputs) and self.out_shapes[output] is not None:
            self.set(output, [self.opaque(n) for n in self.out_shapes[output] or ()])

    def tie_attribute(self, name: str, expr: Expr) -> None:
        """State that an attribute is the size of an axis."""
        self.ties.append(Tie(None, name, lambda kept, old: kept.size(expr)))

    def tie(self, restate: Restate, operand: int | None = None, attribute: str | None = None) -> None:
        """State how an operand, or else an attribute, follows from what is kept."""
        if operand is not None and self.has(operand):
            self.ties.append(Tie(operand, None, restate))
        elif attribute is not None and attribute in self.node.attributes:
            self.ties.append(Tie(None, attribute, restate))

    def tie_scale(self, d: Expr, name: str = "scale") -> None:
        """State that an attribute is by default one over the root of an axis' size, which must not change with it."""

        def restate(kept: Kept, old: Any) -> Any:
            return old if old or kept.size(d) == d.size else 1 / math.sqrt(d.size)

        self.ties.append(Tie(None, name, restate))

    def tie_new(self, restate: Restate, operand: int | None, attribute: str | None) -> None:
        """State what an operand or attribute that the node lacks must be; None where it may stay away."""
        self.ties.append(Tie(operand, attribute, restate))

    def count_macs(self, *axes: Expr) -> None:
        """Add multiply–accumulates: the product of the sizes of the axes."""
        self.macs.append(tuple(axes))

    def broadcast(self, operands: Sequence[int], output: int = 0) -> None:
        """State that operands broadcast to an output: trailing axes are the same, axes of one index stretch."""
        self.set(output, self.stretch([self.axes(i) for i in operands]))

    def stretch(self, rows: Sequence[Axes]) -> list[Expr]:
        """State that rows of axes broadcast against each other, and return the axes that they broadcast to."""
        result: list[Expr] = []
        for position in range(-max(map(len, rows)), 0):
            candidates = [a[position] for a in rows if len(a) >= -position and a[position].size != 1]
            for other in candidates[1:]:
                self.unify(candidates[0], other)
            result.append(candidates[0] if candidates else UNIT)
        return result

    def positive(self, axis: int, rank: int) -> int:
        """Count an axis from the front."""
        return axis + rank if axis < 0 else axis

    def product(self, *factors: Expr) -> Expr:
        """Return the row-major product of expressions."""
        return product(*factors)


class Barrier(Exception):
    """Raised by a rule for a node that cannot be traced: its axes freeze, with the reason, a clause with a verb."""
