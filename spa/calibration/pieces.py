"""Pieces of calibration data: samples, checked against the model's inputs and cast to their types.

Samples lie along the axis that the model has for them, which need not be the first: a recurrent state is
(layers, samples, features). Inputs without such an axis are shared by all samples of a piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa.calibration import images
from spa.calibration.interface import Interface, names_text, shape_text
from spa.errors import PlanError
from spa.running.runtime import TensorSpec

LABELS = ("label", "labels", "y")


@dataclass(frozen=True)
class Piece:
    """Samples with their labels.

    Attributes:
        feeds: checked arrays by input, as the model takes them.
        labels: classes of shape (samples,), or None.
        axes: by input the axis along which samples lie; None for an input that they share. Where all are None, the
            arrays are one batch that is fed as it is.
    """

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None
    axes: Mapping[str, int | None]

    @property
    def samples(self) -> int:
        """The number of samples; a batch that is fed as it is counts as one."""
        return next((self.feeds[n].shape[a] for n, a in self.axes.items() if a is not None), 1)

    @property
    def is_whole(self) -> bool:
        """Return whether the arrays are one batch that is fed as it is."""
        return all(axis is None for axis in self.axes.values())

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what pieces that can be joined have in common: the shapes of one sample, and what is shared."""
        if self.is_whole:
            return (id(self),)
        return tuple(
            array.shape[:axis] + array.shape[axis + 1 :] if (axis := self.axes[name]) is not None else array.tobytes()
            for name, array in self.feeds.items()
        )

    def take(self, index: slice | np.ndarray) -> Piece:
        """Return the samples that an index selects."""
        if self.is_whole:
            return self
        labels = None if self.labels is None else self.labels[index]
        feeds = {
            name: array if (axis := self.axes[name]) is None else array[(slice(None),) * axis + (index,)]
            for name, array in self.feeds.items()
        }
        return Piece(feeds, labels, self.axes)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Join pieces of one kind."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    feeds = {
        name: array if (axis := first.axes[name]) is None else np.concatenate([p.feeds[name] for p in pieces], axis)
        for name, array in first.feeds.items()
    }
    return Piece(feeds, joined_labels(pieces), first.axes)


def joined_labels(pieces: Iterable[Piece]) -> np.ndarray | None:
    """Join the labels of pieces; None where there are none."""
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return np.concatenate(labels) if labels else None


def from_item(subject: str, item: Any, interface: Interface, labels: str | None) -> Piece:
    """Read an item of an iterable: named arrays, an array, or one of these with its labels.

    Args:
        subject: the item's name in messages.
        item: the item.
        interface: the model's inputs.
        labels: the name of the array of classes, if the user gave one.

    Raises:
        PlanError: the item does not fit the model.
    """
    classes: Any = None
    count = len(interface.specs)
    # torch's default collation turns pairs into lists.
    lengths = (1, 2) if count == 1 else (1, 2, count, count + 1)
    parts = isinstance(item, list) and len(item) in lengths and (isinstance(item[0], Mapping) or _is_array(item[0]))
    if isinstance(item, tuple) or parts:
        if count > 1 and len(item) in (count, count + 1) and not isinstance(item[0], Mapping):
            item, classes = dict(zip(interface.names, item, strict=False)), item[count] if len(item) > count else None
        elif len(item) in (1, 2):
            item, classes = item if len(item) == 2 else (item[0], None)
        else:
            expected = "(inputs,) or (inputs, labels)" if count == 1 else f"{count} arrays, or these and labels"
            raise PlanError(
                f"{capitalise(subject)}: it is a tuple of {len(item)}, expected {expected}. "
                "Give a dict of arrays, by the names of the model's inputs."
            )
    if isinstance(item, Mapping):
        return from_names(subject, item, interface, labels, classes=classes, single=True, copy=True)
    return from_bare(subject, item, classes, interface, labels, single=True, copy=True)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def from_bare(
    subject: str,
    value: Any,
    classes: Any,
    interface: Interface,
    labels: str | None,
    *,
    single: bool,
    copy: bool = False,
) -> Piece:
    """Read one array for a model with one input; the arguments are those of :func:`from_names`."""
    if len(interface.specs) != 1:
        raise PlanError(
            f"{capitalise(subject)}: it is one array, but the model takes {names_text(interface.names)}. "
            "Give arrays by these names, in an .npz file or a dict."
        )
    if labels is not None:
        raise PlanError(f"labels '{labels}': {subject} has no named arrays. Leave it out, or name the arrays.")
    return piece_of(subject, {interface.names[0]: value}, classes, interface, single=single, copy=copy)


