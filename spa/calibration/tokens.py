"""Made-up token ids: text where there is a tokenizer, else words as frequent as those of languages are.

Which inputs hold ids is read from the graph: those that index a table of as many rows as vocabularies
have. Masks, segments and positions are the inputs of the same shape; they agree with the ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spa.calibration.passages import passages, passages_of
from spa.calibration.tokenisers import Corpus, find_tokenizer, read_tokenizer, tokenise
from spa.errors import PlanError, UnsupportedError
from spa.running.feeds import MASK, POSITION, SEGMENT, Recipe
from spa.running.runtime import TensorSpec

SMALLEST_VOCABULARY = 1000  # rows; positions are fewer, or have a name that says so
SHORTEST_TEXT = 4  # tokens
FEWEST_USED = 0.5  # of a table's rows that a tokenizer knows, for tables are often padded
PADDED = 0.25  # fraction of sequences that end early where a mask says so
MOST_SENTENCES = 4  # of one passage before another one follows
FLATTENING = 2.7  # the offset of ranks in Zipf's law as Mandelbrot corrected it
REPEATED = 0.3  # fraction of a made-up text's words that it has said before


@dataclass(frozen=True)
class Roles:
    """The inputs that belong to one sequence of tokens.

    Attributes:
        ids: the name of the input that holds token ids.
        vocabulary: the number of rows of the table that they index.
        masks: the names of those that tell tokens from padding.
        segments: the names of those that tell a first text from a second one.
    """

    ids: str
    vocabulary: int
    masks: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """The source of made-up token ids.

    Attributes:
        corpus: real text as ids; None for ids by Zipf's law.
        note: the origin of the ids, a sentence for the report; empty if a network takes none.
        uniform: whether all ids are equally frequent, where there is no real text.
    """

    corpus: Corpus | None = None
    note: str = ""
    uniform: bool = False

    @property
    def said(self) -> str:
        """The origin of the ids, in some words."""
        return "text" if self.corpus is not None else "ids at random" if self.uniform else "ids by Zipf's law"

    def fill(self, recipe: Recipe, feeds: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """Replace the ids, masks and segments of a batch by those of text."""
        for roles in roles_of(recipe):
            count, length = (int(size) for size in feeds[roles.ids].shape)
            used = np.full(count, length)
            if roles.masks:
                shorter = rng.integers(-(-length // 2), length + 1, count)
                used = np.where(rng.random(count) < PADDED, shorter, used)
            if self.corpus is None:
                shape = (count, length)
                ids = rng.integers(0, roles.vocabulary, shape) if self.uniform else zipf(roles.vocabulary, shape, rng)
            else:
                ids = np.stack([_sequence(self.corpus, int(n), length, rng) for n in used])
            is_token = np.arange(length) < used[:, None]
            ids[~is_token] = self.corpus.padding if self.corpus else 0
            feeds[roles.ids] = _like(feeds[roles.ids], ids)
            for name in roles.masks:
                mask = np.ones(feeds[name].shape, bool)
                mask[:, -length:] = is_token  # behind what a cache holds
                feeds[name] = _like(feeds[name], mask)
            for name in roles.segments:
                feeds[name] = np.zeros_like(feeds[name])


def _like(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=array.dtype)


def roles_of(recipe: Recipe) -> list[Roles]:
    """Return the sequences of tokens among a model's inputs."""
    found = [s for s in recipe.specs if _is_ids(s, recipe)]
    return [
        Roles(
            ids=spec.name,
            vocabulary=recipe.ranges[spec.name],
            masks=tuple(s.name for s in recipe.specs if _is_mask(s, recipe) and _owner(s, found) is spec),
            segments=tuple(s.name for s in recipe.specs if _is_segment(s, recipe) and _owner(s, found) is spec),
        )
        for spec in found
    ]


def _is_ids(spec: TensorSpec, recipe: Recipe) -> bool:
    shape = recipe.shape(spec)
    large = recipe.ranges.get(spec.name, 0) >= SMALLEST_VOCABULARY and not POSITION.search(spec.name)
    return large and len(shape) == 2 and shape[1] >= SHORTEST_TEXT


def _is_mask(spec: TensorSpec, recipe: Recipe) -> bool:
    """Tell a mask by its name, or as the integers beside ids that index nothing."""
    if len(spec.shape) != 2 or spec.name in recipe.ranges or POSITION.search(spec.name) or SEGMENT.search(spec.name):
        return False
    return MASK.search(spec.name) is not None or (spec.dtype is not None and spec.dtype.kind in "iub")


def _is_segment(spec: TensorSpec, recipe: Recipe) -> bool:
    return len(spec.shape) == 2 and (recipe.ranges.get(spec.name) in (2, 3, 4) or bool(SEGMENT.search(spec.name)))


