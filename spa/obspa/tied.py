"""Weights that several products share: one fit to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.obspa.linear import Linear, linear
from spa.obspa.moments import Moments
from spa.obspa.score import places
from spa.running.stream import Stream, sliced


def joint(
    analysis: Analysis,
    kept: Kept,
    dense: Stream,
    first: Moments,
    others: Sequence[Linear],
    rng: np.random.Generator,
    one_mean: bool,
) -> Moments:
    """Moments of all products that share their weights.

    Those behind the first learn from the dense network's own inputs, as far as these are kept: what the pruned network
    gives there depends on the fit.

    Args:
        analysis: the dense network.
        kept: what was pruned.
        dense: its stream, at the first product.
        first: the moments of the first product.
        others: the other products, in the pruned network.
        rng: for the choice of places.
        one_mean: whether one bias, or none, has to do for all of them; else each has its own.
    """
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
            chosen = places(rng, lin, y.shape, samples, first.mean_x.shape[1])
            rows.add(lin.inputs(x, y.shape, dense.graph, chosen), lin.outputs(y, chosen))
        parts.append(rows)
    return first if one_mean else Moments.about_own_means(parts)
