"""The cost of a network, as arithmetic on the sizes of its dimensions.

Parameters and multiply–accumulates (MACs) of every node are products of expression sizes, so the effect of any choice
of widths is a number, not another export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Protocol

from onnx import TensorProto, helper

from spa.algebra.axes import Axes, Dim, Expr, Space, Sum
from spa.coupling.analysis import Analysis
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
    """

    params: int
    macs: int
    bytes: int
    channels: int

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
        dims: the dimensions that may shrink, in the order in which widths are given.
    """

    def __init__(self, space: Space, dims: Sequence[Dim]) -> None:
        self._space = space
        self._index = {dim: i for i, dim in enumerate(dims)}
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
            widths: of each dimension, in the order in which the dimensions were given.
            block: the number that sizes are rounded up to a multiple of.
        """
        sizes = [sum(c * prod(widths[i] for i in dims) for c, dims in p) for p in self._polynomials]
        return [-(-n // block) * block for n in sizes] if block > 1 else sizes

    def dims(self, term: Term) -> set[int]:
        """Return the positions of the dimensions that a term depends on."""
        return {i for axis in term.axes for _, dims in self._polynomials[axis] for i in dims}


class CostModel:
    """The cost of any choice of widths.

    Args:
        analysis: the model.
        dims: the dimensions that may shrink, in the order in which widths are given.
        latency: the model's latency, where that is asked for.

    Attributes:
        sizes: the dense widths of the dimensions.
    """

    def __init__(self, analysis: Analysis, dims: Sequence[Dim], latency: LatencyTerms | None = None) -> None:
        self._axes = Sizes(analysis.space, dims)
        self.sizes = [d.size for d in dims]
        self._params: list[Term] = []
        self._bytes: list[tuple[float, Term]] = []
        seen: set[str] = set()
        for (name, _, _), axes in analysis.uses.items():
            tensor = analysis.graph.constants[name]
            if name not in seen and tensor.data_type not in NOT_PARAMETERS:
                seen.add(name)
                self._params.append(self._axes.term(axes))
                self._bytes.append((_item_bytes(tensor.data_type), self._params[-1]))
        self._macs = {i: [self._axes.term(axes) for axes in law.macs] for i, law in analysis.laws.items() if law.macs}
        self._batch = analysis.points.batch
        self._block = latency.block if latency else 1
        self._dense: dict[str, float] = {}
        self._ms: dict[Term, float] = {}
        for ms, axes in latency.terms if latency else ():
            term = self._axes.term(axes)
            self._ms[term] = self._ms.get(term, 0.0) + ms

    def evaluate(self, widths: Sequence[int]) -> Cost:
        """Return the cost when each dimension has the given width."""
        return Cost(**{name: count(widths) for name, count in self._counters().items()})

    def _counters(self) -> dict[str, Callable[[Sequence[int]], int]]:
        """Return what counts each unit at some widths: a search asks for one alone, thousands of times."""

        def macs(widths: Sequence[int]) -> int:
            sizes = self._axes.at(widths)
            return sum(t.value(sizes) for terms in self._macs.values() for t in terms) // self._batch

        def params(widths: Sequence[int]) -> int:
            sizes = self._axes.at(widths)
            return sum(t.value(sizes) for t in self._params)

        def bytes_(widths: Sequence[int]) -> int:
            sizes = self._axes.at(widths)
            return int(sum(item_bytes * t.value(sizes) for item_bytes, t in self._bytes))

        return {"params": params, "macs": macs, "bytes": bytes_, "channels": sum}

    def latency(self, widths: Sequence[int]) -> float:
        """Return the estimated latency in milliseconds at these widths; zero without a latency model."""
        sizes = self._axes.at(widths, self._block)
        return sum(ms * t.value(sizes) for t, ms in self._ms.items())

    def removed(self, widths: Sequence[int], of: str) -> float:
        """Return the fraction of the dense cost that is gone at these widths.

        Args:
            widths: of each dimension.
            of: the unit: ``macs``, ``params``, ``bytes``, ``channels`` or ``latency``.
        """
        if of not in self._dense:
            self._dense[of] = self._amount(self.sizes, of)
        dense = self._dense[of]
        return 1 - self._amount(widths, of) / dense if dense else 0.0

    def _amount(self, widths: Sequence[int], of: str) -> float:
        return self.latency(widths) if of == "latency" else self._counters()[of](widths)

    def fractions(self) -> tuple[list[float], list[float]]:
        """Return for each dimension the fractions of all parameters and of all MACs in tensors and nodes with it."""
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
    dims = [g.dim for g in analysis.prunable]
    return CostModel(analysis, dims).evaluate([d.size for d in dims])


def group_fractions(analysis: Analysis) -> Mapping[str, tuple[float, float]]:
    """Return by group name the fractions of all parameters and of all MACs that the group runs through."""
    groups = [g for g in analysis.groups if g.size > 1]
    params, macs = CostModel(analysis, [g.dim for g in groups]).fractions()
    return {g.name: (p, m) for g, p, m in zip(groups, params, macs, strict=True)}


def count_parameters(graph: Graph) -> tuple[int, int]:
    """Return (elements, bytes) of all weights that a graph really stores."""
    weights = [t for t in graph.constants.values() if t.data_type not in NOT_PARAMETERS]
    sizes = [(prod(t.dims), _item_bytes(t.data_type)) for t in weights]
    return sum(count for count, _ in sizes), int(sum(count * item_bytes for count, item_bytes in sizes))
