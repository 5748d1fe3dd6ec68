"""Inputs for a model that nobody has described: seeded, of the right type, and likely to run.

What an input may hold is read from the graph where the graph says it (ids that index an embedding stay below
its rows) and from the input's name where it does not (masks, positions, lengths). Sizes of dynamic axes are those of
:mod:`spa.model.sizes`, as in the analysis; where onnxruntime refuses them, a short list of others is tried.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from spa.errors import ModelError, UnsupportedError
from spa.model.extents import guesses
from spa.model.sizes import FALLBACKS, Guess, OpenInput, axis_name, batch_axes, kind_of_axis, open_keys, resolve
from spa.running.ranges import Lengths, input_ranges, lengths_for, ranges_for
from spa.running.runtime import Model, TensorSpec, input_specs, load_graph, run

__all__ = [
    "Recipe",
    "first_run",
    "make_feeds",
    "resolve_sizes",
    "working_feeds",
]


_GUESSES = (Guess(), *FALLBACKS)  # for a session alone, of which the graph is not known


NO_LENGTHS = Lengths()


@dataclass(frozen=True)
class Recipe:
    """The way to make the inputs of one model: everything but the seed.

    Attributes:
        specs: the inputs.
        sizes: the size of every dynamic axis, by ``input[axis]``.
        ranges: exclusive upper bounds of inputs, by name.
        guess: where the sizes came from, and the bound of integers about which nothing is known.
        lengths: the inputs that state how many steps there are.
    """

    specs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]
    ranges: Mapping[str, int]
    guess: Guess
    lengths: Lengths = NO_LENGTHS

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Make the inputs of one seed.

        Args:
            seed: the same seed gives the same arrays.

        Returns:
            One array per input.

        Raises:
            UnsupportedError: an input is a string, a sequence, of a type that numpy lacks, or too large.
        """
        shapes = {spec.name: self.shape(spec) for spec in self.specs}
        length = min((_length(s, shapes[s.name]) for s in self.specs if len(s.shape) >= 2), default=1)
        feeds = {}
        for spec in self.specs:
            name, shape = spec.name, shapes[spec.name]
            if spec.dtype is None:
                raise UnsupportedError(
                    f"Input '{name}': no values can be made up for type {spec.type}. Give feeds of your own."
                )
            if math.prod(shape) > MOST_ELEMENTS:
                raise UnsupportedError(
                    f"Input '{name}' of shape {list(shape)} is too large to be made up. Give feeds of your own."
                )
            # crc32 rather than hash(), which differs from one process to the next.
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if name in self.lengths.more:
                values = np.full(shape, self._steps(shapes) + self.lengths.more[name])
            else:
                values = _draw(name, spec.dtype, shape, rng, self.ranges.get(name), length, self.guess)
            feeds[name] = np.ascontiguousarray(values).reshape(shape).astype(spec.dtype)
        return feeds

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the shape of an input as it is made."""
        return tuple(
            dim if isinstance(dim, int) else self.sizes[f"{spec.name}[{axis}]"] for axis, dim in enumerate(spec.shape)
        )

    def _steps(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of all steps: those of the first sequence that is no mask, and those of a cache."""
        caches = self.lengths.caches
        new = (s for n, s in shapes.items() if len(s) >= 2 and n not in caches and not MASK.search(n))
        return next((shape[1] for shape in new), 1) + next((shapes[name][2] for name in caches), 0)

    @property
    def batch(self) -> int:
        """Samples per run: the size of the axis along which samples lie, of the first input that has one."""
        axes = batch_axes([open_input(spec) for spec in self.specs])
        for spec in self.specs:
            if (axis := axes[spec.name]) is not None:
                dim = spec.shape[axis]
                return dim if isinstance(dim, int) else self.sizes[f"{spec.name}[{axis}]"]
        return 1


MOST_ELEMENTS = 2**28  # of an input that is made up: 2 GiB as they are drawn
MASK = re.compile(r"mask", re.IGNORECASE)
POSITION = re.compile(r"position", re.IGNORECASE)
SEGMENT = re.compile(r"token_?type|segment", re.IGNORECASE)
BOX = re.compile(r"box|(^|_)rois?($|_)", re.IGNORECASE)
_RATE = re.compile(r"^sr$|sampl(e|ing)_?rate", re.IGNORECASE)  # of sound, in Hz
_LENGTH = re.compile(r"len(gth)?s?($|_)", re.IGNORECASE)


