"""Padded positions of sequences: what they hold matters to no output, so fits and comparisons leave them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spa.model.graph import Graph
from spa.running.live import PaddedBatch
from spa.running.stream import Feeds, Stream

Array = np.ndarray
TOLERANCE = 1e-4  # of an output's largest value: a difference that padding makes by rounding alone


def with_padding(graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> list[Feeds]:
    """Mark the padded positions of batches, where an input says which they are.

    Such a mask is an input (samples, positions) of zeros and ones. It is believed only if the network does what it
    says: other values at the padded positions change no output, but for what it gives at those positions.

    Args:
        graph: the network.
        batches: its inputs.
        threads: of onnxruntime.

    Returns:
        The batches, as :class:`PaddedBatch` where positions are padded.
    """
    first = next((b for b in batches if any(True for _ in _masks(b))), None)
    if first is None:
        return list(batches)
    for name in _masks(first):
        real = first[name] > 0
        pair = [first, _disturbed(first, name, real)]
        dense, other = Stream(graph.model, graph.base, pair, threads).finish()
        if all(_equal(dense[n], other[n], real) for n in graph.outputs):
            return [_marked(batch, name) for batch in batches]
    return list(batches)


def only_real(value: Array, real: Array | None) -> Array:
    """Return the values at real positions, (real positions, 1, ...); others than (samples, positions, ...) as is."""
    if real is None or value.ndim < 3 or value.shape[:2] != real.shape:
        return value
    return value[real][:, None]


def _masks(batch: Feeds) -> Iterator[str]:
    """Find inputs that may tell real positions from padded ones."""
    for name, value in batch.items():
        beside = (v for n, v in batch.items() if n != name)
        if value.ndim == 2 and any(v.shape[:2] == value.shape for v in beside):
            held = np.unique(value)
            if held.size == 2 and not held[0] and held[1] == 1:
                yield name


def _disturbed(batch: Feeds, mask: str, real: Array) -> dict[str, Array]:
    """Fill padded positions with what each sample has at its first real one."""
    first = real.argmax(axis=1)
    disturbed = dict(batch)
    for name, value in batch.items():
        if name != mask and value.shape[:2] == real.shape:
            filler = value[np.arange(len(value)), first][:, None]
            padded = ~real.reshape(*real.shape, *[1] * (value.ndim - 2))
            disturbed[name] = np.where(padded, filler, value).astype(value.dtype)
    return disturbed


def _equal(a: Array, b: Array, real: Array) -> bool:
    """Return whether two outputs agree wherever they are not of padded positions."""
    if a.shape != b.shape:
        return False
    if a.shape[:2] == real.shape:
        a, b = a[real], b[real]
    if not np.issubdtype(a.dtype, np.number):
        return bool(np.array_equal(a, b))
    scale = float(np.abs(a).max(initial=0))
    return bool(np.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True))


def _marked(batch: Feeds, mask: str) -> Feeds:
    real = batch[mask] > 0
    return batch if real.all() else PaddedBatch(batch, real)
