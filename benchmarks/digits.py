"""Accuracy of the shipped digits networks right after pruning, with no training step.

    python benchmarks/digits.py [--results DIR]

Writes `digits.md`: top-1 on the 360 test images, dense and after removing a share of the MACs, by criterion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.evaluate import accuracy  # noqa: E402 - the checkout must be on the path first
from spa import prune  # noqa: E402
from spa.criteria import names  # noqa: E402

NETWORKS = ("digits_resnet", "digits_vit", "digits_lstm")
RATIOS = (0.3, 0.5)


def requests() -> list[dict[str, Any]]:
    """Optimal brain surgery with training images and without data, and the criteria that look at the weights alone."""
    data = ROOT / "models" / "digits_train.npz"
    return [{"data": data}, {}, *({"criterion": c} for c in names())]


def rows() -> list[str]:
    with np.load(ROOT / "models" / "digits_test.npz") as data:
        images, labels = data["input"], data["label"]
    lines = []
    for network in NETWORKS:
        path = ROOT / "models" / f"{network}.onnx"
        dense = accuracy(str(path), images, labels)
        for ratio in RATIOS:
            cells = []
            for request in requests():
                pruned = prune(path, ratio=ratio, **request).model.SerializeToString()
                cells.append(f"{100 * accuracy(pruned, images, labels):.1f}")
            lines.append(f"| {network} | {100 * dense:.1f} | {ratio:.0%} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    header = ["network", "dense", "MACs removed", "obspa, training images", "obspa, no data", *names()]
    table = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1), *rows()]
    text = (
        "# Digits, right after pruning\n\nTop-1 in per cent on the 360 test images, no training step; global ranking,\n"
    )
    text += "widths rounded to 8 (made by `benchmarks/digits.py`). One image is 0.3 points.\n\n"
    (arguments.results / "digits.md").write_text(text + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
