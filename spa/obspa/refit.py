"""Reconstruction: every linear layer after a cut is refitted so that it does what it did in the dense network.

Layer by layer in topological order. The target is what the layer gives in the dense network, the inputs are what the
network pruned and refitted so far gives it (asymmetric), and at a residual sum the target includes what the other
branch has lost. Each fit is a closed-form least squares with the mean moved into the bias. The layer before a cut is
refitted with its reader, see `spa.obspa.producers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import ModelProto

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.errors import InvariantError
from spa.model.graph import Node
from spa.model.traits import Trait, traits
from spa.obspa import dual, products, recurrent
from spa.obspa.affine import Tail, tail
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import Moments, cautious, least_squares
from spa.obspa.producers import Pair, pair, refine
from spa.obspa.score import gatherer, places
from spa.obspa.tied import joint
from spa.running.runtime import run
from spa.running.stream import Bias, Feeds, Stream, sliced

Array = np.ndarray


def reconstruct(
    analysis: Analysis,
    plan: Plan,
    pruned: ModelProto,
    batches: Sequence[Feeds],
    threads: int = 2,
    seed: int = 0,
    damping: float = 1e-3,
    trust: float = 1.0,
    nodes: Set[int] | None = None,
    producers: bool = False,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Stream:
    """Refit the layers of a pruned model in place.

    Args:
        analysis: the dense model.
        plan: what was pruned.
        pruned: the model that surgery gave; its weights are replaced.
        batches: calibration inputs.
        threads: of onnxruntime.
        seed: of the places that the fits see.
        damping: λ of the fits, a fraction of the mean input variance; pulls towards the dense weights.
        trust: the share of the pruned network's own inputs in what a fit sees; the rest are the dense network's. Errors
            of earlier layers are learnt on few inputs, so mending them in full does not carry over to others.
        nodes: the only nodes (by index in the dense network) to refit; all by default.
        producers: whether layers before a cut are refitted for the sake of those behind it, too.
        progress: called with a stage and the share that is done.

    Returns:
        The pruned network's stream, which knows every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    small = Stream(pruned, analysis.graph.base, batches, threads)
    fits = _Fits(analysis, kept, dense, small, np.random.default_rng(seed), damping, trust)
    changed = list(layers(analysis, kept, dense, small))
    pairs = {node.index: two for node, twin in changed if producers and (two := fits.pair(node, twin)) is not None}
    for node, twin in changed:
        target, lin = linear(dense.graph, node), linear(small.graph, twin)
        is_cell = recurrent.cell(small.graph, twin) is not None
        is_cut = products.pair(small.graph, twin) is not None and products.is_cut(analysis, kept, node)
        if (nodes is not None and node.index not in nodes) or not ((lin and target) or is_cell or is_cut):
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        small.before(twin)
        if lin is not None and target is not None:
            shift = fits.layer(target, lin)
            if node.index in pairs and (inputs := fits.producer(target, pairs[node.index])):
                fits.layer(target, lin, inputs, shift)
        elif is_cell:
            recurrent.refit(analysis, kept, dense, small, node, twin, fits.rng, damping)
        else:
            products.refit(analysis, kept, dense, small, node, twin, damping)
    return small


def layers(analysis: Analysis, kept: Kept, dense: Stream, small: Stream) -> Iterator[tuple[Node, Node]]:
    """Nodes with weights, and products, that read what pruning has changed, in the dense and in the pruned network."""
    for index in _changed(analysis, kept):
        node = dense.graph.nodes[index]
        twin = small.graph.producer.get(next(o for o in node.outputs if o))
        if twin is not None:
            yield node, twin


def _changed(analysis: Analysis, kept: Kept) -> list[int]:
    """Nodes with weights that read something which pruning has changed."""
    changed: set[str] = set()
    found = []
    for index in sorted(analysis.laws):
        law = analysis.laws[index]
        cut = any(kept.size(r.expr) != r.expr.size for r in law.reads)
        if cut or changed.intersection(law.node.inputs):
            changed.update(law.node.outputs)
            if law.reads:
                found.append(index)
    return found


