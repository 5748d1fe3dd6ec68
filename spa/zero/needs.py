"""The backward pass: which elements matter to any output, by what reads them and with which weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from spa.algebra.axes import Axes, Dim, Expr, leaves
from spa.algebra.op import Read
from spa.coupling.analysis import Law
from spa.coupling.places import channel_of
from spa.model.traits import Trait, traits
from spa.zero.facts import Facts, Site
from spa.zero.known import flat
from spa.zero.laws import usable

Array = np.ndarray
Masks = dict[Dim, Array]  # True where a channel is needed; frozen dimensions always are, and have no entry
Operand = tuple[int, int]  # operand, axis
_UNREAD = {("CastLike", 1)}  # only its type matters


class Needs:
    """Which channels of each dimension some node needs.

    A node needs a channel of what it sums over where neither is the channel a known constant that its bias can take
    over (zero always can) nor are all its weights zero in the rows that are needed themselves. A tensor's elements
    are not needed where they are known, whatever made them.

    Attributes:
        read: by dimension, (channels,), True where a node needs the channel; no node sums over those without an entry.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.analysis = facts, facts.analysis
        self.read: Masks = {}
        self._observed: dict[str, Masks] = {}
        graph = self.analysis.graph
        for name in (*graph.outputs, *(n for names in graph.captured.values() for n in names)):
            self._observe(name, {})
        for index in sorted(self.analysis.laws, reverse=True):
            self._pass(self.analysis.laws[index])

    def _pass(self, law: Law) -> None:
        """From what is needed of a node's outputs to what it needs of its inputs."""
        found = [m for n, a in zip(law.node.outputs, law.outputs, strict=True) if (m := self._of(n, a)) is not None]
        if not found:
            return
        masks: Masks = {}
        for each in found:
            _merge(masks, each)
        through = law.barrier is None and not law.node.subgraphs
        needs = self._reads(law, masks) if through else {}
        for operand, (name, axes) in enumerate(zip(law.node.inputs, law.inputs, strict=True)):
            if not name or axes is None or name in self.analysis.graph.constants:
                continue
            wanted: Masks = {}
            for axis, expr in enumerate(axes) if through else ():
                for dim in self._dims([expr]):
                    _merge(wanted, {dim: self._through(law, (operand, axis), dim, needs, masks)})
            if self._any_left(wanted, axes) and (law.node.key, operand) not in _UNREAD:
                self._observe(name, wanted, axes)

    def _through(self, law: Law, place: Operand, dim: Dim, needs: Mapping[Operand, Masks], masks: Masks) -> Array:
        """Which channels of one axis of an operand a node needs."""
        if dim in needs.get(place, {}):
            return needs[place][dim]
        if law.node.label in self.analysis.space.crossings(dim):
            return np.ones(dim.size, bool)
        if dim in masks:
            return masks[dim]
        if Trait.SELECTION in traits(law.node.key):  # nobody reads what it leaves out
            return np.zeros(dim.size, bool)
        for summed in needs.values():  # on the other side of a sum
            if dim in summed:
                return summed[dim]
        everything = np.ones(dim.size, bool)
        if (law.node.key, place[0]) not in _UNREAD:
            _merge(self.read, {dim: everything})
        return everything

    # -- tensors -------------------------------------------------------------------------------------------------

    def _dims(self, exprs: Iterable[Expr]) -> list[Dim]:
        """The dimensions of some axes whose channels may come to nothing."""
        space = self.analysis.space
        found = dict.fromkeys(d for e in exprs for d in leaves(space.resolve(e)))
        return [d for d in found if space.reason(d) is None]

    def _observe(self, name: str, masks: Masks, axes: Axes | None = None) -> None:
        """Note what is needed of a tensor; all of the dimensions that are not named."""
        axes = self.analysis.axes.get(name, ()) if axes is None else axes
        full = {d: np.ones(d.size, bool) for d in self._dims(axes)}
        _merge(self._observed.setdefault(name, {}), full | masks)

    def _of(self, name: str, axes: Axes | None) -> Masks | None:
        """What is needed of a tensor and not known; None where that is nothing."""
        if name not in self._observed:
            return None
        masks = dict(self._observed[name])
        # What the graph makes of constants alone stays what it is only if all of it stays.
        known = None if self.analysis.is_constant(name) else self.facts.of(name)
        if known is not None:
            if known.mask.all():
                return None
            for axis, expr in enumerate(axes or ()):
                for dim in self._dims([expr]):
                    masks[dim] = masks[dim] & self._any(~known.axis(axis, expr.size), expr, dim)
        return masks if self._any_left(masks, axes) else None

    def _any_left(self, masks: Masks, axes: Axes | None) -> bool:
        kept = self.analysis.kept(masks)
        return all(kept.size(e) for e in axes or ())

    def _any(self, mask: Array, expr: Expr, dim: Dim) -> Array:
        """Of a dimension's channels, whether the mask is True at any index of an axis that belongs to them."""
        channel = channel_of(self.analysis.space.resolve(expr), dim)
        found = np.zeros(dim.size, bool)
        found[channel[mask & (channel >= 0)]] = True
        return found

    # -- sums ----------------------------------------------------------------------------------------------------

    def _reads(self, law: Law, masks: Masks) -> dict[Operand, Masks]:
        """What the sums of a node need, by operand and axis; a recurrent cell's own need is added to ``masks``."""
        for read in law.reads:
            if not self._data(law, read):
                self._close(law, read, masks)
        found: dict[Operand, Masks] = {}
        for read in law.reads:
            needs = {dim: self._needed(law, read, dim, masks) for dim in self._dims([read.expr])}
            _merge(self.read, needs)
            for place in self._data(law, read):
                _merge(found.setdefault(place, {}), needs)
        return found

    def _close(self, law: Law, read: Read, masks: Masks) -> None:
        """Units of a recurrent cell that are needed need others, at the step before."""
        for dim in self._dims([read.expr]):
            while dim in masks and (more := self._needed(law, read, dim, masks) & ~masks[dim]).any():
                masks[dim] = masks[dim] | more

    @staticmethod
    def _places(read: Read) -> list[Operand]:
        return [(read.operand, read.axis), *read.others]

    def _data(self, law: Law, read: Read) -> list[Operand]:
        return [p for p in self._places(read) if not self.analysis.is_constant(law.node.inputs[p[0]])]

    def _needed(self, law: Law, read: Read, dim: Dim, masks: Masks) -> Array:
        """The terms of a sum that no factor makes nothing."""
        data = self._data(law, read)
        needed = np.ones(dim.size, bool)
        for operand, axis in self._places(read):
            if (operand, axis) in data:
                if read.zero is not None:  # integers, whose zero is not 0
                    continue
                expr = (law.inputs[operand] or ())[axis]
                known = usable(Site(self.facts, law.node), operand)
                needed &= self._any(~known.axis(axis, expr.size), expr, dim)
            else:
                own = (operand, axis) == (read.operand, read.axis)
                expr = read.expr if own else (law.inputs[operand] or ())[axis]
                needed &= self._any(self._weights(law, operand, axis, masks, read if own else None), expr, dim)
        return needed if data else needed & self._state(law, dim)

    def _weights(self, law: Law, operand: int, axis: int, masks: Masks, own: Read | None) -> Array:
        """Which indices of an axis have a weight that is not zero, in the rows that are needed."""
        value, axes = self.facts.value(law.node.inputs[operand]), law.inputs[operand] or ()
        if value is None:
            return np.ones(axes[axis].size, bool)
        summed = {a for r in law.reads for o, a in self._places(r) if o == operand}
        kept = self.analysis.kept(masks)
        alive = value != self._zero(law, own, value.ndim)
        for i, expr in enumerate(axes):
            if i not in summed and not (rows := kept.mask(expr)).all():
                alive = np.compress(rows, alive, axis=i)
        return np.asarray(alive.any(axis=tuple(i for i in range(alive.ndim) if i != axis)))

    def _zero(self, law: Law, read: Read | None, rank: int) -> Array:
        """What stands for zero among weights; NaN, which nothing equals, where that is not known."""
        if read is None or read.zero is None or read.zero >= len(law.node.inputs) or not law.node.inputs[read.zero]:
            return np.zeros(())
        value = self.facts.value(law.node.inputs[read.zero])
        if value is None:
            return np.full((), np.nan)
        spread = [1] * rank
        spread[read.zero_axis] = -1
        return value.reshape(spread)

    def _state(self, law: Law, dim: Dim) -> Array:
        """Which units of a recurrent cell are not always zero."""
        needed = np.ones(dim.size, bool)
        for name, axes in zip(law.node.outputs, law.outputs, strict=True):
            known = self.facts.of(name) if name else None
            for axis, expr in enumerate(axes or ()):
                if known is not None and dim in self._dims([expr]):
                    needed &= self._any(~flat(known.zero, axis, expr.size), expr, dim)
        return needed


def _merge(into: Masks, masks: Mapping[Dim, Array]) -> None:
    for dim, mask in masks.items():
        into[dim] = into[dim] | mask if dim in into else mask
