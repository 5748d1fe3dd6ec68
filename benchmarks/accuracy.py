"""Accuracy right after pruning published CIFAR-10 networks, with no training step.

    python benchmarks/accuracy.py --data DIR [--results DIR] [--only resnet20] [--seeds 3]

DIR holds `resnet20_cifar10.onnx`, `resnet56_cifar10.onnx` and `cifar10_subset.npz` (`x_train`, `x_test`: uint8 images,
`y_test`). Calibration sees training images without labels, or images that are made up; test images are used for nothing
but the figures. Writes `accuracy.md`, with what `accuracy.json` knows of networks that are not run: top-1 in percent by
criterion, mean and standard deviation over the seeds, beside Torch-Pruning where it is installed; and by what chooses
the widths.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine, previous, table

from spa import prune
from spa.running.runtime import load_session, run

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TARGETS = {"resnet56": (1.5, 2.1, 2.6, 3.5), "resnet20": (1.5, 2.0)}
WEIGHTS_ALONE = ("l1", "l2", "bn_scale", "random")
PEERS = {"Torch-Pruning global L1": True, "the same, residual streams kept": False}
ONCE = {"l1", "l2", "bn_scale"}  # nothing random in them


def normalised(images: np.ndarray) -> np.ndarray:
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (MEAN, STD))
    return np.asarray((images.astype(np.float32) / 255 - mean) / std)


def images(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Load training images, test images and test labels of the subset in a folder."""
    with np.load(folder / "cifar10_subset.npz") as data:
        return normalised(data["x_train"]), normalised(data["x_test"]), data["y_test"]


@dataclass(frozen=True)
class Trial:
    """The network and the images of one trial.

    Attributes:
        path: of the network.
        train: images to learn from.
        test: images to measure on.
        labels: of these.
        threads: of onnxruntime.
    """

    path: Path
    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    threads: int

    def logits(self, model: Any) -> np.ndarray:
        """Run a model on the test images; return (images, classes)."""
        return run(load_session(model, optimise=True), {"image": self.test})[0]

    def top1(self, logits: np.ndarray) -> float:
        """Return the accuracy in percent."""
        return float((logits.argmax(axis=1) == self.labels).mean() * 100)

    def after(self, factor: float, seeds: Sequence[int], **request: Any) -> tuple[str, float]:
        """Divide the MACs by a factor; return top-1 as a cell, and the mean seconds that took."""
        once = request.get("criterion") in ONCE and not request.get("reconstruct")
        found, start = [], time.perf_counter()
        for seed in seeds[:1] if once else seeds:
            common: dict[str, Any] = {"ratio": 1 - 1 / factor, "round_to": 1, "threads": self.threads, "seed": seed}
            found.append(self.top1(self.logits(prune(self.path, **common, **request).model)))
        seconds = (time.perf_counter() - start) / len(found)
        return f"{np.mean(found):.1f}" + (f" ± {np.std(found):.1f}" if len(found) > 1 else ""), seconds

    @property
    def given(self) -> dict[str, Any]:
        """The request to learn from images."""
        return {"data": {"image": self.train}, "samples": 512}


def by_criterion(name: str, trial: Trial, factors: Sequence[float], seeds: Sequence[int]) -> list[list[str]]:
    """Return the rows of the first table."""
    requests: list[dict[str, Any]] = [
        {"mean": MEAN, "std": STD},
        trial.given | {"criterion": "l2", "reconstruct": True},
        *({"criterion": c} for c in WEIGHTS_ALONE),
    ]
    peers = beside(trial, factors)
    rows = [[name, "1", f"{trial.top1(trial.logits(str(trial.path))):.1f}", *([""] * (len(requests) + len(PEERS) + 1))]]
    for factor, others in zip(factors, peers, strict=True):
        calibrated, seconds = trial.after(factor, seeds, **trial.given)
        cells = [trial.after(factor, seeds, **request)[0] for request in requests]
        rows.append([name, f"{factor:g}", calibrated, *cells, *others, f"{seconds:.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def beside(trial: Trial, factors: Sequence[float]) -> list[list[str]]:
    """Return the cells of Torch-Pruning by factor; it learns from nothing, and nothing in it is random."""
    if importlib.util.find_spec("torch_pruning") is None:
        return [["not installed"] * len(PEERS) for _ in factors]
    import cifar_peer

    dense = cifar_peer.load(trial.path)
    expected = trial.logits(str(trial.path))
    error = np.abs(cifar_peer.logits(dense, trial.test) - expected).max() / np.abs(expected).max()
    if not error < 1e-4:
        raise RuntimeError(f"{trial.path.name} in PyTorch differs from the file by {error:.2g}.")
    found = []
    for factor in factors:
        models = [cifar_peer.at_factor(dense, factor, streams) for streams in PEERS.values()]
        found.append(
            ["not reached" if m is None else f"{trial.top1(cifar_peer.logits(m, trial.test)):.1f}" for m in models]
        )
    return found


def by_widths(name: str, trial: Trial, factors: Sequence[float]) -> list[list[str]]:
    """Return the rows of the second table: all learn from the same images and reconstruct."""
    requests = [
        {},
        {"ranking": "uniform"},
        {"ranking": "isomorphic"},
        {"criterion": "l2", "reconstruct": True},
    ]
    rows = []
    for factor in factors:
        cells = [trial.after(factor, [0], **trial.given, **request)[0] for request in requests]
        rows.append([name, f"{factor:g}", *cells])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="these networks only")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    options = parser.parse_args()
    for name in options.only:
        trial = Trial(options.data / f"{name}_cifar10.onnx", *images(options.data), options.threads)
        about = describe(machine() | {"threads used": options.threads, "seeds": options.seeds})
        found = {"criteria": by_criterion(name, trial, TARGETS[name], range(options.seeds))}
        store(options.results, name, found | {"widths": by_widths(name, trial, TARGETS[name])}, about)


def store(folder: Path, name: str, found: dict[str, list[list[str]]], about: str) -> None:
    """Keep a network's rows beside those of others, and write the page anew."""
    known = previous("accuracy", folder) or {}
    known[name] = {**found, "about": about}
    known = {n: known[n] for n in TARGETS if n in known}
    (folder / "accuracy.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    header = ["network", "RF", "obspa, 512 images", "obspa, no data", "l2 + reconstruct, 512 images", *WEIGHTS_ALONE]
    choosers = ["distortion budget", "uniform", "isomorphic", "global L2 scores"]
    abouts = "\n\n".join(f"{n}: {part['about']}" for n, part in known.items())
    text = f"""# Accuracy right after pruning, no training step

Top-1 in percent; RF is by how much the MACs are divided. With ±: mean and standard deviation over the
seeds. Torch-Pruning ranks by group L1 across the network, at the ratio whose MACs are within 2 % of RF
(`benchmarks/cifar_peer.py`).

{table([*header, *PEERS, "seconds (obspa, images)"], [row for part in known.values() for row in part["criteria"]])}

## Who chooses the widths

All with 512 images and reconstruction, one seed. The first three take the channels in obspa's order; the last one ranks
all channels by L2.

{table(["network", "RF", *choosers], [row for part in known.values() for row in part["widths"]])}

{abouts}
"""
    (folder / "accuracy.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
