"""Refits of the layer before a cut: what is left of it learns to give its reader what the reader needs.

A reader's least squares makes the most of channels as they are. Here the channels change, too: Gauss-Newton steps on
the weights of the layer that makes them, through the activation between the two, with a curvature that is a Kronecker
product of the moments of its inputs and of what the reader makes of its outputs (K-FAC, Martens and Grosse 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.model.graph import Graph, Node
from spa.model.traits import Trait, traits
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import at_least_single, cautious, damped
from spa.running.runtime import run
from spa.running.stream import Stream

Array = np.ndarray
ROWS = 40_000  # outputs of the reader that steps look at, at most
INPUTS = 3072  # of either layer, at most: the moments of more take seconds a layer
VALUES = 20_000_000  # numbers in a matrix of either layer's inputs or outputs, at most
STEPS = 6
GAIN = 0.02  # a step that takes away less of the loss is the last
CURVATURE = 0.1  # damping of what the reader makes of the channels, a fraction of the mean


@dataclass(frozen=True)
class Pair:
    """A linear layer whose outputs only one other linear layer reads, through elementwise operators.

    Attributes:
        producer: the first layer.
        chain: the operators between the two, in order.
        reader: the second layer.
    """

    producer: Linear
    chain: tuple[Node, ...]
    reader: Linear

    def by_sample(self, graph: Graph, x: Array, between: Array, shape: tuple[int, ...]) -> bool:
        """Whether samples lie along the first axis all the way, and no constant is different for each."""
        vectors = [graph.constants[c].dims for node in self.chain for c in node.inputs if c in graph.constants]
        return (
            len(x) == len(between) == shape[0]
            and self.producer.by_sample(x.ndim, between.ndim)
            and self.reader.by_sample(between.ndim, len(shape))
            and not any(len(dims) >= between.ndim and dims[0] > 1 for dims in vectors)
        )

    def share(self, graph: Graph, samples: int, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """The share of the samples that steps look at, from the shapes of the reader's input and output."""
        rows, held = ROWS, []
        for lin, seen in ((self.producer, before), (self.reader, after)):
            _, outputs, columns = lin.size(graph)
            held.append(samples * lin.places(seen) * max(outputs, columns))
            rows = max(rows, 10 * columns)
        return min(1.0, rows / (samples * self.reader.places(after)), VALUES / max(held))


def pair(graph: Graph, reader: Linear) -> Pair | None:
    """The layer whose outputs a reader's inputs are made of alone; None where there is none, or others read them."""
    if reader.blocks != 1 or len(reader.input_axes) != 1 or reader.channel_axis is None:
        return None
    if len(uses(graph, reader) or ()) != 1:
        return None
    region: dict[int, Node] = {}
    makers: dict[int, Linear] = {}
    todo = [reader.source]  # not by networkx: the search stops at layers, and ends at the first node that is in the way
    while todo:
        node = graph.producer.get(todo.pop())
        if node is None:
            return None
        lin = linear(graph, node)
        if lin is not None:
            makers[node.index] = lin
        elif Trait.SMOOTH not in traits(node.key) or any(node.outputs[1:]):
            return None
        elif node.index not in region:
            region[node.index] = node
            todo += [x for x in node.inputs if x and x not in graph.constants]
    if len(makers) != 1:
        return None
    producer = next(iter(makers.values()))
    if producer.blocks != 1 or producer.channel_axis is None or len(uses(graph, producer) or ()) != 1:
        return None
    if max(producer.size(graph)[2], reader.size(graph)[2]) > INPUTS:
        return None
    inside = {*region, reader.node.index}
    for name in (o for node in (producer.node, *region.values()) for o in node.outputs if o):
        if name in graph.outputs or any(user.index not in inside for user, _ in graph.users.get(name, ())):
            return None
    return Pair(producer, tuple(region[i] for i in sorted(region)), reader)


def refine(
    small: Stream, two: Pair, x: Array, target: Array, scale: Array, damping: float, constants: bool
) -> tuple[Array, Array] | None:
    """Steps on a producer's weights that bring its reader nearer to a target, the reader's weights being what they are.

    Args:
        small: the pruned network.
        two: the layers.
        x: the producer's inputs.
        target: what the reader is to give, up to a constant for each channel.
        scale: what a unit of each of the reader's outputs is worth.
        damping: of the moments of the producer's inputs, as a fraction of their mean.
        constants: whether the producer's constants can change.

    Returns:
        The change of the producer's matrix (outputs, inputs), and of its constants (outputs,); None where no step
        helps.
    """
    steps = _Steps(small, two, x, target, scale, constants)
    change = steps.take(damping)
    if change is None:
        return None
    return (change[:, :-1], change[:, -1]) if constants else (change, np.zeros(len(change)))


