"""Reading the images of a folder as inputs of a model."""

from __future__ import annotations

import importlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import PlanError
from spa.running.runtime import TensorSpec

UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, struct.error, zipfile.BadZipFile)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# ImageNet's usual statistics for colours; about as wide a range for grey.
_MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
_STD = {1: (0.25,), 3: (0.229, 0.224, 0.225)}


def fixed_size(dim: int | str | None) -> int | None:
    """Return the size of an axis that a model fixes, or None for a dynamic one."""
    return dim if isinstance(dim, int) and dim > 0 else None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether a type is one of floats; numpy does not count bfloat16 as one."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def channel_axis_of(specs: Sequence[TensorSpec]) -> int | None:
    """Return the axis of the channels (1 or 3) if a model takes one float image, else None."""
    spec = specs[0]
    if len(specs) != 1 or len(spec.shape) != 4 or spec.dtype is None or not is_float(spec.dtype):
        return None
    return next((axis for axis in (1, 3) if spec.shape[axis] in (1, 3)), None)


def reader(
    paths: Sequence[Path],
    spec: TensorSpec,
    channel_axis: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Callable[[int], np.ndarray]:
    """Return a function that reads the image at a position of ``paths``.

    Args:
        paths: the files.
        spec: the model's input.
        channel_axis: the axis of the input that holds the channels, 1 or 3.
        mean: per channel, is subtracted from values in 0..1; ImageNet's by default.
        std: per channel, divides the values after that; ImageNet's by default.

    Returns:
        A function from a position to an array of shape (1, c, h, w) or (1, h, w, c), where sizes that the model leaves
        open are those of the first image.

    Raises:
        PlanError: a file is not an image, ``mean`` or ``std`` does not fit, or Pillow is missing.
    """
    channels = fixed_size(spec.shape[channel_axis]) or 3
    shift = _per_channel("mean", mean, _MEAN[channels])
    scale = _per_channel("std", std, _STD[channels])
    if not (scale > 0).all():
        raise PlanError(f"std: {scale.tolist()} is not positive. Give what the images are divided by.")
    try:
        pillow = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise PlanError(f"{paths[0]}: reading images needs Pillow. Run  pip install 'spa-onnx[images]'.") from error
    rows, columns = spec.shape[2:] if channel_axis == 1 else spec.shape[1:3]
    height, width = fixed_size(rows), fixed_size(columns)
    if height is None or width is None:
        first = _open_image(pillow, paths[0], channels)
        height, width = height or first.height, width or first.width
    size = (width, height)

    def read(index: int) -> np.ndarray:
        image = _crop(pillow, _open_image(pillow, paths[index], channels), *size)
        pixels = np.asarray(image, dtype=np.float32).reshape(size[1], size[0], channels) / 255
        pixels = (pixels - shift) / scale
        return np.asarray((pixels.transpose(2, 0, 1) if channel_axis == 1 else pixels)[np.newaxis])

    return read


def _per_channel(name: str, option: Sequence[float] | None, default: tuple[float, ...]) -> np.ndarray:
    values = np.asarray(default if option is None else option, dtype=np.float32)
    if values.shape != (len(default),) or not np.isfinite(values).all():
        raise PlanError(f"{name}: {option} does not fit. Give {len(default)} numbers, one per channel.")
    return values


def _open_image(pillow: Any, path: Path, channels: int) -> Any:
    try:
        with pillow.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except (*UNREADABLE, pillow.DecompressionBombError) as error:
        raise PlanError(f"{path}: it cannot be read as an image ({error}). Remove or replace it.") from error


def _crop(pillow: Any, image: Any, width: int, height: int) -> Any:
    """Resize until the image just covers the target, then cut out its centre."""
    ratio = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
    if covering != image.size:
        image = image.resize(covering, pillow.Resampling.BILINEAR)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
