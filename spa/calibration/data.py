"""Calibration data that a user gives: read, checked against the model's inputs, and cut into batches.

Everything is checked here, so that nothing later meets an array of the wrong name, shape, type or with values
that are not finite. Samples lie along the axis that the model has for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from spa.calibration import images
from spa.calibration.batches import comfortable
from spa.calibration.images import is_float
from spa.calibration.interface import Interface, interface_of, names_text, shape_text
from spa.calibration.pieces import LABELS, Piece, capitalise, from_bare, from_item, from_names, joined, joined_labels
from spa.calibration.samples import is_table, rows_of, samples_of
from spa.errors import PlanError, UnreadableError

__all__ = ["Calibration", "read_data"]

_ARRAYS = (".npy", ".npz")
_FEW = 32
FEW_HELD_OUT = 32  # of fewer, changes are known to a factor of two only
MOST_HELD_OUT = 64  # samples; with labels, of which accuracies are fractions, MOST_LABELLED where there are more
MOST_LABELLED = 512
_MANY_SHAPES = 16
_ROUNDING = 1e-6  # of the largest value, by which samples that are the same may differ
_NAMED_CHANNELS = 5


@dataclass(frozen=True)
class Calibration:
    """Inputs of a model, ready to be run.

    Attributes:
        batches: arrays by input, of the types that the model declares; an input with samples along its first axis
            comes first where there is one.
        labels: one class per sample, in the order of the batches, of shape (samples,), or None.
        samples: the number of samples in all batches.
        source: the data's origin, in words.
        notes: sentences for the reader of a report, about samples that are few or were dropped.
        held_out: further inputs that no fit sees, on which changes are measured; None if there were too few.
        elsewhere: a few inputs of a domain that made-up ones are not of, by its name in ``source``.
    """

    batches: list[dict[str, np.ndarray]]
    labels: np.ndarray | None
    samples: int
    source: str
    notes: tuple[str, ...]
    held_out: Calibration | None = None
    elsewhere: Calibration | None = None

    @property
    def measured(self) -> Calibration:
        """The inputs on which changes are measured: those held out or, without any, all."""
        return self if self.held_out is None else self.held_out


def held_out_samples(samples: int) -> int:
    """Return how many of some samples are held out of every fit: an eighth, a quarter of few, none of very few.

    >>> [held_out_samples(n) for n in (4, 16, 128, 512, 4096)]
    [0, 4, 32, 64, 64]
    """
    share = max(samples // 8, min(samples // 4, FEW_HELD_OUT))
    return min(share, MOST_HELD_OUT) if share > 1 else 0


Preprocess: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Images:
    """The normalisation and the size of a folder's images.

    Attributes:
        mean: per channel, is subtracted from values in 0..1; ImageNet's by default.
        std: per channel, divides the values after that; ImageNet's by default.
        sizes: of open axes, by name or by ``input[axis]``; the median of the images' own by default.
        value_range: the values of black and of white, in place of mean and deviation.
    """

    mean: images.Numbers | None = None
    std: images.Numbers | None = None
    sizes: Mapping[str, int] | None = None
    value_range: tuple[float, float] | None = None

    @property
    def given(self) -> str:
        """The options that say a normalisation, in words; empty without any."""
        asked = "mean and std" if self.mean is not None or self.std is not None else ""
        return "range" if self.value_range is not None else asked


@dataclass(frozen=True)
class _Reading:
    """The state that readers of all kinds of data share.

    Attributes:
        interface: the model's inputs.
        labels: the name of the array of classes, if the user gave one.
        samples: the most samples to take, or None for all.
        labelled: the same for arrays with labels, of which further rows cost nothing.
        rng: chooses them.
        preprocess: makes inputs of a sample, if the user gave it.
    """

    interface: Interface
    labels: str | None
    samples: int | None
    labelled: int | None
    rng: np.random.Generator
    preprocess: Preprocess | None

    def prepared(self, subject: str, item: Any) -> Any:
        """Return an item after preprocessing; what the user's function raises is reported with the item's name."""
        if self.preprocess is None:
            return item
        try:
            return self.preprocess(item)
        except Exception as error:  # whatever a user's function may raise
            raise PlanError(
                f"{capitalise(subject)}: preprocess raised {type(error).__name__}: {error}. "
                "Mend it, or remove the sample."
            ) from error

    def item(self, subject: str, item: Any) -> Piece:
        """Read an item, after preprocessing."""
        return from_item(subject, self.prepared(subject, item), self.interface, self.labels)

    def some(self, count: int, read: Callable[[int], Piece]) -> list[Piece]:
        """Read a random choice of samples, in their order, until there are enough."""
        # Names and rows often begin with a class: the first few would be of one class only.
        order = np.arange(count) if self.samples is None else self.rng.permutation(count)
        if self.samples is not None and count <= self.samples:
            order.sort()
        pieces = self.first(read(i) for i in order.tolist())
        taken = dict(zip(order.tolist(), pieces, strict=False))
        return [taken[index] for index in sorted(taken)]

    def first(self, pieces: Iterator[Piece]) -> list[Piece]:
        """Take the first samples; nothing is drawn from ``pieces`` after them."""
        taken: list[Piece] = []
        count = 0
        while self.samples is None or count < self.samples:
            piece = next(pieces, None)
            if piece is None:
                break
            taken.append(piece if self.samples is None else piece.take(slice(self.samples - count)))
            count += taken[-1].samples
        return taken

    def chosen(self, piece: Piece) -> Piece:
        """Take a random choice of a piece's samples, in their order."""
        most = self.samples if piece.labels is None else self.labelled
        if most is None or piece.samples <= most:
            return piece
        return piece.take(np.sort(self.rng.choice(piece.samples, most, replace=False)))


