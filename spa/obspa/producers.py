"""Refit the layer that feeds a pruned layer, so that its remaining channels preserve the consumer's output.

The reader's least squares makes the most of the remaining channels as they are; here the producer of the channels
changes, too. For the reader's error |T − W f(V x)|² the producer's weights V take Gauss-Newton steps through the
activation f between the two. The curvature is approximated by a Kronecker product A ⊗ G (K-FAC, Martens and Grosse,
2015): A = E[x xᵀ], and G = (Wᵀ W) ∘ E[f' f'ᵀ].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.model.graph import Graph, Node
from spa.model.traits import Trait, traits
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import Damped, at_least_single, damping_for
from spa.running.runtime import run
from spa.running.stream import Stream

Array = np.ndarray
MAX_ROWS = 20_000  # the most rows of the reader's output that steps learn from, or ten per unknown if that is more
MAX_INPUTS = 3072  # the most matrix columns of either layer: larger moments take seconds per layer
MAX_VALUES = 10_000_000  # the most values in a matrix of either layer's rows: 40 MB in float32
STEPS = 6  # chosen by the outputs of ResNet-20 and ResNet-56 on held-out inputs (benchmarks/results/ablation.md)
QUICK_STEPS = 1  # of the quick repair, on half of the rows
MIN_GAIN = 0.02  # a step that removes a smaller fraction of the loss is the last, and so is a round of steps
LONG_ENOUGH = 0.8  # of the best length of a step, up to which none is looked for: that would cost another evaluation
CURVATURE_ROWS = 4000  # that A is the mean of, or five per unknown if that is more: A only bends the steps
ACROSS_ROUNDING = 0.2  # of the outputs' standard deviation: differences that span several steps of rounded activations
CURVATURE_DAMPING = 0.1  # added to the diagonal of G, a fraction of its mean


@dataclass(frozen=True)
class LayerPair:
    """A linear layer whose outputs only one other linear layer reads, through element-wise operators.

    Attributes:
        producer: the first layer.
        chain: the operators between the pair, in order.
        reader: the second layer.
    """

    producer: Linear
    chain: tuple[Node, ...]
    reader: Linear

    def samples_first(self, graph: Graph, x: tuple[int, ...], between: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Return whether samples lie along the first axis throughout, and no constant between differs by sample.

        Args:
            graph: the network.
            x: the shape of the producer's input.
            between: that of the reader's input.
            shape: that of the reader's output.
        """
        vectors = [graph.constants[c].dims for node in self.chain for c in node.inputs if c in graph.constants]
        return (
            x[0] == between[0] == shape[0]
            and self.producer.samples_first(len(x), len(between))
            and self.reader.samples_first(len(between), len(shape))
            and not any(len(dims) >= len(between) and dims[0] > 1 for dims in vectors)
        )

    def sample_fraction(
        self, graph: Graph, samples: int, before: tuple[int, ...], after: tuple[int, ...], quick: bool
    ) -> float:
        """Return the fraction of the samples that steps learn from.

        Args:
            graph: the network.
            samples: the number of all samples.
            before: the shape of the reader's input.
            after: the shape of the reader's output.
            quick: whether half of the rows must do.
        """
        rows, held = MAX_ROWS // 2 if quick else MAX_ROWS, []
        for lin, shape in ((self.producer, before), (self.reader, after)):
            _, outputs, columns = lin.size(graph)
            held.append(samples * lin.positions(shape) * max(outputs, columns))
            rows = max(rows, 10 * columns)
        return min(1.0, rows / (samples * self.reader.positions(after)), MAX_VALUES / max(held))


@dataclass(frozen=True)
class Changes:
    """The changes that steps make to a producer.

    Attributes:
        matrix: the change of its matrix, (outputs, inputs).
        bias: that of its bias, (outputs,).
        removed: the fraction of the reader's loss that is gone.
    """

    matrix: Array
    bias: Array
    removed: float


