"""Steps of a reader's producer, in turn with fits of the reader, on some samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnxruntime import InferenceSession

from spa.errors import InvariantError
from spa.obspa.affine import Tail, find_tail
from spa.obspa.bias_slot import BiasSlot
from spa.obspa.linear import Linear, linear, store
from spa.obspa.moments import Moments
from spa.obspa.producers import QUICK_STEPS, STEPS, GaussNewton, LayerPair
from spa.obspa.readers.base import Reconstruction
from spa.obspa.readers.rows import Targets, add_rows
from spa.running.runtime import run
from spa.running.stream import Feeds

Array = np.ndarray


@dataclass(frozen=True)
class ProducerSteps:
    """The producer of a reader of removed channels, and the samples that both learn from in turn.

    Attributes:
        reconstruction: both networks.
        pair: both layers in the pruned network.
        after: what follows the reader.
        source: the name of the producer's inputs in the dense network.
        x: the producer's inputs.
        target: the reader's target outputs.
        real: which of the positions are no padding, (samples, positions); None where all are.
        representative: whether most samples have these shapes, so that the reader may learn from them alone, too.
    """

    reconstruction: Reconstruction
    pair: LayerPair
    after: Tail
    source: str
    x: Array
    target: Array
    real: Array | None
    representative: bool

    @classmethod
    def begin(cls, reconstruction: Reconstruction, target: Linear, pair: LayerPair) -> ProducerSteps | None:
        """Gather the samples; None if they do not lie along the first axis throughout.

        Where sequences differ in length, they are those of the length that most samples have.

        Args:
            reconstruction: both networks.
            target: the reader in the dense network.
            pair: both layers in the pruned network.
        """
        pruned, dense, reader, output = reconstruction.pruned, reconstruction.dense, pair.reader, target.node.outputs[0]
        p, first = pair.producer, pruned.live[0]
        shape = reconstruction.kept_part(output, dense.live[0]).shape
        if not pair.samples_first(pruned.graph, first.shape(p.source), first.shape(reader.source), shape):
            return None
        blocks, channels, _ = reader.size(pruned.graph)
        after = find_tail(pruned.graph, reader.node, blocks * channels, reader.channel_axis)
        source = in_dense(reconstruction, p).source
        shapes, quick = (first.shape(reader.source), shape), reconstruction.settings.quick
        fraction = pair.sample_fraction(pruned.graph, reconstruction.samples(target), *shapes, quick)
        found: dict[tuple[int, ...], list[tuple[Array, Array, Array]]] = {}
        for batches in zip(dense.live, pruned.live, strict=True):
            samples, real = batches[1].shape(p.source)[0], batches[0].real
            chosen = np.linspace(0, samples, max(1, round(fraction * samples)), endpoint=False).astype(int)
            needed = {n for n in (source, output, p.source, after.addend) if n}
            dense_batch, pruned_batch = (
                {n: b[n][chosen] for n in needed if n in b and b.shape(n)[:1] == (samples,)} for b in batches
            )
            t = reconstruction.kept_part(output, dense_batch)
            lost = branch_loss(reconstruction, after, dense_batch, pruned_batch, t.shape)
            if lost is not None:
                t = t + lost * np.expand_dims(inverse_scale(after), reader.other_axes(t.ndim))
            x = reconstruction.blended(source, p.source, dense_batch, pruned_batch)
            marks = np.ones(t.shape[:2], bool) if real is None or real.shape[0] != samples else real[chosen]
            found.setdefault((*x.shape[1:], *t.shape[1:]), []).append((x, t, marks))
        counts = {shape: sum(len(x) for x, *_ in parts) for shape, parts in found.items()}
        most = max(counts, key=counts.__getitem__)
        xs, ts, marks = (np.concatenate(part) for part in zip(*found[most], strict=True))
        return cls(
            reconstruction=reconstruction,
            pair=pair,
            after=after,
            source=source,
            x=xs,
            target=ts,
            real=None if marks.all() else marks,
            representative=2 * counts[most] > sum(counts.values()),
        )

    def rows(self) -> Moments:
        """Return the rows of the reader on the samples, with the producer as it is now."""
        lin, graph, rows = self.pair.reader, self.reconstruction.pruned.graph, Moments()
        chosen = np.arange(lin.positions(self.target.shape))
        between = run(self._session(), {self.pair.producer.source: self.x})[0]
        add_rows(rows, graph, lin, between, Targets(self.target, self.real), chosen)
        return rows

    def take(self) -> float | None:
        """Change the producer; return the fraction of the reader's loss that is gone, None if no step helps."""
        pruned, p = self.reconstruction.pruned, self._producer()
        before = find_tail(pruned.graph, p.node, p.size(pruned.graph)[1], p.channel_axis)
        slot = BiasSlot.find(pruned, p, before, [p])
        settings, constants = self.reconstruction.settings, slot is not None
        steps = GaussNewton(pruned, self.pair, self.x, self.target, self.after.scale, constants, self.real)
        changes = steps.take(settings.damping, QUICK_STEPS if settings.quick else STEPS)
        if changes is None:
            return None
        store(pruned, p, p.matrix(pruned.graph) + changes.matrix[None])
        if slot is not None:
            slot.move(changes.bias)
        return changes.removed

    def inputs(self) -> Callable[[int], Array]:
        """Run the producer as it is now on all samples; return the reader's inputs, by the number of a batch."""
        pruned, dense, p = self.reconstruction.pruned, self.reconstruction.dense, self.pair.producer
        session, shelf = self._session(), pruned.shelf()
        for batch in pruned.live:
            batch.store(self.pair.reader.source, run(session, {p.source: batch[p.source]})[0], shelf)

        def inputs(number: int) -> Array:
            x = self.reconstruction.blended(self.source, p.source, dense.live[number], pruned.live[number])
            return np.asarray(run(session, {p.source: x})[0])

        return inputs

    def _session(self) -> InferenceSession:
        pair = self.pair
        nodes = [pair.producer.node, *pair.chain]
        return self.reconstruction.pruned.session(nodes, pair.producer.source, pair.reader.source, self.x)

    def _producer(self) -> Linear:
        """Return the producer with the bias that it may have been given."""
        graph = self.reconstruction.pruned.graph
        return linear(graph, self.pair.producer.node) or self.pair.producer


def branch_loss(
    reconstruction: Reconstruction, after: Tail, dense_batch: Feeds, pruned_batch: Feeds, shape: tuple[int, ...]
) -> Array | None:
    """Return what the other branch of the residual sum has lost; None if there is none of the layer's shape."""
    if after.addend is None or after.addend not in dense_batch or after.addend not in pruned_batch:
        return None
    lost = after.aligned(reconstruction.kept_part(after.addend, dense_batch) - pruned_batch[after.addend])
    return lost if lost.shape == shape else None


def inverse_scale(after: Tail) -> Array:
    """Return the inverse of the scales of a layer's outputs; zero for scales below 1 % of the median."""
    size = np.abs(after.scale)
    usable = size > 1e-2 * np.median(size)
    return np.where(usable, 1.0 / np.where(usable, after.scale, 1.0), 0.0).astype(np.float32)


def in_dense(reconstruction: Reconstruction, lin: Linear) -> Linear:
    """Return the counterpart of a layer of the pruned network in the dense one."""
    graph = reconstruction.dense.graph
    counterpart = linear(graph, graph.producer[lin.node.outputs[0]])
    if counterpart is None:
        raise InvariantError(f"{lin.node.label} is linear in the pruned network alone.")
    return counterpart