def _owner(spec: TensorSpec, ids: Sequence[TensorSpec]) -> TensorSpec | None:
    """Return the ids that an input goes with: of its shape if there are such, then those with the most alike name."""
    alike = [s for s in ids if s.shape == spec.shape] or (
        [s for s in ids if s.shape[0] == spec.shape[0]] if MASK.search(spec.name) else []
    )
    return max(alike, key=lambda s: _shared_letters(s.name, spec.name), default=None)


def _shared_letters(one: str, other: str) -> int:
    """Return how many letters two names begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _sequence(corpus: Corpus, used: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a sequence out of the text: sentences of one passage after another until it is full."""
    row = np.full(length, corpus.padding, np.int64)
    before, after = corpus.before, corpus.after
    if used <= len(before) + len(after):  # too short for special tokens
        before, after = (), ()
    room = used - len(before) - len(after)
    parts: list[np.ndarray] = []
    filled = 0
    while filled < room:
        at = int(rng.choice(len(corpus.passages), p=corpus.weights))
        ids, starts = corpus.passages[at], corpus.starts[at]
        first = int(rng.integers(len(starts)))
        last = first + int(rng.integers(1, MOST_SENTENCES + 1))
        part = ids[starts[first] : starts[last] if last < len(starts) else None]
        parts.append(part)
        filled += len(part)
    row[:used] = np.r_[before, np.concatenate(parts)[:room], after]
    return row


def zipf(vocabulary: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw ids whose frequencies fall with their rank as those of words do; texts repeat some of their own words.

    Vocabularies are about in the order of frequency.

    Args:
        vocabulary: the number of ids.
        shape: texts and their length.
        rng: the source of randomness.

    >>> ids = zipf(5000, (4, 256), np.random.default_rng(0))
    >>> ids.shape, bool(np.median(ids) < 500), int(ids.max()) < 5000
    ((4, 256), True, True)
    """
    cumulative = np.cumsum(1 / (np.arange(vocabulary) + FLATTENING))
    ids = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    said_before = rng.random(shape) < REPEATED
    earlier = (rng.random(shape) * np.arange(shape[1])).astype(np.int64)
    return np.where(said_before, np.take_along_axis(ids, earlier, axis=1), ids)


# -- choice --------------------------------------------------------------------------------------------------------


def choose_text(
    recipe: Recipe,
    folder: Path | None = None,
    text: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Text:
    """Choose what token ids are made of.

    Args:
        recipe: how the model's inputs are made.
        folder: the model's own, in which a tokenizer may lie.
        text: a file of text to use in place of the pages that come with the package.
        tokenizer: the tokenizer's file or folder.

    Raises:
        PlanError: ``text`` or ``tokenizer`` is given and cannot be used.
        UnsupportedError: they are given, and the ``tokenizers`` package is not installed.
    """
    rows = {roles.ids: roles.vocabulary for roles in roles_of(recipe)}
    given = tokenizer or text
    if not rows:
        if given:
            name = "tokenizer" if tokenizer else "text"
            raise PlanError(f"{name}: no input of the model holds token ids. Leave it out.")
        return Text()
    path = Path(tokenizer) if tokenizer else find_tokenizer(folder) if folder is not None else None
    if path is None and text is not None:
        raise PlanError(f"text {os.fspath(text)}: no tokenizer lies beside the model. Give --tokenizer.")
    without = f"token ids ({', '.join(rows)}) follow Zipf's law"
    hint = "--tokenizer, or inputs with --data, make better ones"
    if path is None:
        return Text(note=f"{without}, for no tokenizer lies beside the model; {hint}")
    try:
        corpus = _corpus(path, text, rows)
    except (PlanError, UnsupportedError) as error:
        if given:
            raise
        return Text(note=f"{without}: {error}")
    said = os.fspath(text) if text is not None else "passages that come with SPA: code, " + ", ".join(corpus.languages)
    return Text(corpus=corpus, note=f"token ids ({', '.join(rows)}) are {said}, tokenised with {path}")


def _corpus(path: Path, text: str | os.PathLike[str] | None, rows: Mapping[str, int]) -> Corpus:
    reader = read_tokenizer(path)
    fewest = min(rows, key=lambda name: rows[name])
    if reader.get_vocab_size() < FEWEST_USED * rows[fewest]:
        raise PlanError(
            f"{path}: it knows {reader.get_vocab_size()} tokens, input '{fewest}' of the model {rows[fewest]}. "
            "Give the model's own tokenizer."
        )
    corpus = tokenise(reader, passages() if text is None else passages_of(_read(text)))
    if not corpus.passages:
        raise PlanError(f"{text}: it holds no text. Give some pages.")
    if corpus.largest >= rows[fewest]:
        raise PlanError(
            f"{path}: it makes id {corpus.largest}, input '{fewest}' of the model has ids below {rows[fewest]}. "
            "Give the model's own tokenizer."
        )
    return corpus


def _read(text: str | os.PathLike[str]) -> str:
    try:
        return Path(text).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"text {os.fspath(text)}: it cannot be read ({error}). Give a file of text in UTF-8."
        ) from error
