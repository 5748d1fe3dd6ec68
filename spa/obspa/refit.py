"""Reconstruction: every linear layer after a cut is refitted so that it does what it did in the dense network.

Layer by layer in topological order. The target is what the layer gives in the dense network, the inputs are what the
network pruned and refitted so far gives it (asymmetric), and at a residual sum the target includes what the other
branch has lost. Each fit is a closed-form least squares with the mean moved into the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

import numpy as np
from onnx import ModelProto

from spa.axes import Axes, Kept
from spa.coupling import Analysis
from spa.obspa.affine import Tail, tail
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Moments, least_squares
from spa.obspa.score import places
from spa.obspa.stream import Feeds, Stream
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
        nodes: the only nodes (by index in the dense network) to refit; all by default.
        progress: called with a stage and the share that is done.

    Returns:
        The pruned network's stream, which knows every edit.
    """
    kept = analysis.kept(plan.masks(analysis))
    dense = Stream(analysis.graph.model, analysis.graph.base, batches, threads)
    small = Stream(pruned, analysis.graph.base, batches, threads)
    rng = np.random.default_rng(seed)
    for target, lin in layers(analysis, kept, dense, small, progress, nodes):
        _refit(analysis, kept, dense, small, target, lin, rng, damping)
    return small


def layers(
    analysis: Analysis,
    kept: Kept,
    dense: Stream,
    small: Stream,
    progress: Callable[[str, float], None],
    nodes: Set[int] | None = None,
) -> Iterator[tuple[Linear, Linear]]:
    """The linear layers that read something which pruning has changed, in the dense and in the pruned network.

    Both networks run in lockstep: the dense one up to and with the layer, the pruned one up to it. Of ``nodes``, where
    they are given, no others.
    """
    for index in _changed(analysis, kept):
        node = dense.graph.nodes[index]
        twin = small.graph.producer.get(node.outputs[0])
        target = linear(dense.graph, node)
        lin = None if twin is None else linear(small.graph, twin)
        if lin is None or target is None or (nodes is not None and index not in nodes):
            continue
        progress("reconstruct", index / len(dense.graph.nodes))
        dense.after(node)
        small.before(lin.node)
        yield target, lin


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


def sliced(kept: Kept, axes: Axes | None, value: Array) -> Array:
    """A dense tensor's part that the pruned network has."""
    for axis, expr in enumerate(axes or ()):
        if kept.size(expr) != expr.size and value.shape[axis] == expr.size:
            value = np.compress(kept.mask(expr), value, axis=axis)
    return value


def _refit(
    analysis: Analysis,
    kept: Kept,
    dense: Stream,
    small: Stream,
    target: Linear,
    lin: Linear,
    rng: np.random.Generator,
    damping: float,
) -> None:
    name = target.node.outputs[0]
    axes = analysis.axes.get(name)
    matrix = lin.matrix(small.graph)
    samples = sum(b[name].shape[0] for b in dense.live)
    after = tail(small.graph, lin.node, matrix.shape[0] * matrix.shape[1], lin.channel_axis)
    moments = Moments()
    for big, little in zip(dense.live, small.live, strict=True):
        y = sliced(kept, axes, big[name])
        chosen = places(rng, lin, y.shape, samples, matrix.shape[2])
        t = lin.outputs(y, chosen)
        t = t + _owed(kept, analysis, lin, after, big, little, chosen, y.shape)
        moments.add(lin.inputs(little[lin.node.inputs[0]], y.shape, small.graph, chosen), t)
    shift = Shift.place(small, lin, after)
    used = moments if shift is not None else moments.without_mean()
    # Fewer rows than unknowns would fit noise: the pull towards the given weights grows with their ratio.
    fitted = least_squares(used, matrix, damping * (1 + 10 * matrix.shape[2] / moments.count))
    weights = lin.weights_from(fitted, small.graph)
    small.replace(lin.weight, weights)
    if (turned := lin.node.inputs[1]) != lin.weight:  # the Transpose before the node has run already
        for batch in small.live:
            batch[turned] = weights.T
    if shift is not None:
        constant = moments.mean_t - np.einsum("goi,gi->go", fitted, moments.mean_x)
        shift.set(constant.reshape(-1))


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
        sign: with which it enters the layer's output.
        base: what it is where the layer's own constant is zero.
    """

    def __init__(self, stream: Stream, name: str, sign: float, base: Array) -> None:
        self.stream, self.name, self.sign, self.base = stream, name, sign, base

    @classmethod
    def place(cls, stream: Stream, lin: Linear, after: Tail) -> Shift | None:
        """Find the place, or make it; None where there is none."""
        graph = stream.graph
        if lin.bias is not None:
            if lin.bias in graph.constants and len(graph.users[lin.bias]) == 1 and graph.array(lin.bias).ndim == 1:
                return cls(stream, lin.bias, 1.0, np.zeros(()))
            return None
        if after.mean is not None:
            return cls(stream, after.mean, -1.0, graph.array(after.mean))
        if after.bias is not None:
            return cls(stream, after.bias, 1.0, graph.array(after.bias).reshape(-1))
        if lin.node.op in ("Conv", "Gemm"):
            width = lin.matrix(graph).shape[:2]
            return cls(stream, stream.append_bias(lin.node, width[0] * width[1]), 1.0, np.zeros(()))
        return None

    def set(self, constant: Array) -> None:
        """Store the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (self.base + self.sign * constant).reshape(old.shape).astype(old.dtype))

    def move(self, change: Array) -> None:
        """Add to the layer's constant."""
        old = self.stream.graph.array(self.name)
        self.stream.replace(self.name, (old + self.sign * change.reshape(old.shape)).astype(old.dtype))
