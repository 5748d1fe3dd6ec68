"""How many samples run together while calibrating."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MOST = 64  # samples
MOST_BYTES = 10 << 20  # of inputs: activations take some hundred times that, all layers together


def comfortable(sample: Mapping[str, np.ndarray], samples: int = 1) -> int:
    """The size of a batch, given the feeds of so many samples."""
    size = sum(a.nbytes for a in sample.values()) / max(samples, 1)
    return int(max(1, min(MOST, MOST_BYTES // max(size, 1))))
