"""The memory of a network's activations: the bytes that are live at one time, at any choice of widths.

Nodes run in the order of the file. A tensor is live from the node that makes it to the last that reads it, inputs from
the start, outputs to the end; what only gives a tensor another shape takes none of its own. Weights are not counted,
nor what a runtime saves by working in place, or takes for its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spa.algebra.axes import Axes

if TYPE_CHECKING:
    from spa.coupling.analysis import Analysis

VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class Product(Protocol):
    """A product of axis sizes, as :class:`spa.coupling.cost.Term`."""

    def value(self, sizes: Sequence[int]) -> int:
        """Return the product."""


class Activations:
    """The bytes of activations at each node.

    Args:
        analysis: the network.
        term: returns the number of elements of a tensor with some axes.
        switches: returns the dimensions of the branches that hold all of some nodes.
        item_bytes: returns the bytes of an element of a type.
    """

    def __init__(
        self,
        analysis: Analysis,
        term: Callable[[Axes], Product],
        switches: Callable[[Iterable[int]], Axes],
        item_bytes: Callable[[int], float],
    ) -> None:
        walk, graph = analysis.points.first, analysis.graph
        self._nodes = len(graph.nodes)
        spans = _spans(analysis)
        terms: dict[Product, int] = {}
        rows = []
        for name, (start, end) in spans.items():
            maker = graph.producer.get(name)
            inside = () if maker is None else switches((maker.index,))
            number = terms.setdefault(term((*analysis.axes[name], *inside)), len(terms))
            rows.append((start, end + 1, number, item_bytes(walk.dtype[name])))
        self._terms = list(terms)
        table = np.array(rows, float).reshape(-1, 4)
        self._starts, self._ends, self._numbers = table[:, :3].astype(int).T
        self._item_bytes = table[:, 3]

    def live(self, sizes: Sequence[int]) -> np.ndarray:
        """Return the bytes that are live while each node runs, (nodes,).

        Args:
            sizes: of the axes that can shrink (see :meth:`spa.coupling.cost.Sizes.at`).
        """
        elements = np.array([t.value(sizes) for t in self._terms], float)
        size = elements[self._numbers] * self._item_bytes if self._terms else np.zeros(0)
        change = np.zeros(self._nodes + 1)
        np.add.at(change, self._starts, size)
        np.subtract.at(change, self._ends, size)
        return np.cumsum(change[:-1])


def _spans(analysis: Analysis) -> dict[str, tuple[int, int]]:
    """Return by tensor the first and the last node that it is live at; tensors that only have new shapes are one."""
    graph, computed = analysis.graph, analysis.points.first.computed
    owner: dict[str, str] = {}
    spans: dict[str, tuple[int, int]] = {}
    last = len(graph.nodes) - 1

    def is_counted(name: str) -> bool:
        return name in analysis.axes and name not in computed and not analysis.is_constant(name)

    def add(name: str, start: int) -> None:
        if is_counted(name):
            readers = [user.index for user, _ in graph.users.get(name, ())]
            readers += [index for index, names in graph.captured.items() if name in names]
            end = max([start, *readers, *([last] if name in graph.outputs else [])])
            first, before = spans.get(owner.setdefault(name, name), (start, start))
            spans[owner[name]] = first, max(before, end)

    for name in graph.inputs:
        add(name, 0)
    for node in graph.nodes:
        for name in node.outputs:
            if node.op in VIEWS and not node.domain and node.inputs[0] in owner:
                owner[name] = owner[node.inputs[0]]
            add(name, node.index)
    return spans
