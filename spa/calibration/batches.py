"""The number of samples that run together while calibrating."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MAX_SAMPLES = 64
MAX_BYTES = 10 << 20  # of inputs: activations take some hundred times that, all layers together


def comfortable(feeds: Mapping[str, np.ndarray], samples: int = 1) -> int:
    """Return a batch size at which the inputs of a batch stay small.

    Args:
        feeds: the inputs of some samples.
        samples: the number of these samples.

    >>> comfortable({"x": np.zeros((1, 3, 224, 224), np.float32)})
    17
    """
    sample_bytes = sum(array.nbytes for array in feeds.values()) / max(samples, 1)
    return int(max(1, min(MAX_SAMPLES, MAX_BYTES // max(sample_bytes, 1))))
