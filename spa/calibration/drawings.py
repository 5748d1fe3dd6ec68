"""Images of drawings, and of gradients and textures: the domains that leaves and words lack.

Drawings have thin strokes and plain areas, as diagrams, plans and plots. Textures have no edges at all: slopes of
brightness, waves, and noise whose spectrum falls.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from spa.calibration.pages import drawn

Array = np.ndarray
DARK = 0.25  # the fraction of drawings on a dark ground
SHAPES = (4, 30)  # of a drawing
MANY_POINTS = 12  # of a curve
WAVES = 3  # that a texture is the sum of, at most
GRADIENTS, WAVY = 0.3, 0.35  # fractions of textures; the others are noise
SLOPES = (0.5, 2.5)  # of the noise's amplitude over the frequency


def drawings(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
    """Draw lines, boxes, ovals and curves in few colours on a plain ground.

    Args:
        count: the number of images.
        channels: the number of channels: 1, 3 or 4, of which the fourth is opaque.
        height: rows.
        width: columns.
        rng: the source of randomness.

    Returns:
        Values in [0, 1], float32, of shape (count, channels, height, width).

    >>> images = drawings(2, 3, 32, 64, np.random.default_rng(0))
    >>> images.shape, images.dtype, bool(images.std() > 0.05)
    ((2, 3, 32, 64), dtype('float32'), True)
    """
    return drawn((count, channels, height, width), lambda: _drawing(height, width, rng))


def _drawing(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    dark = rng.random() < DARK
    ground, inks = (rng.integers(0, 60, 3), (150, 256)) if dark else (rng.integers(220, 256, 3), (0, 140))
    page = Image.new("RGB", (width, height), tuple(ground.tolist()))
    draw = ImageDraw.Draw(page)
    palette = rng.integers(*inks, (3, 3))
    thin = max(1, round(min(height, width) / 160))
    for _ in range(int(rng.integers(*SHAPES))):
        colour = tuple(palette[int(rng.integers(3))].tolist())
        stroke = thin * int(rng.integers(1, 4))
        corners = np.sort(rng.random((2, 2)) * [width, height], axis=0).ravel().tolist()
        kind = int(rng.integers(5))
        if kind == 0:
            draw.line((rng.random((2, 2)) * [width, height]).ravel().tolist(), colour, stroke)
        elif kind == 1:
            draw.rectangle(corners, colour if rng.random() < 0.2 else None, colour, stroke)
        elif kind == 2:
            draw.ellipse(corners, None, colour, stroke)
        elif kind == 3:  # along an axis, as frames and tables have
            end = float(rng.random() * (width if rng.random() < 0.5 else height))
            draw.line((end, 0, end, height) if rng.random() < 0.5 else (0, end, width, end), colour, stroke)
        else:
            x = np.linspace(corners[0], corners[2], MANY_POINTS)
            y = corners[1] + (corners[3] - corners[1]) * np.cumsum(rng.normal(0, 0.3, MANY_POINTS))
            draw.line(np.stack([x, y], axis=1).ravel().tolist(), colour, stroke)
    return page


def textures(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
    """Draw gradients, waves and noise whose spectrum falls, in any contrast; arguments and result as :func:`drawings`.

    >>> images = textures(2, 1, 24, 24, np.random.default_rng(0))
    >>> images.shape, bool(images.min() >= 0 and images.max() <= 1)
    ((2, 1, 24, 24), True)
    """
    images = np.empty((count, channels, height, width), np.float32)
    for image in images:
        kind = rng.random()
        source = _gradient if kind < GRADIENTS else _waves if kind < GRADIENTS + WAVY else _noise
        shared = source(height, width, rng)
        image[:] = rng.uniform(0.2, 0.8) + rng.uniform(0.05, 0.35) * shared
        for channel in image if channels > 1 else ():
            channel += 0.3 * rng.uniform(0, 0.35) * source(height, width, rng) + rng.normal(0, 0.06)
    if channels > 3:
        images[:, 3:] = 1
    return np.clip(images, 0, 1)


def _gradient(height: int, width: int, rng: np.random.Generator) -> Array:
    """Return a slope along some direction, or around some centre, within about -1 and 1."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        return np.asarray(np.cos(angle) * x + np.sin(angle) * y)
    return np.asarray(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) - 1)


def _waves(height: int, width: int, rng: np.random.Generator) -> Array:
    """Return waves in a few directions, from some across the image to some pixels long."""
    y, x = np.mgrid[:height, :width]
    total = np.zeros((height, width))
    number = int(rng.integers(1, WAVES + 1))
    for _ in range(number):
        length = 3 * (max(height, width) / 3) ** rng.random()
        angle = rng.uniform(0, np.pi)
        total += np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / length + rng.uniform(0, 2 * np.pi))
    return total / number


def _noise(height: int, width: int, rng: np.random.Generator) -> Array:
    """Return noise of unit variance whose amplitude falls with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * frequency ** -rng.uniform(*SLOPES)
    spectrum[0, 0] = 0
    made: Array = np.fft.irfft2(spectrum, (height, width))
    return made / max(float(made.std()), 1e-9)
