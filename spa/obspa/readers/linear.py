"""Linear layers: matrix products with constant weights of their own, and the layers before them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil

import numpy as np

from spa.algebra.axes import product
from spa.coupling.analysis import Analysis
from spa.errors import InvariantError
from spa.model.graph import Graph, Node
from spa.obspa import dual
from spa.obspa.affine import Tail, before_transpose, tail
from spa.obspa.curves import AnyReader, Reader, Seen
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Moments, cautious, least_squares
from spa.obspa.producers import Pair, pair, refine
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.obspa.shift import Shift
from spa.running.runtime import run
from spa.running.stream import Feeds, Stream

Array = np.ndarray
Rows = Moments | dual.Rows
ROWS = 40_000  # rows that a least-squares fit sees at most, or ten per unknown where that is more


def places(rng: np.random.Generator, lin: Linear, shape: tuple[int, ...], samples: int, inputs: int) -> Array:
    """Draw output places of each sample to learn from, without replacement."""
    total = lin.places(shape)
    wanted = ceil((max(ROWS, 10 * inputs) if inputs <= dual.LARGEST else dual.ROWS) / max(samples, 1))
    if wanted >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, wanted, replace=False))


def gatherer(inputs: int, samples: int, cross: bool = True) -> Rows:
    """Return what gathers rows of a product: their moments or, where these would be too large, some of the rows."""
    return Moments(cross) if inputs <= dual.LARGEST else dual.Rows(ceil(samples / dual.ROWS))


class LinearLayer(ReaderKind):
    """A matrix product with constant weights that nothing else reads (see :func:`spa.obspa.linear.linear`)."""

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is a matrix product with constant weights."""
        return linear(graph, node) is not None

    # -- scoring -----------------------------------------------------------------------------------------------

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Seen]:
        """Observe the layer as a reader of its input, through the moments of its rows or the rows themselves."""
        graph = stream.graph
        lin = linear(graph, node)
        axes = None if lin is None else analysis.axes.get(lin.source)
        if lin is None or axes is None:
            return []
        rows, unit = _observed_rows(stream, lin, rng)
        if isinstance(rows, Moments):
            w = lin.matrix(graph) * unit[:, :, None]
            of: Callable[[Array], AnyReader] = partial(Reader, rows.xx, w, rows=rows.count)
        elif lin.blocks == 1:
            of = partial(dual.RowReader, rows.centred()[0], dual.sketched(lin.matrix(graph, np.float32), unit[0], rng))
        else:
            return []
        inputs = analysis.space.resolve(product(*(axes[a] for a in lin.input_axes)))
        return [Seen(of, inputs, lin.blocks, lin.kernel_places(graph))]

    # -- refitting ---------------------------------------------------------------------------------------------

    def may_refit(self, at: Reconstruction, node: Node, twin: Node) -> bool:
        """Return whether the node is linear in the dense network, too."""
        return linear(at.dense.graph, node) is not None

    def prepare(self, at: Reconstruction, node: Node, twin: Node) -> None:
        """Hold the inputs of the layer before the cut, if that is to be refitted, too."""
        two = self._pair(at, node, twin)
        if two is not None:
            at.small.hold(two.producer.source, twin)
            at.dense.hold(_in_dense(at, two.producer).source, node)

    def refit(self, at: Reconstruction, node: Node, twin: Node) -> None:
        """Fit the layer by least squares, then the layer before it by the reader's error, then the layer once more."""
        target, lin = linear(at.dense.graph, node), linear(at.small.graph, twin)
        if target is None or lin is None:
            return
        two = self._pair(at, node, twin)
        shift = self._fit(at, target, lin)
        if two is not None and (inputs := _refit_producer(at, target, two)):
            self._fit(at, target, lin, inputs, shift)

    def sharing(self, graph: Graph, lin: Linear) -> list[Linear]:
        """Return the layers that one fit of the weights serves."""
        return [lin]

    def fitted(self, at: Reconstruction, lin: Linear, rows: Rows, matrix: Array, shift: Shift | None) -> Array:
        """Fit and store the weights.

        Args:
            at: both networks.
            lin: the layer in the pruned network.
            rows: its inputs and what it is to give.
            matrix: its weights so far, (blocks, outputs, inputs).
            shift: where its constant goes, or None.

        Returns:
            The weights from now on, of the same shape.
        """
        fitted = least_squares_of(rows, matrix, at.settings.damping, shift is not None)
        store(at.small, lin, fitted)
        return fitted

    def _fit(
        self,
        at: Reconstruction,
        target: Linear,
        lin: Linear,
        inputs: Callable[[int], Array] | None = None,
        shift: Shift | None = None,
    ) -> Shift | None:
        """Fit a layer; return where its constant went.

        Args:
            at: both networks.
            target: the layer in the dense network.
            lin: the layer in the pruned network.
            inputs: what it learns from, by the number of a batch; what the streams hold by default.
            shift: where its constant goes, of an earlier fit.
        """
        graph = at.small.graph
        blocks, channels, columns = lin.size(graph)
        matrix = lin.matrix(graph, np.float64 if columns <= dual.LARGEST else np.float32)
        after = tail(graph, lin.node, blocks * channels, lin.channel_axis)
        rows = _rows(at, target, lin, after, inputs)
        shift = shift or Shift.place(at.small, lin, after, self.sharing(graph, lin))
        fitted = self.fitted(at, lin, rows, matrix, shift)
        if shift is not None:
            constant = rows.mean_t - np.einsum("goi,gi->go", fitted, rows.mean_x)
            shift.set(constant.reshape(-1))
        return shift

    def _pair(self, at: Reconstruction, node: Node, twin: Node) -> Pair | None:
        """Return a cut layer with the one that makes its inputs, in the pruned network, if both are to be refitted."""
        lin = linear(at.small.graph, twin) if at.settings.refit_producers else None
        cut = any(at.kept.size(r.expr) != r.expr.size for r in at.analysis.laws[node.index].reads)
        return pair(at.small.graph, lin) if lin is not None and cut else None


