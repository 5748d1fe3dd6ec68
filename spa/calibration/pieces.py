"""Pieces of calibration data: samples, checked against the model's inputs and cast to their types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa.calibration import images
from spa.errors import PlanError
from spa.running.runtime import TensorSpec

_LABELS = ("label", "labels", "y")


@dataclass(frozen=True)
class Piece:
    """Samples with their labels.

    Attributes:
        feeds: checked arrays by input, of shape (samples, ...) each.
        labels: classes of shape (samples,), or None.
    """

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(next(iter(self.feeds.values())))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one sample; pieces that agree in them can be joined."""
        return tuple(array.shape[1:] for array in self.feeds.values())

    def take(self, index: slice | np.ndarray) -> Piece:
        """Return the samples that an index selects."""
        labels = None if self.labels is None else self.labels[index]
        return Piece({name: array[index] for name, array in self.feeds.items()}, labels)


def from_item(subject: str, item: Any, specs: Sequence[TensorSpec], labels: str | None) -> Piece:
    """Read an item of an iterable: named arrays, an array, or one of these with its labels.

    Args:
        subject: the item's name in messages.
        item: the item.
        specs: the model's inputs.
        labels: the name of the array of classes, if the user gave one.

    Raises:
        PlanError: the item does not fit the model.
    """
    classes: Any = None
    # torch's default collation turns pairs into lists.
    pair = isinstance(item, list) and 1 <= len(item) <= 2 and (isinstance(item[0], Mapping) or _is_array(item[0]))
    if isinstance(item, tuple) or pair:
        if not 1 <= len(item) <= 2:
            raise PlanError(
                f"{capitalise(subject)}: it is a tuple of {len(item)}, expected (inputs,) or (inputs, labels). "
                "Give a dict of arrays, by the names of the model's inputs."
            )
        item, classes = item if len(item) == 2 else (item[0], None)
    if isinstance(item, Mapping):
        return from_names(subject, item, specs, labels, classes=classes, single=True, copy=True)
    return from_bare(subject, item, classes, specs, labels, single=True, copy=True)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def from_bare(
    subject: str,
    value: Any,
    classes: Any,
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    single: bool,
    copy: bool = False,
) -> Piece:
    """Read one array for a model with one input; the arguments are those of :func:`from_names`."""
    if len(specs) != 1:
        raise PlanError(
            f"{capitalise(subject)}: it is one array, but the model takes {names_text(s.name for s in specs)}. "
            "Give arrays by these names, in an .npz file or a dict."
        )
    if labels is not None:
        raise PlanError(f"labels '{labels}': {subject} has no named arrays. Leave it out, or name the arrays.")
    return piece_of(subject, {specs[0].name: value}, classes, specs, single=single, copy=copy)


def from_names(
    subject: str,
    arrays: Mapping[Any, Any],
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    classes: Any = None,
    single: bool = False,
    any_name: bool = False,
    copy: bool = False,
) -> Piece:
    """Sort named arrays into inputs and labels.

    Args:
        subject: the name of the arrays' source in messages.
        arrays: the arrays by name.
        specs: the model's inputs.
        labels: the name of the array of classes; if None, ``label``, ``labels`` or ``y`` unless that is an input.
        classes: the classes, if they came apart from the arrays.
        single: whether arrays with one axis less than the inputs' are one sample.
        any_name: whether a single array fits a single input whatever its name.
        copy: whether the arrays must be copied, since their owner may change them.

    Raises:
        PlanError: the arrays do not fit the model.
    """
    expected = [spec.name for spec in specs]
    if labels in expected:
        raise PlanError(f"labels '{labels}': this is an input of the model. Name another array, or leave it out.")
    if labels is not None and labels not in arrays:
        raise PlanError(
            f"labels '{labels}': {subject} has no such array (it has {names_text(arrays)}). Check the name."
        )
    key = labels or next((name for name in _LABELS if name in arrays and name not in expected), None)
    if key is not None and classes is not None:
        raise PlanError(f"{capitalise(subject)}: it has labels twice, as '{key}' and in a pair. Leave one out.")
    inputs = {name: array for name, array in arrays.items() if name != key}
    if any_name and len(expected) == 1 and len(inputs) == 1:
        inputs = {expected[0]: next(iter(inputs.values()))}
    missing = [name for name in expected if name not in inputs]
    if missing:
        raise PlanError(
            f"{capitalise(subject)}: {names_text(missing)} {'is' if len(missing) == 1 else 'are'} missing "
            f"(expected {names_text(expected)}, got {names_text(arrays)}). Name the arrays like the model's inputs."
        )
    extra = [name for name in inputs if name not in expected]
    if extra:
        verb = "is not an input" if len(extra) == 1 else "are not inputs"
        raise PlanError(
            f"{capitalise(subject)}: {names_text(extra)} {verb} of the model "
            f"(expected {names_text(expected)}). Remove what is not needed, or name the labels."
        )
    return piece_of(subject, inputs, classes if key is None else arrays[key], specs, single=single, copy=copy)


