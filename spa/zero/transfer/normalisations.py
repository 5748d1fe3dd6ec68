"""Normalisations: a scale of zero leaves the shift, whatever the input."""

from __future__ import annotations

import numpy as np

from spa.zero.facts import Site
from spa.zero.known import Known, along_channels
from spa.zero.transfer.registry import KnownOutputs, transfer

Array = np.ndarray


@transfer("BatchNormalization")
def batch_norm(site: Site) -> KnownOutputs:
    """Apply the affine map γ (x − μ) / √(σ² + ε) + β of each channel; it is known where x is, or where γ is zero."""
    x = site.known(0)
    parameters = [site.value(i) for i in range(1, 5)]
    if site.attr("training_mode", 0) or any(v is None for v in parameters):
        return None
    scale, shift, mean, variance = (
        along_channels(v.astype(np.float64), x.value.ndim) for v in parameters if v is not None
    )
    slope = scale / np.sqrt(variance + site.attr("epsilon", 1e-5))
    value = np.where(x.mask, x.value, mean).astype(np.float64)
    return [Known(((value - mean) * slope + shift).astype(x.value.dtype), x.mask | (scale == 0))]


@transfer("LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization")
def normalise(site: Site) -> KnownOutputs:
    """Return the bias where the scale is zero."""
    scale, shift = site.value(1), site.value(2) if site.has(2) else np.zeros((), np.float32)
    rank = len(site.shape(0))
    if scale is None or shift is None:
        return None
    if site.node.op in ("InstanceNormalization", "GroupNormalization"):
        repeats = site.shape(0)[1] // scale.size
        scale, shift = (along_channels(np.repeat(v, repeats), rank) for v in (scale, shift))
    else:
        scale, shift = (v.reshape((1,) * (rank - v.ndim) + v.shape) for v in (scale, shift))
    return [Known(shift.astype(site.known(0).value.dtype), scale == 0)]
