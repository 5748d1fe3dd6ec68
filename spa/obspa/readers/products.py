"""Products of two activations as readers: the queries and the keys of an attention.

Both operands shrink along the axis that the product sums over. There are no weights to refit in the product itself; a
matrix that mixes the remaining dimensions of each head moves into the layer that makes the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil, prod

import numpy as np

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.obspa.curves import MomentReader, Observation
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Damped, at_least_single
from spa.obspa.origin import Origin, origin
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.running.stream import Stream, sliced

Array = np.ndarray
# The weight of a relative error before a softmax, which softens it, as does the residual sum behind. Chosen by the
# outputs of the digits' vision transformer with 70 % of its MACs removed: their error is 0.010 to 0.012 with weights
# of 0.03 to 0.1, and 0.020 to 0.024 with 0.3 and more.
SOFTMAX_WEIGHT = 0.05
MAX_ELEMENTS = 1 << 24  # the most values of second moments that are held (134 MB in float64), sample by sample
STEPS = 40  # the most steps of conjugate gradients
TOLERANCE = 1e-8  # of their residual, relative to the first; rounding is not far below


def activation_operands(graph: Graph, node: Node) -> tuple[str, str] | None:
    """Return the two activations that a MatMul multiplies, or None if the node is something else."""
    if node.op != "MatMul" or node.domain or any(n in graph.constants for n in node.inputs):
        return None
    return node.inputs[0], node.inputs[1]


class ActivationProduct(ReaderKind):
    """A MatMul of two activations, as of the queries and the keys of an attention."""

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node multiplies two activations."""
        return activation_operands(graph, node) is not None

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Observe the product as a reader of the axis that it sums over.

        Index j adds q_j k_jᵀ to the product Q Kᵀ. With a weight of one for each index, the second moments of these
        terms are QᵀQ ∘ KᵀK, summed over samples and heads. The loss is relative to the product's energy, and counts
        less if a softmax follows.
        """
        axes = analysis.axes.get(node.inputs[0])
        if axes is None or len(axes) < 2 or len(analysis.axes.get(node.inputs[1], ())) < 2:
            return []
        h = np.zeros((axes[-1].size, axes[-1].size))
        into_softmax = _into_softmax(analysis, node)
        for q, k in _operands(stream, node, into_softmax):
            both = (q.swapaxes(-1, -2) @ q) * (k @ k.swapaxes(-1, -2))
            h += both.sum(axis=tuple(range(both.ndim - 2)), dtype=np.float64)
        energy = float(h.sum())
        weight = (SOFTMAX_WEIGHT if into_softmax else 1.0) / (energy if energy > 0 else 1.0)
        w = np.full((1, 1, len(h)), np.sqrt(weight))
        return [Observation(partial(MomentReader, h[None], w), analysis.space.resolve(axes[-1]))]

    def may_refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> bool:
        """Return whether pruning has removed indices that the product sums over."""
        axes = reconstruction.analysis.axes.get(node.inputs[0])
        return axes is not None and reconstruction.kept.touches(axes[-1:])

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Mix the remaining dimensions of a pruned product's query so that the product is nearest to the dense one.

        For each head the matrix A minimises Σ|Q Kᵀ − Q' A K'ᵀ|² over the samples; it moves into the weights that make
        the query. Nothing is done if the query is not the plain output of a product with weights of its own. The
        damping pulls towards A = I.
        """
        analysis, pruned = reconstruction.analysis, reconstruction.pruned
        axes = analysis.axes[node.inputs[0]]
        source = origin(analysis, node.inputs[0])
        lin = None if source is None else linear(pruned.graph, pruned.graph.producer[source.lin.node.outputs[0]])
        if source is None or lin is None or not _owns(pruned.graph, lin, source.bias):
            return
        channels = _pruned_channels(analysis, reconstruction.kept, source, axes)
        if channels.shape[-2] != 1 or np.unique(channels).size != channels.size:
            return
        heads = [i for i, n in enumerate(channels.shape[:-2]) if n > 1]
        centre = _into_softmax(analysis, node)
        elements = sum(prod(b.shape(pruned_node.inputs[0])[:-2]) for b in pruned.live) * channels.shape[-1] ** 2
        step = ceil(elements / MAX_ELEMENTS)
        moments = _moments(
            _operands(reconstruction.dense, node, centre), _operands(pruned, pruned_node, centre), heads, step
        )
        if moments is None:
            return
        mix = solve_mixing(*moments, reconstruction.settings.damping).reshape(
            *channels.shape[:-2], channels.shape[-1], -1
        )
        _mix_query(pruned, lin, source.bias, channels[..., 0, :], mix)
        for batch in pruned.live:  # the query has been computed already
            q = batch[pruned_node.inputs[0]]
            batch[pruned_node.inputs[0]] = (q @ mix).astype(q.dtype)


