"""Does the outputs' change on made-up inputs tell which of two choices of widths is the better one?

    python benchmarks/trials.py --data DIR [--results DIR] [--threads 2] [--only resnet20] [--seeds 3]

DIR is that of `accuracy.py`. Each exponent of the loss curves (decision 7) is cut and reconstructed by itself: the
change that pruning sees, and the divergence of the outputs (KL, in nats) on the training images, none of which it sees.
Writes `trials.md`, with what `trials.json` knows of networks that are not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ablation import constants, log_softmax
from accuracy import MEAN, STD, images
from common import RESULTS, describe, machine, previous, table

from spa import prune
from spa.obspa import criterion

FACTORS = {"resnet56": (1.5, 2.1), "resnet20": (1.5, 2.0)}
EXPONENTS = (criterion.REFIT_DISCOUNT_SYNTHETIC, criterion.REFIT_DISCOUNT)

TEXT = """# Trials of widths

Exponents of the loss curves of made-up inputs (decision 7), each cut and reconstructed: the outputs' change that
pruning sees, and the KL from the dense network on the training images, by seed. Bold is what the trial keeps.

{table}

It keeps the one with the lower KL in {right} of {cases} cases.

{about}
"""


def measure(path: Path, factor: float, seed: int, train: np.ndarray, threads: int) -> list[list[float]]:
    """Return the change of the outputs and KL by exponent."""
    dense = log_softmax(path, train)
    found = []
    for exponent in EXPONENTS:
        with constants(criterion, ("REFIT_DISCOUNT_SYNTHETIC",), exponent), constants(criterion, ("TRIALS",), 0.0):
            result = prune(path, ratio=1 - 1 / factor, round_to=1, threads=threads, seed=seed, mean=MEAN, std=STD)
        pruned = log_softmax(result.model, train)
        divergence = float((np.exp(dense) * (dense - pruned)).sum(axis=1).mean())
        found.append([result.report.to_dict()["calibration"]["after"], divergence])
    return found


def page(known: dict[str, Any]) -> str:
    """Return results/trials.md."""
    rows, right = [], []
    for name, part in known.items():
        for factor, seed, found in part["cases"]:
            kept = min(range(len(found)), key=lambda i: found[i][0])
            right.append(found[kept][1] == min(kl for _, kl in found))
            cells = [f"{change:.4f}, {kl:.4f}" for change, kl in found]
            rows.append([name, factor, seed, *(f"**{c}**" if i == kept else c for i, c in enumerate(cells))])
    header = ["network", "RF", "seed", *(f"exponent {e:g}: change, KL" for e in EXPONENTS)]
    about = "\n\n".join(f"{name}: {part['about']}" for name, part in known.items())
    return TEXT.format(table=table(header, rows), right=sum(right), cases=len(right), about=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(FACTORS), choices=list(FACTORS), help="these networks only")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    options = parser.parse_args()
    train, _, _ = images(options.data)
    for name in options.only:
        path = options.data / f"{name}_cifar10.onnx"
        about = describe(machine() | {"threads used": options.threads})
        cases = []
        for factor in FACTORS[name]:
            for seed in range(options.seeds):
                cases.append([factor, seed, measure(path, factor, seed, train, options.threads)])
                print(name, *cases[-1], flush=True)
        known = (previous("trials", options.results) or {}) | {name: {"cases": cases, "about": about}}
        known = {n: known[n] for n in FACTORS if n in known}
        (options.results / "trials.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        (options.results / "trials.md").write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
