"""Recurrent cells: which units are zero at every step."""

from __future__ import annotations

import numpy as np

from spa.model.traits import Trait, operators
from spa.rules.recurrent import GATES
from spa.zero.facts import Site
from spa.zero.known import Known, all_along, uniform_along
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray
# Recurrent cells name their activations as the operators are named; ScaledTanh has no operator.
_ZERO_AT_ZERO = {*operators(Trait.ZERO_AT_ZERO), "ScaledTanh"}


@transfer("LSTM", "GRU", "RNN")
def recurrent(site: Site) -> KnownOutputs:
    """Return zero for the units whose candidate is always zero: they keep the state of zero that they start with.

    With the candidate g (LSTM) or n (GRU, RNN), as the ONNX operators define them:
    h_t = o ∘ tanh(f ∘ c_{t−1} + i ∘ g), h_t = (1 − z) ∘ n + z ∘ h_{t−1}, h_t = n.
    """
    w, r = site.value(1), site.value(2)
    bias = site.value(3) if site.has(3) else np.zeros((), np.float32)
    if w is None or r is None or bias is None or not _activations_keep_zero(site):
        return None
    directions, gates, units = w.shape[0], GATES[site.node.op], r.shape[2]
    gate = {"LSTM": 3, "GRU": 2, "RNN": 0}[site.node.op]
    w, r = (v.reshape(directions, gates, units, -1)[:, gate] for v in (w, r))
    bias = np.broadcast_to(bias, (directions, 2 * gates * units)).reshape(directions, 2, gates, units)[:, :, gate]
    x = all_along(site.known(0).zero, 2, w.shape[2])
    zero = ~((w != 0) & ~x).any(axis=2) & ~(bias != 0).any(axis=1)
    for operand in (5, 6):
        if site.has(operand):  # d b h, or b d h where the batch comes first
            start = uniform_along(site.full(operand, site.known(operand)), [0 if site.attr("layout", 0) else 1])
            zero &= start.zero.reshape(directions, units)
    for _ in range(units):
        still_zero = zero & ~((r != 0) & ~zero[:, None, :]).any(axis=2)
        if np.array_equal(still_zero, zero):
            break
        zero = still_zero
    return [
        Known(np.zeros((1,) * len(s), r.dtype), _as_output(zero, len(s), bool(site.attr("layout", 0))))
        for s in _out_shapes(site)
    ]


def _out_shapes(site: Site) -> list[tuple[int, ...]]:
    """Return the outputs' shapes, with a stand-in for those that are left out."""
    return [site.out_shape(i) if o else (1, 1, 1) for i, o in enumerate(site.node.outputs)]


def _as_output(zero: Array, rank: int, batch_first: bool) -> Array:
    """Return a mask (directions, units) as one of Y [s d b h] or Y_h [d b h]; [b s d h] or [b d h] if batch_first."""
    if batch_first:
        return zero.reshape((1,) * (rank - 2) + zero.shape)
    return zero.reshape((1,) * (rank - 3) + (zero.shape[0], 1, zero.shape[1]))


def _activations_keep_zero(site: Site) -> bool:
    """Return whether the activations of candidates and states map zero to zero."""
    names = site.attr("activations")
    if names is None:
        return True
    count = {"LSTM": 3, "GRU": 2, "RNN": 1}[site.node.op]
    return all(name in _ZERO_AT_ZERO for i, name in enumerate(names) if count == 1 or i % count)