def find_pair(graph: Graph, reader: Linear) -> LayerPair | None:
    """Find the only layer that a reader's inputs are computed from; None if there is none, or if others read it."""
    if reader.blocks != 1 or len(reader.input_axes) != 1 or reader.channel_axis is None:
        return None
    if len(uses(graph, reader) or ()) != 1:
        return None
    region: dict[int, Node] = {}
    makers: dict[int, Linear] = {}
    todo = [
        reader.source
    ]  # no networkx: the search stops at layers, and fails at the first other node that is not smooth
    while todo:
        node = graph.producer.get(todo.pop())
        if node is None:
            return None
        lin = linear(graph, node)
        if lin is not None:
            makers[node.index] = lin
        elif not traits(node.key) & {Trait.SMOOTH, Trait.QUANTISING} or any(node.outputs[1:]):
            return None
        elif node.index not in region:
            region[node.index] = node
            todo += [x for x in node.inputs if x and x not in graph.constants]
    if len(makers) != 1:
        return None
    producer = next(iter(makers.values()))
    if producer.blocks != 1 or producer.channel_axis is None or len(uses(graph, producer) or ()) != 1:
        return None
    if max(producer.size(graph)[2], reader.size(graph)[2]) > MAX_INPUTS:
        return None
    inside = {*region, reader.node.index}
    for name in (o for node in (producer.node, *region.values()) for o in node.outputs if o):
        if name in graph.outputs or any(user.index not in inside for user, _ in graph.users.get(name, ())):
            return None
    return LayerPair(producer, tuple(region[i] for i in sorted(region)), reader)


