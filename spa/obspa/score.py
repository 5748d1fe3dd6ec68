"""Optimal brain surgery scores of whole groups, from one pass of the dense network over the calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import numpy as np

from spa.algebra.axes import product
from spa.coupling.analysis import Analysis, Group
from spa.model.graph import Node
from spa.obspa import dual, products, recurrent
from spa.obspa.affine import before_transpose, tail
from spa.obspa.curves import AnyReader, Curve, Reader, Seen, greedy
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Moments
from spa.running.stream import Feeds, Stream

Array = np.ndarray
# Removing channels of a stream that many layers read harms more than the sum of its readers' own losses says: their
# errors add up along the depth. Found by measuring the outputs of ResNet-20 and ResNet-56 (benchmarks/accuracy.py).
SHARED = 4.0
ROWS = 40_000  # rows that a least-squares fit sees at most, or ten per unknown where that is more


def places(rng: np.random.Generator, lin: Linear, shape: tuple[int, ...], samples: int, inputs: int) -> Array:
    """Output places of each sample to learn from, drawn without replacement."""
    total = lin.places(shape)
    wanted = ceil((max(ROWS, 10 * inputs) if inputs <= dual.LARGEST else dual.ROWS) / max(samples, 1))
    if wanted >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, wanted, replace=False))


def gatherer(inputs: int, samples: int, cross: bool = True) -> Moments | dual.Rows:
    """What rows of a product are gathered in: their moments or, where these would be too large, some rows."""
    return Moments(cross) if inputs <= dual.LARGEST else dual.Rows(ceil(samples / dual.ROWS))


def curves(
    analysis: Analysis,
    groups: Sequence[Group],
    batches: Sequence[Feeds],
    threads: int = 2,
    seed: int = 0,
    damping: float = 1e-3,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> dict[str, Curve]:
    """For each group the order in which channels go, and the relative output error of each prefix.

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


def faded(curves: Mapping[str, Curve], groups: Sequence[Group], mended: float) -> dict[str, Curve]:
    """Loss curves as the outputs see them: later fits mend part of what goes wrong.

    With n readers (of any of the groups) behind it a loss counts ``(1 + n) ** -mended``.
    """
    readers = sorted({i for g in groups for i in g.readers})

    def share(group: Group) -> float:
        behind = len(readers) - 1 - np.searchsorted(readers, sorted(group.readers))
        return float(np.mean((1.0 + behind) ** -mended))

    return {g.name: Curve(c.order, c.loss * share(g)) for g in groups if (c := curves.get(g.name)) is not None}


def observe(analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Seen]:
    """What a node reads, with the statistics of its inputs; nothing where it is no reader that is understood.

    A matrix product with constant weights is one reader, a recurrent cell two (of its input and of its state), a
    product of two activations one.
    """
    lin = linear(stream.graph, node)
    if lin is not None:
        stream.after(node)
        return _linear(analysis, stream, lin, rng)
    if recurrent.cell(stream.graph, node) is not None:
        stream.after(node)
        return recurrent.observe(analysis, stream, node, rng)
    if products.pair(stream.graph, node) is not None:
        stream.after(node)
        return products.observe(analysis, stream, node)
    return []


def _linear(analysis: Analysis, stream: Stream, lin: Linear, rng: np.random.Generator) -> list[Seen]:
    """A matrix product with constant weights as a reader."""
    axes = analysis.axes.get(lin.source)
    if axes is None:
        return []
    graph = stream.graph
    rows, unit = _observe(stream, lin, rng)
    if isinstance(rows, Moments):
        w = lin.matrix(graph) * unit[:, :, None]
        of: Callable[[Array], AnyReader] = partial(Reader, rows.xx, w, rows=rows.count)
    elif lin.blocks == 1:
        of = partial(dual.RowReader, rows.centred()[0], dual.sketched(lin.matrix(graph, np.float32), unit[0], rng))
    else:
        return []
    inputs = analysis.space.resolve(product(*(axes[a] for a in lin.input_axes)))
    return [Seen(of, inputs, lin.blocks, lin.kernel_places(graph))]


def _observe(stream: Stream, lin: Linear, rng: np.random.Generator) -> tuple[Moments | dual.Rows, Array]:
    """Rows of a reader, and what one unit of each output is worth (the root of it), (blocks, outputs)."""
    graph, name = stream.graph, lin.node.outputs[0]
    samples = sum(lin.samples(b[name].shape) for b in stream.live)
    blocks, channels, size = lin.size(graph)
    after = tail(graph, lin.node, blocks * channels, lin.channel_axis)
    # A loss is relative to the residual sum where the block adds to what it reads. Branches side by side, as in the
    # first block of a stage, are each measured alone, whichever is computed first.
    skip = after.addend if after.addend and graph.depends(lin.source, before_transpose(graph, after.addend)) else ""
    rows, addend = gatherer(size, samples, cross=False), Moments(cross=False)
    for batch in stream.live:
        x, y = batch[lin.source], batch[name]
        chosen = places(rng, lin, y.shape, samples, size)
        rows.add(lin.inputs(x, y.shape, graph, chosen), lin.outputs(y, chosen))
        if skip in batch and (addition := after.aligned(batch[skip])).shape == y.shape:
            s = lin.outputs(addition, chosen)
            addend.add(s[:, :, :1], s)
    energy = float((np.square(after.scale) * rows.tt.reshape(-1)).sum())
    if addend.count:
        energy += float(addend.tt.sum())
    return rows, after.scale.reshape(blocks, channels) / np.sqrt(energy if energy > 0 else 1.0)
