"""The cost of a network, as arithmetic on the sizes of its dimensions.

Parameters and multiply–accumulates (MACs) of every node are products of expression sizes, so the effect of any choice
of widths is a number, not another export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper

from spa.algebra.axes import Axes, Dim, Expr, Space, Sum
from spa.coupling.activations import Activations
from spa.coupling.analysis import Analysis, Group, Part
from spa.model.graph import Graph
from spa.model.traits import NOT_PARAMETERS

Polynomial = list[tuple[int, tuple[int, ...]]]  # terms: (coefficient, positions of dimensions)


class LatencyTerms(Protocol):
    """A network's latency as a sum of products of axis sizes, as :class:`spa.widths.latency.LatencyModel` has it."""

    @property
    def terms(self) -> tuple[tuple[float, Axes], ...]:
        """(milliseconds per element, axes of a tensor)."""

    @property
    def block(self) -> int:
        """The block size; sizes of axes count as rounded up to multiples of it."""


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Attributes:
        params: elements of all weights (constants that are no indices, sizes or strings).
        macs: multiply–accumulates for one sample, at the input sizes of the analysis.
        bytes: bytes of all weights.
        channels: summed sizes of the groups that may be pruned.
        memory: bytes of activations at the worst moment, for one sample (:mod:`spa.coupling.activations`).
    """

    params: int
    macs: int
    bytes: int
    channels: int
    memory: int

    def to_dict(self) -> dict[str, int]:
        """Return the cost as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Term:
    """A product of axis sizes.

    Attributes:
        fixed: the product of the sizes that no width changes.
        axes: positions of the axes that can shrink, in the result of :meth:`Sizes.at`.
    """

    fixed: int
    axes: tuple[int, ...]

    def value(self, sizes: Sequence[int]) -> int:
        """Return the product at these sizes of the axes that can shrink (see :meth:`Sizes.at`)."""
        return self.fixed * prod(sizes[i] for i in self.axes)


