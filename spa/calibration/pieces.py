"""Some samples of calibration data: named, checked against the model's inputs, and cast to their types."""

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
    """Some samples: checked feeds, and their labels if there are any."""

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None

    @property
    def samples(self) -> int:
        """How many."""
        return len(next(iter(self.feeds.values())))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one sample: pieces that agree in them can be put together."""
        return tuple(array.shape[1:] for array in self.feeds.values())

    def take(self, index: slice | np.ndarray) -> Piece:
        """The samples of an index."""
        labels = None if self.labels is None else self.labels[index]
        return Piece({name: array[index] for name, array in self.feeds.items()}, labels)


def from_item(what: str, item: Any, specs: Sequence[TensorSpec], labels: str | None) -> Piece:
    """An item of an iterable: named arrays, an array, or one of these with its labels."""
    classes: Any = None
    # torch's default collation turns pairs into lists.
    pair = isinstance(item, list) and 1 <= len(item) <= 2 and (isinstance(item[0], Mapping) or _is_array(item[0]))
    if isinstance(item, tuple) or pair:
        if not 1 <= len(item) <= 2:
            raise PlanError(
                f"{cap(what)}: it is a tuple of {len(item)}, expected (inputs,) or (inputs, labels). "
                "Give a dict of arrays, by the names of the model's inputs."
            )
        item, classes = item if len(item) == 2 else (item[0], None)
    if isinstance(item, Mapping):
        return from_names(what, item, specs, labels, classes=classes, single=True, copy=True)
    return from_bare(what, item, classes, specs, labels, single=True, copy=True)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def from_bare(
    what: str,
    value: Any,
    classes: Any,
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    single: bool,
    copy: bool = False,
) -> Piece:
    """One array for a model with one input."""
    if len(specs) != 1:
        raise PlanError(
            f"{cap(what)}: it is one array, but the model takes {say_names(s.name for s in specs)}. "
            "Give arrays by these names, in an .npz file or a dict."
        )
    if labels is not None:
        raise PlanError(f"labels '{labels}': {what} has no named arrays. Leave it out, or name the arrays.")
    return piece_of(what, {specs[0].name: value}, classes, specs, single=single, copy=copy)


def from_names(
    what: str,
    arrays: Mapping[Any, Any],
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    classes: Any = None,
    single: bool = False,
    any_name: bool = False,
    copy: bool = False,
) -> Piece:
    """Sort named arrays into inputs and labels; with `any_name` a single array fits a single input."""
    expected = [spec.name for spec in specs]
    if labels in expected:
        raise PlanError(f"labels '{labels}': this is an input of the model. Name another array, or leave it out.")
    if labels is not None and labels not in arrays:
        raise PlanError(f"labels '{labels}': {what} has no such array (it has {say_names(arrays)}). Check the name.")
    key = labels or next((name for name in _LABELS if name in arrays and name not in expected), None)
    if key is not None and classes is not None:
        raise PlanError(f"{cap(what)}: it has labels twice, as '{key}' and in a pair. Leave one out.")
    given = {name: array for name, array in arrays.items() if name != key}
    if any_name and len(expected) == 1 and len(given) == 1:
        given = {expected[0]: next(iter(given.values()))}
    missing = [name for name in expected if name not in given]
    if missing:
        raise PlanError(
            f"{cap(what)}: {say_names(missing)} {'is' if len(missing) == 1 else 'are'} missing "
            f"(expected {say_names(expected)}, got {say_names(arrays)}). Name the arrays like the model's inputs."
        )
    extra = [name for name in given if name not in expected]
    if extra:
        raise PlanError(
            f"{cap(what)}: {say_names(extra)} {'is no input' if len(extra) == 1 else 'are no inputs'} of the model "
            f"(expected {say_names(expected)}). Remove what is not needed, or name the labels."
        )
    return piece_of(what, given, classes if key is None else arrays[key], specs, single=single, copy=copy)


def piece_of(
    what: str, given: Mapping[str, Any], classes: Any, specs: Sequence[TensorSpec], *, single: bool, copy: bool
) -> Piece:
    """Check arrays against the inputs; with `single`, one axis less than the input's means one sample."""
    raw = {spec.name: _as_array(f"Input '{spec.name}' of {what}", given[spec.name], copy) for spec in specs}
    y = None if classes is None else _as_array(f"The labels of {what}", classes, copy)
    if single and all(raw[spec.name].ndim == len(spec.shape) - 1 for spec in specs):
        raw = {name: array[np.newaxis] for name, array in raw.items()}
        y = y[np.newaxis] if y is not None and y.ndim == 0 else y
    feeds = {spec.name: _fit(f"Input '{spec.name}' of {what}", raw[spec.name], spec) for spec in specs}
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise PlanError(f"{cap(what)}: its arrays differ in the number of samples ({said}). Give each as many.")
    if y is not None:
        y = _fit_labels(f"The labels of {what}", y, next(iter(counts.values())))
    return Piece(feeds, y)


