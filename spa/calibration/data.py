"""Calibration data that a user gives: read, checked against the model's inputs, and cut into batches.

Everything is checked here, so that nothing later meets an array of the wrong name, shape, type or with values
that are not finite. Samples lie along the first axis of every input.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from spa.calibration import images
from spa.calibration.batches import comfortable
from spa.calibration.pieces import (
    Piece,
    capitalise,
    from_bare,
    from_item,
    from_names,
    names_text,
    piece_of,
    shape_text,
)
from spa.errors import PlanError
from spa.running.runtime import TensorSpec, input_specs

__all__ = ["Calibration", "read_data"]

_ARRAYS = (".npy", ".npz")
_FEW = 32
MOST_HELD_OUT = 64  # samples; with labels, of which accuracies are fractions, MOST_LABELLED where there are more
MOST_LABELLED = 512


@dataclass(frozen=True)
class Calibration:
    """Inputs of a model, ready to be run.

    Attributes:
        batches: arrays by input, of the types that the model declares.
        labels: one class per sample, in the order of the batches, of shape (samples,), or None.
        samples: the number of samples in all batches.
        source: the data's origin, in words.
        notes: sentences for the reader of a report, about samples that are few or were dropped.
        held_out: further inputs that no fit sees, on which changes are measured; None if there were too few.
    """

    batches: list[dict[str, np.ndarray]]
    labels: np.ndarray | None
    samples: int
    source: str
    notes: tuple[str, ...]
    held_out: Calibration | None = None

    @property
    def measured(self) -> Calibration:
        """The inputs on which changes are measured: those held out or, without any, all."""
        return self if self.held_out is None else self.held_out


def held_out_samples(samples: int) -> int:
    """Return how many of some samples are held out of every fit: an eighth, a quarter of few, none of very few.

    >>> [held_out_samples(n) for n in (4, 16, 128, 512, 4096)]
    [0, 4, 16, 64, 64]
    """
    share = samples // 8 if samples >= 32 else samples // 4
    return min(share, MOST_HELD_OUT) if share > 1 else 0


_Reader: TypeAlias = Callable[[int], Piece]


def read_data(
    data: Any,
    model: onnx.ModelProto,
    *,
    labels: str | None = None,
    samples: int | None = 512,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    hold_out: bool = False,
) -> Calibration:
    """Read calibration data and check all of it against a model's inputs.

    Args:
        data: an ``.npz`` or ``.npy`` file, a folder of them or of images, a dict of arrays, one array, or an
            iterable of feeds (dicts, arrays, or pairs of an array and its labels).
        model: the model that will be fed.
        labels: the name of the array of classes; if None, ``label``, ``labels`` or ``y`` unless an input is called
            that.
        samples: the most samples to take, or None for all: a random choice of arrays and of a folder's files, the
            first of an iterable, which is not consumed any further.
        seed: the same seed chooses the same samples.
        mean: per channel, is subtracted from an image once its values lie in 0..1.
        std: per channel, divides an image after that.
        hold_out: whether to hold some samples out: further ones where the data has more than ``samples``, up to 512
            where it has labels, else some of those taken (see :func:`held_out_samples`).

    Returns:
        The batches, and the labels if there are any.

    Raises:
        PlanError: the data cannot be read or does not fit the model, or an option is out of range.
    """
    specs = _checked_specs(model)
    _check_count("samples", samples)
    fixed_batch = _fixed_batch(specs)
    if fixed_batch is not None and samples is not None and samples < fixed_batch:
        raise PlanError(
            f"samples: {samples} were asked for, the model takes batches of exactly {fixed_batch}. "
            f"Ask for {fixed_batch} or more, or export the model with a dynamic batch axis."
        )
    rng = np.random.default_rng(seed)
    pieces, source = _read_pieces(data, specs, labels, samples, rng, (mean, std), hold_out)
    exact = fixed_batch is not None
    if not hold_out:
        return _assemble(pieces, fixed_batch, exact, source)
    fit, held_out = _split(pieces, samples, fixed_batch or 1, rng)
    calibration = _assemble(fit, fixed_batch, exact, source)
    return replace(calibration, held_out=_assemble(held_out, fixed_batch, exact, source)) if held_out else calibration


def _read_pieces(
    data: Any,
    specs: Sequence[TensorSpec],
    labels: str | None,
    samples: int | None,
    rng: np.random.Generator,
    normalisation: tuple[Sequence[float] | None, Sequence[float] | None],
    hold_out: bool,
) -> tuple[list[Piece], str]:
    """Read samples, and those to hold out; return them with the data's origin, in words."""
    most = samples + held_out_samples(samples) if hold_out and samples is not None else samples
    path = Path(os.fspath(data)) if isinstance(data, str | os.PathLike) else None
    source = "an iterable" if path is None else str(path)
    if normalisation != (None, None) and (path is None or not path.is_dir()):
        raise PlanError("mean and std: the data is no folder of images. Leave them out, and normalise the arrays.")
    if path is not None and path.is_dir():
        return _read_folder(path, specs, labels, most, rng, *normalisation), source
    if path is not None:
        piece = _read_file(path, specs, labels, single=False)
    elif isinstance(data, Mapping):
        piece, source = from_names("the data", data, specs, labels), "a dict of arrays"
    elif hasattr(data, "__array__"):
        piece, source = from_bare("the data", data, None, specs, labels, single=False), "an array"
    else:
        return _read_iterable(data, specs, labels, most), source
    if hold_out and samples is not None and piece.labels is not None:
        most = samples + MOST_LABELLED  # further rows of arrays cost nothing
    return [_choose(piece, most, rng)], source


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
    parts = [(p.take(~mask), p.take(mask)) for p, mask in zip(pieces, np.split(held_out, ends), strict=True)]
    return [seen for seen, _ in parts if seen.samples], [held for _, held in parts if held.samples]


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
    """Return the batch size that the model fixes, or None for a dynamic one."""
    sizes = {spec.name: size for spec in specs if (size := images.fixed_size(spec.shape[0])) is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"'{name}' {size}" for name, size in sizes.items())
        raise PlanError(
            f"The model: its inputs have first axes of different fixed sizes ({listed}), so samples cannot lie along "
            "them. Export the model with a batch axis first in every input."
        )
    return next(iter(sizes.values()), None)


