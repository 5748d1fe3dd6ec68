"""Products of two activations as readers: the query and the key of an attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil, prod

import numpy as np

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.obspa.curves import Reader, Seen
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import at_least_single, damped
from spa.obspa.origin import Origin, origin
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.running.stream import Stream, sliced

Array = np.ndarray
# What a relative error before a softmax weighs: the softmax and the residual sum behind it soften it. Found by
# measuring the outputs of the digits' vision transformer with 70 % of its MACs gone: a distortion of 0.010 to 0.012
# with 0.03 to 0.1, of 0.020 to 0.024 with 0.3 and more.
SOFTENED = 0.05
ELEMENTS = 1 << 24  # of second moments that are held, sample by sample
STEPS = 40  # of the conjugate gradients at most
TOLERANCE = 1e-8  # of their residual


def pair(graph: Graph, node: Node) -> tuple[str, str] | None:
    """Return the two activations that a MatMul multiplies, or None where the node is something else."""
    if node.op != "MatMul" or node.domain or any(n in graph.constants for n in node.inputs):
        return None
    return node.inputs[0], node.inputs[1]


class ActivationProduct(ReaderKind):
    """A MatMul of two activations, as of the queries and the keys of an attention."""

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node multiplies two activations."""
        return pair(graph, node) is not None

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Seen]:
        """Observe the product as a reader of the axis that it sums over.

        Index j adds q_j k_jᵀ to the product. With a weight of one for each index, the second moments of these terms are
        the elementwise product of QᵀQ and KᵀK, summed over samples and heads. The loss is relative to the product's
        energy, and counts for less where a softmax follows.
        """
        axes = analysis.axes.get(node.inputs[0])
        if axes is None or len(axes) < 2 or len(analysis.axes.get(node.inputs[1], ())) < 2:
            return []
        h = np.zeros((axes[-1].size, axes[-1].size))
        softened = _into_softmax(analysis, node)
        for q, k in _operands(stream, node, softened):
            both = (q.swapaxes(-1, -2) @ q) * (k @ k.swapaxes(-1, -2))
            h += both.sum(axis=tuple(range(both.ndim - 2)), dtype=np.float64)
        energy = float(h.sum())
        worth = (SOFTENED if softened else 1.0) / (energy if energy > 0 else 1.0)
        w = np.full((1, 1, len(h)), np.sqrt(worth))
        return [Seen(partial(Reader, h[None], w), analysis.space.resolve(axes[-1]))]

    def may_refit(self, at: Reconstruction, node: Node, twin: Node) -> bool:
        """Return whether pruning has removed indices that the product sums over."""
        axes = at.analysis.axes.get(node.inputs[0])
        return axes is not None and at.kept.touches(axes[-1:])

    def refit(self, at: Reconstruction, node: Node, twin: Node) -> None:
        """Mix the remaining dimensions of a pruned product's query so that the product is nearest to the dense one.

        For each head the matrix A minimises Σ|Q Kᵀ − Q' A K'ᵀ|² over the samples; it goes into the weights that make
        the query. Nothing is done where the query is not the plain output of a product with weights of its own. The
        damping pulls towards A = 1, as a fraction of the fit's mean diagonal.
        """
        analysis, small = at.analysis, at.small
        axes = analysis.axes[node.inputs[0]]
        source = origin(analysis, node.inputs[0])
        lin = None if source is None else linear(small.graph, small.graph.producer[source.lin.node.outputs[0]])
        if source is None or lin is None or not _owns(small.graph, lin, source.bias):
            return
        channels = _pruned_channels(analysis, at.kept, source, axes)
        if channels.shape[-2] != 1 or np.unique(channels).size != channels.size:
            return
        heads = [i for i, n in enumerate(channels.shape[:-2]) if n > 1]
        centre = _into_softmax(analysis, node)
        elements = sum(prod(b[twin.inputs[0]].shape[:-2]) for b in small.live) * channels.shape[-1] ** 2
        step = ceil(elements / ELEMENTS)
        seen = _moments(_operands(at.dense, node, centre), _operands(small, twin, centre), heads, step)
        if seen is None:
            return
        mix = mixing(*seen, at.settings.damping).reshape(*channels.shape[:-2], channels.shape[-1], -1)
        _mix_query(small, lin, source.bias, channels[..., 0, :], mix)
        for batch in small.live:  # the query has been computed already
            q = batch[twin.inputs[0]]
            batch[twin.inputs[0]] = (q @ mix).astype(q.dtype)


def _mix_query(small: Stream, lin: Linear, bias: str | None, rows: Array, mix: Array) -> None:
    """Multiply the weights and the bias that make a query by the matrix of each head.

    Args:
        small: the pruned network.
        lin: the layer that makes the query.
        bias: the name of the constant that is added to it, or None.
        rows: the channels of each head, (..., d), as numpy.matmul counts heads.
        mix: A, (..., d, d).
    """
    matrix = lin.matrix(small.graph).reshape(-1, lin.size(small.graph)[2]).copy()
    matrix[rows] = mix.swapaxes(-1, -2) @ matrix[rows]
    small.replace(lin.weight, lin.weights_from(matrix.reshape(lin.size(small.graph)), small.graph))
    if bias is not None:
        value = small.graph.array(bias).copy()
        flat = value.reshape(-1)
        flat[rows] = (flat[rows][..., None, :].astype(np.float64) @ mix)[..., 0, :]
        small.replace(bias, value)


