"""Dead leaves: images of overlapping shapes with the statistics of photographs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# How often each pixel is covered on average, sizes over the shorter side, and bounds on work.
_COVERAGE = 4.0
_SMALLEST_LEAF = 1 / 160
_LARGEST_LEAF = 1 / 2
_CHUNK_PIXELS = 1 << 21
_CHUNK_WINDOWS = 1 << 18


def dead_leaves(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw images of overlapping ellipses and rectangles whose sizes follow a power law, as in photographs.

    Radii have density r^-3, which makes the images scale invariant (Lee, Mumford, Huang 2001); each leaf has one
    colour, with a linear shading. Colours vary most in brightness, less from warm to cold, least from green to purple.

    Args:
        count: the number of images.
        channels: the number of channels, which are strongly correlated.
        height: rows.
        width: columns.
        rng: the source of randomness.

    Returns:
        Values in [0, 1], float32, of shape (count, channels, height, width).

    >>> images = dead_leaves(2, 3, 16, 24, np.random.default_rng(0))
    >>> images.shape, images.dtype, bool(images.min() >= 0 and images.max() <= 1)
    ((2, 3, 16, 24), dtype('float32'), True)
    """
    images = np.empty((count, channels, height, width), np.float32)
    step = max(1, _CHUNK_PIXELS // max(height * width, 1))
    for start in range(0, count if images.size else 0, step):
        part = images[start : start + step]
        leaves = _scatter_leaves(len(part), height, width, rng)
        _paint(part, leaves, _topmost(leaves, len(part), height, width), rng)
        _blur(part, rng)
        part += rng.uniform(0, 0.02, (len(part), 1, 1, 1)).astype(np.float32) * rng.standard_normal(
            part.shape, np.float32
        )
        np.clip(part, 0, 1, out=part)
    return images


@dataclass(frozen=True)
class _Leaves:
    """Leaves of several images, image by image; within one, later ones lie on top. Row 0 is the background.

    Attributes:
        x: columns of the centres; like all others, of shape (images, leaves).
        y: rows of the centres.
        radius: geometric means of both half axes.
        wide: ratios of the first half axis to ``radius``, and of ``radius`` to the second.
        angle: directions of the first half axis, in radians.
        box: whether a leaf is a rectangle rather than an ellipse.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    wide: np.ndarray
    angle: np.ndarray
    box: np.ndarray


def _scatter_leaves(count: int, height: int, width: int, rng: np.random.Generator) -> _Leaves:
    """Scatter all leaves that may touch the image evenly over the plane; each image has the expected number."""
    side = min(height, width)
    smallest = max(1.0, side * _SMALLEST_LEAF)
    edges = np.geomspace(smallest, max(2 * smallest, side * _LARGEST_LEAF), 257)
    middles = np.sqrt(edges[1:] * edges[:-1])
    density = _COVERAGE / (math.pi * math.log(edges[-1] / edges[0])) * middles**-3
    # The larger a leaf, the farther outside its centre may lie.
    expected = density * (height + 2 * middles) * (width + 2 * middles) * np.diff(edges)
    number = max(1, round(float(expected.sum())))
    cumulative = np.concatenate([[0.0], np.cumsum(expected) / expected.sum()])

    shape = (count, number + 1)
    radius = np.interp(rng.random(shape), cumulative, edges)
    x = rng.random(shape) * (width + 2 * radius) - radius
    y = rng.random(shape) * (height + 2 * radius) - radius
    x[:, 0], y[:, 0], radius[:, 0] = width / 2, height / 2, max(height, width) / 2
    wide = np.exp(rng.uniform(0, 0.6, shape)) ** rng.integers(0, 2, shape)  # Half of them: disks and squares.
    angle = rng.uniform(0, 2 * math.pi, shape)
    box = rng.random(shape) < 0.4
    return _Leaves(
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        radius=radius.astype(np.float32),
        wide=wide.astype(np.float32),
        angle=angle.astype(np.float32),
        box=box,
    )


def _topmost(leaves: _Leaves, count: int, height: int, width: int) -> np.ndarray:
    """Find the leaf that each pixel shows, of shape (count, height, width).

    Leaves of about one size are drawn at once, each within a window of its own; the order in which they lie
    is kept by taking the maximum of their numbers.
    """
    number = leaves.x.shape[1] - 1
    x, y, radius, wide, angle, box = (
        array[:, 1:].ravel() for array in (leaves.x, leaves.y, leaves.radius, leaves.wide, leaves.angle, leaves.box)
    )
    depth = np.tile(np.arange(1, number + 1, dtype=np.int32), count)
    base = np.repeat(np.arange(count) * (height * width), number)
    first, second = radius * wide, radius / wide
    first, second = np.where(box, first * 0.886, first), np.where(box, second * 0.886, second)  # Equal areas.
    reach = np.where(box, np.hypot(first, second), first)
    # Rows of the map that takes a leaf to the unit disk or square.
    across, down = np.cos(angle), np.sin(angle)
    ux, uy, vx, vy = across / first, down / first, -down / second, across / second

    top = np.zeros(count * height * width, np.int32)
    for half, is_box, indices in _alike_leaves(reach, box, max(height, width)):
        high, broad = min(2 * half + 1, height), min(2 * half + 1, width)
        step = max(1, _CHUNK_WINDOWS // (high * broad))
        for start in range(0, len(indices), step):
            at = indices[start : start + step]
            row = np.clip(np.rint(y[at]).astype(np.int64) - half, 0, height - high)[:, None] + np.arange(high)
            column = np.clip(np.rint(x[at]).astype(np.int64) - half, 0, width - broad)[:, None] + np.arange(broad)
            dy = (row - y[at, None]).astype(np.float32)
            dx = (column - x[at, None]).astype(np.float32)
            u = (uy[at, None] * dy)[:, :, None] + (ux[at, None] * dx)[:, None, :]
            v = (vy[at, None] * dy)[:, :, None] + (vx[at, None] * dx)[:, None, :]
            inside = np.maximum(np.abs(u), np.abs(v)) <= 1 if is_box else u * u + v * v <= 1
            pixel = (base[at, None] + row * width)[:, :, None] + column[:, None, :]
            above = np.broadcast_to(depth[at, None, None], inside.shape)
            np.maximum.at(top, pixel[inside], above[inside])
    return top.reshape(count, height, width)


def _alike_leaves(reach: np.ndarray, box: np.ndarray, side: int) -> Iterator[tuple[int, bool, np.ndarray]]:
    """Yield sets of leaves of one form that fit into one window.

    Yields:
        (half the window's side in pixels, whether the leaves are rectangles, the positions of the leaves).
    """
    halves = [1]
    while halves[-1] < side:
        halves.append(max(halves[-1] + 1, math.ceil(halves[-1] * 1.3)))
    # Centres are rounded to whole pixels, hence the half; what is larger than the last has the whole image.
    group = np.minimum(np.searchsorted(np.asarray(halves), reach + 0.5), len(halves) - 1)
    for index, half in enumerate(halves):
        for is_box in (False, True):
            indices = np.flatnonzero((group == index) & (box == is_box))
            if len(indices):
                yield half, is_box, indices


def _paint(images: np.ndarray, leaves: _Leaves, top: np.ndarray, rng: np.random.Generator) -> None:
    """Colour each pixel by the leaf it shows."""
    count, channels, height, width = images.shape
    number = leaves.x.shape[1]
    at = top + (np.arange(count, dtype=np.int64) * number)[:, None, None]

    # Illumination: a plane on each leaf, zero at its centre.
    tilt = rng.normal(0, 0.08, leaves.x.shape) / leaves.radius
    direction = rng.uniform(0, 2 * math.pi, leaves.x.shape)
    slope_x, slope_y = tilt * np.cos(direction), tilt * np.sin(direction)
    offset = -(slope_x * leaves.x + slope_y * leaves.y)
    shade = _look_up(slope_x, at) * np.arange(width, dtype=np.float32)
    shade += _look_up(slope_y, at) * np.arange(height, dtype=np.float32)[:, None]
    shade += _look_up(offset, at)

    # Photographs differ in exposure and contrast, and so does what they show.
    palette = np.array([0.45]) + _colours((count, 1), channels, 0.1, rng)
    contrast = rng.uniform(0.6, 1.4, (count, 1, 1))
    colours = palette + contrast * _colours(leaves.x.shape, channels, 0.2, rng)
    for channel in range(channels):
        np.add(_look_up(colours[..., channel], at), shade, out=images[:, channel])
    np.clip(images, 0, 1, out=images)


def _look_up(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    values: np.ndarray = table.astype(np.float32).ravel()[at]
    return values


def _colours(shape: tuple[int, ...], channels: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Draw deviations from grey, in the basis of cosines over the channels.

    For RGB that is about the basis of photographs: their principal components are brightness, blue against yellow, and
    green against purple (Ruderman, Cronin, Chiao 1998), close to the three cosines over three channels.
    """
    order = np.arange(channels)
    basis = np.cos(math.pi * order[:, None] * (order + 0.5) / channels) * np.where(order, math.sqrt(2), 1)[:, None]
    weights = spread * np.array([1.0, 0.25, 0.1, 0.1])[np.minimum(order, 3)]
    deviations: np.ndarray = (rng.standard_normal((*shape, channels)) * weights) @ basis
    return deviations


def _blur(images: np.ndarray, rng: np.random.Generator) -> None:
    """Mix each pixel with its neighbours along both axes, in place, by an amount that differs by image."""
    amount = rng.uniform(0.05, 0.25, (len(images), 1, 1, 1)).astype(np.float32)
    for axis in (2, 3):
        lines: np.ndarray = np.moveaxis(images, axis, -1)
        padded: np.ndarray[Any, Any] = np.concatenate([lines[..., :1], lines, lines[..., -1:]], axis=-1)
        lines += amount * (padded[..., :-2] + padded[..., 2:] - 2 * lines)