def read_data(
    data: Any,
    model: onnx.ModelProto,
    *,
    labels: str | None = None,
    samples: int | None = 512,
    seed: int = 0,
    images_as: Images | None = None,
    preprocess: Preprocess | None = None,
    hold_out: bool = False,
) -> Calibration:
    """Read calibration data and check all of it against a model's inputs.

    Args:
        data: an ``.npz`` or ``.npy`` file, a folder of them or of images, a dict of arrays, one array, a table with
            columns (a dataset of Hugging Face), or an iterable of feeds: dicts, arrays, tuples of the inputs in the
            model's order, any of them with labels behind. Samples may differ in length.
        model: the model that will be fed.
        labels: the name of the array of classes; if None, ``label``, ``labels`` or ``y`` unless an input is called
            that.
        samples: the most samples to take, or None for all: a random choice of arrays and of a folder's files, the
            first of an iterable, which is not consumed any further.
        seed: the same seed chooses the same samples.
        images_as: the normalisation and the size of images.
        preprocess: makes inputs of a sample: of an image (``PIL.Image``), a row of a table or of arrays, an item of an
            iterable. What it returns is read like an item.
        hold_out: whether to hold some samples out: further ones where the data has more than ``samples``, up to 512
            where it is arrays with labels, else some of those taken (see :func:`held_out_samples`).

    Returns:
        The batches, and the labels if there are any.

    Raises:
        PlanError: the data cannot be read or does not fit the model, or an option is out of range.
    """
    interface = interface_of(model)
    images_as = images_as or Images()
    _check_count("samples", samples)
    fixed_batch = interface.batch
    if fixed_batch is not None and samples is not None and samples < fixed_batch:
        raise PlanError(
            f"samples: {samples} were asked for, the model takes batches of exactly {fixed_batch}. "
            f"Ask for {fixed_batch} or more, or export the model with a dynamic batch axis."
        )
    rng = np.random.default_rng(seed)
    most = labelled = samples
    if hold_out and samples is not None:
        most, labelled = samples + held_out_samples(samples), samples + MOST_LABELLED
    reading = _Reading(interface, labels, most, labelled, rng, preprocess)
    source, pieces, notes = _read(data, reading, images_as)
    if not hold_out:
        return _assemble(pieces, interface, source, notes)
    fit, held_out = _split(pieces, samples, fixed_batch or 1, rng)
    calibration = _assemble(fit, interface, source, notes)
    return replace(calibration, held_out=_assemble(held_out, interface, source, ())) if held_out else calibration


def _split(
    pieces: Sequence[Piece], samples: int | None, step: int, rng: np.random.Generator
) -> tuple[list[Piece], list[Piece]]:
    """Split pieces at random into those that fits see, at most ``samples``, and those held out.

    Args:
        pieces: the samples.
        samples: the most that fits see; None for no limit.
        step: the number of held-out samples is a multiple of it.
        rng: chooses.
    """
    total = sum(piece.samples for piece in pieces)
    fit = total if samples is None else min(samples, total)
    count = max(total - fit, held_out_samples(fit)) // step * step
    held_out = np.zeros(total, bool)
    held_out[rng.permutation(total)[:count]] = True
    ends = np.cumsum([piece.samples for piece in pieces])[:-1]
    parts: tuple[list[Piece], list[Piece]] = ([], [])
    for piece, mask in zip(pieces, np.split(held_out, ends), strict=True):
        for chosen, part in zip((~mask, mask), parts, strict=True):
            if chosen.any():
                part.append(piece.take(chosen))
    return parts


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise PlanError(f"{name}: {value} is not positive. Give 1 or more.")