@dataclass(frozen=True)
class _Fits:
    """The dense and the pruned network at the same place, and how fits are made."""

    analysis: Analysis
    kept: Kept
    dense: Stream
    small: Stream
    rng: np.random.Generator
    damping: float
    trust: float

    def layer(
        self,
        target: Linear,
        lin: Linear,
        inputs: Callable[[int], Array] | None = None,
        shift: Shift | None = None,
    ) -> Shift | None:
        """Fit a layer; where its constant went.

        Args:
            target: it in the dense network.
            lin: it in the pruned network.
            inputs: what it learns from, by the number of a batch.
            shift: where its constant goes, of an earlier fit.
        """
        graph, name = self.small.graph, target.node.outputs[0]
        blocks, channels, columns = lin.size(graph)
        matrix = lin.matrix(graph, np.float64 if columns <= dual.LARGEST else np.float32)
        after = tail(graph, lin.node, blocks * channels, lin.channel_axis)
        rows = gatherer(columns, self._samples(target))
        for number in range(len(self.dense.live)):
            big, little = self.dense.live[number], self.small.live[number]
            y = self._wanted(name, big)
            chosen = places(self.rng, lin, y.shape, self._samples(target), columns)
            t = lin.outputs(y, chosen)
            lost = self._lost(after, big, little, y.shape)
            if lost is not None:
                t = t + lin.outputs(lost, chosen) * _inverse(after).reshape(lin.blocks, 1, -1)
            x = self._between(target.source, lin.source, big, little) if inputs is None else inputs(number)
            rows.add(lin.inputs(x, y.shape, graph, chosen), t)
        everyone = uses(graph, lin) or []
        first = bool(everyone) and lin.node.index == min(u.node.index for u in everyone)
        shift = shift or Shift.place(self.small, lin, after, everyone if first else [lin])
        if first:
            one_mean = shift is None or (lin.bias is not None and len(graph.users[lin.bias]) > 1)
            others = [u for u in everyone if u.node is not lin.node]
            used = rows
            if others and isinstance(rows, Moments):
                used = joint(self.analysis, self.kept, self.dense, rows, others, self.rng, one_mean)
            fitted = _fit(used, matrix, self.damping, shift is not None)
            _store(self.small, lin, fitted)
        else:  # the weights are others', too: the mean alone can be put right
            fitted = matrix
        if shift is not None:
            constant = rows.mean_t - np.einsum("goi,gi->go", fitted, rows.mean_x)
            shift.set(constant.reshape(-1))
        return shift

    def _samples(self, target: Linear) -> int:
        return sum(target.samples(b[target.node.outputs[0]].shape) for b in self.dense.live)

    def _wanted(self, name: str, big: Feeds) -> Array:
        """A dense tensor's part that the pruned network has."""
        return sliced(self.kept, self.analysis.axes.get(name), big[name])

    def _lost(self, after: Tail, big: Feeds, little: Feeds, shape: tuple[int, ...]) -> Array | None:
        """What the other branch of the residual sum has lost; None where there is none of the layer's shape."""
        if after.addend is None or after.addend not in big or after.addend not in little:
            return None
        lost = after.aligned(self._wanted(after.addend, big) - little[after.addend])
        return lost if lost.shape == shape else None

    def _between(self, name: str, own: str, big: Feeds, little: Feeds) -> Array:
        """Inputs between the dense and the pruned network's, where the shapes agree."""
        small = little[own]
        if self.trust == 1:
            return small
        dense = self._wanted(name, big)
        if dense.shape != small.shape:
            return small
        return np.asarray(dense + self.trust * (small - dense), small.dtype)

    def pair(self, node: Node, twin: Node) -> Pair | None:
        """A cut layer of the pruned network with the one that makes its inputs, whose own inputs are held from now."""
        lin = linear(self.small.graph, twin)
        cut = any(self.kept.size(r.expr) != r.expr.size for r in self.analysis.laws[node.index].reads)
        two = pair(self.small.graph, lin) if lin is not None and cut else None
        if two is not None:
            self.small.hold(two.producer.source, twin)
            self.dense.hold(self._dense(two.producer).source, node)
        return two

    def _dense(self, lin: Linear) -> Linear:
        """A layer of the pruned network in the dense one."""
        found = linear(self.dense.graph, self.dense.graph.producer[lin.node.outputs[0]])
        if found is None:
            raise InvariantError(f"{lin.node.label} is linear in the pruned network alone.")
        return found

    def producer(self, target: Linear, two: Pair) -> Callable[[int], Array] | None:
        """Refit the layer before one; the latter's inputs from then on, None where they stay as they are."""
        small, reader = self.small, two.reader
        p = linear(small.graph, two.producer.node)
        first, output = small.live[0], target.node.outputs[0]
        shape = self._wanted(output, self.dense.live[0]).shape
        if p is None or not two.by_sample(small.graph, first[p.source], first[reader.source], shape):
            return None
        source = self._dense(p).source
        blocks, channels, _ = reader.size(small.graph)
        after = tail(small.graph, reader.node, blocks * channels, reader.channel_axis)
        used = two.share(small.graph, self._samples(target), first[reader.source].shape, shape)
        xs, ts = [], []
        for everything in zip(self.dense.live, small.live, strict=True):
            samples = len(everything[1][p.source])
            some = np.linspace(0, samples, max(1, round(used * samples)), endpoint=False).astype(int)
            seen = {source, output, p.source, after.addend}
            big, little = ({n: v[some] for n, v in b.items() if n in seen and len(v) == samples} for b in everything)
            t = self._wanted(output, big)
            lost = self._lost(after, big, little, t.shape)
            if lost is not None:
                t = t + lost * np.expand_dims(_inverse(after), reader.other_axes(t.ndim))
            xs.append(self._between(source, p.source, big, little))
            ts.append(t)
        before = tail(small.graph, p.node, p.size(small.graph)[1], p.channel_axis)
        place = Shift.place(small, p, before, [p])
        x, t = np.concatenate(xs), np.concatenate(ts)
        del xs, ts
        found = refine(small, two, x, t, after.scale, self.damping, place is not None)
        if found is None:
            return None
        _store(small, p, p.matrix(small.graph) + found[0][None])
        if place is not None:
            place.move(found[1])
        again = small.session([p.node, *two.chain], p.source, reader.source, x)
        for batch in small.live:
            batch[reader.source] = small.stored(run(again, {p.source: batch[p.source]})[0])

        def inputs(number: int) -> Array:
            x = self._between(source, p.source, self.dense.live[number], small.live[number])
            return np.asarray(run(again, {p.source: x})[0])

        return inputs


