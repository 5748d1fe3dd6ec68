"""Tied layers: fit weights that several products share to all of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from spa.model.graph import Graph, Node
from spa.obspa.bias_slot import BiasSlot
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.moments import Means, Moments
from spa.obspa.readers.base import Reconstruction
from spa.obspa.readers.linear import LinearLayer, fit
from spa.obspa.readers.rows import Rows, Targets, add_rows, draw_positions
from spa.running.stream import sliced

Array = np.ndarray


class TiedLayer(LinearLayer):
    """A linear layer whose weights others read, too.

    The first of the products fits the weights, to all of them. The others have only their biases refitted; so have all
    of them if anything but products reads the weights.
    """

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is a linear layer whose weights others read, too."""
        lin = linear(graph, node)
        return lin is not None and len(uses(graph, lin) or ()) != 1

    def served_by_fit(self, graph: Graph, lin: Linear) -> list[Linear]:
        """Return all products with the weights if the layer is the first of them; else the layer alone."""
        products = uses(graph, lin) or []
        first = bool(products) and lin.node.index == min(u.node.index for u in products)
        return products if first else [lin]

    def rows_for(self, graph: Graph, lin: Linear, samples: int) -> Rows:
        """Return what gathers the rows of a fit: only the first of the products fits the weights."""
        return super().rows_for(graph, lin, samples) if len(self.served_by_fit(graph, lin)) > 1 else Means()

    def fit_weights(
        self, reconstruction: Reconstruction, lin: Linear, rows: Rows, matrix: Array, slot: BiasSlot | None
    ) -> Array:
        """Fit and store the weights if the layer is the first of the products; see :meth:`LinearLayer.fit_weights`."""
        graph = reconstruction.pruned.graph
        others = [u for u in self.served_by_fit(graph, lin) if u.node is not lin.node]
        if isinstance(rows, Means):
            return matrix
        shared_mean = slot is None or (lin.bias is not None and len(graph.users[lin.bias]) > 1)
        used = joint_moments(reconstruction, rows, others, shared_mean) if isinstance(rows, Moments) else rows
        return fit(reconstruction, lin, used, matrix, slot is not None)


def joint_moments(
    reconstruction: Reconstruction, first: Moments, others: Sequence[Linear], shared_mean: bool
) -> Moments:
    """Return the moments of all products that share their weights.

    The products behind the first learn from the kept part of the dense network's inputs: the pruned network's own
    depend on the fit.

    Args:
        reconstruction: both networks, at the first product.
        first: the moments of the first product.
        others: the other products, in the pruned network.
        shared_mean: whether the products share one bias or have none; otherwise each has its own.
    """
    uses = _uses_ahead(reconstruction, first, others, shared_mean)
    if not shared_mean:
        return Moments.about_own_means(itertools.chain([first], uses))
    for _ in uses:
        pass
    return first


def _uses_ahead(
    reconstruction: Reconstruction, first: Moments, others: Sequence[Linear], shared_mean: bool
) -> Iterator[Moments]:
    """Yield the moments of each use behind the first, or add them to the first's; see :func:`joint_moments`."""
    analysis, kept, dense = reconstruction.analysis, reconstruction.kept, reconstruction.dense
    ahead = dense.fork()
    for lin in sorted(others, key=lambda o: o.node.index):
        dense_lin = linear(ahead.graph, ahead.graph.producer[lin.node.outputs[0]])
        if dense_lin is None:
            continue
        ahead.after(dense_lin.node)
        name = dense_lin.node.outputs[0]
        columns = lin.size(reconstruction.pruned.graph)[2]
        samples = sum(dense_lin.samples(b.shape(name)) for b in ahead.live)
        rows = first if shared_mean else Moments()
        for batch in ahead.live:
            y = sliced(kept, analysis.axes.get(name), batch[name])
            x = sliced(kept, analysis.axes.get(dense_lin.source), batch[dense_lin.source])
            chosen = draw_positions(reconstruction.rng, lin, y.shape, samples, columns)
            add_rows(rows, dense.graph, lin, x, Targets(y, batch.real), chosen)
        yield rows