def _mix_query(pruned: Stream, lin: Linear, bias: str | None, rows: Array, mix: Array) -> None:
    """Multiply the weights and the bias that make a query by the matrix of each head.

    Args:
        pruned: the pruned network.
        lin: the layer that makes the query.
        bias: the name of the constant that is added to it, or None.
        rows: the channels of each head, (..., d), with the heads along the leading axes.
        mix: A, (..., d, d).
    """
    matrix = lin.matrix(pruned.graph).reshape(-1, lin.size(pruned.graph)[2]).copy()
    matrix[rows] = mix.swapaxes(-1, -2) @ matrix[rows]
    pruned.replace(lin.weight, lin.weights_from(matrix.reshape(lin.size(pruned.graph)), pruned.graph))
    if bias is not None:
        value = pruned.graph.array(bias).copy()
        flat = value.reshape(-1)
        flat[rows] = (flat[rows][..., None, :].astype(np.float64) @ mix)[..., 0, :]
        pruned.replace(bias, value)


def _owns(graph: Graph, lin: Linear, bias: str | None) -> bool:
    """Return whether nothing else reads a product's weights and bias, and the bias is a vector of its channels."""
    names = [lin.weight, *([bias] if bias else [])]
    if any(n not in graph.constants or len(graph.users[n]) != 1 for n in names):
        return False
    width = lin.size(graph)[1]
    dims = [width] if bias is None else list(graph.constants[bias].dims)
    return dims[-1:] == [width] and prod(dims) == width


def _pruned_channels(analysis: Analysis, kept: Kept, source: Origin, axes: Axes) -> Array:
    """Return the channel of each of the query's entries, numbered as in the pruned network."""
    number = np.cumsum(kept.mask(analysis.axes[source.lin.node.outputs[0]][-1])) - 1
    return np.asarray(number[sliced(kept, axes, source.channels)])


def _moments(
    dense: Iterator[tuple[Array, Array]], pruned: Iterator[tuple[Array, Array]], heads: list[int], step: int
) -> tuple[Array, Array, Array] | None:
    """Return Q'ᵀQ', K'ᵀK' and Q'ᵀQ KᵀK' of every step-th sample, each (samples, heads, d, d); None if shapes differ."""
    collected: tuple[list[Array], ...] = ([], [], [])
    for (q, k), (q2, k2) in zip(dense, pruned, strict=True):
        if q.shape[:-2] != k.shape[:-2] or q2.shape[:-2] != q.shape[:-2]:
            return None
        q, k, q2, k2 = (_by_heads(a, heads)[::step].astype(np.float64) for a in (q, k, q2, k2))
        q2t, k2t = q2.swapaxes(-1, -2), k2.swapaxes(-1, -2)
        for parts, value in zip(collected, (q2t @ q2, k2 @ k2t, (q2t @ q) @ (k @ k2t)), strict=True):
            parts.append(value)
    s, t, c = (np.concatenate(parts) for parts in collected)
    return s, t, c


def _by_heads(value: Array, heads: list[int]) -> Array:
    """Reshape (..., m, n) to (samples, heads, m, n), given the leading axes that count heads."""
    value = np.moveaxis(value, heads, range(value.ndim - 2 - len(heads), value.ndim - 2))
    return value.reshape(-1, prod(value.shape[-2 - len(heads) : -2]), *value.shape[-2:])


def solve_mixing(s: Array, t: Array, c: Array, damping: float) -> Array:
    """Solve Σ S_n A T_n + λA = Σ C_n + λI for the matrix A of each head, by conjugate gradients from A = I.

    The preconditioner is the inverse of S A T with the means of S_n and T_n.

    Args:
        s: (samples, heads, d, d), symmetric.
        t: (samples, heads, d, d), symmetric.
        c: (samples, heads, d, d).
        damping: λ as a fraction of the mean of Σ S_ii T_jj.

    Returns:
        A, (heads, d, d).
    """
    d, right = int(s.shape[-1]), c.sum(axis=0)
    traces = [np.trace(m, axis1=2, axis2=3) for m in (s, t)]
    added = damping * (traces[0] * traces[1]).sum(axis=0)[:, None, None] / d**2
    added = np.where(added > 0, added, 1.0)
    mean_s, mean_t = (Damped(m.sum(axis=0) / len(m), damping) for m in (s, t))

    def product(a: Array) -> Array:
        return np.asarray((s @ a @ t).sum(axis=0) + added * a)

    def conditioned(r: Array) -> Array:
        return mean_t.solve(mean_s.solve(r.swapaxes(1, 2)).swapaxes(1, 2))

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
    """Yield the queries (..., m, d) and the keys (..., d, n) of each batch.

    A softmax over the keys does not depend on what all of them have in common: ``centre`` subtracts their mean.
    """
    for batch in stream.live:
        q, k = (at_least_single(batch[n]) for n in node.inputs)
        yield q, k - k.mean(axis=-1, keepdims=True) if centre else k


def _into_softmax(analysis: Analysis, node: Node) -> bool:
    """Return whether a product goes into a softmax over its last axis, through scales, sums (masks) and casts alone."""
    graph, name = analysis.graph, node.outputs[0]
    shapes = analysis.points.first.shape
    while len(users := graph.users.get(name, [])) == 1 and name not in graph.outputs:  # a chain, no search
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
