"""Accuracy right after pruning published CIFAR-10 networks, with no training step.

    python benchmarks/accuracy.py --data DIR [--results DIR]

DIR holds `resnet20_cifar10.onnx`, `resnet56_cifar10.onnx` and `cifar10_subset.npz` (`x_train`, `x_test`: uint8 images,
`y_test`). Calibration sees training images without labels, or images that are made up; test images are used for nothing
but the figures. Writes `accuracy.md`: top-1 in percent by criterion, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, describe, machine

from spa import prune
from spa.runtime import load_session, run

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
TARGETS = {"resnet56": (1.5, 2.1, 2.6, 3.5), "resnet20": (1.5, 2.0)}
SEEDS = (0, 1, 2)
WEIGHTS_ALONE = ("l1", "l2", "bn_scale", "random")


def normalised(images: np.ndarray) -> np.ndarray:
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (MEAN, STD))
    return np.asarray((images.astype(np.float32) / 255 - mean) / std)


def images(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images and test labels of the subset in a folder."""
    with np.load(folder / "cifar10_subset.npz") as data:
        return normalised(data["x_train"]), normalised(data["x_test"]), data["y_test"]


def top1(model: Any, images: np.ndarray, labels: np.ndarray) -> float:
    return float((run(load_session(model, optimise=True), {"image": images})[0].argmax(axis=1) == labels).mean() * 100)


def table(folder: Path, threads: int) -> list[str]:
    train, test, labels = images(folder)
    columns = ["obspa, 512 images", "obspa, no data", "l2 + reconstruct, 512 images", *WEIGHTS_ALONE]
    lines = [f"| network | RF | {' | '.join(columns)} | seconds (obspa, images) |", "| --- " * (len(columns) + 3) + "|"]
    for name, factors in TARGETS.items():
        path = folder / f"{name}_cifar10.onnx"
        lines.append(f"| {name} | 1 | {top1(str(path), test, labels):.1f} |" + " |" * len(columns))
        for factor in factors:
            common: dict[str, Any] = {"ratio": 1 - 1 / factor, "round_to": 1, "threads": threads}
            given: dict[str, Any] = {"data": {"image": train}, "samples": 512}
            cells, seconds = [], []
            requests: list[dict[str, Any]] = [
                given,
                {"mean": MEAN, "std": STD},
                given | {"criterion": "l2", "reconstruct": True},
            ]
            for request in [*requests, *({"criterion": c} for c in WEIGHTS_ALONE)]:
                found = []
                for seed in SEEDS:
                    start = time.perf_counter()
                    result = prune(path, **common, **request, seed=seed)
                    if request is given:
                        seconds.append(time.perf_counter() - start)
                    found.append(top1(result.model, test, labels))
                    if request.get("criterion") in set(WEIGHTS_ALONE) - {"random"} and "reconstruct" not in request:
                        break
                cells.append(f"{np.mean(found):.1f}" + (f" ± {np.std(found):.1f}" if len(found) > 1 else ""))
            lines.append(f"| {name} | {factor} | {' | '.join(cells)} | {np.mean(seconds):.0f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    lines = table(options.data, options.threads)
    about = describe(machine() | {"threads used": options.threads})
    text = "\n".join(["# Accuracy right after pruning, no training step", "", about, "", *lines, ""])
    (options.results / "accuracy.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