# --- sources ---------------------------------------------------------------------------------------------------


def _read(data: Any, reading: _Reading, images_as: Images) -> tuple[str, list[Piece], list[str]]:
    """Read data of any kind: say what it is, return its pieces, and say what was done to them."""
    path = Path(os.fspath(data)) if isinstance(data, str | os.PathLike) else None
    if images_as.given and (path is None or not path.is_dir()):
        raise PlanError(f"{images_as.given}: the data is no folder of images. Leave that out, and scale the arrays.")
    if path is None:
        return _read_object(data, reading)
    if path.is_dir():
        pieces, notes = _read_folder(path, reading, images_as)
        return str(path), pieces, notes
    return str(path), _read_file(path, reading), []


def _loaded(path: Path) -> Any:
    """Read an ``.npz`` file as a dict of arrays, or an ``.npy`` file as an array."""
    if not path.exists():
        raise UnreadableError(f"{path}: there is no such file or folder. Check the path.")
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
            f"Write it with numpy.{'savez' if suffix == '.npz' else 'save'}, without objects; "
            "samples of different lengths go into one file each."
        ) from error
    if suffix == ".npz" and arrays is None:
        raise PlanError(f"{path}: it is not an npz file, but a single array. Rename it to .npy.")
    if suffix == ".npy" and arrays is not None:
        raise PlanError(f"{path}: it is not an npy file, but an npz archive. Rename it to .npz.")
    return loaded if arrays is None else arrays


def _read_file(path: Path, reading: _Reading) -> list[Piece]:
    """Read a file of many samples."""
    loaded = _loaded(path)
    if reading.preprocess is not None:
        return _read_rows(str(path), loaded, reading)
    return [reading.chosen(_piece_in(path, loaded, reading, single=False))]


def _piece_in(path: Path, loaded: Any, reading: _Reading, *, single: bool) -> Piece:
    """Read a file's arrays; with ``single`` they may be one sample without a batch axis."""
    if isinstance(loaded, dict):
        return from_names(str(path), loaded, reading.interface, reading.labels, single=single, any_name=True)
    return from_bare(str(path), loaded, None, reading.interface, reading.labels, single=single)


def _read_folder(folder: Path, reading: _Reading, images_as: Images) -> tuple[list[Piece], list[str]]:
    """Read the files of a folder, and say what was done to images."""
    specs = reading.interface.specs
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise PlanError(f"{folder}: the folder holds no files. Put arrays or images straight into it.")
    pictures = [p for p in files if p.suffix.lower() in images.SUFFIXES]
    arrays = [p for p in files if p.suffix.lower() == ".npz" or (p.suffix.lower() == ".npy" and len(specs) == 1)]
    if arrays and pictures and images.channel_axis_of(specs) is not None:
        raise PlanError(
            f"{folder}: it holds both arrays ({arrays[0].name}) and images ({pictures[0].name}). "
            "Put them into folders of their own."
        )
    if arrays:
        if images_as.given:
            raise PlanError(f"{images_as.given}: {folder} holds arrays. Leave that out, and scale the arrays.")

        def read(index: int) -> Piece:
            path = arrays[index]
            if reading.preprocess is not None:
                return reading.item(str(path), _loaded(path))
            return _piece_in(path, _loaded(path), reading, single=True)

        return reading.some(len(arrays), read), []
    if pictures:
        return _read_pictures(folder, pictures, reading, images_as)
    if any(p.suffix.lower() == ".npy" for p in files):
        raise PlanError(
            f"{folder}: an .npy file holds one array, but the model takes {names_text(reading.interface.names)}. "
            "Give .npz files with all of them."
        )
    raise PlanError(
        f"{folder}: none of its {len(files)} files can be used (such as {files[0].name}). "
        f"Give files that end in {', '.join(_ARRAYS + images.SUFFIXES)}."
    )