def _owns(graph: Graph, lin: Linear, bias: str | None) -> bool:
    """Whether nothing else reads a product's weights and bias."""
    alone = [lin.weight, *([bias] if bias else [])]
    if any(n not in graph.constants or len(graph.users[n]) != 1 for n in alone):
        return False
    width = lin.size(graph)[1]
    dims = [width] if bias is None else list(graph.constants[bias].dims)
    return dims[-1:] == [width] and prod(dims) == width


def _pruned_channels(analysis: Analysis, kept: Kept, source: Origin, axes: Axes) -> Array:
    """The channel of each of the query's entries, counted in the pruned network."""
    number = np.cumsum(kept.mask(analysis.axes[source.lin.node.outputs[0]][-1])) - 1
    return np.asarray(number[sliced(kept, axes, source.channels)])


def _moments(
    dense: Iterator[tuple[Array, Array]], small: Iterator[tuple[Array, Array]], heads: list[int], step: int
) -> tuple[Array, Array, Array] | None:
    """Q'ᵀQ', K'ᵀK' and Q'ᵀQ KᵀK', each (samples, heads, d, d), of each sample that is a multiple of the step."""
    found: tuple[list[Array], ...] = ([], [], [])
    for (q, k), (q2, k2) in zip(dense, small, strict=True):
        if q.shape[:-2] != k.shape[:-2] or q2.shape[:-2] != q.shape[:-2]:
            return None
        q, k, q2, k2 = (_by_heads(a, heads)[::step].astype(np.float64) for a in (q, k, q2, k2))
        q2t, k2t = q2.swapaxes(-1, -2), k2.swapaxes(-1, -2)
        for parts, value in zip(found, (q2t @ q2, k2 @ k2t, (q2t @ q) @ (k @ k2t)), strict=True):
            parts.append(value)
    s, t, c = (np.concatenate(parts) for parts in found)
    return s, t, c


def _by_heads(value: Array, heads: list[int]) -> Array:
    """Leading axes as two: those that count samples, and those that count heads."""
    value = np.moveaxis(value, heads, range(value.ndim - 2 - len(heads), value.ndim - 2))
    return value.reshape(-1, prod(value.shape[-2 - len(heads) : -2]), *value.shape[-2:])


def mixing(s: Array, t: Array, c: Array, damping: float) -> Array:
    """The matrix A of each head that solves Σ S_n A T_n + λA = Σ C_n + λ, by conjugate gradients from A = 1.

    The preconditioner is the inverse of S A T with the means of S_n and T_n.

    Args:
        s: (samples, heads, d, d), symmetric.
        t: likewise.
        c: (samples, heads, d, d).
        damping: λ as a fraction of the mean of Σ S_ii T_jj.

    Returns:
        A, (heads, d, d).
    """
    d, right = int(s.shape[-1]), c.sum(axis=0)
    traces = [np.trace(m, axis1=2, axis2=3) for m in (s, t)]
    added = damping * (traces[0] * traces[1]).sum(axis=0)[:, None, None] / d**2
    added = np.where(added > 0, added, 1.0)
    mean_s, mean_t = (damped(m.sum(axis=0) / len(m), damping)[0] for m in (s, t))

    def product(a: Array) -> Array:
        return np.asarray((s @ a @ t).sum(axis=0) + added * a)

    def conditioned(r: Array) -> Array:
        return np.asarray(np.linalg.solve(mean_t, np.linalg.solve(mean_s, r).swapaxes(1, 2)).swapaxes(1, 2))

    a = np.broadcast_to(np.eye(d), right.shape)
    r = right + added * a - product(a)
    z = conditioned(r)
    p, rz, start = z, (r * z).sum(axis=(1, 2), keepdims=True), np.square(r).sum()
    for _ in range(STEPS):
        if np.square(r).sum() <= TOLERANCE**2 * start:
            break
        ap = product(p)
        step = rz / np.maximum((p * ap).sum(axis=(1, 2), keepdims=True), np.finfo(float).tiny)
        a, r = a + step * p, r - step * ap
        z = conditioned(r)
        rz, before = (r * z).sum(axis=(1, 2), keepdims=True), rz
        p = z + rz / np.maximum(before, np.finfo(float).tiny) * p
    return a


def _operands(stream: Stream, node: Node, centre: bool) -> Iterator[tuple[Array, Array]]:
    """Queries (..., m, d) and keys (..., d, n) of each batch.

    A softmax over the keys does not see what all of them have in common: their mean is then to be taken out.
    """
    for batch in stream.live:
        q, k = (at_least_single(batch[n]) for n in node.inputs)
        yield q, k - k.mean(axis=-1, keepdims=True) if centre else k


def _into_softmax(analysis: Analysis, node: Node) -> bool:
    """Whether a product goes into a softmax over its last axis, with nothing but scales, masks and sums between."""
    graph, name = analysis.graph, node.outputs[0]
    shapes = analysis.points.first.shape
    while len(users := graph.users.get(name, [])) == 1 and name not in graph.outputs:
        user, operand = users[0]
        if user.op == "Softmax" and not user.domain:
            axis = user.attributes.get("axis", -1 if user.version >= 13 else 1)
            return bool(axis in (-1, len(shapes[name]) - 1))
        single = len(user.inputs) == 2 and prod(shapes.get(user.inputs[1 - operand], (0,))) == 1
        scales = single and (user.op == "Mul" or (user.op == "Div" and operand == 0))
        if not scales and user.op not in ("Add", "Cast"):
            return False
        name = user.outputs[0]
    return False