def _fit(rows: Moments | dual.Rows, prior: Array, damping: float, mean: bool) -> Array:
    """The least squares of what was gathered, with the means left out where they can go into a bias."""
    damping = cautious(damping, prior.shape[2], rows.count)
    if isinstance(rows, dual.Rows):
        return dual.least_squares(rows, prior, damping, mean)
    return least_squares(rows if mean else rows.without_mean(), prior, damping)


def _store(stream: Stream, lin: Linear, fitted: Array) -> None:
    weights = lin.weights_from(fitted, stream.graph)
    stream.replace(lin.weight, weights)
    for user, _ in stream.graph.users[lin.weight]:
        if user.op == "Transpose":  # it may have run already
            for batch in stream.live:
                if user.outputs[0] in batch:
                    batch[user.outputs[0]] = weights.T


def _inverse(after: Tail) -> Array:
    """What the residual sum is to a unit of each of the layer's outputs; none where hardly anything gets there."""
    size = np.abs(after.scale)
    usable = size > 1e-2 * np.median(size)
    return np.where(usable, 1.0 / np.where(usable, after.scale, 1.0), 0.0).astype(np.float32)


class Shift:
    """Where a layer's constant goes: its bias, the mean of the BatchNormalization behind it, or a new bias.

    Attributes:
        stream: the network.
        name: of the constant vector.
        factor: a change of it per change of the layer's output.
        base: what it is where the layer's own constant is zero.
    """

    def __init__(self, stream: Stream, name: str, factor: float, base: Array) -> None:
        self.stream, self.name, self.factor, self.base = stream, name, factor, base

    @classmethod
    def place(cls, stream: Stream, lin: Linear, after: Tail, everyone: Sequence[Linear]) -> Shift | None:
        """Find the place, or make it; None where there is none. ``everyone`` may share the layer's bias."""
        graph, width = stream.graph, after.scale.size
        if lin.bias is not None:
            if lin.bias not in graph.constants:
                return None
            dims = list(graph.constants[lin.bias].dims)
            readers = {n.index for n, _ in graph.users[lin.bias]}
            shared = readers not in ({lin.node.index}, {u.node.index for u in everyone})
            if shared or dims[-1:] != [width] or prod(dims) != width:
                return None
            return cls(stream, lin.bias, 1 / lin.bias_scale, np.zeros(()))
        if after.mean is not None:
            return cls(stream, after.mean, -1.0, graph.array(after.mean))
        if after.bias is not None:
            return cls(stream, after.bias, 1.0, graph.array(after.bias).reshape(-1))
        if Trait.BIASED in traits(lin.node.key):
            name = stream.add_bias(lin.node, Bias((width,), lin.weight))
            return cls(stream, name, 1 / lin.bias_scale, np.zeros(()))
        return None

    def set(self, constant: Array) -> None:
        """Store the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (self.base + self.factor * constant).reshape(old.shape).astype(old.dtype))

    def move(self, change: Array) -> None:
        """Add to the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (old + self.factor * change.reshape(old.shape)).astype(old.dtype))
