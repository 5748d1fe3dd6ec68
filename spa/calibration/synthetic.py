"""Synthetic calibration inputs, for a model without data.

Statistics of activations depend on more than shapes: under white noise the filters of an image network see no
edge and hardly fire. Inputs that look like images therefore get dead leaves (Lee, Mumford, Huang 2001), which
have occlusion, edges and the power spectrum in common with photographs and train networks surprisingly well (Baradad
et al. 2021); inputs that look like series get 1/f noise. All others are as :mod:`spa.running.feeds` makes them.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from spa.calibration.batches import comfortable
from spa.errors import ModelError, PlanError
from spa.model.traits import FLOAT_NAMES
from spa.running.feeds import Recipe, first_run, resolve_sizes
from spa.running.ranges import ranges_for
from spa.running.runtime import TensorSpec, input_specs, load_session, model_name, run

__all__ = ["dead_leaves", "pink_noise", "synthesise"]

_CHANNELS = (1, 3, 4)
_SMALLEST_IMAGE = 8
_SHORTEST_SERIES = 32

_SOUND = re.compile(r"audio|wave|wav($|_)|speech|(^|_)(log)?mel|(^|_)spec($|_|tro)", re.IGNORECASE)
# Floats of which the shape misleads: caches have heads where images have channels, and what another network
# has computed is closer to white noise than to an image or a series.
_COMPUTED = re.compile(r"mask|past|cache|state|hidden|embed|latent|noise", re.IGNORECASE)

# Leaves: how often each pixel is covered on average, sizes over the shorter side, and bounds on work.
_COVERAGE = 4.0
_SMALLEST_LEAF = 1 / 160
_LARGEST_LEAF = 1 / 2
_CHUNK_PIXELS = 1 << 21
_CHUNK_WINDOWS = 1 << 18


def synthesise(
    model: onnx.ModelProto,
    samples: int,
    batch: int | None = None,
    seed: int = 0,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Synthesise calibration inputs, of sizes at which the model has been seen to run.

    Floats of rank 4 with 1, 3 or 4 channels (first or last) are images: `dead_leaves`, normalised. Floats of
    rank 3 with a long last axis, and those of rank 2 that are named after sound, are series: `pink_noise`. The
    rest is as `spa.running.feeds` makes it, with a fresh seed for each batch.

    Args:
        model: the model, which is not changed.
        samples: the number of samples to make; where the batch axis is fixed, this is rounded up to whole batches.
        batch: the most samples in one batch, by default a size that is comfortable; a model that takes one batch size
            only keeps that.
        seed: the same arguments give the same bytes.
        mean: subtracted from images in [0, 1], per channel or for all; ImageNet's for three channels, else 0.5.
        std: divides images after that; ImageNet's for three channels, else 0.25.
        sizes: sizes of dynamic axes, by the axis' name or by ``input[axis]``.

    Returns:
        One mapping from input to array per batch; the last batch is smaller if ``samples`` leaves a remainder
        and the model takes it.

    Raises:
        PlanError: ``samples``, ``batch``, ``mean``, ``std`` or ``sizes`` does not fit.
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        ModelError: the model cannot be loaded, or ran on none of the sizes that were tried.
    """
    for option, number in (("samples", samples), ("batch", batch)):
        if number is not None and number < 1:
            raise PlanError(f"{option} is {number}. Give 1 or more.")
    name = model_name(model)
    session = load_session(model, name=name)
    ranges = ranges_for(model, input_specs(session))
    recipe, _ = first_run(session, seed=seed, sizes=sizes, ranges=ranges, name=name)

    def resized(base: Recipe, size: int) -> Recipe:
        """Return the recipe at another batch size, or as it was where the model refuses that."""
        guess = replace(base.guess, batch=size)
        other = replace(base, guess=guess, sizes=resolve_sizes(base.specs, guess, sizes))
        if other.sizes == base.sizes:
            return base
        try:
            run(session, other.feeds(seed), name=name)
        except ModelError:
            return base
        return other

    most = comfortable(recipe.feeds(seed), recipe.batch) if batch is None else batch
    recipe = resized(recipe, min(most, samples))
    count = -(-samples // recipe.batch)
    remainder = samples - (count - 1) * recipe.batch
    recipes = [recipe] * (count - 1) + [resized(recipe, remainder) if remainder < recipe.batch else recipe]
    return [_batch(each, (seed, index), mean, std) for index, each in enumerate(recipes)]


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


def pink_noise(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw 1/f noise along the last axis; each series has a slope of its own, from -0.5 to -2 (of the power).

    Args:
        shape: the shape of the result; all axes but the last count series.
        rng: the source of randomness.

    Returns:
        float32 of that shape; each series has zero mean and unit variance.
    """
    shape = tuple(shape)
    if not shape or shape[-1] < 2 or 0 in shape:
        return rng.standard_normal(shape, np.float32) if shape else np.array(rng.standard_normal(), np.float32)
    length, leading = shape[-1], shape[:-1]
    # Twice as long, then cut: the result of an inverse FFT joins up at its ends.
    frequency = np.arange(1, length + 1, dtype=np.float32)
    slope = rng.uniform(0.5, 2.0, (*leading, 1)).astype(np.float32)
    spectrum = np.zeros((*leading, length + 1), np.complex64)
    parts = rng.standard_normal((2, *leading, length), np.float32)
    spectrum[..., 1:] = (parts[0] + 1j * parts[1]) * frequency ** (-slope / 2)
    series = np.fft.irfft(spectrum, 2 * length, axis=-1)[..., :length]
    series -= series.mean(axis=-1, keepdims=True)
    spread = series.std(axis=-1, keepdims=True)
    return (series / np.where(spread > 0, spread, 1)).astype(np.float32)


# -- inputs --------------------------------------------------------------------------------------------------


def _batch(
    recipe: Recipe, seed: tuple[int, int], mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> dict[str, np.ndarray]:
    feeds = recipe.feeds(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    for spec in recipe.specs:
        # A float with a bound holds ids that the graph casts.
        if spec.element not in FLOAT_NAMES or spec.name in recipe.ranges or _COMPUTED.search(spec.name):
            continue
        array = feeds[spec.name]
        rng = np.random.default_rng([*seed, zlib.crc32(spec.name.encode())])
        axis = _channel_axis(array.shape)
        if axis is not None:
            content = _normalised_images(array.shape, axis, spec.name, mean, std, rng)
        elif _is_series(spec, array.shape):
            content = pink_noise(array.shape, rng)
        else:
            continue
        feeds[spec.name] = np.ascontiguousarray(content, dtype=array.dtype)
    return feeds


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return the axis that holds the channels of images; None for a shape that is not one of images."""
    if len(shape) == 4:
        for axis, spatial in ((1, shape[2:]), (3, shape[1:3])):
            if shape[axis] in _CHANNELS and min(spatial) >= _SMALLEST_IMAGE:
                return axis
    return None


def _is_series(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    if len(shape) not in (2, 3) or shape[-1] < _SHORTEST_SERIES:
        return False
    return len(shape) == 3 or _SOUND.search(spec.name) is not None


def _normalised_images(
    shape: tuple[int, ...],
    axis: int,
    name: str,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    rng: np.random.Generator,
) -> np.ndarray:
    channels = shape[axis]
    height, width = shape[2:] if axis == 1 else shape[1:3]
    rgb = channels == 3
    centre = _per_channel("mean", mean, (0.485, 0.456, 0.406) if rgb else 0.5, channels, name)
    spread = _per_channel("std", std, (0.229, 0.224, 0.225) if rgb else 0.25, channels, name)
    if not (spread > 0).all():
        raise PlanError(f"std is {spread.ravel().tolist()}, which is not positive. Give positive numbers.")
    images = dead_leaves(shape[0], channels, height, width, rng)
    images -= centre
    images /= spread
    return images if axis == 1 else images.transpose(0, 2, 3, 1)


def _per_channel(
    option: str, value: float | Sequence[float] | None, default: float | Sequence[float], channels: int, name: str
) -> np.ndarray:
    values = np.asarray(default if value is None else value, np.float32).reshape(-1)
    if len(values) not in (1, channels):
        raise PlanError(
            f"{option} has {len(values)} entries; input '{name}' has {channels} channels. Give one number for each."
        )
    return np.broadcast_to(values, (channels,)).reshape(-1, 1, 1)


# -- dead leaves ---------------------------------------------------------------------------------------------


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
