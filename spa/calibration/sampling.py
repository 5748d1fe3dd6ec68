"""Sequences that a causal language model writes itself, which are the calibration data that come nearest to its own.

Each token is drawn from what the network says after those before it. Drawing them in turn would take as many runs as
there are tokens. Instead all are drawn at once, from made-up text, and again from what came of that, with the same
random numbers: after n rounds the first n are exactly those that would be drawn in turn, and the others follow a text
much like the one before them (decision 34).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from spa.calibration.tokens import Text, roles_of
from spa.running.feeds import POSITION, Recipe
from spa.running.runtime import run

ROUNDS = 8
MOST_MACS = 1e12  # of all rounds: some minutes on few cores
MOST_LOGITS = 1 << 26  # bytes that one run may return
EQUAL = 1e-3  # a difference of logits over their deviation, below which nothing was read

Array = np.ndarray
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Sampler:
    """A causal language model as a source of sequences.

    Attributes:
        session: runs it.
        ids: the name of the input that holds token ids.
        masks: the names of those that tell tokens from padding.
        output: the position of the logits among the outputs.
        rows: the most sequences in one run.
    """

    session: ort.InferenceSession
    ids: str
    masks: tuple[str, ...]
    output: int
    rows: int

    @property
    def note(self) -> str:
        """Say what is done."""
        return f"token ids ({self.ids}) were then sampled from the network itself, a causal language model"

    def refine(self, feeds: Feeds, rng: np.random.Generator) -> None:
        """Replace all tokens but the first of each sequence, and padding, by what the network says, in place."""
        ids = feeds[self.ids]
        is_token = np.ones(ids.shape, bool)
        for name in self.masks:
            is_token &= feeds[name][:, -ids.shape[1] :] != 0
        chance = rng.random((ids.shape[0], ids.shape[1] - 1), np.float32)
        for start in range(0, len(ids), self.rows):
            part = slice(start, start + self.rows)
            some = {
                name: array[part] if array.ndim and len(array) == len(ids) else array for name, array in feeds.items()
            }
            some[self.ids] = ids[part].copy()
            for _ in range(ROUNDS):
                drawn = _drawn(run(self.session, some)[self.output][:, :-1], chance[part])
                kept = some[self.ids][:, 1:]
                some[self.ids][:, 1:] = np.where(is_token[part, 1:], drawn, kept)
            ids[part] = some[self.ids]


def _drawn(logits: Array, chance: Array) -> Array:
    """Draw a class by each softmax.

    Args:
        logits: (..., classes).
        chance: numbers from 0 to 1, (...).
    """
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    cumulative = np.cumsum(weights, axis=-1)
    drawn = (cumulative < chance[..., None] * cumulative[..., -1:]).sum(axis=-1)
    return np.minimum(drawn, logits.shape[-1] - 1)


def sampler_of(session: ort.InferenceSession, recipe: Recipe) -> Sampler | None:
    """Return a network as a source of sequences if it is a causal language model.

    It is one if it takes token ids, and beside them only what goes with them, and if one output has scores of all ids
    at each position, which do not depend on later ones.

    Args:
        session: of the network.
        recipe: how its inputs are made.
    """
    found = roles_of(recipe)
    if len(found) != 1:
        return None
    (roles,) = found
    others = {s.name for s in recipe.specs} - {roles.ids, *roles.masks, *roles.segments}
    if any(not POSITION.search(name) for name in others):
        return None
    feeds = recipe.feeds()
    Text().fill(recipe, feeds, np.random.default_rng(0))
    before = run(session, feeds)
    ids = feeds[roles.ids]
    half = ids.shape[1] // 2
    feeds[roles.ids] = ids.copy()
    feeds[roles.ids][:, half:] = (ids[:, half:] + 1) % roles.vocabulary
    after = run(session, feeds)
    for at, (a, b) in enumerate(zip(before, after, strict=True)):
        if a.shape == (*ids.shape, roles.vocabulary) and a.dtype.kind == "f" and _is_causal(a, b, half):
            is_fixed = isinstance(next(s for s in recipe.specs if s.name == roles.ids).shape[0], int)
            rows = len(ids) if is_fixed else max(1, MOST_LOGITS // (a[0].size * 4))
            return Sampler(session=session, ids=roles.ids, masks=roles.masks, output=at, rows=rows)
    return None


def _is_causal(a: Array, b: Array, half: int) -> bool:
    """Return whether scores of texts that differ from some position on are equal before it, and differ behind it."""
    difference = np.abs(a.astype(np.float32) - b).max(axis=(0, 2))
    read = difference > EQUAL * float(a.std())
    return not read[:half].any() and bool(read[half:].any())
