"""Reading the images of a folder as inputs of a model."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spa.errors import PlanError
from spa.running.runtime import TensorSpec

Numbers = float | Sequence[float]  # for all channels, or for each
UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, struct.error, zipfile.BadZipFile)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# ImageNet's usual statistics for colours; about as wide a range for grey.
MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
STD = {1: (0.25,), 3: (0.229, 0.224, 0.225)}
_STEP = 32  # open sizes are multiples of it: what most networks with strides ask for
_LARGEST = 1024  # rows or columns of an open size
_HEADERS = 256  # files whose sizes are looked at


def range_normalisation(low: float, high: float) -> tuple[float, float]:
    """Return the mean and the deviation by which values in 0..1 get another range.

    >>> range_normalisation(-1, 1)
    (0.5, 0.5)
    """
    return -low / (high - low), 1 / (high - low)


def fixed_size(dim: int | str | None) -> int | None:
    """Return the size of an axis that a model fixes, or None for a dynamic one."""
    return dim if isinstance(dim, int) and dim > 0 else None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether a type is one of floats; numpy does not count bfloat16 as one."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def channel_axis_of(specs: Sequence[TensorSpec]) -> int | None:
    """Return the axis of the channels (1 or 3) if a model takes one float image, else None.

    Where all axes of the image are open, the channels are taken to be three and to come first.
    """
    spec = specs[0]
    if len(specs) != 1 or len(spec.shape) != 4 or spec.dtype is None or not is_float(spec.dtype):
        return None
    found = next((axis for axis in (1, 3) if spec.shape[axis] in (1, 3)), None)
    return 1 if found is None and not any(isinstance(dim, int) for dim in spec.shape[1:]) else found


@dataclass(frozen=True)
class Pictures:
    """The images of a folder, read one by one as a model takes them.

    Attributes:
        paths: the files.
        channel_axis: the axis of the input that holds the channels, 1 or 3.
        channels: their number.
        height: rows, or None for as many as keep an image's proportions.
        width: columns, or None for as many as keep an image's proportions.
        mean: per channel, is subtracted from values in 0..1.
        std: per channel, divides the values after that.
        crops: whether what is too long is cut off rather than squeezed.
        value_range: what mean and deviation make of 0..1, where it was given so.
    """

    paths: Sequence[Path]
    channel_axis: int
    channels: int
    height: int | None
    width: int | None
    mean: np.ndarray
    std: np.ndarray
    crops: bool
    value_range: tuple[float, float] | None = None

    def read(self, index: int) -> np.ndarray:
        """Read the image at a position of ``paths``, resized and normalised.

        Returns:
            Float32, of shape (1, c, h, w) or (1, h, w, c).
        """
        image = opened(self.paths[index], self.channels)
        width, height = self._size_of(image)
        bilinear = Image.Resampling.BILINEAR
        if self.crops:
            image = _crop(image, width, height, bilinear)
        elif image.size != (width, height):
            image = image.resize((width, height), bilinear)
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, self.channels) / 255
        pixels = (pixels - self.mean) / self.std
        return np.asarray((pixels.transpose(2, 0, 1) if self.channel_axis == 1 else pixels)[np.newaxis])

    def _size_of(self, image: Any) -> tuple[int, int]:
        width, height = self.width, self.height
        if width is None:
            width = _rounded(image.width * (height or image.height) / image.height)
        if height is None:
            height = _rounded(image.height * width / image.width)
        return width, height

    @property
    def note(self) -> str:
        """Say in a sentence what is done to the images."""
        if self.height is None or self.width is None:
            side = f"{self.height} rows" if self.width is None else f"{self.width} columns"
            how = f"resized to {side}, the other side in proportion, in steps of {_STEP}"
        elif self.crops:
            how = f"resized to cover {self.height}x{self.width} (rows x columns), what sticks out was cut off evenly"
        else:
            how = f"resized to {self.height}x{self.width} (rows x columns), since the model leaves the size open"
        if self.value_range is not None:
            return "images were {}; scaled to {:g}..{:g}, as --range says".format(how, *self.value_range)
        mean, std = (", ".join(f"{v:.3g}" for v in values.tolist()) for values in (self.mean, self.std))
        return (
            f"images were {how}; scaled to 0..1, less mean {mean}, over std {std} (--mean and --std, if it took others)"
        )


def pictures(
    paths: Sequence[Path],
    spec: TensorSpec,
    channel_axis: int,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Pictures:
    """Prepare to read images.

    Sizes that the model fixes are covered by the image, as in the evaluation of classifiers. Where it leaves both open,
    all images are resized to one size, ``sizes`` or else the median of theirs; where it leaves one open, as for lines
    of text, each keeps its proportions.

    Args:
        paths: the files.
        spec: the model's input.
        channel_axis: the axis of the input that holds the channels, 1 or 3.
        mean: per channel, is subtracted from values in 0..1; ImageNet's by default.
        std: per channel, divides the values after that; ImageNet's by default.
        sizes: of open axes, by name or by ``input[axis]``.

    Raises:
        PlanError: a file is not an image, or ``mean`` or ``std`` does not fit.
    """
    channels = fixed_size(spec.shape[channel_axis]) or 3
    shift = _per_channel("mean", mean, MEAN[channels])
    scale = _per_channel("std", std, STD[channels])
    if not (scale > 0).all():
        raise PlanError(f"std: {scale.tolist()} is not positive. Give what the images are divided by.")
    axes = (2, 3) if channel_axis == 1 else (1, 2)
    height, width = (_given(spec, axis, sizes or {}) for axis in axes)
    is_fixed = all(fixed_size(spec.shape[axis]) for axis in axes)
    if height is None and width is None:
        seen = [opened(path, channels, header=True) for path in paths[:_HEADERS]]
        height, width = (
            _rounded(float(np.median(side))) for side in ([i.height for i in seen], [i.width for i in seen])
        )
    return Pictures(
        paths=paths,
        channel_axis=channel_axis,
        channels=channels,
        height=height,
        width=width,
        mean=shift,
        std=scale,
        crops=is_fixed,
    )


def _given(spec: TensorSpec, axis: int, sizes: Mapping[str, int]) -> int | None:
    dim = spec.shape[axis]
    return fixed_size(dim) or sizes.get(f"{spec.name}[{axis}]") or sizes.get(str(dim))


def _rounded(size: float) -> int:
    return min(max(round(size / _STEP), 1) * _STEP, _LARGEST)


def _per_channel(name: str, option: Numbers | None, default: tuple[float, ...]) -> np.ndarray:
    values = np.asarray(default if option is None else option, dtype=np.float32)
    values = np.broadcast_to(values, len(default)) if values.ndim == 0 else values
    if values.shape != (len(default),) or not np.isfinite(values).all():
        raise PlanError(f"{name}: {option} does not fit. Give {len(default)} numbers, one per channel.")
    return values


def opened(path: Path, channels: int = 3, header: bool = False) -> Any:
    """Open an image in grey (1) or colours (3), as Pillow's; with ``header`` its size alone is read."""
    try:
        with Image.open(path) as image:
            return image if header else image.convert("L" if channels == 1 else "RGB")
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise PlanError(f"{path}: it cannot be read as an image ({error}). Remove or replace it.") from error


def _crop(image: Any, width: int, height: int, method: Any) -> Any:
    """Resize until the image just covers the target, then cut out its centre."""
    ratio = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * ratio)), max(height, round(image.height * ratio))
    if covering != image.size:
        image = image.resize(covering, method)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