class _Steps:
    """Both layers on some samples."""

    def __init__(self, small: Stream, two: Pair, x: Array, target: Array, scale: Array, constants: bool) -> None:
        graph, p, reader = small.graph, two.producer, two.reader
        self.graph, self.two, self.name = graph, two, p.node.outputs[0]
        self.z0 = run(small.session([p.node], p.source, self.name, x), {p.source: x})[0]
        self.chain = small.session(two.chain, self.name, reader.source, self.z0) if two.chain else None
        self.both = small.session([*two.chain, reader.node], self.name, reader.node.outputs[0], self.z0)
        self.x = at_least_single(p.inputs(x, self.z0.shape, graph, np.arange(p.places(self.z0.shape)))[0])
        if constants:
            self.x = np.concatenate([self.x, np.ones_like(self.x[:, :1])], axis=1)
        self.others = reader.other_axes(target.ndim)
        self.scale = np.expand_dims(np.abs(scale).astype(self.x.dtype), self.others)
        self.target = target * self.scale
        self.w = reader.matrix(graph, self.x.dtype) * np.abs(scale).astype(self.x.dtype)[:, None]

    def before(self, change: Array) -> Array:
        """The producer's outputs."""
        rows = (change.astype(self.x.dtype) @ self.x.T).T
        return np.asarray(self.z0 + self.two.producer.spread(rows[None], self.z0.shape), self.z0.dtype)

    def residual(self, z: Array) -> Array:
        """What the reader's outputs lack, by what a unit of each is worth, about the mean."""
        lack = run(self.both, {self.name: z})[0] * -self.scale
        lack += self.target
        lack -= lack.mean(axis=self.others, keepdims=True)
        return np.asarray(lack)

    def slope(self, z: Array) -> Array:
        """The derivative of each of the reader's inputs by the producer's output that it is made of."""
        if self.chain is None:
            return np.ones_like(at_least_single(z))
        e = 1e-2 * (float(z.std(dtype=np.float64)) or 1.0)
        down, up = (at_least_single(run(self.chain, {self.name: (z + s * e).astype(z.dtype)})[0]) for s in (-1, 1))
        with np.errstate(invalid="ignore"):
            up -= down
        up /= np.asarray(2 * e, up.dtype)
        up[~np.isfinite(up)] = 0
        return up

    def direction(self, residual: Array, slope: Array, moments: Array, reading: Array) -> Array:
        """The damped Gauss-Newton step."""
        p = self.two.producer
        back = self.two.reader.back(residual, self.w, slope.shape, self.graph)
        back *= slope
        every = np.arange(p.places(slope.shape))
        gradient = p.outputs(back, every)[0].T @ self.x / len(self.x)
        slopes = p.outputs(slope, every)[0]
        seen = reading * (slopes.T @ slopes / len(slopes))
        half = np.linalg.solve(damped(seen[None], CURVATURE)[0][0], gradient.astype(np.float64))
        return np.asarray(np.linalg.solve(moments, half.T).T)

    def take(self, damping: float) -> Array | None:
        """Steps as long as they help; none where a constant between the layers brings axes of its own."""
        slope = self.slope(self.z0)
        if slope.shape != self.z0.shape:
            return None
        moments = (self.x.T @ self.x / len(self.x)).astype(np.float64)
        moments = damped(moments[None], cautious(damping, len(moments), len(self.x)))[0][0]
        w = self.w[0].reshape(self.w.shape[1], -1, self.two.reader.kernel_places(self.graph)).astype(np.float64)
        reading = np.einsum("oct,odt->cd", w, w, optimize=True)
        change = np.zeros((self.two.producer.size(self.graph)[1], self.x.shape[1]))
        residual = self.residual(self.z0)
        loss = first = np.vdot(residual, residual)
        for _ in range(STEPS):
            step = self.direction(residual, slope, moments, reading)
            gone = residual - self.residual(self.before(change + step))
            size = np.vdot(gone, gone)
            rate = np.vdot(gone, residual) / size if size > 0 else 0.0
            z = self.before(change + rate * step)
            residual = self.residual(z)
            new = np.vdot(residual, residual)
            if not new < loss:
                break
            change, loss, old = change + rate * step, new, loss
            if new > (1 - GAIN) * old:
                break
            slope = self.slope(z)
        return change if loss < first else None
