"""Optimal brain surgery scores of whole groups, from one pass of the dense network over the calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.criteria.answers import Curve
from spa.model.graph import Node
from spa.obspa.curves import AnyReader, Seen, greedy
from spa.obspa.readers import kind_of
from spa.running.stream import Feeds, Stream

Array = np.ndarray
# Removing channels of a stream that many layers read harms more than the sum of its readers' own losses says: their
# errors add up along the depth. Found by measuring the outputs of ResNet-20 and ResNet-56 (benchmarks/accuracy.py).
SHARED = 4.0


def curves(
    analysis: Analysis,
    groups: Sequence[Group],
    batches: Sequence[Feeds],
    threads: int = 2,
    seed: int = 0,
    damping: float = 1e-3,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> dict[str, Curve]:
    """Find for each group the order in which channels go, and the relative output error of each prefix.

    Losses are measured in what the reader's output becomes (after the scale of a following BatchNormalization),
    divided by the energy of the sum that it goes into, so that they compare across the network.

    Returns:
        By group name; groups none of whose readers is understood (see :func:`observe`) are missing.
    """
    wanted: dict[int, list[Group]] = {}
    for group in groups:
        for index in group.readers:
            wanted.setdefault(index, []).append(group)
    graph = analysis.graph
    stream = Stream(graph.model, graph.base, batches, threads)
    rng = np.random.default_rng(seed)
    last = {g.name: max((i for i in g.readers), default=-1) for g in groups}
    pending: dict[str, list[AnyReader]] = {g.name: [] for g in groups}
    result: dict[str, Curve] = {}
    for index in sorted(wanted):
        progress("score", index / len(graph.nodes))
        for seen in observe(analysis, stream, stream.graph.nodes[index], rng):
            for group in wanted[index]:
                columns = seen.columns(group.dim, group.size)
                if columns is not None:
                    pending[group.name].append(seen.of(columns))
        for group in wanted[index]:
            if last[group.name] == index and pending[group.name]:
                curve = greedy(pending.pop(group.name), group.size, damping=damping)
                result[group.name] = Curve(curve.order, curve.loss * (SHARED if len(group.readers) > 1 else 1.0))
    return result


def discounted(curves: Mapping[str, Curve], groups: Sequence[Group], exponent: float) -> dict[str, Curve]:
    """Scale loss curves to what the outputs see of them: later refits repair part of what goes wrong.

    With n readers (of any of the groups) behind it a loss counts ``(1 + n) ** -exponent``.
    """
    readers = sorted({i for g in groups for i in g.readers})

    def share(group: Group) -> float:
        behind = len(readers) - 1 - np.searchsorted(readers, sorted(group.readers))
        return float(np.mean((1.0 + behind) ** -exponent))

    return {g.name: Curve(c.order, c.loss * share(g)) for g in groups if (c := curves.get(g.name)) is not None}


def observe(analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Seen]:
    """Return what a node reads, with the statistics of its inputs; nothing where it is no reader that is understood."""
    kind = kind_of(stream.graph, node)
    if kind is None:
        return []
    stream.after(node)
    return kind.observe(analysis, stream, node, rng)