def _observed_rows(stream: Stream, lin: Linear, rng: np.random.Generator) -> tuple[Rows, Array]:
    """Return rows of a reader, and what one unit of each output is worth (the root of it), (blocks, outputs)."""
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


def _rows(at: Reconstruction, target: Linear, lin: Linear, after: Tail, inputs: Callable[[int], Array] | None) -> Rows:
    """Gather what a layer of the pruned network reads, and what it is to give; arguments as in :meth:`_fit`."""
    graph, name = at.small.graph, target.node.outputs[0]
    columns = lin.size(graph)[2]
    rows = gatherer(columns, at.samples(target))
    for number in range(len(at.dense.live)):
        big, little = at.dense.live[number], at.small.live[number]
        y = at.wanted(name, big)
        chosen = places(at.rng, lin, y.shape, at.samples(target), columns)
        t = lin.outputs(y, chosen)
        lost = _lost(at, after, big, little, y.shape)
        if lost is not None:
            t = t + lin.outputs(lost, chosen) * _inverse(after).reshape(lin.blocks, 1, -1)
        x = at.between(target.source, lin.source, big, little) if inputs is None else inputs(number)
        rows.add(lin.inputs(x, y.shape, graph, chosen), t)
    return rows


def _lost(at: Reconstruction, after: Tail, big: Feeds, little: Feeds, shape: tuple[int, ...]) -> Array | None:
    """Return what the other branch of the residual sum has lost; None where there is none of the layer's shape."""
    if after.addend is None or after.addend not in big or after.addend not in little:
        return None
    lost = after.aligned(at.wanted(after.addend, big) - little[after.addend])
    return lost if lost.shape == shape else None


def _inverse(after: Tail) -> Array:
    """Return what undoes the scales of the layer's outputs; zero where hardly anything gets through."""
    size = np.abs(after.scale)
    usable = size > 1e-2 * np.median(size)
    return np.where(usable, 1.0 / np.where(usable, after.scale, 1.0), 0.0).astype(np.float32)


