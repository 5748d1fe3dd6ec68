"""The parts that all public networks share: what one is, what inputs are, how one is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spa.running.runtime import load_session, output_specs, run

Array = np.ndarray
Feeds = Mapping[str, Array]
CALIBRATION, TEST = 0, 1  # parts, which share no word, font, file, voice or seed
BATCH = 16


class Missing(Exception):
    """Something that the inputs are made of is not on this machine; the message says what."""


@dataclass(frozen=True)
class Place:
    """Where things lie.

    Attributes:
        site: the folder into which the packages were installed.
        photos: a folder of photographs, if the user gave one.
    """

    site: Path
    photos: Path | None = None

    @property
    def exported(self) -> Path:
        """The folder of networks that were exported from the packages' weights."""
        return self.site / "exported"


@dataclass(frozen=True)
class Inputs:
    """Real inputs of a network.

    Attributes:
        feeds: arrays by input.
        truth: what the outputs should say, if that is known, or other things that scores need.
        axes: the axis of the samples by input, the first one by default.
        batch: samples per run.
    """

    feeds: Feeds
    truth: Any = None
    axes: Mapping[str, int] = field(default_factory=dict)
    batch: int = BATCH

    @property
    def count(self) -> int:
        """The number of samples."""
        name, array = next(iter(self.feeds.items()))
        return int(array.shape[self.axes.get(name, 0)])

    def batches(self) -> list[dict[str, Array]]:
        """Cut the samples into batches."""
        return [
            {n: a.take(range(i, min(i + self.batch, self.count)), self.axes.get(n, 0)) for n, a in self.feeds.items()}
            for i in range(0, self.count, self.batch)
        ]


Outputs = Mapping[str, Array]
Scores = dict[str, float]


def run_batches(model: Path, inputs: Inputs) -> dict[str, Array]:
    """Run a network on inputs.

    Returns:
        Each output, of which the first axis counts the samples, whatever axis it has in the network.
    """
    session = load_session(str(model), optimise=True)
    names = [spec.name for spec in output_specs(session)]
    runs = [run(session, batch) for batch in inputs.batches()]
    return {name: np.concatenate([outputs[i] for outputs in runs]) for i, name in enumerate(names)}


@dataclass(frozen=True)
class Network:
    """A public network and how well it does.

    Attributes:
        name: on the command line and in the tables.
        title: what it does.
        metric: the first of its scores, with the unit.
        find: returns its file, which it may have to export first.
        inputs: makes so many inputs of a part.
        score: the scores of outputs, given those of the dense network; the main one first.
        run: runs a file on inputs.
        tests: the number of test inputs.
        most: the largest number of calibration inputs that make sense.
        options: of the command, where its default says nothing.
    """

    name: str
    title: str
    metric: str
    find: Callable[[Place], Path]
    inputs: Callable[[Place, int, int], Inputs]
    score: Callable[[Inputs, Outputs, Outputs], Scores]
    run: Callable[[Path, Inputs], Outputs] = run_batches
    tests: int = 400
    most: int = 512
    options: Sequence[str] = ()


def in_package(path: str) -> Callable[[Place], Path]:
    """Return what finds a file of an installed package."""
    return lambda place: place.site / path


def percent(equal: Any) -> float:
    """Return the share of true values in percent."""
    return 100 * float(np.mean(equal))


def seeded(part: int, *more: int) -> np.random.Generator:
    """Return the source of randomness of a part."""
    return np.random.default_rng((20261126, part, *more))