def from_names(
    subject: str,
    arrays: Mapping[Any, Any],
    interface: Interface,
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
        interface: the model's inputs.
        labels: the name of the array of classes; if None, ``label``, ``labels`` or ``y`` unless that is an input.
        classes: the classes, if they came apart from the arrays.
        single: whether arrays with one axis less than the inputs' are one sample.
        any_name: whether a single array fits a single input whatever its name.
        copy: whether the arrays must be copied, since their owner may change them.

    Raises:
        PlanError: the arrays do not fit the model.
    """
    expected = interface.names
    if labels in expected:
        raise PlanError(f"labels '{labels}': this is an input of the model. Name another array, or leave it out.")
    if labels is not None and labels not in arrays:
        raise PlanError(
            f"labels '{labels}': {subject} has no such array (it has {names_text(arrays)}). Check the name."
        )
    key = labels or next((name for name in LABELS if name in arrays and name not in expected), None)
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
    return piece_of(subject, inputs, classes if key is None else arrays[key], interface, single=single, copy=copy)


def piece_of(
    subject: str, arrays: Mapping[str, Any], classes: Any, interface: Interface, *, single: bool, copy: bool
) -> Piece:
    """Check arrays, by input, and their classes; the arguments are those of :func:`from_names`."""
    specs, axes = interface.specs, interface.axes
    raw = {spec.name: _as_array(f"Input '{spec.name}' of {subject}", arrays[spec.name], copy) for spec in specs}
    labels = None if classes is None else _as_array(f"The labels of {subject}", classes, copy)
    if single and all(raw[spec.name].ndim == len(spec.shape) - 1 for spec in interface.batched):
        raw |= {spec.name: np.expand_dims(raw[spec.name], axes[spec.name] or 0) for spec in interface.batched}
        labels = labels[np.newaxis] if labels is not None and labels.ndim == 0 else labels
    feeds = {s.name: _fit(f"Input '{s.name}' of {subject}", raw[s.name], s, axes[s.name]) for s in specs}
    counts = {s.name: feeds[s.name].shape[axes[s.name] or 0] for s in interface.batched}
    if len(set(counts.values())) > 1:
        if single and labels is None and _fits_as_it_is(feeds, specs):
            return Piece(feeds, None, dict.fromkeys(feeds))
        listed = ", ".join(f"'{name}' {count} along axis {axes[name]}" for name, count in counts.items())
        raise PlanError(
            f"{capitalise(subject)}: its arrays differ in the number of samples ({listed}). "
            "Give each as many, along that axis."
        )
    if labels is not None:
        samples = next(iter(counts.values()), 1)
        labels = _fit_labels(f"The labels of {subject}", np.atleast_1d(labels), samples, interface.classes)
    # What counts samples along its first axis comes first: readers of a batch take its length for their number.
    order = sorted(feeds, key=lambda name: 2 if axes[name] is None else min(axes[name] or 0, 1))
    return Piece({name: feeds[name] for name in order}, labels, {name: axes[name] for name in order})


def _fits_as_it_is(feeds: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> bool:
    """Tell whether arrays that differ in the number of samples are one batch all the same: no name has two sizes."""
    sizes: dict[str, int] = {}
    dims = [(dim, size) for s in specs for dim, size in zip(s.shape, feeds[s.name].shape, strict=True)]
    fixed = all(dim == size for dim, size in dims if isinstance(dim, int))
    return fixed and all(sizes.setdefault(dim, size) == size for dim, size in dims if isinstance(dim, str) and dim)


def _as_array(subject: str, value: Any, copy: bool) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of PyTorch: numpy takes neither its gradients, nor its devices and bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
        # A generator may fill the same array again and again.
        return array.copy() if copy else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"{subject}: numpy makes no array of a {type(value).__name__} ({error}). Give an array."
        ) from error


def _fit(subject: str, array: np.ndarray, spec: TensorSpec, batch_axis: int | None) -> np.ndarray:
    """Check an array's shape against an input, and cast it to the input's type.

    1. Samples lie along the batch axis, of any number.
    2. An array with one axis more has samples along its first, each with a batch of one.
    3. What all samples share has the input's own shape; or it is given for each sample, and is the same in all.
    """
    rank = len(spec.shape)
    if array.ndim == rank + 1 and batch_axis is not None and array.shape[batch_axis + 1] == 1:  # case 2
        array = np.moveaxis(array.squeeze(batch_axis + 1), 0, batch_axis)
    if array.ndim == rank + 1 and batch_axis is None and len(array) and (array == array[:1]).all():  # case 3
        array = array[0]
    if array.ndim != rank:
        expected = f"expected {rank} {shape_text(spec.shape)}"
        shared = "; all samples share it" if batch_axis is None else ""
        raise PlanError(
            f"{subject}: it has {array.ndim} axes {shape_text(array.shape)}, {expected}{shared}. Reshape it."
        )
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis == batch_axis:
            continue
        if images.fixed_size(dim) not in (None, size):
            where, remedy = "", "Give samples as the model takes them."
            if batch_axis:
                where = f"; samples lie along axis {batch_axis}"
                remedy = f"Move the axis of the samples there: numpy.moveaxis(array, 0, {batch_axis})."
            elif batch_axis is None:
                where, remedy = "; all samples share it", "Give it once, in that shape."
            raise PlanError(
                f"{subject}: axis {axis} has size {size}, expected {dim} (shape {shape_text(array.shape)}, expected "
                f"{shape_text(spec.shape)}{where}). {remedy}"
            )
        if size == 0:
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
    return sum(int(rows.size - np.count_nonzero(np.isfinite(rows))) for rows in np.atleast_1d(array))


def _fit_labels(subject: str, array: np.ndarray, samples: int, classes: tuple[str, int] | None) -> np.ndarray:
    """Check that labels are one class per sample, each one of those that the output has; return them as int64."""
    if array.dtype.kind not in "iu":
        raise PlanError(f"{subject}: their dtype is {array.dtype}, expected integers. Give classes, or leave them out.")
    if array.ndim != 1:
        raise PlanError(
            f"{subject}: they have {array.ndim} axes {shape_text(array.shape)}, expected 1. Give one class each."
        )
    if len(array) != samples:
        raise PlanError(f"{subject}: there are {len(array)} for {samples} samples. Give one class per sample.")
    if classes is not None and array.size:
        output, count = classes
        wrong = np.flatnonzero((array < 0) | (array >= count))
        if wrong.size:
            raise PlanError(
                f"{subject}: class {array[wrong[0]]} of sample {wrong[0]} is none of the {count} of output '{output}', "
                f"0 to {count - 1}. Number the classes as the model does, or leave the labels out."
            )
    return array.astype(np.int64)


def capitalise(subject: str) -> str:
    """Capitalise the subject of a sentence; paths stay as they are."""
    return (
        subject[0].upper() + subject[1:]
        if subject.startswith(("the ", "item ", "row ", "sample ", "a ", "an "))
        else subject
    )