class Sizes:
    """The sizes of axes as polynomials in the widths of some dimensions.

    Args:
        space: the space that the axes belong to.
        groups: the groups that may shrink, in the order in which widths are given.
    """

    def __init__(self, space: Space, groups: Sequence[Group]) -> None:
        self._space = space
        self._index = {g.dim: i for i, g in enumerate(groups)}
        self._branches = {i for i, g in enumerate(groups) if isinstance(g, Part)}
        self._polynomials: list[Polynomial] = []
        self._positions: dict[Expr, int] = {}  # of an axis' polynomial

    def term(self, axes: Axes) -> Term:
        """Return the number of elements of a tensor with these axes, as a term."""
        fixed, shrinking = 1, []
        for expr in axes:
            resolved = self._space.resolve(expr)
            polynomial = self._polynomial(resolved)
            if all(not dims for _, dims in polynomial):
                fixed *= resolved.size
            else:
                if resolved not in self._positions:
                    self._positions[resolved] = len(self._polynomials)
                    self._polynomials.append(polynomial)
                shrinking.append(self._positions[resolved])
        return Term(fixed, tuple(shrinking))

    def _polynomial(self, expr: Expr) -> Polynomial:
        if isinstance(expr, Dim):
            return [(1, (self._index[expr],))] if expr in self._index else [(expr.size, ())]
        if isinstance(expr, Sum):
            return [t for term in expr.terms for t in self._polynomial(term)]
        result: Polynomial = [(1, ())]
        for factor in expr.factors:
            result = [(a * b, x + y) for a, x in result for b, y in self._polynomial(factor)]
        return result

    def at(self, widths: Sequence[int], block: int = 1) -> list[int]:
        """Return the sizes of the axes that can shrink, each rounded up to a multiple of ``block``.

        Args:
            widths: of each group, in the order in which the groups were given.
            block: the number that sizes are rounded up to a multiple of; branches are there or not.
        """
        sizes = [sum(c * prod(widths[i] for i in dims) for c, dims in p) for p in self._polynomials]
        if block == 1:
            return sizes
        return [
            n if self._branches.issuperset(p[0][1]) else -(-n // block) * block
            for n, p in zip(sizes, self._polynomials, strict=True)
        ]

    def dims(self, term: Term) -> set[int]:
        """Return the positions of the groups that a term depends on."""
        return {i for axis in term.axes for _, dims in self._polynomials[axis] for i in dims}


class Switches:
    """The branches that go together with nodes, as factors of what these cost.

    Args:
        groups: those that may shrink, of which some may be branches.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._by_node: dict[int, list[Dim]] = {}
        for branch in groups:
            if isinstance(branch, Part):
                for index in branch.operators:
                    self._by_node.setdefault(index, []).append(branch.dim)

    def of(self, nodes: Iterable[int]) -> Axes:
        """Return the dimensions of the branches that hold all of some nodes, one index each."""
        if not self._by_node:
            return ()
        each = [self._by_node.get(index, ()) for index in nodes]
        return tuple(d for d in each[0] if all(d in dims for dims in each[1:])) if each else ()


class CostModel:
    """The cost of any choice of widths.

    Args:
        analysis: the model.
        groups: the groups that may shrink, in the order in which widths are given; branches may be among them.
        latency: the model's latency, where that is asked for.

    Attributes:
        sizes: the dense widths of the groups.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], latency: LatencyTerms | None = None) -> None:
        self._axes = Sizes(analysis.space, groups)
        self.sizes = [g.size for g in groups]
        inside = Switches(groups)
        self._channels = [self._axes.term((g.dim, *inside.of(g.operators))) for g in groups if not isinstance(g, Part)]
        self._params: list[Term] = []
        self._bytes: list[tuple[float, Term]] = []
        seen: set[str] = set()
        for (name, _, _), axes in analysis.uses.items():
            tensor = analysis.graph.constants[name]
            if name not in seen and tensor.data_type not in NOT_PARAMETERS:
                seen.add(name)
                readers = [node.index for node, _ in analysis.graph.users.get(name, ())]
                self._params.append(self._axes.term((*axes, *inside.of(readers))))
                self._bytes.append((_item_bytes(tensor.data_type), self._params[-1]))
        self._macs = {
            i: [self._axes.term((*axes, *inside.of((i,)))) for axes in law.macs]
            for i, law in analysis.laws.items()
            if law.macs
        }
        self._activations = Activations(analysis, self._axes.term, inside.of, _item_bytes)
        self._batch = analysis.points.batch
        self._block = latency.block if latency else 1
        self._dense: dict[str, float] = {}
        self._ms: dict[Term, float] = {}
        for ms, axes in latency.terms if latency else ():
            term = self._axes.term(axes)
            self._ms[term] = self._ms.get(term, 0.0) + ms

    def evaluate(self, widths: Sequence[int]) -> Cost:
        """Return the cost when each group has the given width."""
        return Cost(**{of: self._count(widths, of) for of in ("params", "macs", "bytes", "channels", "memory")})

    def _count(self, widths: Sequence[int], of: str) -> int:
        sizes = self._axes.at(widths)
        if of == "params":
            return sum(t.value(sizes) for t in self._params)
        if of == "bytes":
            return int(sum(item_bytes * t.value(sizes) for item_bytes, t in self._bytes))
        if of == "channels":
            return sum(t.value(sizes) for t in self._channels)
        if of == "memory":
            return int(self._activations.live(sizes).max(initial=0)) // self._batch
        return sum(t.value(sizes) for terms in self._macs.values() for t in terms) // self._batch

    def latency(self, widths: Sequence[int]) -> float:
        """Return the estimated latency in milliseconds at these widths; zero without a latency model."""
        sizes = self._axes.at(widths, self._block)
        return sum(ms * t.value(sizes) for t, ms in self._ms.items())

    def removed(self, widths: Sequence[int], of: str) -> float:
        """Return the fraction of the dense cost that is gone at these widths.

        Args:
            widths: of each group.
            of: the unit: ``macs``, ``params``, ``bytes``, ``channels``, ``memory`` or ``latency``.
        """
        if of not in self._dense:
            self._dense[of] = self._amount(self.sizes, of)
        dense = self._dense[of]
        return 1 - self._amount(widths, of) / dense if dense else 0.0

    def approach(self, widths: Sequence[int], of: str, ratio: float) -> float:
        """Return how much of a unit is removed, so that whatever helps to reach a ratio makes it more.

        The memory of activations is that of the worst moment. Where there are several, no width alone makes it less;
        what exceeds the goal, summed over all moments, does become less.

        Args:
            widths: of each group.
            of: the unit.
            ratio: the goal.
        """
        if of != "memory":
            return self.removed(widths, of)
        goal = (1 - ratio) * self._batch * self._count(self.sizes, of)
        return -float(np.maximum(self._activations.live(self._axes.at(widths)) - goal, 0).sum())

    def _amount(self, widths: Sequence[int], of: str) -> float:
        return self.latency(widths) if of == "latency" else self._count(widths, of)

    def fractions(self) -> tuple[list[float], list[float]]:
        """Return for each group the fractions of all parameters and of all MACs in tensors and nodes with it."""
        sizes = self._axes.at(self.sizes)

        def fractions(terms: Sequence[Term]) -> list[float]:
            total, by_dim = 0.0, [0.0] * len(self.sizes)
            for term in terms:
                value = term.value(sizes)
                total += value
                for i in self._axes.dims(term):
                    by_dim[i] += value
            return [v / total if total else 0.0 for v in by_dim]

        return fractions(self._params), fractions([t for terms in self._macs.values() for t in terms])


def _item_bytes(data_type: int) -> float:
    name = TensorProto.DataType.Name(data_type)
    if name.endswith(("INT4", "FLOAT4E2M1")):
        return 0.5
    return float(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def measure(analysis: Analysis) -> Cost:
    """Return the cost of the dense model; ``channels`` counts every group that is not frozen."""
    costs = CostModel(analysis, analysis.prunable)
    return costs.evaluate(costs.sizes)


def group_fractions(analysis: Analysis) -> Mapping[str, tuple[float, float]]:
    """Return by group name the fractions of all parameters and of all MACs that the group runs through."""
    groups = [g for g in analysis.groups if g.size > 1]
    params, macs = CostModel(analysis, groups).fractions()
    return {g.name: (p, m) for g, p, m in zip(groups, params, macs, strict=True)}


def count_parameters(graph: Graph) -> tuple[int, int]:
    """Return (elements, bytes) of all weights that a graph really stores."""
    weights = [t for t in graph.constants.values() if t.data_type not in NOT_PARAMETERS]
    sizes = [(prod(t.dims), _item_bytes(t.data_type)) for t in weights]
    return sum(count for count, _ in sizes), int(sum(count * item_bytes for count, item_bytes in sizes))