# --- sources ---------------------------------------------------------------------------------------------------


def _read_file(path: Path, specs: Sequence[TensorSpec], labels: str | None, *, single: bool) -> Piece:
    """Read an ``.npz`` or ``.npy`` file; with ``single`` it may hold one sample without a batch axis."""
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
        return from_bare(str(path), loaded, None, specs, labels, single=single)
    return from_names(str(path), arrays, specs, labels, single=single, any_name=True)


def _read_folder(
    folder: Path,
    specs: Sequence[TensorSpec],
    labels: str | None,
    samples: int | None,
    rng: np.random.Generator,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> list[Piece]:
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
        if mean is not None or std is not None:
            raise PlanError(f"mean and std: {folder} holds arrays. Leave them out, and normalise the arrays.")
        return _some_of(len(arrays), lambda i: _read_file(arrays[i], specs, labels, single=True), samples, rng)
    if pictures:
        read = _picture_reader(folder, pictures, specs, labels, mean, std)
        return _some_of(len(pictures), read, samples, rng)
    if any(p.suffix.lower() == ".npy" for p in files):
        raise PlanError(
            f"{folder}: an .npy file holds one array, but the model takes {names_text(s.name for s in specs)}. "
            "Give .npz files with all of them."
        )
    raise PlanError(
        f"{folder}: none of its {len(files)} files can be used (such as {files[0].name}). "
        f"Give files that end in {', '.join(_ARRAYS + images.SUFFIXES)}."
    )


def _picture_reader(
    folder: Path,
    pictures: Sequence[Path],
    specs: Sequence[TensorSpec],
    labels: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> _Reader:
    channel_axis = images.channel_axis_of(specs)
    if channel_axis is None:
        listed = ", ".join(f"'{spec.name}' {spec.element} {shape_text(spec.shape)}" for spec in specs)
        raise PlanError(
            f"{folder}: it holds images, but the model does not take one float image with 1 or 3 channels "
            f"(inputs: {listed}). Give arrays in .npz files."
        )
    if labels is not None:
        raise PlanError(f"labels '{labels}': images have no named arrays. Leave it out, or give an .npz file.")
    picture = images.reader(pictures, specs[0], channel_axis, mean, std)

    def read(index: int) -> Piece:
        feeds = {specs[0].name: picture(index)}
        return piece_of(str(pictures[index]), feeds, None, specs, single=False, copy=False)

    return read


def _some_of(count: int, read: _Reader, samples: int | None, rng: np.random.Generator) -> list[Piece]:
    """Read a random choice of a folder's files, in their order, until there are enough samples."""
    # Names often begin with the class: the first few would be of one class only.
    order = np.arange(count) if samples is None else rng.permutation(count)
    if samples is not None and count <= samples:
        order.sort()
    taken = dict(zip(order.tolist(), _first((read(i) for i in order.tolist()), samples), strict=False))
    return [taken[index] for index in sorted(taken)]


def _read_iterable(data: Any, specs: Sequence[TensorSpec], labels: str | None, samples: int | None) -> list[Piece]:
    try:
        if data is None or isinstance(data, bytes | bytearray):
            raise TypeError
        items = iter(data)
    except TypeError:
        raise PlanError(
            f"data: a {type(data).__name__} cannot be read. Give a path, a dict of arrays, or an iterable of feeds."
        ) from None
    return _first((from_item(f"item {i} of the data", item, specs, labels) for i, item in enumerate(items)), samples)


def _first(pieces: Iterator[Piece], samples: int | None) -> list[Piece]:
    """Take the first samples; nothing is drawn from ``pieces`` after them."""
    taken: list[Piece] = []
    count = 0
    while samples is None or count < samples:
        piece = next(pieces, None)
        if piece is None:
            break
        taken.append(piece if samples is None else piece.take(slice(samples - count)))
        count += taken[-1].samples
    return taken


def _choose(piece: Piece, samples: int | None, rng: np.random.Generator) -> Piece:
    if samples is None or piece.samples <= samples:
        return piece
    return piece.take(np.sort(rng.choice(piece.samples, samples, replace=False)))


# --- batches ---------------------------------------------------------------------------------------------------


def _assemble(pieces: Sequence[Piece], batch: int | None, exact: bool, source: str) -> Calibration:
    """Cut pieces into batches; pieces whose samples differ in shape stay apart.

    Args:
        pieces: the samples.
        batch: samples per batch; None for a size that is comfortable.
        exact: whether the model takes batches of that size only, so that a remainder is dropped.
        source: the data's origin, in words.
    """
    pieces = [piece for piece in pieces if piece.samples]
    total = sum(piece.samples for piece in pieces)
    if not total:
        raise PlanError(f"{capitalise(source)}: it holds no samples. Give one at least.")
    labelled = sum(piece.labels is not None for piece in pieces)
    if 0 < labelled < len(pieces):
        raise PlanError(f"{capitalise(source)}: {labelled} of its {len(pieces)} parts have labels. Give all or none.")
    batches: list[Piece] = []
    for _, group in itertools.groupby(pieces, lambda piece: piece.shapes):
        whole = _join(list(group))
        size = batch or comfortable(whole.feeds, whole.samples)
        stop = whole.samples - whole.samples % size if exact else whole.samples
        batches += [whole.take(slice(start, min(start + size, stop))) for start in range(0, stop, size)]
    used = sum(piece.samples for piece in batches)
    if not used:
        raise PlanError(
            f"{capitalise(source)}: its {total} samples fill no batch, the model takes batches of exactly {batch}. "
            "Give more samples, or export the model with a dynamic batch axis."
        )
    notes = []
    if used < total:
        notes.append(f"{total - used} of {total} samples were dropped: the model takes batches of exactly {batch}.")
    if used < _FEW:
        notes.append(f"{used} samples are few: the fit will be damped. Give {_FEW} or more.")
    feeds = [{name: np.ascontiguousarray(array) for name, array in piece.feeds.items()} for piece in batches]
    return Calibration(batches=feeds, labels=_join_labels(batches), samples=used, source=source, notes=tuple(notes))


def _join(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    feeds = {name: np.concatenate([piece.feeds[name] for piece in pieces]) for name in pieces[0].feeds}
    return Piece(feeds, _join_labels(pieces))


def _join_labels(pieces: Iterable[Piece]) -> np.ndarray | None:
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return np.concatenate(labels) if labels else None
