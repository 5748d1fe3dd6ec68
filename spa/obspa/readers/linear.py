"""Linear layers as readers: matrix products with constant weights; and the refit of their producers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from spa.algebra.axes import product
from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.obspa import dual
from spa.obspa.affine import Tail, before_transpose, find_tail
from spa.obspa.bias_slot import BiasSlot
from spa.obspa.curves import MomentReader, Observation, Reader
from spa.obspa.linear import Linear, linear, store
from spa.obspa.moments import Means, Moments, damping_for, least_squares
from spa.obspa.producers import MIN_GAIN, LayerPair, find_pair
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.obspa.readers.rows import Fitted, Rows, Targets, accumulator, add_rows, draw_positions
from spa.obspa.readers.steps import ProducerSteps, branch_loss, in_dense, inverse_scale
from spa.running.stream import Stream

Array = np.ndarray
MANY_WEIGHTS = 1 << 23  # which a fit reads in single precision: that of the prior to which it is damped
Inputs = Callable[[int], Array]  # by the number of a batch


class LinearLayer(ReaderKind):
    """A matrix product with constant weights that nothing else reads (see :func:`spa.obspa.linear.linear`)."""

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is a matrix product with constant weights."""
        return linear(graph, node) is not None

    # -- scoring -----------------------------------------------------------------------------------------------

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Observe the layer as a reader of its input, through the moments of its rows or the rows themselves."""
        graph = stream.graph
        lin = linear(graph, node)
        axes = None if lin is None else analysis.axes.get(lin.source)
        if lin is None or axes is None:
            return []
        rows, unit = _observed_rows(stream, lin, rng)
        if isinstance(rows, Moments):
            w = lin.matrix(graph) * unit[:, :, None]
            make_reader: Callable[[Array], Reader] = partial(
                MomentReader, rows.xx.astype(np.float32), w, rows=rows.count
            )
        elif lin.blocks == 1:
            make_reader = partial(
                dual.RowReader, rows.centred()[0], dual.sketch(lin.matrix(graph, np.float32), unit[0], rng)
            )
        else:
            return []
        inputs = analysis.space.resolve(product(*(axes[a] for a in lin.input_axes)))
        weights = lin.weight if len(graph.users[lin.weight]) > 1 else None
        mean = rows.mean_x if isinstance(rows, Moments) else None
        return [Observation(make_reader, inputs, blocks=lin.blocks, taps=lin.taps(graph), weights=weights, mean=mean)]

    # -- refitting ---------------------------------------------------------------------------------------------

    def may_refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> bool:
        """Return whether the node is linear in the dense network, too."""
        return linear(reconstruction.dense.graph, node) is not None

    def prepare(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Hold the inputs of the layer's producer, if that is refitted, too."""
        pair = self._pair(reconstruction, node, pruned_node)
        if pair is not None:
            reconstruction.pruned.hold(pair.producer.source, pruned_node)
            reconstruction.dense.hold(in_dense(reconstruction, pair.producer).source, node)

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Fit the layer by least squares; before that, where its producer is refitted, too, both in turn on samples."""
        target, lin = linear(reconstruction.dense.graph, node), linear(reconstruction.pruned.graph, pruned_node)
        if target is None or lin is None:
            return
        pair = self._pair(reconstruction, node, pruned_node)
        steps = None if pair is None else ProducerSteps.begin(reconstruction, target, pair)
        inputs, slot = self._in_turn(reconstruction, target, lin, steps) if steps is not None else (None, None)
        self.fit(reconstruction, lin, self._all_rows(reconstruction, target, lin, inputs), slot)

    def _in_turn(
        self, reconstruction: Reconstruction, target: Linear, lin: Linear, steps: ProducerSteps
    ) -> tuple[Inputs | None, BiasSlot | None]:
        """Fit a layer and step its producer in turn; return its new inputs, and the vector that took over the mean."""
        prior, slot = lin.matrix(reconstruction.pruned.graph), None
        for turn in range(reconstruction.settings.producer_rounds):
            few = steps.representative
            rows = steps.rows() if few else self._all_rows(reconstruction, target, lin, steps.inputs())
            slot = self.fit(reconstruction, lin, rows, slot)
            removed = steps.take()
            if removed is None and not turn:  # as if nothing had been tried
                store(reconstruction.pruned, lin, prior)
                return None, slot
            if removed is None or removed < MIN_GAIN:
                break
        return steps.inputs(), slot

    def served_by_fit(self, graph: Graph, lin: Linear) -> list[Linear]:
        """Return the layers that one fit of the weights serves."""
        return [lin]

    def rows_for(self, graph: Graph, lin: Linear, samples: int) -> Rows:
        """Return what gathers the rows of a fit: all that the weights need, or means where a bias alone is fitted."""
        return accumulator(lin.size(graph)[2], samples)

    def fit_weights(
        self, reconstruction: Reconstruction, lin: Linear, rows: Rows, matrix: Array, slot: BiasSlot | None
    ) -> Array:
        """Fit and store the weights.

        Args:
            reconstruction: both networks.
            lin: the layer in the pruned network.
            rows: its inputs and targets.
            matrix: its weights so far, (blocks, outputs, inputs).
            slot: the vector that takes over its mean, or None.

        Returns:
            The new weights, of the same shape.
        """
        if isinstance(rows, Means):
            return matrix
        return fit(reconstruction, lin, rows, matrix, slot is not None)

    def fit(
        self, reconstruction: Reconstruction, lin: Linear, rows: Rows, slot: BiasSlot | None = None
    ) -> BiasSlot | None:
        """Fit a layer's weights and bias; return the vector that took over the mean.

        Args:
            reconstruction: both networks.
            lin: the layer in the pruned network.
            rows: its inputs and targets.
            slot: the vector that takes over its mean, of an earlier fit.
        """
        graph = reconstruction.pruned.graph
        blocks, channels, columns = lin.size(graph)
        large = columns > dual.MAX_MOMENT_INPUTS or blocks * channels * columns > MANY_WEIGHTS
        matrix = lin.matrix(graph, np.float32 if large else np.float64)
        if slot is None:
            after = find_tail(graph, lin.node, blocks * channels, lin.channel_axis)
            slot = BiasSlot.find(reconstruction.pruned, lin, after, self.served_by_fit(graph, lin))
        fitted = self.fit_weights(reconstruction, lin, rows, matrix, slot)
        if slot is not None:
            constant = rows.mean_t - np.einsum("goi,gi->go", fitted, rows.mean_x)
            slot.set(constant.reshape(-1))
        return slot

    def _all_rows(
        self,
        reconstruction: Reconstruction,
        target: Linear,
        lin: Linear,
        inputs: Inputs | None = None,
    ) -> Rows:
        """Gather the inputs and the targets of a layer from all batches.

        Args:
            reconstruction: both networks.
            target: the layer in the dense network.
            lin: the layer in the pruned network.
            inputs: returns the inputs to learn from, by the number of a batch; those of the streams by default.
        """
        graph = reconstruction.pruned.graph
        blocks, channels, _ = lin.size(graph)
        rows = self.rows_for(graph, lin, reconstruction.samples(target))
        _gather(
            rows, reconstruction, target, lin, find_tail(graph, lin.node, blocks * channels, lin.channel_axis), inputs
        )
        return rows

    def _pair(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> LayerPair | None:
        """Return a reader of removed channels with its producer, in the pruned network, if both are refitted."""
        lin = linear(reconstruction.pruned.graph, pruned_node) if reconstruction.settings.producer_rounds else None
        kept, reads = reconstruction.kept, reconstruction.analysis.laws[node.index].reads
        pruned = any(kept.size(read.expr) != read.expr.size for read in reads)
        return find_pair(reconstruction.pruned.graph, lin) if lin is not None and pruned else None


def _observed_rows(stream: Stream, lin: Linear, rng: np.random.Generator) -> tuple[Fitted, Array]:
    """Return rows of a reader, and the square root of each output's weight in the loss, (blocks, outputs)."""
    graph, name = stream.graph, lin.node.outputs[0]
    samples = sum(lin.samples(b.shape(name)) for b in stream.live)
    blocks, channels, size = lin.size(graph)
    after = find_tail(graph, lin.node, blocks * channels, lin.channel_axis)
    # A loss is relative to the residual sum if the block adds to what it reads. Branches side by side, as in the
    # first block of a stage, are each measured alone, whichever is computed first.
    skip = after.addend if after.addend and graph.depends(lin.source, before_transpose(graph, after.addend)) else ""
    rows, addend = accumulator(size, samples, cross=False), Moments(cross=False)
    for batch in stream.live:
        x, y = batch[lin.source], batch[name]
        chosen = draw_positions(rng, lin, y.shape, samples, size)
        add_rows(rows, graph, lin, x, Targets(y, batch.real), chosen)
        if skip in batch and (addition := after.aligned(batch[skip])).shape == y.shape:
            s = lin.output_rows(addition, chosen)[:, lin.real_rows(batch.real, y.shape, chosen)]
            addend.add(s[:, :, :1], s)
    energy = float((np.square(after.scale) * rows.tt.reshape(-1)).sum())
    if addend.count:
        energy += float(addend.tt.sum())
    return rows, after.scale.reshape(blocks, channels) / np.sqrt(energy if energy > 0 else 1.0)


