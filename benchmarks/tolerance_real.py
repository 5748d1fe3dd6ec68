"""Is "at most one point" met on samples that the search never saw, for real public networks?

    python benchmarks/tolerance_real.py --networks DIR [--only direction,crnn,magika] [--splits 4] [--half 600]

DIR is that of ``real.py``, which installs the packages. Of the test inputs there (which share no word, font or file
with the calibration inputs), one random half is the metric of ``--max-drop 1``, the other half is evaluated afterwards.
The direction classifier has labels; of the others those samples count of which every decision is the dense network's.
Prints a table; ``results/steering.md`` has it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import describe, machine, table
from real_networks import NETWORKS
from real_networks.base import CALIBRATION, TEST, Inputs, Network, Place

import spa

POINT, LABELLED = 1.0, {"direction"}
UNSEEN_DISAGREEMENTS = 2.7  # that none among n does not exclude with 95 % confidence: Wilson's bound, decision 30
HEADER = (
    "network",
    "split",
    "MACs removed",
    "drop, metric's half",
    "standard error",
    "drop, unseen half",
    "evaluations",
)


def correct(network: Network, file: Path, inputs: Inputs, dense: np.ndarray) -> np.ndarray:
    """Return which samples are right, in percent: by their labels, or by the dense network's decisions."""
    found = decisions(network, file, inputs)
    wanted = np.asarray(inputs.truth)[:, None] if network.name in LABELLED else dense
    return (found == wanted).all(axis=1) * 100.0


def decisions(network: Network, file: Path, inputs: Inputs) -> np.ndarray:
    """Return the top classes, (samples, positions)."""
    output = next(iter(network.run(file, inputs).values()))
    return output.argmax(axis=-1).reshape(inputs.count, -1)


def part(inputs: Inputs, chosen: np.ndarray) -> Inputs:
    """Return some of the samples."""
    feeds = {name: array.take(chosen, inputs.axes.get(name, 0)) for name, array in inputs.feeds.items()}
    return replace(inputs, feeds=feeds, truth=None if inputs.truth is None else np.asarray(inputs.truth)[chosen])


def metric(network: Network, inputs: Inputs, dense: np.ndarray) -> Callable[[str], dict[str, float]]:
    """Return a metric of a model's path: how much is right, with the standard error of its drop."""
    before = None

    def measure(path: str) -> dict[str, float]:
        nonlocal before
        right = correct(network, Path(path), inputs, dense)
        before = right if before is None else before
        error = 100 * np.sqrt((right != before).sum() + UNSEEN_DISAGREEMENTS) / len(right)
        return {"right": float(right.mean()), "stderr": float(error)}

    return measure


def rows(network: Network, place: Place, splits: int, half: int) -> Iterator[list[Any]]:
    """Yield the rows of a network."""
    file = network.find(place)
    calibration, test = network.inputs(place, CALIBRATION, 128), network.inputs(place, TEST, 2 * half)
    dense = decisions(network, file, test)
    right = correct(network, file, test, dense)
    for split in range(splits):
        order = np.random.default_rng(split).permutation(test.count)
        seen, unseen = order[:half], order[half:]
        start = time.perf_counter()
        result = spa.prune(
            str(file),
            evaluate=metric(network, part(test, seen), dense[seen]),
            max_drop=POINT,
            data=dict(calibration.feeds),
            seed=split,
        )
        with tempfile.TemporaryDirectory() as folder:
            pruned = Path(folder) / "pruned.onnx"
            result.save(pruned)
            after = correct(network, pruned, part(test, unseen), dense[unseen])
        found = result.report.metric or {}
        print(network.name, split, f"{time.perf_counter() - start:.0f} s", flush=True)
        drop = f"{right[unseen].mean() - after.mean():.2f}"
        figures = (f"{result.report.reached:.0%}", f"{found['drop']:.2f}", f"{found['noise']:.2f}", drop)
        yield [f"`{network.name}`", split, *figures, len(found["evaluations"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--only", default="direction,crnn,magika")
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--half", type=int, default=600)
    options = parser.parse_args()
    found = []
    for name in options.only.split(","):
        for row in rows(NETWORKS[name], Place(options.networks), options.splits, options.half):
            found.append(row)
            print(*row, flush=True)
    print(table(HEADER, found))
    met = sum(float(row[5]) <= POINT for row in found)
    print(f"{met} of {len(found)} within {POINT:g} point on the unseen half\n\n{describe(machine())}")


if __name__ == "__main__":
    main()
