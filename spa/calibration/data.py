"""Calibration data that a user gives: read, checked against the model's inputs, and cut into batches.

Everything is checked here, so that nothing later meets an array of the wrong name, shape, type or with values
that are not finite. Samples lie along the first axis of every input.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from spa.calibration import images
from spa.calibration.batches import comfortable
from spa.errors import PlanError
from spa.runtime import TensorSpec, input_specs

__all__ = ["Calibration", "read_data"]

_LABELS = ("label", "labels", "y")
_ARRAYS = (".npy", ".npz")
_FEW = 32


@dataclass(frozen=True)
class Calibration:
    """Inputs of a model, ready to be run.

    Attributes:
        batches: Feeds, of the types that the model declares.
        labels: One class per sample, in the order of the batches, or None.
        samples: The number of samples in all batches.
        source: Where they came from, in words.
        notes: What the reader of a report should know.
    """

    batches: list[dict[str, np.ndarray]]
    labels: np.ndarray | None
    samples: int
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """Some samples: checked feeds, and their labels if there are any."""

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None

    @property
    def samples(self) -> int:
        return len(next(iter(self.feeds.values())))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one sample: pieces that agree in them can be put together."""
        return tuple(array.shape[1:] for array in self.feeds.values())

    def take(self, index: slice | np.ndarray) -> _Piece:
        """The samples of an index."""
        labels = None if self.labels is None else self.labels[index]
        return _Piece({name: array[index] for name, array in self.feeds.items()}, labels)


_Reader: TypeAlias = Callable[[int], _Piece]


def read_data(
    data: Any,
    model: onnx.ModelProto,
    *,
    labels: str | None = None,
    samples: int | None = 512,
    batch: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Calibration:
    """Read calibration data and check all of it against a model's inputs.

    Args:
        data: An ``.npz`` or ``.npy`` file, a folder of them or of images, a dict of arrays, one array, or an
            iterable of feeds (dicts, arrays, or pairs of an array and its labels).
        model: The model that will be fed.
        labels: The name of the array of classes; if not given, ``label``, ``labels`` or ``y`` unless an input
            is called that.
        samples: How many samples to take at most, or None for all: a random choice of arrays and of a folder's
            files, the first of an iterable, which is not consumed any further.
        batch: Samples per batch, by default what is comfortable; a model whose first axis is fixed has its own.
        seed: The same seed chooses the same samples.
        mean: What is subtracted from an image, per channel, once its values lie in 0..1.
        std: What an image is then divided by, per channel.

    Returns:
        The batches, and the labels if there are any.

    Raises:
        PlanError: The data cannot be read or does not fit the model, or an option is out of range.
    """
    specs = _checked_specs(model)
    _check_count("samples", samples)
    if batch is not None:
        _check_count("batch", batch)
    fixed = _fixed_batch(specs)
    if fixed is not None and samples is not None and samples < fixed:
        raise PlanError(
            f"samples: {samples} were asked for, the model takes batches of exactly {fixed}. "
            f"Ask for {fixed} or more, or export the model with a dynamic batch axis."
        )
    rng = np.random.default_rng(seed)
    path = Path(os.fspath(data)) if isinstance(data, str | os.PathLike) else None
    source = "an iterable" if path is None else str(path)
    if (mean is not None or std is not None) and (path is None or not path.is_dir()):
        raise PlanError("mean and std: the data is no folder of images. Leave them out, and normalise the arrays.")
    if path is not None and path.is_dir():
        pieces = _read_folder(path, specs, labels, samples, rng, mean, std)
    elif path is not None:
        pieces = [_choose(_read_file(path, specs, labels, single=False), samples, rng)]
    elif isinstance(data, Mapping):
        source = "a dict of arrays"
        pieces = [_choose(_from_names("the data", data, specs, labels), samples, rng)]
    elif hasattr(data, "__array__"):
        source = "an array"
        pieces = [_choose(_from_bare("the data", data, None, specs, labels, single=False), samples, rng)]
    else:
        pieces = _read_iterable(data, specs, labels, samples)
    return _assemble(pieces, fixed or batch, fixed is not None, source)


def _checked_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    specs = input_specs(model)
    if not specs:
        raise PlanError("The model: it has no inputs. Calibrate a model that takes some.")
    for spec in specs:
        if spec.dtype is None:
            raise PlanError(
                f"Input '{spec.name}': arrays cannot hold its type {spec.type}. Export the model without it."
            )
        if not spec.shape:
            raise PlanError(
                f"Input '{spec.name}': it declares no axes, so it has none for samples. "
                "Make it a constant, or export the model with the input's shape."
            )
    return specs


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise PlanError(f"{name}: {value} is not positive. Give 1 or more.")


def _fixed_batch(specs: Sequence[TensorSpec]) -> int | None:
    """The batch size that the model insists on, if it does."""
    sizes = {spec.name: size for spec in specs if (size := images.fixed(spec.shape[0])) is not None}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"'{name}' {size}" for name, size in sizes.items())
        raise PlanError(
            f"The model: its inputs have first axes of different fixed sizes ({said}), so samples cannot lie along "
            "them. Export the model with a batch axis first in every input."
        )
    return next(iter(sizes.values()), None)


