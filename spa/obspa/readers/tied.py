"""Tied layers: weights that several products share get one fit to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.model.graph import Graph, Node
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import Moments
from spa.obspa.readers.base import Reconstruction
from spa.obspa.readers.linear import LinearLayer, Rows, least_squares_of, places, store
from spa.obspa.shift import Shift
from spa.running.stream import sliced

Array = np.ndarray


class TiedLayer(LinearLayer):
    """A linear layer whose weights others read, too.

    The first of the products fits the weights, to all of them. The others, and all where something else reads the
    weights, have their means put right alone.
    """

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is a linear layer whose weights are not its own."""
        lin = linear(graph, node)
        return lin is not None and len(uses(graph, lin) or ()) != 1

    def sharing(self, graph: Graph, lin: Linear) -> list[Linear]:
        """Return all products of the weights for the first of them, else the layer alone."""
        everyone = uses(graph, lin) or []
        first = bool(everyone) and lin.node.index == min(u.node.index for u in everyone)
        return everyone if first else [lin]

    def fitted(self, at: Reconstruction, lin: Linear, rows: Rows, matrix: Array, shift: Shift | None) -> Array:
        """Fit and store the weights if the layer is the first of the products; see :meth:`LinearLayer.fitted`."""
        graph = at.small.graph
        others = [u for u in self.sharing(graph, lin) if u.node is not lin.node]
        if not others:
            return matrix
        one_mean = shift is None or (lin.bias is not None and len(graph.users[lin.bias]) > 1)
        used = joint(at, rows, others, one_mean) if isinstance(rows, Moments) else rows
        fitted = least_squares_of(used, matrix, at.settings.damping, shift is not None)
        store(at.small, lin, fitted)
        return fitted


def joint(at: Reconstruction, first: Moments, others: Sequence[Linear], one_mean: bool) -> Moments:
    """Return the moments of all products that share their weights.

    Those behind the first learn from the dense network's own inputs, as far as these are kept: what the pruned network
    gives there depends on the fit.

    Args:
        at: both networks, at the first product.
        first: the moments of the first product.
        others: the other products, in the pruned network.
        one_mean: whether one bias, or none, has to do for all of them; else each has its own.
    """
    analysis, kept, dense = at.analysis, at.kept, at.dense
    ahead = dense.fork()
    parts = [first]
    for lin in sorted(others, key=lambda o: o.node.index):
        twin = linear(ahead.graph, ahead.graph.producer[lin.node.outputs[0]])
        if twin is None:
            continue
        ahead.after(twin.node)
        name = twin.node.outputs[0]
        samples = sum(twin.samples(b[name].shape) for b in ahead.live)
        rows = first if one_mean else Moments()
        for batch in ahead.live:
            y = sliced(kept, analysis.axes.get(name), batch[name])
            x = sliced(kept, analysis.axes.get(twin.source), batch[twin.source])
            chosen = places(at.rng, lin, y.shape, samples, first.mean_x.shape[1])
            rows.add(lin.inputs(x, y.shape, dense.graph, chosen), lin.outputs(y, chosen))
        parts.append(rows)
    return first if one_mean else Moments.about_own_means(parts)
