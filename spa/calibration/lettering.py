"""Images of made-up text: the domain of documents, signs and screens, which leaves lack.

Networks that read text answer images without any by a constant, so that nothing can be learnt from their outputs. What
the words say hardly matters, so letters are drawn at random.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spa.calibration.leaves import dead_leaves
from spa.calibration.pages import drawn

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,-:/"))
SMALLEST, LARGEST = 1 / 40, 0.9  # sizes of letters over the height of an image; at least some pixels
FEWEST_PIXELS = 7
DARK, LEAFY, ALL_AROUND = 0.3, 0.4, 0.1  # fractions of images: on a dark ground, on leaves, upside down
# Images so many times as wide as high are lines: their letters fill most of the height, and more are upside down.
LINE, SMALLEST_OF_LINE, ALL_AROUND_LINE = 3, 0.4, 0.25


def lettering(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw lines of random words in random sizes and colours, on plain or leafy, dark or light grounds.

    Args:
        count: the number of images.
        channels: the number of channels: 1, 3 or 4, of which the fourth is opaque.
        height: rows.
        width: columns.
        rng: the source of randomness.

    Returns:
        Values in [0, 1], float32, of shape (count, channels, height, width).

    >>> images = lettering(2, 3, 32, 64, np.random.default_rng(0))
    >>> images.shape, images.dtype, bool(images.std() > 0.05)
    ((2, 3, 32, 64), dtype('float32'), True)
    """
    return drawn((count, channels, height, width), lambda: _page(height, width, rng))


def _page(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Draw one image."""
    dark = rng.random() < DARK
    ground = rng.integers(0, 90, 3) if dark else rng.integers(150, 256, 3)
    page = Image.new("RGB", (width, height), tuple(map(int, ground)))
    if rng.random() < LEAFY:
        leaves = dead_leaves(1, 3, height, width, rng)[0].transpose(1, 2, 0)
        page = Image.blend(page, Image.fromarray((leaves * 255).astype(np.uint8)), float(rng.uniform(0.1, 0.7)))
    draw = ImageDraw.Draw(page)
    is_line = width >= LINE * height
    smallest = max(FEWEST_PIXELS, height * (SMALLEST_OF_LINE if is_line else SMALLEST))
    base = math.exp(rng.uniform(math.log(smallest), math.log(max(smallest + 1, height * LARGEST))))
    y = float(rng.uniform(-0.2, 0.3)) * base
    while y < height:
        size = max(FEWEST_PIXELS, round(base * rng.uniform(0.7, 1.3)))
        colour = rng.integers(140, 256, 3) if dark else rng.integers(0, 130, 3)
        letters = "".join(rng.choice(LETTERS, int(rng.integers(2, 3 + max(1, 2 * width // size)))))
        at = (int(rng.integers(-size, max(1, width // 3))), round(y))
        draw.text(at, letters, tuple(map(int, colour)), _font(size))
        y += size * rng.uniform(1.0, 2.5)
    return page.rotate(180) if rng.random() < (ALL_AROUND_LINE if is_line else ALL_AROUND) else page


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
