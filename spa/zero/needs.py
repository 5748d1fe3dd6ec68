"""The backward pass: find which channels matter to any output, from who reads them and with which weights.

This is a liveness analysis, from the outputs to the inputs: a node needs what its needed outputs are computed from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from spa.algebra.axes import Axes, Dim, Expr, leaves
from spa.algebra.op import Read
from spa.coupling.analysis import Law
from spa.coupling.places import channel_of
from spa.model.marks import is_mark
from spa.model.traits import Trait, traits
from spa.zero.facts import Facts, Site
from spa.zero.known import all_along
from spa.zero.transfer.products import foldable

Array = np.ndarray
Masks = dict[Dim, Array]  # True where a channel is needed; frozen dimensions have no entry: all their channels are
OperandAxis = tuple[int, int]  # operand, axis
_UNREAD = {("CastLike", 1)}  # only its type matters


class Needs:
    """The channels of each dimension that some node needs.

    A node does not need a channel that it sums over if the channel is a known constant that its bias can take over
    (zero always can), or if all weights of the channel are zero in the rows that are needed themselves. Elements of a
    tensor that are known are not needed.

    Attributes:
        read: by dimension, (channels,), True where a node needs the channel; no node sums over dimensions without an
            entry.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.analysis = facts, facts.analysis
        self.read: Masks = {}
        self._observed: dict[str, Masks] = {}
        graph = self.analysis.graph
        for name in (*graph.outputs, *(n for names in graph.captured.values() for n in names)):
            self._observe(name, {})
        for index in sorted(self.analysis.laws, reverse=True):
            self._propagate(self.analysis.laws[index])

    def _propagate(self, law: Law) -> None:
        """Derive what a node needs of its inputs from what is needed of its outputs."""
        outputs = [self._needed_of(n, a) for n, a in zip(law.node.outputs, law.outputs, strict=True)]
        if all(needed is None for needed in outputs):
            return
        masks: Masks = {}
        for needed in outputs:
            _merge(masks, needed or {})
        # What leaves a body goes in again: of marks, everything is needed.
        through = law.barrier is None and not law.node.subgraphs and not is_mark(law.node)
        needs = self._needed_by_sums(law, masks) if through else {}
        for operand, (name, axes) in enumerate(zip(law.node.inputs, law.inputs, strict=True)):
            if not name or axes is None or name in self.analysis.graph.constants:
                continue
            wanted: Masks = {}
            for axis, expr in enumerate(axes) if through else ():
                for dim in self._dims([expr]):
                    _merge(wanted, {dim: self._needed_along(law, (operand, axis), dim, needs, masks)})
            if self._any_needed(wanted, axes) and (law.node.key, operand) not in _UNREAD:
                self._observe(name, wanted, axes)

    def _needed_along(
        self, law: Law, operand_axis: OperandAxis, dim: Dim, needs: Mapping[OperandAxis, Masks], masks: Masks
    ) -> Array:
        """Return the channels of one axis of an operand that a node needs, (channels,)."""
        if dim in needs.get(operand_axis, {}):
            return needs[operand_axis][dim]
        if law.node.label in self.analysis.space.crossings(dim):
            return np.ones(dim.size, bool)
        if dim in masks:
            return masks[dim]
        if Trait.SELECTION in traits(law.node.key):  # what it leaves out is not read
            return np.zeros(dim.size, bool)
        for summed in needs.values():  # on the other side of a sum
            if dim in summed:
                return summed[dim]
        everything = np.ones(dim.size, bool)
        if (law.node.key, operand_axis[0]) not in _UNREAD:
            _merge(self.read, {dim: everything})
        return everything

    # -- tensors -------------------------------------------------------------------------------------------------

    def _dims(self, exprs: Iterable[Expr]) -> list[Dim]:
        """Return the dimensions of some axes that are not frozen."""
        space = self.analysis.space
        dims = dict.fromkeys(d for e in exprs for d in leaves(space.resolve(e)))
        return [d for d in dims if space.reason(d) is None]

    def _observe(self, name: str, masks: Masks, axes: Axes | None = None) -> None:
        """Add to what is needed of a tensor; dimensions without a mask are needed whole."""
        axes = self.analysis.axes.get(name, ()) if axes is None else axes
        full = {d: np.ones(d.size, bool) for d in self._dims(axes)}
        _merge(self._observed.setdefault(name, {}), full | masks)

    def _needed_of(self, name: str, axes: Axes | None) -> Masks | None:
        """Return what is needed of a tensor and not known; None if that is nothing."""
        if name not in self._observed:
            return None
        masks = dict(self._observed[name])
        # A tensor computed from constants alone keeps its value only if all its channels stay.
        known = None if self.analysis.is_constant(name) else self.facts.of(name)
        if known is not None:
            if known.mask.all():
                return None
            for axis, expr in enumerate(axes or ()):
                for dim in self._dims([expr]):
                    masks[dim] = masks[dim] & self._any_index(~known.along(axis, expr.size), expr, dim)
        return masks if self._any_needed(masks, axes) else None

    def _any_needed(self, masks: Masks, axes: Axes | None) -> bool:
        kept = self.analysis.kept(masks)
        return all(kept.size(e) for e in axes or ())

    def _any_index(self, mask: Array, expr: Expr, dim: Dim) -> Array:
        """Return for each channel of a dimension whether an axis' mask is True at any of the channel's indices."""
        channel = channel_of(self.analysis.space.resolve(expr), dim)
        result = np.zeros(dim.size, bool)
        result[channel[mask & (channel >= 0)]] = True
        return result

    # -- sums ----------------------------------------------------------------------------------------------------

    def _needed_by_sums(self, law: Law, masks: Masks) -> dict[OperandAxis, Masks]:
        """Return what the sums of a node need, by operand and axis; extend ``masks`` by what a recurrent cell needs."""
        for read in law.reads:
            if not self._varying_factors(law, read):
                self._close_recurrence(law, read, masks)
        result: dict[OperandAxis, Masks] = {}
        for read in law.reads:
            needs = {dim: self._needed_terms(law, read, dim, masks) for dim in self._dims([read.expr])}
            _merge(self.read, needs)
            for operand_axis in self._varying_factors(law, read):
                _merge(result.setdefault(operand_axis, {}), needs)
        return result

    def _close_recurrence(self, law: Law, read: Read, masks: Masks) -> None:
        """Add the units of a recurrent cell that needed units read at the step before, until none is new."""
        for dim in self._dims([read.expr]):
            while dim in masks and (more := self._needed_terms(law, read, dim, masks) & ~masks[dim]).any():
                masks[dim] = masks[dim] | more

    @staticmethod
    def _factors(read: Read) -> list[OperandAxis]:
        return [(read.operand, read.axis), *read.others]

    def _varying_factors(self, law: Law, read: Read) -> list[OperandAxis]:
        return [p for p in self._factors(read) if not self.analysis.is_constant(law.node.inputs[p[0]])]

    def _needed_terms(self, law: Law, read: Read, dim: Dim, masks: Masks) -> Array:
        """Return the channels whose terms in a sum have no factor that is zero or can move into a bias."""
        varying = self._varying_factors(law, read)
        needed = np.ones(dim.size, bool)
        for operand, axis in self._factors(read):
            if (operand, axis) in varying:
                if read.zero is not None:  # integers, whose zero is not 0
                    continue
                expr = (law.inputs[operand] or ())[axis]
                known = foldable(Site(self.facts, law.node), operand)
                needed &= self._any_index(~known.along(axis, expr.size), expr, dim)
            else:
                own = (operand, axis) == (read.operand, read.axis)
                expr = read.expr if own else (law.inputs[operand] or ())[axis]
                needed &= self._any_index(self._weights(law, operand, axis, masks, read if own else None), expr, dim)
        return needed if varying else needed & self._nonzero_states(law, dim)

    def _weights(self, law: Law, operand: int, axis: int, masks: Masks, own: Read | None) -> Array:
        """Return for each index of an axis whether it has a nonzero weight in the rows that are needed."""
        value, axes = self.facts.value(law.node.inputs[operand]), law.inputs[operand] or ()
        if value is None:
            return np.ones(axes[axis].size, bool)
        summed = {a for r in law.reads for o, a in self._factors(r) if o == operand}
        kept = self.analysis.kept(masks)
        alive = value != self._zero(law, own, value.ndim)
        for i, expr in enumerate(axes):
            if i not in summed and not (rows := kept.mask(expr)).all():
                alive = np.compress(rows, alive, axis=i)
        return np.asarray(alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis)))

    def _zero(self, law: Law, read: Read | None, rank: int) -> Array:
        """Return the value that stands for zero among weights; NaN, which nothing equals, if it is not known."""
        if read is None or read.zero is None or read.zero >= len(law.node.inputs) or not law.node.inputs[read.zero]:
            return np.zeros(())
        value = self.facts.value(law.node.inputs[read.zero])
        if value is None:
            return np.full((), np.nan)
        spread = [1] * rank
        spread[read.zero_axis] = -1
        return value.reshape(spread)

    def _nonzero_states(self, law: Law, dim: Dim) -> Array:
        """Return the units of a recurrent cell that are not always zero, (units,)."""
        needed = np.ones(dim.size, bool)
        for name, axes in zip(law.node.outputs, law.outputs, strict=True):
            known = self.facts.of(name) if name else None
            for axis, expr in enumerate(axes or ()):
                if known is not None and dim in self._dims([expr]):
                    needed &= self._any_index(~all_along(known.zero, axis, expr.size), expr, dim)
        return needed


def _merge(into: Masks, masks: Mapping[Dim, Array]) -> None:
    for dim, mask in masks.items():
        into[dim] = into[dim] | mask if dim in into else mask
