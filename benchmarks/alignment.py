"""The alignment of widths that pays: what ResNet-20 keeps, and how fast it is, by the multiple that widths become.

    python benchmarks/alignment.py --data DIR [--results DIR]

DIR as for `accuracy.py`. A quarter to 60 % of the MACs go, with 512 training images. Latencies are 10th percentiles in
onnxruntime with one thread, of the pruned network and of the dense one in turns. Writes `alignment.md`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from accuracy import Trial, images
from common import RESULTS, describe, machine, table

import spa
from spa import bench

MULTIPLES = (1, 2, 4, 8)
RATIOS = (0.25, 0.4, 0.5, 0.6)
BATCHES = (1, 32)


def divergence(dense: np.ndarray, pruned: np.ndarray) -> float:
    """Return the mean Kullback–Leibler divergence of the pruned network's classes, from logits."""
    p, q = (z - np.logaddexp.reduce(z, axis=1, keepdims=True) for z in (dense, pruned))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def rows_of(trial: Trial, ratio: float) -> list[list[str]]:
    """Return the rows of one ratio: each multiple, all timed in turns."""
    dense = trial.logits(str(trial.path))
    results = [
        spa.prune(trial.path, ratio=ratio, round_to=multiple, threads=trial.threads, **trial.given)
        for multiple in MULTIPLES
    ]
    models = [str(trial.path), *(r.model for r in results)]
    times = [bench(models, batch=batch, threads=1, isolate_memory=False).models for batch in BATCHES]
    rows = []
    for i, (multiple, result) in enumerate(zip(MULTIPLES, results, strict=True), start=1):
        logits = trial.logits(result.model)
        shares = [f"{100 * (1 - of_batch[i].p10_ms / of_batch[0].p10_ms):.0f}" for of_batch in times]
        kept = [f"{divergence(dense, logits):.3f}", f"{trial.top1(logits):.1f}"]
        rows.append([f"{100 * ratio:.0f}", str(multiple), f"{100 * result.report.reached:.1f}", *shares, *kept])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = describe(machine() | {"threads used": 2})
    trial = Trial(options.data / "resnet20_cifar10.onnx", *images(options.data), 2)
    header = [
        "MACs asked, %",
        "multiple",
        "MACs gone, %",
        *(f"time gone at batch {b}, %" for b in BATCHES),
        "KL",
        "top-1",
    ]
    rows = [row for ratio in RATIOS for row in rows_of(trial, ratio)]
    text = f"""# The multiple that widths become

ResNet-20 (16 to 64 channels, {trial.top1(trial.logits(str(trial.path))):.1f} dense), 512 training images; KL is the
divergence of the classes from the dense network's, on test images.

{table(header, rows)}

{about}
"""
    (options.results / "alignment.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