class GaussNewton:
    """Steps on a producer's weights towards its reader's target, on some samples; the reader's weights stay.

    Notation as at the top of the module.

    Args:
        pruned: the pruned network.
        pair: both layers.
        x: the producer's inputs.
        target: the reader's target outputs, up to a constant for each channel.
        scale: the factor of the error of each of the reader's output channels, (channels,).
        constants: whether the producer's bias can change.
        real: which positions of the samples count, (samples, positions); all by default.
    """

    def __init__(
        self,
        pruned: Stream,
        pair: LayerPair,
        x: Array,
        target: Array,
        scale: Array,
        constants: bool,
        real: Array | None = None,
    ) -> None:
        graph, p, reader = pruned.graph, pair.producer, pair.reader
        self.graph, self.pair, self.name, self.constants = graph, pair, p.node.outputs[0], constants
        self.z0 = run(pruned.session([p.node], p.source, self.name, x), {p.source: x})[0]
        self.chain = pruned.session(pair.chain, self.name, reader.source, self.z0) if pair.chain else None
        self.both = pruned.session([*pair.chain, reader.node], self.name, reader.node.outputs[0], self.z0)
        self.x = at_least_single(p.input_rows(x, self.z0.shape, graph, np.arange(p.positions(self.z0.shape)))[0])
        if constants:
            self.x = np.concatenate([self.x, np.ones_like(self.x[:, :1])], axis=1)
        self.others = reader.other_axes(target.ndim)
        self.scale = np.expand_dims(np.abs(scale).astype(self.x.dtype), self.others)
        self.target = target * self.scale
        self.real, self.count = self._aligned(real, target.shape), len(self.x)
        if self.real is not None:
            self.count = int(self.real.sum())
            self.x = self.x * p.output_rows(self.real, np.arange(self.real.shape[1]))[0]
        self.w = reader.matrix(graph, self.x.dtype) * np.abs(scale).astype(self.x.dtype)[:, None]

    def _aligned(self, real: Array | None, shape: tuple[int, ...]) -> Array | None:
        """Return ones at real positions and zeros at padded ones, (samples, positions, 1).

        None where all are real, or where the outputs of either layer are not (samples, positions, channels).
        """
        if real is None or {shape[:-1], self.z0.shape[:-1]} != {real.shape} or self.others != (0, 1):
            return None
        return real[:, :, None].astype(self.x.dtype)

    def output_change(self, change: Array) -> Array:
        """Return how the producer's outputs change with its weights."""
        rows = (change.astype(self.x.dtype) @ self.x.T).T
        return self.pair.producer.output_from_rows(rows[None], self.z0.shape).astype(self.z0.dtype, copy=False)

    def residual(self, z: Array) -> Array:
        """Return the reader's scaled error about its mean, target less output, for outputs z of the producer."""
        error = run(self.both, {self.name: z})[0] * -self.scale
        error += self.target
        if self.real is None:
            error -= error.mean(axis=self.others, keepdims=True)
        else:
            error *= self.real
            error -= self.real * (error.sum(axis=self.others, keepdims=True) / self.real.sum())
        return np.asarray(error)

    def slope(self, z: Array) -> Array:
        """Return f' by central differences, for outputs z of the producer; its shape is that of the reader's input."""
        if self.chain is None:
            return np.ones_like(at_least_single(z))
        rounded = any(Trait.QUANTISING in traits(node.key) for node in self.pair.chain)
        e = (ACROSS_ROUNDING if rounded else 1e-2) * (float(z.std(dtype=np.float64)) or 1.0)
        down, up = (at_least_single(run(self.chain, {self.name: (z + s * e).astype(z.dtype)})[0]) for s in (-1, 1))
        with np.errstate(invalid="ignore"):
            up -= down
        up /= np.asarray(2 * e, up.dtype)
        up[~np.isfinite(up)] = 0
        return up

    def direction(self, residual: Array, slope: Array, inputs: Damped, reading: Array) -> Array:
        """Return the damped Gauss-Newton step, G⁻¹ (gradient) A⁻¹, for G = reading ∘ E[f' f'ᵀ] and A = inputs."""
        p = self.pair.producer
        backward = self.pair.reader.input_gradient(residual, self.w, slope.shape, self.graph)
        backward *= slope
        every = np.arange(p.positions(slope.shape))
        gradient = p.output_rows(backward, every)[0].T @ self.x / self.count
        slopes = p.output_rows(slope if self.real is None else slope * self.real, every)[0]
        curvature = (reading * (slopes.T @ slopes / self.count)).astype(np.float64)
        half = Damped(curvature[None], CURVATURE_DAMPING).solve(gradient.T[None].astype(np.float64))[0].T
        return inputs.solve(half[None])[0]

    def take(self, damping: float, steps: int = STEPS) -> Changes | None:
        """Take steps as long as they help; none if a constant between the layers brings axes of its own.

        Args:
            damping: added to the diagonal of A, as a fraction of its mean.
            steps: the most that are taken.

        Returns:
            The changes; None if no step helps.
        """
        slope = self.slope(self.z0)
        if slope.shape != self.z0.shape:
            return None
        every = max(1, len(self.x) // max(CURVATURE_ROWS, 5 * self.x.shape[1]))
        some = self.x[::every]
        moments = (some.T @ some * (len(self.x) / (len(some) * self.count))).astype(np.float64)  # padded rows are zero
        inputs = Damped(moments[None], damping_for(damping, len(moments), self.count))
        w = self.w[0].reshape(self.w.shape[1], -1, self.pair.reader.taps(self.graph)).astype(np.float64)
        reading = np.einsum("oct,odt->cd", w, w, optimize=True)
        change = np.zeros((self.pair.producer.size(self.graph)[1], self.x.shape[1]))
        z, residual = self.z0, self.residual(self.z0)
        loss = first = np.vdot(residual, residual)
        rate = 1.0
        for number in range(1, steps + 1):
            step = self.direction(residual, slope, inputs, reading) * rate
            move = self.output_change(step)
            trial = self.residual(z + move)
            removed = residual - trial
            size = np.vdot(removed, removed)
            further = float(np.vdot(removed, residual) / size) if size > 0 else 0.0
            rate *= further  # the next step begins with this one's length
            if self.chain is None or not LONG_ENOUGH < further < 1 / LONG_ENOUGH:
                step, move = step * further, move * np.asarray(further, move.dtype)
                straight = self.chain is None  # then the residual changes in proportion to the step
                trial = residual - np.asarray(further, removed.dtype) * removed if straight else self.residual(z + move)
            new = np.vdot(trial, trial)
            if not new < loss:
                break
            z, residual = z + move, trial
            change, loss, previous = change + step, new, loss
            if number == steps or new > (1 - MIN_GAIN) * previous:
                break
            slope = self.slope(z)
        if not loss < first:
            return None
        gone = 1 - float(loss / first)
        if self.constants:
            return Changes(matrix=change[:, :-1], bias=change[:, -1], removed=gone)
        return Changes(matrix=change, bias=np.zeros(len(change)), removed=gone)