def least_squares_of(rows: Rows, prior: Array, damping: float, mean: bool) -> Array:
    """Fit what was gathered, about the means where these can go into a bias."""
    damping = cautious(damping, prior.shape[2], rows.count)
    if isinstance(rows, dual.Rows):
        return dual.least_squares(rows, prior, damping, mean)
    return least_squares(rows if mean else rows.without_mean(), prior, damping)


def store(stream: Stream, lin: Linear, fitted: Array) -> None:
    """Replace a layer's weights, and what a Transpose has made of them already."""
    weights = lin.weights_from(fitted, stream.graph)
    stream.replace(lin.weight, weights)
    for user, _ in stream.graph.users[lin.weight]:
        if user.op == "Transpose":
            for batch in stream.live:
                if user.outputs[0] in batch:
                    batch[user.outputs[0]] = weights.T


# -- the layer before a cut ----------------------------------------------------------------------------------------


def _in_dense(at: Reconstruction, lin: Linear) -> Linear:
    """Return a layer of the pruned network in the dense one."""
    found = linear(at.dense.graph, at.dense.graph.producer[lin.node.outputs[0]])
    if found is None:
        raise InvariantError(f"{lin.node.label} is linear in the pruned network alone.")
    return found


def _refit_producer(at: Reconstruction, target: Linear, two: Pair) -> Callable[[int], Array] | None:
    """Refit the layer before one; return the latter's inputs from then on, None where they stay as they are."""
    small = at.small
    p = linear(small.graph, two.producer.node)
    first = small.live[0]
    shape = at.wanted(target.node.outputs[0], at.dense.live[0]).shape
    if p is None or not two.by_sample(small.graph, first[p.source], first[two.reader.source], shape):
        return None
    source = _in_dense(at, p).source
    blocks, channels, _ = two.reader.size(small.graph)
    after = tail(small.graph, two.reader.node, blocks * channels, two.reader.channel_axis)
    x, t = _some_samples(at, target, two, p, source, after)
    before = tail(small.graph, p.node, p.size(small.graph)[1], p.channel_axis)
    place = Shift.place(small, p, before, [p])
    found = refine(small, two, x, t, after.scale, at.settings.damping, place is not None)
    if found is None:
        return None
    store(small, p, p.matrix(small.graph) + found[0][None])
    if place is not None:
        place.move(found[1])
    again = small.session([p.node, *two.chain], p.source, two.reader.source, x)
    for batch in small.live:
        batch[two.reader.source] = small.stored(run(again, {p.source: batch[p.source]})[0])

    def inputs(number: int) -> Array:
        x = at.between(source, p.source, at.dense.live[number], small.live[number])
        return np.asarray(run(again, {p.source: x})[0])

    return inputs


def _some_samples(
    at: Reconstruction, target: Linear, two: Pair, p: Linear, source: str, after: Tail
) -> tuple[Array, Array]:
    """Return the inputs of a producer, and what its reader is to give, on the samples that steps look at.

    Args:
        at: both networks.
        target: the reader in the dense network.
        two: both layers in the pruned network.
        p: the producer there.
        source: the name of the producer's inputs in the dense network.
        after: what follows the reader.
    """
    small, reader, output = at.small, two.reader, target.node.outputs[0]
    first = small.live[0]
    shape = at.wanted(output, at.dense.live[0]).shape
    used = two.share(small.graph, at.samples(target), first[reader.source].shape, shape)
    xs, ts = [], []
    for everything in zip(at.dense.live, small.live, strict=True):
        samples = len(everything[1][p.source])
        some = np.linspace(0, samples, max(1, round(used * samples)), endpoint=False).astype(int)
        seen = {source, output, p.source, after.addend}
        big, little = ({n: v[some] for n, v in b.items() if n in seen and len(v) == samples} for b in everything)
        t = at.wanted(output, big)
        lost = _lost(at, after, big, little, t.shape)
        if lost is not None:
            t = t + lost * np.expand_dims(_inverse(after), reader.other_axes(t.ndim))
        xs.append(at.between(source, p.source, big, little))
        ts.append(t)
    return np.concatenate(xs), np.concatenate(ts)