def make_feeds(
    session_or_model_path: ort.InferenceSession | Model,
    *,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Make seeded inputs for a model, without running it.

    Floats are standard normal. An integer stays below the rows of the embedding that it indexes. By name: a
    mask is 1 on a prefix of each row and 0 after it, the corners of a box are in order, positions count up, segments
    are 0 or 1, lengths are the sequence's.

    Args:
        session_or_model_path: a session, a path, the bytes of a file, or a parsed model.
        seed: the same seed gives the same arrays; an input's values depend on its name, not on its position.
        batch: the size of dynamic batch axes (2 if not given).
        sizes: sizes of dynamic axes, by the axis' name (the same everywhere) or by ``input[axis]``.
        ranges: exclusive upper bounds of inputs, by name; taken from the graph if a model is given instead of
            a session.

    Returns:
        One array per input; a dynamic axis that has one name has one size everywhere.

    Raises:
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        PlanError: ``sizes`` names no dynamic axis, or a size is not positive.
        ModelError: the model cannot be read.
    """
    source = session_or_model_path
    if isinstance(source, str | os.PathLike | bytes | onnx.ModelProto):
        graph = load_graph(source)
        specs, guess = input_specs(graph), guesses(graph)[0]
        known = input_ranges(graph) if ranges is None else ranges
        lengths = lengths_for(graph, specs)
    else:
        specs, guess, known, lengths = input_specs(source), _GUESSES[0], ranges or {}, NO_LENGTHS
    guess = guess if batch is None else replace(guess, batch=batch)
    return Recipe(specs, resolve_sizes(specs, guess, sizes), known, guess, lengths).feeds(seed)


def working_feeds(
    session: ort.InferenceSession,
    *,
    model: Model | None = None,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    name: str = "the model",
) -> dict[str, np.ndarray]:
    """Make seeded inputs on which a session runs, trying other sizes where the first guess is refused.

    Args:
        session: from ``spa.running.runtime.load_session``.
        model: as for ``first_run``.
        seed: as for ``make_feeds``.
        batch: as for ``make_feeds``; if given, it is kept in every attempt.
        sizes: as for ``make_feeds``; kept in every attempt.
        ranges: exclusive upper bounds of inputs; from ``ranges_for`` if not given.
        name: what messages call the model.

    Returns:
        One array per input.

    Raises:
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        PlanError: ``sizes`` names no dynamic axis, or a size is not positive.
        ModelError: no attempt ran; the message quotes onnxruntime's reason for refusing the first.
    """
    recipe, _ = first_run(session, model=model, seed=seed, batch=batch, sizes=sizes, ranges=ranges, name=name)
    return recipe.feeds(seed)


def first_run(
    session: ort.InferenceSession,
    *,
    model: Model | None = None,
    seed: int = 0,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Mapping[str, int] | None = None,
    name: str = "the model",
    specs: Sequence[TensorSpec] | None = None,
) -> tuple[Recipe, list[Any]]:
    """Find the recipe for inputs on which a session runs, as ``working_feeds`` does.

    Args:
        session: from ``spa.running.runtime.load_session``.
        model: what the session runs; its graph tells the sizes, which are then those of the analysis, and ``ranges``.
        seed: as for ``make_feeds``.
        batch: as for ``working_feeds``.
        sizes: as for ``working_feeds``.
        ranges: exclusive upper bounds of inputs; from ``ranges_for`` if not given.
        name: what messages call the model.
        specs: the inputs to make, where they are narrower than the session's own (a second model must take
            them too).

    Returns:
        The recipe, for more seeds, and the outputs of the run that proved it, in order.

    Raises:
        UnsupportedError: as ``working_feeds``.
        PlanError: as ``working_feeds``.
        ModelError: as ``working_feeds``.
    """
    specs = tuple(input_specs(session) if specs is None else specs)
    if ranges is None:
        ranges = {} if model is None else ranges_for(model, specs)
    lengths = NO_LENGTHS if model is None else lengths_for(model, specs)
    first: ModelError | None = None
    tried: list[str] = []
    for guess, resolved in _attempts(specs, _guesses_for(model, specs), batch, sizes):
        recipe = Recipe(specs, resolved, ranges, guess, lengths)
        feeds = recipe.feeds(seed)
        try:
            return recipe, run(session, feeds, name=name)
        except ModelError as error:
            first = first or error
            tried.append(_say_sizes(feeds))
    more = f"; and {len(tried) - 3} more" if len(tried) > 3 else ""
    raise ModelError(f"{first} (inputs tried: {'; '.join(tried[:3])}{more}). {_remedy(specs)}") from first


def resolve_sizes(
    specs: Iterable[TensorSpec], guess: Guess | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Choose a size for every dynamic axis.

    Args:
        specs: the inputs.
        guess: sizes by kind.
        sizes: sizes to keep, by the axis' name or by ``input[axis]``.

    Returns:
        Sizes by ``input[axis]``, for every dynamic axis of every input.

    Raises:
        SizeError: ``sizes`` names no dynamic axis.
        PlanError: a size is not positive.
    """
    return resolve([open_input(spec) for spec in specs], guess or _GUESSES[0], sizes)


