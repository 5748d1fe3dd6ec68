"""Synthetic calibration inputs, for a model without data.

Statistics of activations depend on more than shapes: under white noise the filters of an image network see no
edge and hardly fire. Inputs that look like images therefore get dead leaves (Lee, Mumford, Huang 2001), which
have occlusion, edges and the power spectrum in common with photographs and train networks surprisingly well (Baradad
et al. 2021), and lines of words, which networks that read answer to; token ids get text; inputs that look like
series get 1/f noise. All others are as :mod:`spa.running.feeds` makes them.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from spa.calibration.batches import comfortable
from spa.calibration.bonds import Bonds, bonds_of
from spa.calibration.byte_files import byte_inputs, fill_bytes
from spa.calibration.imagery import IMAGES, NEARER, SHOWN, Imagery, choose, misfits, unused
from spa.calibration.images import Numbers, range_normalisation
from spa.calibration.sampling import Sampler, sampler_of
from spa.calibration.sound import levelled
from spa.calibration.streams import STEPS, fill_streams, sound_inputs, state_pairs
from spa.calibration.tokens import Text, choose_text, roles_of
from spa.errors import ModelError, PlanError
from spa.model.sizes import is_state, kind_of_axis
from spa.model.traits import FLOAT_NAMES
from spa.running.feeds import Recipe, first_run, is_box, open_input, resolve_sizes
from spa.running.ranges import lengths_for, ranges_for
from spa.running.runtime import TensorSpec, input_specs, load_session, model_name, run

__all__ = ["Synthesiser", "pink_noise", "synthesise"]

_CHANNELS = (1, 3, 4)
_SMALLEST_IMAGE = 8
_SHORTEST_SERIES = 32

_SOUND = re.compile(r"audio|wave|wav($|_)|speech|(^|_)(log)?mel|(^|_)spec($|_|tro)", re.IGNORECASE)
# Floats of which the shape misleads: caches have heads where images have channels, and what another network
# has computed is closer to white noise than to an image or a series.
_COMPUTED = re.compile(r"mask|past|cache|state|hidden|embed|latent|noise", re.IGNORECASE)

MAX_BYTES = 1 << 28  # of made-up inputs, all of which are held: activations come on top
SHORTER = (0.75, 0.5, 0.875, 0.625)  # of the length of sequences, batch after batch behind a full one
SHORTEST_MIXED = 64  # tokens, below which sequences are not made any shorter
Sizes = Mapping[str, int]
HEARD = 16  # windows of sound that are tried
DEVIATIONS = 3.0  # of a series or of noise, that fill a range of values which is given
FEWEST = 32  # samples that are made whatever they take


@dataclass(frozen=True)
class Elsewhere:
    """Inputs of a domain that was not used.

    Attributes:
        said: the domain, in words.
        imagery: what images are made of.
        text: what token ids are made of.
    """

    said: str
    imagery: Imagery
    text: Text


class Synthesiser:
    """Makes inputs for one model, of sizes at which it has been seen to run.

    Args:
        model: the model, which is not changed.
        seed: of the inputs that are tried.
        sizes: sizes of dynamic axes, by the axis' name or by ``input[axis]``.
        value_range: the lowest and the highest value of floats that show something; by default images are as
            :meth:`imagery` chooses, and other floats as they are drawn.
        mixed: whether sequences of tokens differ in length from batch to batch, where the model leaves it open: what
            is made is half as long at least.

    Raises:
        PlanError: ``sizes`` does not fit, or no input can have the range.
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        ModelError: the model cannot be loaded, or ran on none of the sizes that were tried.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        value_range: tuple[float, float] | None = None,
        mixed: bool = False,
    ) -> None:
        self.model, self.seed, self.sizes = model, seed, sizes
        self.name = model_name(model)
        self.session = load_session(model, name=self.name)
        specs = input_specs(self.session)
        ranges, told = ranges_for(model, specs), model if lengths_for(model, specs).more else None
        find = partial(first_run, self.session, seed=seed, sizes=sizes, ranges=ranges, name=self.name)
        try:
            self.recipe, _ = find(model=told)
        except ModelError:  # of the usual sizes; its graph may state one that fits
            if told is not None:
                raise
            self.recipe, _ = find(model=model)
        self.heard = sound_inputs(model, self.recipe)
        self._bonds = self._working_bonds()
        self.value_range = value_range
        self._shorter = self._shorter_lengths() if mixed else ()
        self._images = [s.name for s in self.recipe.specs if _is_image(self.recipe, s, self.recipe.shape(s))]
        self._levelled = ""
        if self.heard and value_range is None and not state_pairs(self.session, self.recipe):
            self._levelled = self._levels_sound()
        if value_range is not None and not self._ranged:
            raise PlanError("value_range: no input of the model takes images, sound or other floats. Leave it out.")

    def _levels_sound(self) -> str:
        """Return why each window of sound has mean 0 and deviation 1: nearer to BatchNormalizations; empty if not."""
        (sound, *_) = self.batches(HEARD, HEARD, self.seed)
        loud, level = misfits(self.model, [sound, self._level(sound)]) or (0.0, 0.0)
        if level >= NEARER * loud:
            return ""
        return f"nearer to the statistics of the BatchNormalizations ({level:.2g}) than as it is ({loud:.2g})"

    def _level(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return inputs of which each window of sound has mean 0 and deviation 1."""
        return {n: levelled(a) if n in self.heard else a for n, a in feeds.items()}

    def _shorter_lengths(self) -> tuple[Sizes, ...]:
        """Return sizes of shorter sequences at which the model runs; none if it takes no tokens, or one length."""
        recipe = self.recipe
        lengths = {roles.ids: recipe.shape(spec)[1] for roles in roles_of(recipe) for spec in _named(recipe, roles.ids)}
        if len(set(lengths.values())) != 1 or not recipe.sizes.keys() >= {f"{name}[1]" for name in lengths}:
            return ()
        (length,) = set(lengths.values())
        steps = [
            f"{spec.name}[{axis}]"
            for spec in recipe.specs
            for axis, size in enumerate(recipe.shape(spec))
            if size == length and f"{spec.name}[{axis}]" in recipe.sizes
            if kind_of_axis(open_input(spec), axis) in ("sequence", "series")
        ]
        found: list[Sizes] = []
        for fraction in SHORTER if length >= SHORTEST_MIXED else ():
            sizes = {**(self.sizes or {}), **dict.fromkeys(steps, round(length * fraction))}
            other = replace(recipe, sizes=resolve_sizes(recipe.specs, recipe.guess, sizes))
            try:
                run(self.session, other.feeds(self.seed), name=self.name)
            except ModelError:
                return ()
            found.append(sizes)
        return tuple(found)

    def _of_lengths(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Return the recipes, of which most are of shorter sequences, if lengths are mixed."""
        choices = (self.sizes, *self._shorter)
        chosen = [(recipe, choices[at % len(choices)]) for at, recipe in enumerate(recipes)]
        return [replace(r, sizes=resolve_sizes(r.specs, r.guess, sizes)) if sizes else r for r, sizes in chosen]

    def _working_bonds(self) -> Bonds:
        """Return what inputs must agree in, where the network runs on inputs that do."""
        bonds = bonds_of(self.model, self.recipe)
        if not bonds:
            return bonds
        feeds = self.recipe.feeds(self.seed)
        bonds.fill(feeds, np.random.default_rng(self.seed))
        try:
            run(self.session, feeds, name=self.name)
        except ModelError:
            return Bonds()
        return bonds

    @property
    def _ranged(self) -> list[str]:
        """The inputs that have the range of values that is given: floats along some axis, but for states and masks."""
        if self.value_range is None:
            return []
        floats = (s for s in self.recipe.specs if len(s.shape) > 1 and _is_content(self.recipe, s))
        return [s.name for s in floats if not is_state(open_input(s))]

    def imagery(
        self, domain: str = "auto", mean: Numbers | None = None, std: Numbers | None = None, threads: int = 2
    ) -> Imagery:
        """Choose what images show and their values (:func:`spa.calibration.imagery.choose`).

        Args:
            domain: one of :data:`spa.calibration.imagery.DOMAINS`.
            mean: subtracted from images in [0, 1], per channel or for all; chosen by default.
            std: divides images after that.
            threads: of onnxruntime.
        """
        if not self._images:
            return Imagery()
        values = "as given"
        if self.value_range is not None:
            mean, std = range_normalisation(*self.value_range)
            values = "{:g} to {:g}".format(*self.value_range)
        given = mean is not None or std is not None
        recipe = self._resized(self.recipe, IMAGES)

        def make(imagery: Imagery) -> dict[str, np.ndarray]:
            return _batch(recipe, (self.seed, 0), replace(imagery, mean=mean, std=std) if given else imagery, Text())

        chosen = choose(self.model, make, domain, given, threads)
        return replace(chosen, mean=mean, std=std, values=values) if given else chosen

    def text(
        self,
        folder: Path | None = None,
        text: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> Text:
        """Choose what token ids are made of (:func:`spa.calibration.tokens.choose_text`).

        Args:
            folder: the model's own, in which a tokenizer may lie.
            text: a file of text.
            tokenizer: the tokenizer's file or folder.
        """
        return choose_text(self.recipe, folder, text, tokenizer)

    def elsewhere(self, imagery: Imagery, text: Text, sampled: bool = False) -> Elsewhere | None:
        """Return inputs of a domain that was not used, to tell how far a figure carries; None where there is none.

        Args:
            imagery: what images were made of.
            text: what token ids were made of.
            sampled: whether the network wrote its own ids from them.
        """
        if self._images:
            other = unused(imagery, [self.recipe.shape(s) for s in self.recipe.specs if s.name in self._images])
            return Elsewhere(said=SHOWN[other.domain].removeprefix("like "), imagery=other, text=text)
        if roles_of(self.recipe):
            other_text = text if sampled else Text(uniform=text.corpus is None)
            return Elsewhere(said=other_text.said, imagery=imagery, text=other_text)
        return None

    def sampler(self) -> Sampler | None:
        """Return the network as a source of token ids, if it is a causal language model."""
        return sampler_of(self.session, self.recipe)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is to be said of the inputs, but for images and text."""
        notes = []
        if self.value_range is not None:
            low, high = self.value_range
            notes.append(f"made-up values of {', '.join(self._ranged)} lie from {low:g} to {high:g}, as --range says")
        if names := byte_inputs(self.recipe):
            notes.append(f"bytes ({', '.join(names)}) are of made-up files: text, tables, pictures, archives, programs")
        if self._shorter:
            notes.append("made-up sequences differ in length from batch to batch (--size gives one length)")
        if self.heard:
            how = f"; each window has mean 0 and deviation 1, {self._levelled}" if self._levelled else ""
            notes.append(f"sound ({', '.join(self.heard)}) is made up: like speech, like music, noise{how}")
        notes += self._bonds.notes
        if pairs := state_pairs(self.session, self.recipe):
            notes.append(f"states ({', '.join(n for n, _ in pairs)}) are what the network makes of the inputs before")
        return tuple(notes)

    def affordable(self, samples: int) -> int:
        """Return how many of some samples to make, so that they take no more than ``MAX_BYTES``, but at least 32."""
        each = sum(array.nbytes for array in self.recipe.feeds(self.seed).values()) / max(self.recipe.batch, 1)
        return min(samples, max(FEWEST, int(MAX_BYTES // max(each, 1))))

    def batches(
        self,
        samples: int,
        batch: int | None = None,
        seed: int = 0,
        imagery: Imagery | None = None,
        text: Text | None = None,
        sampler: Sampler | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """Make inputs; the arguments are those of :func:`synthesise`, and what writes sequences anew, from text."""
        for option, number in (("samples", samples), ("batch", batch)):
            if number is not None and number < 1:
                raise PlanError(f"{option} is {number}. Give 1 or more.")
        recipe = self.recipe
        empty = next((name for name, array in recipe.feeds(seed).items() if not array.size), None)
        if empty is not None and not recipe.batch:
            raise ModelError(
                f"input {empty!r} is declared with a size of 0, so that running it tells nothing. Open it."
            )
        most = comfortable(recipe.feeds(seed), recipe.batch) if batch is None else batch
        if batch is None and state_pairs(self.session, recipe):  # so that states are carried some way
            most = min(most, max(1, samples // STEPS))
        if batch is None and self._shorter:  # so that there are batches of all lengths
            most = min(most, max(1, samples // (1 + len(self._shorter))))
        recipe = self._resized(recipe, min(most, samples))
        count = -(-samples // recipe.batch)
        remainder = samples - (count - 1) * recipe.batch
        recipes = [recipe] * (count - 1) + [self._resized(recipe, remainder) if remainder < recipe.batch else recipe]
        recipes = self._of_lengths(recipes) if self._shorter else recipes
        imagery, text = imagery or Imagery(), text or Text()
        made = [_batch(each, (seed, index), imagery, text) for index, each in enumerate(recipes)]
        for index, feeds in enumerate(made):
            if sampler is not None:
                sampler.refine(feeds, np.random.default_rng([seed, index, zlib.crc32(b"sampler")]))
            self._bonds.fill(feeds, np.random.default_rng([seed, index, zlib.crc32(b"bonds")]))
        fill_streams(made, recipe, self.session, self.heard, np.random.default_rng([seed, zlib.crc32(b"sound")]))
        if self._levelled:
            made = [self._level(feeds) for feeds in made]
        for name in self._ranged:
            if name not in self._images:
                for feeds in made:
                    feeds[name] = self._in_range(name, feeds[name])
        return made

    def _in_range(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return sound (-1 to 1) or what is of unit variance in the range of values that is given."""
        low, high = self.value_range or (0.0, 1.0)
        unit = np.clip(values if name in self.heard else values / DEVIATIONS, -1, 1).astype(np.float32)
        return np.ascontiguousarray(low + (high - low) * (unit + 1) / 2, dtype=values.dtype)

    def _resized(self, base: Recipe, size: int) -> Recipe:
        """Return the recipe at another batch size, or as it was where the model refuses that."""
        guess = replace(base.guess, batch=size)
        other = replace(base, guess=guess, sizes=resolve_sizes(base.specs, guess, self.sizes))
        if other.sizes == base.sizes:
            return base
        try:
            run(self.session, other.feeds(self.seed), name=self.name)
        except ModelError:
            return base
        return other


def synthesise(
    model: onnx.ModelProto,
    samples: int,
    batch: int | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    imagery: Imagery | None = None,
    text: Text | None = None,
) -> list[dict[str, np.ndarray]]:
    """Synthesise calibration inputs, of sizes at which the model has been seen to run.

    Floats of rank 4 with 1, 3 or 4 channels (first or last) are images (:mod:`spa.calibration.imagery`). Floats of
    rank 3 with a long axis, and those of rank 2 that are named after sound, are series: `pink_noise`. Integers
    that index the table of a vocabulary are text (:mod:`spa.calibration.tokens`), bytes are files
    (:mod:`spa.calibration.byte_files`), what a long filter reads is sound, and recurrent states are carried from batch
    to batch (:mod:`spa.calibration.streams`). The rest is as `spa.running.feeds` makes it, with a fresh seed for each
    batch.

    Args:
        model: the model, which is not changed.
        samples: the number of samples to make; where the batch axis is fixed, this is rounded up to whole batches.
        batch: the most samples in one batch, by default a size that is comfortable; a model that takes one batch size
            only keeps that.
        seed: the same arguments give the same bytes.
        sizes: sizes of dynamic axes, by the axis' name or by ``input[axis]``.
        imagery: what images show and the values that they have; photographs normalised as ImageNet's by default.
        text: what token ids are made of; words as frequent as those of languages by default.

    Returns:
        One mapping from input to array per batch; the last batch is smaller if ``samples`` leaves a remainder
        and the model takes it.

    Raises:
        PlanError: ``samples``, ``batch``, ``imagery`` or ``sizes`` does not fit.
        UnsupportedError: an input is a string, a sequence or of a type that numpy lacks.
        ModelError: the model cannot be loaded, or ran on none of the sizes that were tried.
    """
    return Synthesiser(model, seed, sizes).batches(samples, batch, seed, imagery, text)


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


def _batch(recipe: Recipe, seed: tuple[int, int], imagery: Imagery, text: Text) -> dict[str, np.ndarray]:
    feeds = recipe.feeds(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    text.fill(recipe, feeds, np.random.default_rng([*seed, zlib.crc32(b"text")]))
    fill_bytes(recipe, feeds, np.random.default_rng([*seed, zlib.crc32(b"bytes")]))
    for spec in recipe.specs:
        if not _is_content(recipe, spec):
            continue
        array = feeds[spec.name]
        rng = np.random.default_rng([*seed, zlib.crc32(spec.name.encode())])
        axis = _channel_axis(array.shape)
        if axis is not None:
            height, width = array.shape[2:] if axis == 1 else array.shape[1:3]
            images = imagery.draw(array.shape[0], array.shape[axis], height, width, rng)
            content = np.moveaxis(imagery.normalised(images, spec.name), 1, axis)
        elif (time := _time_axis(spec, array.shape)) is not None:
            moved = np.moveaxis(array, time, -1).shape
            content = np.moveaxis(pink_noise(moved, rng), -1, time)
        else:
            continue
        feeds[spec.name] = np.ascontiguousarray(content, dtype=array.dtype)
    return feeds


def _named(recipe: Recipe, name: str) -> list[TensorSpec]:
    return [spec for spec in recipe.specs if spec.name == name]


def _is_content(recipe: Recipe, spec: TensorSpec) -> bool:
    """Return whether an input may show something; a float with a bound holds ids that the graph casts."""
    if spec.element not in FLOAT_NAMES or spec.name in recipe.ranges:
        return False
    return not (_COMPUTED.search(spec.name) or is_box(spec.name, recipe.shape(spec)))


def _is_image(recipe: Recipe, spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return _is_content(recipe, spec) and _channel_axis(shape) is not None


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Return the axis that holds the channels of images; None for a shape that is not one of images."""
    if len(shape) == 4:
        for axis, spatial in ((1, shape[2:]), (3, shape[1:3])):
            if shape[axis] in _CHANNELS and min(spatial) >= _SMALLEST_IMAGE:
                return axis
    return None


def _time_axis(spec: TensorSpec, shape: tuple[int, ...]) -> int | None:
    """Return the axis along which a series goes on; None for a shape that is not one of series.

    Of [batch, channels, time] and [batch, time, channels] an open axis is the time, for channels are fixed; where both
    are open or fixed, the last one is if it is long enough.
    """
    if len(shape) == 2 and _SOUND.search(spec.name) is None:
        return None
    long = [axis for axis in range(max(1, len(shape) - 2), len(shape)) if shape[axis] >= _SHORTEST_SERIES]
    if len(shape) not in (2, 3) or not long:
        return None
    return max(long, key=lambda axis: (not isinstance(spec.shape[axis], int), axis))
