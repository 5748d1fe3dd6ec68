"""The rows that fits and scores of linear layers learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from spa.model.graph import Graph
from spa.obspa import dual
from spa.obspa.linear import Linear
from spa.obspa.moments import Means, Moments

Array = np.ndarray
Fitted = Moments | dual.Rows
Rows = Fitted | Means
MAX_ROWS = 40_000  # the most rows that a least-squares fit learns from, or ten per unknown if that is more
MAX_VALUES = 8_000_000  # the most values of inputs and targets that are gathered at a time: 32 MB in float32


@dataclass(frozen=True)
class Targets:
    """The outputs that a linear layer shall have.

    Attributes:
        y: them, in the shape of the layer's output.
        real: which positions of sequences are no padding, (samples, positions); None where all are.
        more: what is added to them, of the same shape, or None.
        factor: that of what is added, (channels,).
    """

    y: Array
    real: Array | None = None
    more: Array | None = None
    factor: Array | None = None


def draw_positions(rng: np.random.Generator, lin: Linear, shape: tuple[int, ...], samples: int, inputs: int) -> Array:
    """Draw the positions of each sample that a fit learns from, without replacement.

    Args:
        rng: draws; not used if all positions are taken.
        lin: the layer.
        shape: the shape of its output.
        samples: the number of samples of all batches.
        inputs: the number of matrix columns.

    Returns:
        Flat indices of positions, sorted.
    """
    total = lin.positions(shape)
    count = ceil((max(MAX_ROWS, 10 * inputs) if inputs <= dual.MAX_MOMENT_INPUTS else dual.MAX_ROWS) / max(samples, 1))
    if count >= total:
        return np.arange(total)
    return np.sort(rng.choice(total, count, replace=False))


def accumulator(inputs: int, samples: int, cross: bool = True) -> Fitted:
    """Return an accumulator of a layer's rows: their moments or, if these would be too large, some of the rows."""
    return Moments(cross) if inputs <= dual.MAX_MOMENT_INPUTS else dual.Rows(ceil(samples / dual.MAX_ROWS))


def add_rows(rows: Rows, graph: Graph, lin: Linear, x: Array, targets: Targets, chosen: Array) -> None:
    """Add a batch, some samples at a time: unfolded inputs of a convolution are many times as large as they are.

    Args:
        rows: takes them.
        graph: the layer's network.
        lin: the layer.
        x: its inputs.
        targets: its outputs.
        chosen: flat indices of the positions of each sample.
    """
    y, more = targets.y, targets.more
    real = lin.real_rows(targets.real, y.shape, chosen)
    for part in _parts(lin, x, y, len(chosen) * sum(lin.size(graph)[1:]) * lin.blocks):
        t = lin.output_rows(y[part], chosen)
        if more is not None and targets.factor is not None:
            t = t + lin.output_rows(more[part], chosen) * targets.factor.reshape(lin.blocks, 1, -1)
        of = real
        if not isinstance(real, slice):
            of = real[part.start * len(chosen) : part.stop * len(chosen)] if part.stop is not None else real
        rows.add(lin.input_rows(x[part], y[part].shape, graph, chosen)[:, of], t[:, of])


def _parts(lin: Linear, x: Array, y: Array, values: int) -> Iterator[slice]:
    """Yield parts of a batch of so many values per sample; the batch as a whole where samples are not first."""
    if len(x) != len(y) or not lin.samples_first(x.ndim, y.ndim):
        yield slice(None)
        return
    step = max(1, MAX_VALUES // max(values, 1))
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))
