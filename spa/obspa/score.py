"""Optimal brain surgery scores of whole groups, from one pass of the dense network over the calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from spa.coupling import Analysis, Group
from spa.criteria.places import channel_of
from spa.obspa.affine import tail
from spa.obspa.curves import Curve, Reader, greedy
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Moments
from spa.obspa.stream import Feeds, Stream

Array = np.ndarray
# Removing channels of a stream that many layers read harms more than the sum of its readers' own losses says: their
# errors add up along the depth. Found by measuring the outputs of ResNet-20 and ResNet-56 (benchmarks/accuracy.py).
SHARED = 4.0
ROWS = 40_000  # rows that a least-squares fit sees at most, or ten per unknown where that is more


def places(rng: np.random.Generator, lin: Linear, shape: tuple[int, ...], samples: int, inputs: int) -> Array:
    """Output places of each sample to learn from, drawn without replacement."""
    total = lin.places(shape)
    wanted = ceil(max(ROWS, 10 * inputs) / max(samples, 1))
    if wanted >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, wanted, replace=False))


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

    Losses are measured in what the reader's output becomes (after the scale of a following BatchNormalization) and
    divided by the energy of the sum that it goes into, so that they compare across the network.

    Returns:
        By group name; groups none of whose readers is a float Conv, Gemm or MatMul are missing.
    """
    wanted: dict[int, list[Group]] = {}
    for group in groups:
        for index in group.readers:
            wanted.setdefault(index, []).append(group)
    graph = analysis.graph
    stream = Stream(graph.model, graph.base, batches, threads)
    rng = np.random.default_rng(seed)
    last = {g.name: max((i for i in g.readers), default=-1) for g in groups}
    pending: dict[str, list[Reader]] = {g.name: [] for g in groups}
    result: dict[str, Curve] = {}
    for index in sorted(wanted):
        progress("score", index / len(graph.nodes))
        node = graph.nodes[index]
        lin = linear(stream.graph, node)
        if lin is not None:
            stream.after(stream.graph.nodes[index])
            moments, unit = _observe(stream, lin, rng)
            h = moments.xx
            w = lin.matrix(stream.graph) * unit.reshape(lin.blocks, -1, 1)
            for group in wanted[index]:
                columns = columns_of(analysis, lin, group)
                if columns is not None:
                    pending[group.name].append(Reader(h, w, columns))
        for group in wanted[index]:
            if last[group.name] == index and pending[group.name]:
                curve = greedy(pending.pop(group.name), group.size, damping=damping)
                weight = SHARED if len(group.readers) > 1 else 1.0
                result[group.name] = Curve(curve.order, curve.loss * weight)
    return result


def _observe(stream: Stream, lin: Linear, rng: np.random.Generator) -> tuple[Moments, Array]:
    """Moments of a reader, and what one unit of each output is worth (the root of it)."""
    graph, node = stream.graph, lin.node
    samples = sum(b[node.outputs[0]].shape[0] for b in stream.live)
    size = lin.matrix(graph).shape[2]
    after = tail(graph, node, stream.live[0][node.outputs[0]].shape[lin.channel_axis], lin.channel_axis)
    moments, addend = Moments(), Moments()
    for batch in stream.live:
        x, y = batch[node.inputs[0]], batch[node.outputs[0]]
        chosen = places(rng, lin, y.shape, samples, size)
        t = lin.outputs(y, chosen)
        moments.add(lin.inputs(x, y.shape, graph, chosen), t)
        if after.addend in batch and batch[after.addend].shape == y.shape:
            s = lin.outputs(batch[after.addend], chosen)
            addend.add(s, s[:, :, :1])
    energy = float((np.square(after.scale) * moments.tt.reshape(-1)).sum())
    if addend.count:
        energy += float(np.diagonal(addend.xx, axis1=1, axis2=2).sum())
    return moments, after.scale / np.sqrt(energy if energy > 0 else 1.0)


def columns_of(analysis: Analysis, lin: Linear, group: Group) -> Array | None:
    """The inputs (columns of the matrix) of each channel of a group, (channels, inputs of a channel), −1 pads."""
    axes = analysis.axes.get(lin.node.inputs[0])
    if axes is None:
        return None
    channel = channel_of(analysis.space.resolve(axes[lin.channel_axis]), group.dim)
    blocks = channel.reshape(lin.blocks, -1)
    if lin.blocks > 1 and not (blocks == blocks[0]).all():
        return None
    channel = blocks[0]
    counts = np.bincount(channel[channel >= 0], minlength=group.size)
    if not counts.any():
        return None
    order = np.argsort(np.where(channel < 0, group.size, channel), kind="stable")[: counts.sum()]
    columns = np.full((group.size, counts.max()), -1)
    rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    columns[np.repeat(np.arange(group.size), counts), rank] = order
    shape = lin.kernel_places(analysis.graph)
    spread = columns[:, :, None] * shape + np.arange(shape)
    return np.where(columns[:, :, None] < 0, -1, spread).reshape(group.size, -1)