# --- sources ---------------------------------------------------------------------------------------------------


def _read_file(path: Path, specs: Sequence[TensorSpec], labels: str | None, *, single: bool) -> _Piece:
    """Read an .npz or .npy file; with `single` it may hold one sample without a batch axis."""
    if not path.exists():
        raise PlanError(f"{path}: there is no such file or folder. Check the path.")
    suffix = path.suffix.lower()
    if suffix not in _ARRAYS:
        raise PlanError(f"{path}: the suffix '{suffix}' is unknown. Give an .npz or .npy file, or a folder.")
    try:
        # numpy leaves a file that it opened itself open if it is no archive.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else None
    except images.UNREADABLE as error:
        raise PlanError(
            f"{path}: numpy cannot read it as an {suffix} file ({error}). "
            f"Write it with numpy.{'savez' if suffix == '.npz' else 'save'}, without objects."
        ) from error
    if suffix == ".npz" and arrays is None:
        raise PlanError(f"{path}: it is not an npz file, but a single array. Rename it to .npy.")
    if suffix == ".npy" and arrays is not None:
        raise PlanError(f"{path}: it is not an npy file, but an npz archive. Rename it to .npz.")
    if arrays is None:
        return _from_bare(str(path), loaded, None, specs, labels, single=single)
    return _from_names(str(path), arrays, specs, labels, single=single, any_name=True)