def _read_pictures(
    folder: Path, paths: Sequence[Path], reading: _Reading, images_as: Images
) -> tuple[list[Piece], list[str]]:
    """Read images, each resized and normalised, or as ``preprocess`` has it; and say which."""
    specs = reading.interface.specs
    channel_axis = images.channel_axis_of(specs)
    if channel_axis is None and reading.preprocess is None:
        listed = ", ".join(f"'{spec.name}' {spec.element} {shape_text(spec.shape)}" for spec in specs)
        raise PlanError(
            f"{folder}: it holds images, but the model does not take one float image with 1 or 3 channels "
            f"(inputs: {listed}). Give arrays in .npz files, or in Python a preprocess= that makes inputs of an image."
        )
    if reading.labels is not None:
        raise PlanError(f"labels '{reading.labels}': images have no named arrays. Leave it out, or give an .npz file.")
    if channel_axis is None or reading.preprocess is not None:
        made = reading.some(len(paths), lambda i: reading.item(str(paths[i]), images.opened(paths[i])))
        return made, ["images are what preprocess made of them"]
    mean, std = images_as.mean, images_as.std
    if images_as.value_range is not None:
        mean, std = images.range_normalisation(*images_as.value_range)
    found = images.pictures(paths, specs[0], channel_axis, mean, std, images_as.sizes)
    found = replace(found, value_range=images_as.value_range)

    def read(index: int) -> Piece:
        return from_bare(str(paths[index]), found.read(index), None, reading.interface, None, single=False)

    return reading.some(len(paths), read), [found.note]


def _read_object(data: Any, reading: _Reading) -> tuple[str, list[Piece], list[str]]:
    """Read what is no path: say what it is, read it, and say what was left out."""
    if is_table(data):
        return _read_table(data, reading)
    if isinstance(data, Mapping):
        source = "a dict of arrays"
        rows = rows_of("the data", data, reading.interface)
        if rows is not None or reading.preprocess is not None:
            return source, _read_rows("the data", data if rows is None else rows, reading), []
        return source, [reading.chosen(from_names("the data", data, reading.interface, reading.labels))], []
    if hasattr(data, "__array__"):
        if reading.preprocess is not None:
            return "an array", _read_rows("the data", data, reading), []
        piece = from_bare("the data", data, None, reading.interface, reading.labels, single=False)
        return "an array", [reading.chosen(piece)], []
    return "an iterable", _read_iterable(data, reading), []


def _read_rows(subject: str, data: Any, reading: _Reading) -> list[Piece]:
    """Read samples one by one, from arrays or from a list of rows."""
    rows = data if isinstance(data, list) else samples_of(subject, data)
    return reading.some(len(rows), lambda i: reading.item(f"sample {i} of {subject}", rows[i]))


def _read_table(data: Any, reading: _Reading) -> tuple[str, list[Piece], list[str]]:
    """Read a table with columns: those that are inputs, and the labels; the others are left out, which is said."""
    left: dict[str, None] = {}

    def read(index: int, row: Any) -> Piece:
        if reading.preprocess is None:
            wanted = {*reading.interface.names, *((reading.labels,) if reading.labels else LABELS)}
            left.update(dict.fromkeys(name for name in row if name not in wanted))
            row = {name: value for name, value in row.items() if name in wanted}
        return reading.item(f"row {index} of the data", row)

    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        pieces, source = reading.some(len(data), lambda i: read(i, data[i])), f"a table of {len(data)} rows"
    else:
        pieces, source = reading.first(read(i, row) for i, row in enumerate(data)), "a table"
    return source, pieces, [f"columns {names_text(left)} of the data are no inputs and were left out"] if left else []


def _read_iterable(data: Any, reading: _Reading) -> list[Piece]:
    try:
        if data is None or isinstance(data, bytes | bytearray):
            raise TypeError
        items = iter(data)
    except TypeError:
        raise PlanError(
            f"data: a {type(data).__name__} cannot be read. Give a path, a dict of arrays, or an iterable of feeds."
        ) from None
    return reading.first(reading.item(f"item {i} of the data", item) for i, item in enumerate(items))


# --- batches ---------------------------------------------------------------------------------------------------


