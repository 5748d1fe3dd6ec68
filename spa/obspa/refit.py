"""Reconstruction: every linear layer after a cut is refitted so that it does what it did in the dense network.

Layer by layer in topological order. The target is what the layer gives in the dense network, the inputs are what the
network pruned and refitted so far gives it (asymmetric), and at a residual sum the target includes what the other
branch has lost. Each fit is a closed-form least squares with the mean moved into the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from math import prod

import numpy as np
from onnx import ModelProto

from spa.axes import Kept
from spa.coupling import Analysis
from spa.graph import Node
from spa.obspa import dual, products, recurrent
from spa.obspa.affine import Tail, tail
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import Moments, cautious, least_squares
from spa.obspa.score import gatherer, places
from spa.obspa.stream import Bias, Feeds, Stream, sliced
from spa.obspa.tied import joint
from spa.plan import Plan

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
        progress: called with a stage and the share that is done.

    Returns:
        The pruned network's stream, which knows every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    small = Stream(pruned, analysis.graph.base, batches, threads)
    rng = np.random.default_rng(seed)
    for node, twin in layers(analysis, kept, dense, small):
        target, lin = linear(dense.graph, node), linear(small.graph, twin)
        is_cell = recurrent.cell(small.graph, twin) is not None
        is_cut = products.pair(small.graph, twin) is not None and products.is_cut(analysis, kept, node)
        if (nodes is not None and node.index not in nodes) or not ((lin and target) or is_cell or is_cut):
            continue
        progress("reconstruct", node.index / len(dense.graph.nodes))
        dense.after(node)
        small.before(twin)
        if lin is not None and target is not None:
            _refit(analysis, kept, dense, small, target, lin, rng, damping, trust)
        elif is_cell:
            recurrent.refit(analysis, kept, dense, small, node, twin, rng, damping)
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


def _refit(
    analysis: Analysis,
    kept: Kept,
    dense: Stream,
    small: Stream,
    target: Linear,
    lin: Linear,
    rng: np.random.Generator,
    damping: float,
    trust: float,
) -> None:
    name = target.node.outputs[0]
    axes = analysis.axes.get(name)
    blocks, channels, inputs = lin.size(small.graph)
    matrix = lin.matrix(small.graph, np.float64 if inputs <= dual.LARGEST else np.float32)
    samples = sum(lin.samples(b[name].shape) for b in dense.live)
    after = tail(small.graph, lin.node, blocks * channels, lin.channel_axis)
    rows = gatherer(inputs, samples)
    for big, little in zip(dense.live, small.live, strict=True):
        y = sliced(kept, axes, big[name])
        chosen = places(rng, lin, y.shape, samples, inputs)
        t = lin.outputs(y, chosen)
        t = t + _owed(kept, analysis, lin, after, big, little, chosen, y.shape)
        x = _between(sliced(kept, analysis.axes.get(target.source), big[target.source]), little[lin.source], trust)
        rows.add(lin.inputs(x, y.shape, small.graph, chosen), t)
    everyone = uses(small.graph, lin) or []
    first = bool(everyone) and lin.node.index == min(u.node.index for u in everyone)
    shift = Shift.place(small, lin, after, everyone if first else [lin])
    if first:
        one_mean = shift is None or (lin.bias is not None and len(small.graph.users[lin.bias]) > 1)
        others = [u for u in everyone if u.node is not lin.node]
        used = rows
        if others and isinstance(rows, Moments):
            used = joint(analysis, kept, dense, rows, others, rng, one_mean)
        fitted = _fit(used, matrix, damping, shift is not None)
        _store(small, lin, fitted)
    else:  # the weights are others', too: the mean alone can be put right
        fitted = matrix
    if shift is not None:
        constant = rows.mean_t - np.einsum("goi,gi->go", fitted, rows.mean_x)
        shift.set(constant.reshape(-1))


def _between(dense: Array, small: Array, trust: float) -> Array:
    """Inputs between the dense and the pruned network's, where the shapes agree."""
    if trust == 1 or dense.shape != small.shape:
        return small
    return np.asarray(dense + trust * (small - dense), small.dtype)


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


def _owed(
    kept: Kept,
    analysis: Analysis,
    lin: Linear,
    after: Tail,
    big: Feeds,
    little: Feeds,
    chosen: Array,
    shape: tuple[int, ...],
) -> Array | float:
    """What the other branch of the residual sum has lost, in units of the layer's output."""
    if after.addend is None or after.addend not in big or after.addend not in little:
        return 0.0
    lost = sliced(kept, analysis.axes.get(after.addend), big[after.addend]) - little[after.addend]
    if lost.shape != shape:
        return 0.0
    size = np.abs(after.scale)
    usable = size > 1e-2 * np.median(size)
    inverse = np.where(usable, 1.0 / np.where(usable, after.scale, 1.0), 0.0).astype(np.float32)
    return lin.outputs(lost, chosen) * inverse.reshape(lin.blocks, 1, -1)


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
        if lin.node.op in ("Conv", "ConvTranspose", "Gemm"):
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
