"""The number of calibration inputs that obspa wants: top-1 of ResNet-20 on CIFAR-10 right after pruning.

    python benchmarks/inputs.py --data DIR [--results DIR]

DIR as for `accuracy.py`. Writes `inputs.md`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accuracy import MEAN, STD, TARGETS, Trial, images
from common import RESULTS, describe, machine, table

SAMPLES = (128, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    options = parser.parse_args()
    about = describe(machine() | {"threads used": options.threads})
    trial = Trial(options.data / "resnet20_cifar10.onnx", *images(options.data), options.threads)
    rows = []
    for factor in TARGETS["resnet20"]:
        for what, request in (("training images", trial.given), ("made up", {"mean": MEAN, "std": STD})):
            cells = [trial.after(factor, range(options.seeds), **{**request, "samples": n})[0] for n in SAMPLES]
            rows.append([f"{factor:g}", what, *cells])
            print(*rows[-1], sep=" | ", flush=True)
    text = f"""# How many inputs

Top-1 of ResNet-20 (91.8 dense) in percent, mean and standard deviation over {options.seeds} seeds.

{table(["RF", "inputs", *map(str, SAMPLES)], rows)}

{about}
"""
    (options.results / "inputs.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