# -- sizes ---------------------------------------------------------------------------------------------------


def open_input(spec: TensorSpec) -> OpenInput:
    """Return an input as far as its sizes go."""
    shape = tuple(dim if isinstance(dim, int) or dim is None else axis_name(dim) for dim in spec.shape)
    return OpenInput(spec.name, shape, "int" in spec.element)


def _guesses_for(model: Model | None, specs: Sequence[TensorSpec]) -> tuple[Guess, ...]:
    """Return the sizes to try; the model is not read where all its axes but the batch are fixed."""
    inputs = [open_input(spec) for spec in specs]
    if model is None or not any(
        not isinstance(dim, int) and kind_of_axis(each, axis) != "batch"
        for each in inputs
        for axis, dim in enumerate(each.shape)
    ):
        return _GUESSES
    return guesses(load_graph(model))


def _attempts(
    specs: Sequence[TensorSpec], choices: Sequence[Guess], batch: int | None, sizes: Mapping[str, int] | None
) -> Iterator[tuple[Guess, dict[str, int]]]:
    seen: set[tuple[object, ...]] = set()
    free_integers = any(spec.dtype is not None and spec.dtype.kind in "iu" for spec in specs)
    for guess in choices:
        if batch is not None:
            guess = replace(guess, batch=batch)
        resolved = resolve_sizes(specs, guess, sizes)
        key = (*sorted(resolved.items()), guess.integers if free_integers else 0)
        if key not in seen:
            seen.add(key)
            yield guess, resolved


# -- values --------------------------------------------------------------------------------------------------


def _length(spec: TensorSpec, shape: tuple[int, ...]) -> int:
    """Return the most that an input with lengths may state, going by one other input."""
    of = open_input(spec)
    kinds = {a: kind_of_axis(of, a) for a, dim in enumerate(spec.shape) if not isinstance(dim, int)}
    steps = [shape[axis] for axis, kind in kinds.items() if kind in ("sequence", "series", "past") and spec.shape[axis]]
    return min(steps or shape[:2])


def _draw(
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    rng: np.random.Generator,
    bound: int | None,
    length: int,
    guess: Guess,
) -> np.ndarray:
    """Draw the values of one input, before the conversion to its type."""
    if MASK.search(name):
        return _prefix_mask(shape, rng)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape)
    if is_box(name, shape):
        return boxes(shape, rng, bound or (guess.integers if dtype.kind in "iu" else None))
    if dtype.kind not in "iu" and bound is None:
        return rng.standard_normal(shape)
    # From here on integers, and ids that are fed as floats and cast, as Keras does.
    if POSITION.search(name) and shape:
        return np.broadcast_to(np.arange(shape[-1]) % (bound or shape[-1]), shape)
    if SEGMENT.search(name):
        return rng.integers(0, min(bound or 2, 2), shape)
    if bound is not None:
        return rng.integers(0, bound, shape)
    if _RATE.search(name) and not shape:
        return np.full(shape, 16_000)
    if _LENGTH.search(name):
        return np.full(shape, length)
    if dtype.itemsize == 1:  # Images, or quantised activations: the whole range is valid.
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max + 1, shape)
    return rng.integers(0, guess.integers, shape)


def is_box(name: str, shape: Sequence[int]) -> bool:
    """Tell by its name and its four columns whether an input holds boxes."""
    return len(shape) > 1 and shape[-1] == 4 and BOX.search(name) is not None


def boxes(shape: Sequence[int], rng: np.random.Generator, bound: int | None = None) -> np.ndarray:
    """Draw boxes (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2.

    Args:
        shape: of the result, (..., 4).
        rng: the source of randomness.
        bound: draws whole numbers below it; floats in [0, 1) without it.
    """
    corners = (*shape[:-1], 2, 2)
    drawn = rng.random(corners) if bound is None else rng.integers(0, bound, corners)
    return np.sort(drawn, axis=-2).reshape(tuple(shape))


def _prefix_mask(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Set ones on at least the first half of each row: softmax over a row with no valid position is NaN."""
    if not shape:
        return np.ones(())
    size = shape[-1]
    valid = rng.integers((size + 1) // 2, size + 1, (*shape[:-1], 1))
    return (np.arange(size) < np.maximum(valid, 1)).astype(np.int64)


def _say_sizes(feeds: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items())


def _remedy(specs: Iterable[TensorSpec]) -> str:
    if names := open_keys(open_input(spec) for spec in specs):
        return f"Give the sizes of its dynamic axes: {', '.join(names)}."
    return "Its inputs have fixed sizes, so the model itself, or the values it needs, are the cause."