def _read_folder(
    folder: Path,
    specs: Sequence[TensorSpec],
    labels: str | None,
    samples: int | None,
    rng: np.random.Generator,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> list[_Piece]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise PlanError(f"{folder}: the folder holds no files. Put arrays or images straight into it.")
    pictures = [p for p in files if p.suffix.lower() in images.SUFFIXES]
    arrays = [p for p in files if p.suffix.lower() == ".npz" or (p.suffix.lower() == ".npy" and len(specs) == 1)]
    layout = images.layout_of(specs)
    if arrays and pictures and layout is not None:
        raise PlanError(
            f"{folder}: it holds both arrays ({arrays[0].name}) and images ({pictures[0].name}). "
            "Put them into folders of their own."
        )
    read: _Reader
    if arrays:
        if mean is not None or std is not None:
            raise PlanError(f"mean and std: {folder} holds arrays. Leave them out, and normalise the arrays.")
        usable = arrays

        def read(index: int) -> _Piece:
            return _read_file(arrays[index], specs, labels, single=True)

    elif pictures:
        if layout is None:
            said = ", ".join(f"'{spec.name}' {spec.element} {_say_shape(spec.shape)}" for spec in specs)
            raise PlanError(
                f"{folder}: it holds images, but the model does not take one float image with 1 or 3 channels "
                f"(inputs: {said}). Give arrays in .npz files."
            )
        if labels is not None:
            raise PlanError(f"labels '{labels}': images have no named arrays. Leave it out, or give an .npz file.")
        usable = pictures
        picture = images.reader(pictures, specs[0], layout, mean, std)

        def read(index: int) -> _Piece:
            what, feeds = str(pictures[index]), {specs[0].name: picture(index)}
            return _piece(what, feeds, None, specs, single=False, copy=False)

    elif any(p.suffix.lower() == ".npy" for p in files):
        raise PlanError(
            f"{folder}: an .npy file holds one array, but the model takes {_say_names(s.name for s in specs)}. "
            "Give .npz files with all of them."
        )
    else:
        raise PlanError(
            f"{folder}: none of its {len(files)} files can be used (such as {files[0].name}). "
            f"Give files that end in {', '.join(_ARRAYS + images.SUFFIXES)}."
        )
    # Names often begin with the class: the first few would be of one class only.
    order = np.arange(len(usable)) if samples is None else rng.permutation(len(usable))
    if samples is not None and len(usable) <= samples:
        order.sort()
    taken = dict(zip(order.tolist(), _first((read(i) for i in order.tolist()), samples), strict=False))
    return [taken[index] for index in sorted(taken)]


def _read_iterable(data: Any, specs: Sequence[TensorSpec], labels: str | None, samples: int | None) -> list[_Piece]:
    try:
        if data is None or isinstance(data, bytes | bytearray):
            raise TypeError
        items = iter(data)
    except TypeError:
        raise PlanError(
            f"data: a {type(data).__name__} cannot be read. Give a path, a dict of arrays, or an iterable of feeds."
        ) from None
    return _first((_from_item(f"item {i} of the data", item, specs, labels) for i, item in enumerate(items)), samples)


def _first(pieces: Iterator[_Piece], samples: int | None) -> list[_Piece]:
    """The first samples; nothing is drawn from `pieces` after them."""
    taken: list[_Piece] = []
    count = 0
    while samples is None or count < samples:
        piece = next(pieces, None)
        if piece is None:
            break
        taken.append(piece if samples is None else piece.take(slice(samples - count)))
        count += taken[-1].samples
    return taken


def _choose(piece: _Piece, samples: int | None, rng: np.random.Generator) -> _Piece:
    if samples is None or piece.samples <= samples:
        return piece
    return piece.take(np.sort(rng.choice(piece.samples, samples, replace=False)))


# --- one piece -------------------------------------------------------------------------------------------------


def _from_item(what: str, item: Any, specs: Sequence[TensorSpec], labels: str | None) -> _Piece:
    classes: Any = None
    # torch's default collation turns pairs into lists.
    pair = isinstance(item, list) and 1 <= len(item) <= 2 and (isinstance(item[0], Mapping) or _is_array(item[0]))
    if isinstance(item, tuple) or pair:
        if not 1 <= len(item) <= 2:
            raise PlanError(
                f"{_cap(what)}: it is a tuple of {len(item)}, expected (inputs,) or (inputs, labels). "
                "Give a dict of arrays, by the names of the model's inputs."
            )
        item, classes = item if len(item) == 2 else (item[0], None)
    if isinstance(item, Mapping):
        return _from_names(what, item, specs, labels, classes=classes, single=True, copy=True)
    return _from_bare(what, item, classes, specs, labels, single=True, copy=True)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _from_bare(
    what: str,
    value: Any,
    classes: Any,
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    single: bool,
    copy: bool = False,
) -> _Piece:
    if len(specs) != 1:
        raise PlanError(
            f"{_cap(what)}: it is one array, but the model takes {_say_names(s.name for s in specs)}. "
            "Give arrays by these names, in an .npz file or a dict."
        )
    if labels is not None:
        raise PlanError(f"labels '{labels}': {what} has no named arrays. Leave it out, or name the arrays.")
    return _piece(what, {specs[0].name: value}, classes, specs, single=single, copy=copy)


def _from_names(
    what: str,
    arrays: Mapping[Any, Any],
    specs: Sequence[TensorSpec],
    labels: str | None,
    *,
    classes: Any = None,
    single: bool = False,
    any_name: bool = False,
    copy: bool = False,
) -> _Piece:
    """Sort named arrays into inputs and labels; with `any_name` a single array fits a single input."""
    expected = [spec.name for spec in specs]
    if labels in expected:
        raise PlanError(f"labels '{labels}': this is an input of the model. Name another array, or leave it out.")
    if labels is not None and labels not in arrays:
        raise PlanError(f"labels '{labels}': {what} has no such array (it has {_say_names(arrays)}). Check the name.")
    key = labels or next((name for name in _LABELS if name in arrays and name not in expected), None)
    if key is not None and classes is not None:
        raise PlanError(f"{_cap(what)}: it has labels twice, as '{key}' and in a pair. Leave one out.")
    given = {name: array for name, array in arrays.items() if name != key}
    if any_name and len(expected) == 1 and len(given) == 1:
        given = {expected[0]: next(iter(given.values()))}
    missing = [name for name in expected if name not in given]
    if missing:
        raise PlanError(
            f"{_cap(what)}: {_say_names(missing)} {'is' if len(missing) == 1 else 'are'} missing "
            f"(expected {_say_names(expected)}, got {_say_names(arrays)}). Name the arrays like the model's inputs."
        )
    extra = [name for name in given if name not in expected]
    if extra:
        raise PlanError(
            f"{_cap(what)}: {_say_names(extra)} {'is no input' if len(extra) == 1 else 'are no inputs'} of the model "
            f"(expected {_say_names(expected)}). Remove what is not needed, or name the labels."
        )
    return _piece(what, given, classes if key is None else arrays[key], specs, single=single, copy=copy)


def _piece(
    what: str, given: Mapping[str, Any], classes: Any, specs: Sequence[TensorSpec], *, single: bool, copy: bool
) -> _Piece:
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
        raise PlanError(f"{_cap(what)}: its arrays differ in the number of samples ({said}). Give each as many.")
    if y is not None:
        y = _fit_labels(f"The labels of {what}", y, next(iter(counts.values())))
    return _Piece(feeds, y)


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
    expected = f"expected {len(spec.shape)} {_say_shape(spec.shape)}"
    if array.ndim != len(spec.shape):
        raise PlanError(f"{what}: it has {array.ndim} axes {_say_shape(array.shape)}, {expected}. Reshape it.")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if axis and images.fixed(dim) not in (None, size):
            raise PlanError(
                f"{what}: axis {axis} has size {size}, expected {dim} (shape {_say_shape(array.shape)}, expected "
                f"{_say_shape(spec.shape)}). Give samples as the model takes them."
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
            f"{what}: they have {array.ndim} axes {_say_shape(array.shape)}, expected 1. Give one class each."
        )
    if len(array) != samples:
        raise PlanError(f"{what}: there are {len(array)} for {samples} samples. Give one class per sample.")
    return array.astype(np.int64)


# --- batches ---------------------------------------------------------------------------------------------------


def _assemble(pieces: Sequence[_Piece], given: int | None, exact: bool, source: str) -> Calibration:
    """Cut pieces into batches; those whose samples differ in shape stay apart."""
    pieces = [piece for piece in pieces if piece.samples]
    total = sum(piece.samples for piece in pieces)
    if not total:
        raise PlanError(f"{_cap(source)}: it holds no samples. Give one at least.")
    labelled = sum(piece.labels is not None for piece in pieces)
    if 0 < labelled < len(pieces):
        raise PlanError(f"{_cap(source)}: {labelled} of its {len(pieces)} parts have labels. Give all or none.")
    batches: list[_Piece] = []
    for _, group in itertools.groupby(pieces, lambda piece: piece.shapes):
        whole = _join(list(group))
        size = given or comfortable(whole.feeds, whole.samples)
        stop = whole.samples - whole.samples % size if exact else whole.samples
        batches += [whole.take(slice(start, min(start + size, stop))) for start in range(0, stop, size)]
    used = sum(piece.samples for piece in batches)
    if not used:
        raise PlanError(
            f"{_cap(source)}: its {total} samples fill no batch, the model takes batches of exactly {given}. "
            "Give more samples, or export the model with a dynamic batch axis."
        )
    notes = []
    if used < total:
        notes.append(f"{total - used} of {total} samples were dropped: the model takes batches of exactly {given}.")
    if used < _FEW:
        notes.append(f"{used} samples are few: the fit will be damped. Give {_FEW} or more.")
    feeds = [{name: np.ascontiguousarray(array) for name, array in piece.feeds.items()} for piece in batches]
    return Calibration(feeds, _join_labels(batches), used, source, tuple(notes))


def _join(pieces: Sequence[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    feeds = {name: np.concatenate([piece.feeds[name] for piece in pieces]) for name in pieces[0].feeds}
    return _Piece(feeds, _join_labels(pieces))


def _join_labels(pieces: Iterable[_Piece]) -> np.ndarray | None:
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return np.concatenate(labels) if labels else None


# --- words -----------------------------------------------------------------------------------------------------


def _say_names(names: Iterable[Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _say_shape(shape: Iterable[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _cap(what: str) -> str:
    """A sentence's first word; paths stay as they are."""
    return what[0].upper() + what[1:] if what.startswith(("the ", "item ", "a ", "an ")) else what