def _as_array(what: str, value: Any, copy: bool) -> np.ndarray:
    try:
        array = np.asarray(value)
        # A generator may fill the same array again and again.
        return array.copy() if copy else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"{what}: numpy makes no array of a {type(value).__name__} ({error}). Give an array."
        ) from error


def _fit(what: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    expected = f"expected {len(spec.shape)} {say_shape(spec.shape)}"
    if array.ndim != len(spec.shape):
        raise PlanError(f"{what}: it has {array.ndim} axes {say_shape(array.shape)}, {expected}. Reshape it.")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis and images.fixed(dim) not in (None, size):
            raise PlanError(
                f"{what}: axis {axis} has size {size}, expected {dim} (shape {say_shape(array.shape)}, expected "
                f"{say_shape(spec.shape)}). Give samples as the model takes them."
            )
        if axis and size == 0:
            raise PlanError(f"{what}: axis {axis} has size 0. Give samples that hold something.")
    return _cast(what, array, spec)


def _cast(what: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    dtype = spec.dtype
    assert dtype is not None  # _checked_specs
    if images.is_float(array.dtype) and (bad := _not_finite(array)):
        raise PlanError(f"{what}: {bad} of {array.size} values are nan or inf. Remove those samples, or mend them.")
    if array.dtype == dtype:
        return array.astype(dtype, copy=False)
    if images.is_float(array.dtype) and images.is_float(dtype):
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if bad := _not_finite(cast):
            raise PlanError(f"{what}: {bad} of {array.size} values are too large for {dtype}. Scale them down.")
        return cast
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
            raise PlanError(
                f"{what}: its values {array.min()}..{array.max()} do not fit into {dtype}. Give values that do."
            )
        return array.astype(dtype)
    remedy = f"Cast it to {dtype}."
    if array.dtype == np.uint8 and images.is_float(dtype):
        remedy = f"Normalise it first, as for the model's training: {dtype}, not bytes."
    raise PlanError(f"{what}: its dtype is {array.dtype}, expected {dtype}. {remedy}")


def _not_finite(array: np.ndarray) -> int:
    """How many values are nan or inf, found without a mask as large as the array."""
    return sum(int(rows.size - np.count_nonzero(np.isfinite(rows))) for rows in array)


def _fit_labels(what: str, array: np.ndarray, samples: int) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise PlanError(f"{what}: their dtype is {array.dtype}, expected integers. Give classes, or leave them out.")
    if array.ndim != 1:
        raise PlanError(
            f"{what}: they have {array.ndim} axes {say_shape(array.shape)}, expected 1. Give one class each."
        )
    if len(array) != samples:
        raise PlanError(f"{what}: there are {len(array)} for {samples} samples. Give one class per sample.")
    return array.astype(np.int64)


def say_names(names: Iterable[Any]) -> str:
    """Names in quotes."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def say_shape(shape: Iterable[int | str | None]) -> str:
    """A shape in brackets."""
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def cap(what: str) -> str:
    """A sentence's first word; paths stay as they are."""
    return what[0].upper() + what[1:] if what.startswith(("the ", "item ", "a ", "an ")) else what