def piece_of(
    subject: str, arrays: Mapping[str, Any], classes: Any, specs: Sequence[TensorSpec], *, single: bool, copy: bool
) -> Piece:
    """Check arrays, by input, and their classes; the arguments are those of :func:`from_names`."""
    raw = {spec.name: _as_array(f"Input '{spec.name}' of {subject}", arrays[spec.name], copy) for spec in specs}
    labels = None if classes is None else _as_array(f"The labels of {subject}", classes, copy)
    if single and all(raw[spec.name].ndim == len(spec.shape) - 1 for spec in specs):
        raw = {name: array[np.newaxis] for name, array in raw.items()}
        labels = labels[np.newaxis] if labels is not None and labels.ndim == 0 else labels
    feeds = {spec.name: _fit(f"Input '{spec.name}' of {subject}", raw[spec.name], spec) for spec in specs}
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise PlanError(
            f"{capitalise(subject)}: its arrays differ in the number of samples ({listed}). Give each as many."
        )
    if labels is not None:
        labels = _fit_labels(f"The labels of {subject}", labels, next(iter(counts.values())))
    return Piece(feeds, labels)


def _as_array(subject: str, value: Any, copy: bool) -> np.ndarray:
    try:
        array = np.asarray(value)
        # A generator may fill the same array again and again.
        return array.copy() if copy else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"{subject}: numpy makes no array of a {type(value).__name__} ({error}). Give an array."
        ) from error


def _fit(subject: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Check an array's shape against an input, and cast it to the input's type."""
    expected = f"expected {len(spec.shape)} {shape_text(spec.shape)}"
    if array.ndim != len(spec.shape):
        raise PlanError(f"{subject}: it has {array.ndim} axes {shape_text(array.shape)}, {expected}. Reshape it.")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis and images.fixed_size(dim) not in (None, size):
            raise PlanError(
                f"{subject}: axis {axis} has size {size}, expected {dim} (shape {shape_text(array.shape)}, expected "
                f"{shape_text(spec.shape)}). Give samples as the model takes them."
            )
        if axis and size == 0:
            raise PlanError(f"{subject}: axis {axis} has size 0. Give samples that hold something.")
    return _cast(subject, array, spec)


def _cast(subject: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Cast an array to an input's type; refuse a cast that would change values."""
    dtype = spec.dtype
    assert dtype is not None  # _checked_specs
    if images.is_float(array.dtype) and (count := _count_not_finite(array)):
        raise PlanError(f"{subject}: {count} of {array.size} values are nan or inf. Remove or repair those samples.")
    if array.dtype == dtype:
        return array.astype(dtype, copy=False)
    if images.is_float(array.dtype) and images.is_float(dtype):
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if count := _count_not_finite(cast):
            raise PlanError(f"{subject}: {count} of {array.size} values are too large for {dtype}. Scale them down.")
        return cast
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
            raise PlanError(
                f"{subject}: its values {array.min()}..{array.max()} do not fit into {dtype}. Give values that do."
            )
        return array.astype(dtype)
    remedy = f"Cast it to {dtype}."
    if array.dtype == np.uint8 and images.is_float(dtype):
        remedy = f"Normalise it first, as for the model's training: {dtype}, not bytes."
    raise PlanError(f"{subject}: its dtype is {array.dtype}, expected {dtype}. {remedy}")


def _count_not_finite(array: np.ndarray) -> int:
    """Count the values that are nan or inf, without a mask as large as the array."""
    return sum(int(rows.size - np.count_nonzero(np.isfinite(rows))) for rows in array)


def _fit_labels(subject: str, array: np.ndarray, samples: int) -> np.ndarray:
    """Check that labels are one class per sample, and return them as int64."""
    if array.dtype.kind not in "iu":
        raise PlanError(f"{subject}: their dtype is {array.dtype}, expected integers. Give classes, or leave them out.")
    if array.ndim != 1:
        raise PlanError(
            f"{subject}: they have {array.ndim} axes {shape_text(array.shape)}, expected 1. Give one class each."
        )
    if len(array) != samples:
        raise PlanError(f"{subject}: there are {len(array)} for {samples} samples. Give one class per sample.")
    return array.astype(np.int64)


def names_text(names: Iterable[Any]) -> str:
    """Return names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def shape_text(shape: Iterable[int | str | None]) -> str:
    """Return a shape in brackets, for a message."""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def capitalise(subject: str) -> str:
    """Capitalise the subject of a sentence; paths stay as they are."""
    return subject[0].upper() + subject[1:] if subject.startswith(("the ", "item ", "a ", "an ")) else subject