def _assemble(pieces: Sequence[Piece], interface: Interface, source: str, notes: Iterable[str]) -> Calibration:
    """Cut pieces into batches; pieces whose samples differ in shape stay apart.

    Args:
        pieces: the samples.
        interface: the model's inputs; one that fixes the number of samples takes no remainder.
        source: the data's origin, in words.
        notes: what is to be said of it.
    """
    pieces = [piece for piece in pieces if piece.samples]
    total = sum(piece.samples for piece in pieces)
    if not total:
        raise PlanError(f"{capitalise(source)}: it holds no samples. Give one at least.")
    labelled = sum(piece.labels is not None for piece in pieces)
    if 0 < labelled < len(pieces):
        raise PlanError(f"{capitalise(source)}: {labelled} of its {len(pieces)} parts have labels. Give all or none.")
    kinds: dict[Any, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.kind, []).append(piece)
    batches: list[Piece] = []
    for group in kinds.values():
        whole = joined(group)
        size = interface.batch or comfortable(whole.feeds, whole.samples)
        exact = interface.batch is not None and not whole.is_whole
        stop = whole.samples - whole.samples % size if exact else whole.samples
        batches += [whole.take(slice(start, min(start + size, stop))) for start in range(0, stop, size)]
    used = sum(piece.samples for piece in batches)
    if not used:
        raise PlanError(
            f"{capitalise(source)}: its {total} samples fill no batch, the model takes batches of exactly "
            f"{interface.batch}. Give more samples, or export the model with a dynamic batch axis."
        )
    _refuse_constant(batches, interface, source)
    notes = [*notes, *_notes(used, total, interface.batch, len(kinds)), *_silent(batches, interface)]
    feeds = [{name: np.asarray(array, order="C") for name, array in piece.feeds.items()} for piece in batches]
    return Calibration(batches=feeds, labels=joined_labels(batches), samples=used, source=source, notes=tuple(notes))


def _notes(used: int, total: int, batch: int | None, kinds: int) -> Iterator[str]:
    if used < total:
        yield f"{total - used} of {total} samples were dropped: the model takes batches of exactly {batch}"
    if used < _FEW:
        yield f"{used} samples are few: the fit will be damped. Give {_FEW} or more"
    if kinds > _MANY_SHAPES:
        yield f"the samples have {kinds} different shapes, and run in as many batches; like ones run faster"


def _refuse_constant(batches: Sequence[Piece], interface: Interface, source: str) -> None:
    """Refuse samples that are all the same.

    Raises:
        PlanError: every input is the same in all samples, of which there are several.
    """
    first = batches[0].take(slice(0, 1))
    names = [spec.name for spec in interface.batched]
    alike = sum(p.samples for p in batches) > 1 and all(p.kind == first.kind for p in batches)
    if alike and all(_same(p.feeds[name], first.feeds[name]) for name in names for p in batches):
        raise PlanError(
            f"{capitalise(source)}: input {names_text(names)} is the same in all samples, from which nothing can be "
            "learnt. Give samples that differ."
        )


def _same(values: np.ndarray, first: np.ndarray) -> bool:
    """Return whether all samples are the first one, but for rounding."""
    if not is_float(values.dtype) or not values.size:
        return bool((values == first).all())
    return float(np.abs(values - first).max()) <= _ROUNDING * float(np.abs(first).max())


def _silent(batches: Sequence[Piece], interface: Interface) -> Iterator[str]:
    """Say which channels of images and series hold one value in all samples."""
    for spec in interface.batched:
        arrays = [p.feeds[spec.name] for p in batches]
        axis = _channels_of(arrays[0].shape) if is_float(arrays[0].dtype) else None
        if (
            axis is None
            or interface.axes[spec.name] != 0
            or any(a.shape[axis] != arrays[0].shape[axis] for a in arrays)
        ):
            continue
        others = tuple(a for a in range(arrays[0].ndim) if a != axis)
        low, high = (f([f(a, axis=others) for a in arrays], axis=0) for f in (np.min, np.max))
        silent = np.flatnonzero(low == high)
        if 0 < silent.size < low.size:
            listed = ", ".join(map(str, silent[:_NAMED_CHANNELS])) + (" …" if silent.size > _NAMED_CHANNELS else "")
            yield (
                f"channels {listed} of input '{spec.name}' hold the same value in all samples: what they lead to "
                "cannot be told from what is dead"
            )


def _channels_of(shape: Sequence[int]) -> int | None:
    """Return the axis of the channels of images and series, which are fewer than rows, columns or steps."""
    for axis in (1, len(shape) - 1) if len(shape) > 2 else ():
        rest = [size for at, size in enumerate(shape) if at not in (0, axis)]
        if 1 < shape[axis] < min(rest):
            return axis
    return None
