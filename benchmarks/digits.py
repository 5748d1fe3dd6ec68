"""Accuracy of the shipped digits networks right after pruning, with no training step.

    python benchmarks/digits.py [--results DIR] [--threads 2]

Writes `digits.md`: top-1 on the 360 test images, dense and after dividing the MACs by a factor, by criterion. What
depends on a seed (calibration images, random scores) is the mean and standard deviation over three.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, describe, machine, table

sys.path.insert(0, str(ROOT))

from models.evaluate import accuracy  # the checkout must be on the path first
from spa import prune
from spa.criteria import names

MODELS = ROOT / "models"
NETWORKS = ("digits_resnet", "digits_vgg", "digits_vit", "digits_lstm")
FACTORS = (1.5, 2.0)
SEEDS = (0, 1, 2)


def requests() -> dict[str, dict[str, Any]]:
    """Optimal brain surgery with training images and without data, and the criteria that look at the weights alone."""
    given = {"obspa, training images": {"data": MODELS / "digits_train.npz"}, "obspa, no data": {}}
    return given | {name: {"criterion": name} for name in names({"weights"}) if name != "zero"}


def rows(threads: int) -> list[list[str]]:
    with np.load(MODELS / "digits_test.npz") as data:
        images, labels = data["input"], data["label"]
    found = []
    for network in NETWORKS:
        path = MODELS / f"{network}.onnx"
        dense = f"{100 * accuracy(str(path), images, labels):.1f}"
        for factor in FACTORS:
            cells = []
            for request in requests().values():
                seeds = SEEDS if request.get("criterion", "random") == "random" else SEEDS[:1]
                common: dict[str, Any] = {"ratio": 1 - 1 / factor, "round_to": 1, "threads": threads}
                pruned = [prune(path, **common, **request, seed=seed).model.SerializeToString() for seed in seeds]
                top1 = [100 * accuracy(model, images, labels) for model in pruned]
                cells.append(f"{np.mean(top1):.1f}" + (f" ± {np.std(top1):.1f}" if len(seeds) > 1 else ""))
            found.append([network, dense, f"{factor:g}", *cells])
            print(*found[-1], sep=" | ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    about = describe(machine() | {"threads used": options.threads})
    text = f"""# Digits, right after pruning

Top-1 in per cent on the 360 test images, no training step; global ranking, widths not rounded (made by
`benchmarks/digits.py`). RF is by how much the MACs are divided. With ±: mean and standard deviation over
{len(SEEDS)} seeds, with 512 inputs to learn from. One image is 0.3 points.

{table(["network", "dense", "RF", *requests()], rows(options.threads))}

{about}
"""
    (options.results / "digits.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
