"""Images that Pillow draws, as arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Array = np.ndarray


def drawn(shape: tuple[int, int, int, int], page: Callable[[], Image.Image]) -> Array:
    """Draw images one at a time, as Pillow does.

    Args:
        shape: their number, channels (1, 3 or 4, of which the fourth is opaque), height and width.
        page: draws one image of three channels.

    Returns:
        Values in [0, 1], float32, of that shape.

    >>> drawn((1, 3, 1, 2), lambda: Image.new("RGB", (2, 1), (255, 0, 0))).tolist()
    [[[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]]
    """
    images = np.ones(shape, np.float32)
    for image in images:
        values = np.asarray(page(), np.float32).transpose(2, 0, 1) / 255
        image[:3] = values.mean(axis=0) if shape[1] == 1 else values
    return images
