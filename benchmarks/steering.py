"""Steering by a metric: is what was asked for met on samples that the search never saw, and what does it cost?

    python -m benchmarks.steering tolerance [--splits 3]

``tolerance``: the digits' 360 test images are split at random into halves. One half is the metric (top-1), with
``--max-drop 1``; the other half is evaluated afterwards. Calibration uses 512 training images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import spa
from models.evaluate import accuracy

ROOT = Path(__file__).parent.parent
NETWORKS = ("digits_resnet", "digits_vgg", "digits_vit", "digits_lstm")
POINT = 1.0


def tolerance(splits: int) -> list[dict[str, float | str]]:
    with np.load(ROOT / "models" / "digits_test.npz") as data:
        images, labels = data["input"], data["label"]
    rows: list[dict[str, float | str]] = []
    for name in NETWORKS:
        path = ROOT / "models" / f"{name}.onnx"
        for seed in range(splits):
            order = np.random.default_rng(seed).permutation(len(labels))
            seen, unseen = np.split(order, 2)
            with tempfile.TemporaryDirectory() as folder:
                half = Path(folder) / "half.npz"
                np.savez(half, input=images[seen], label=labels[seen])
                result = spa.prune(
                    path,
                    evaluate=f"top1:{half}",
                    max_drop=POINT,
                    data=ROOT / "models" / "digits_train.npz",
                    seed=seed,
                    threads=1,
                )
            dense, pruned = (
                100 * accuracy(m, images[unseen], labels[unseen])
                for m in (str(path), result.model.SerializeToString())
            )
            metric = result.report.metric or {}
            rows.append(
                {
                    "network": name,
                    "split": seed,
                    "MACs removed": result.report.reached,
                    "drop seen": metric["drop"],
                    "noise": metric["noise"],
                    "drop unseen": dense - pruned,
                    "evaluations": len(metric["evaluations"]),
                    "seconds": sum(result.report.seconds.values()),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["tolerance"])
    parser.add_argument("--splits", type=int, default=3)
    arguments = parser.parse_args()
    rows = tolerance(arguments.splits)
    met = sum(float(r["drop unseen"]) <= POINT for r in rows)
    print(f"{met} of {len(rows)} within {POINT:g} point on the unseen half")


if __name__ == "__main__":
    main()