def _gather(
    rows: Rows,
    reconstruction: Reconstruction,
    target: Linear,
    lin: Linear,
    after: Tail,
    inputs: Inputs | None,
) -> None:
    """Add the inputs and the targets of a layer of the pruned network to rows."""
    graph, name = reconstruction.pruned.graph, target.node.outputs[0]
    columns = lin.size(graph)[2]
    for number in range(len(reconstruction.dense.live)):
        dense_batch, pruned_batch = reconstruction.dense.live[number], reconstruction.pruned.live[number]
        y = reconstruction.kept_part(name, dense_batch)
        chosen = draw_positions(reconstruction.rng, lin, y.shape, reconstruction.samples(target), columns)
        lost = branch_loss(reconstruction, after, dense_batch, pruned_batch, y.shape)
        if inputs is None:
            x = reconstruction.blended(target.source, lin.source, dense_batch, pruned_batch)
        else:
            x = inputs(number)
        add_rows(rows, graph, lin, x, Targets(y, dense_batch.real, lost, inverse_scale(after)), chosen)


def fit(reconstruction: Reconstruction, lin: Linear, rows: Fitted, prior: Array, mean: bool) -> Array:
    """Fit the weights of a layer of the pruned network by damped least squares, and store them.

    Where the weights are integers, the fit is rounded to their grid, and each output keeps its row so far if that is
    nearer to the fit, as the inputs weigh it.

    Args:
        reconstruction: both networks.
        lin: the layer.
        rows: its inputs and targets.
        prior: its weights so far, (blocks, outputs, inputs).
        mean: whether to fit about the means, which a bias takes over.

    Returns:
        The weights as they are stored, of the same shape.
    """
    damping = damping_for(reconstruction.settings.damping, prior.shape[2], rows.count)
    if isinstance(rows, dual.Rows):
        fitted = dual.least_squares(rows, prior, damping, mean)
    else:
        fitted = least_squares(rows, prior, damping, mean)
    store(reconstruction.pruned, lin, fitted)
    if lin.weights.exact:
        return fitted
    rounded = lin.matrix(reconstruction.pruned.graph, prior.dtype)
    worse = rows.energy(rounded - fitted, mean) >= rows.energy(prior - fitted, mean)
    found = np.where(worse[:, :, None], prior, rounded)
    store(reconstruction.pruned, lin, found)
    return found
