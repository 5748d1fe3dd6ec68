"""The effect of the numbers inside obspa, on published CIFAR-10 networks.

    python benchmarks/ablation.py --data DIR [--results DIR] [--threads 2]

DIR is that of `accuracy.py`. The first 512 training images calibrate; the outputs are compared on the others: the
divergence of the pruned network's class distribution from the dense network's (KL, in nats), and how often the
predicted classes agree. Test images are not looked at. Writes `ablation.md`; what was chosen is in bold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from accuracy import MEAN, STD, images
from common import RESULTS, describe, machine, table

from spa import prune
from spa.obspa import criterion, pipeline, producers, score, sensitivity
from spa.obspa.readers import rows as gathering
from spa.running.runtime import load_session, run

# Network, by how much the MACs are divided, whether images are given.
CASES = (("resnet56", 2.1, True), ("resnet56", 2.1, False), ("resnet20", 2.0, True), ("resnet20", 2.0, False))
# What varies, with the names and values of the constants; the rest stays as it is.
FRACTIONS = ("PRUNED_INPUT_FRACTION", "PRUNED_INPUT_FRACTION_SYNTHETIC")
VARIED: tuple[tuple[str, ModuleType, tuple[str, ...], tuple[float, ...]], ...] = (
    ("steps on the layer before a cut", producers, ("STEPS",), (0, 1, 6)),
    ("fraction of the pruned network's inputs that fits see", pipeline, FRACTIONS, (1.0, 0.85, 0.7)),
    (
        "exponent of the readers behind a group (made up: tried beside 0)",
        criterion,
        ("REFIT_DISCOUNT",),
        (0.0, 0.3, 0.6),
    ),
    ("weight of groups with several readers", score, ("SHARED_GROUP_WEIGHT",), (1.0, 4.0)),
    ("exponent of a measured loss", sensitivity, ("TRUST",), (0.0, 0.5, 0.75, 1.0)),
    ("fraction of a group that is gone where it is measured", sensitivity, ("FRACTION",), (0.3, 0.5)),
    ("rows that fits and scores learn from", gathering, ("MAX_ROWS",), (20_000, 40_000, 80_000)),
    ("rows that steps learn from", producers, ("MAX_ROWS",), (10_000, 20_000, 40_000)),
    ("damping of fits", pipeline, ("DAMPING",), (0.01, 0.03, 0.1)),
)

GIVEN = 512

TEXT = """# What the numbers inside obspa do

KL from the dense network's class distribution, in nats, and agreement of the predicted classes, on the training images
but the 512 that calibrate. One constant at a time is changed; what was chosen is in bold.

{table}

{about}
"""


@contextmanager
def constants(module: ModuleType, names: tuple[str, ...], value: float) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, old in before.items():
            setattr(module, name, old)


def log_softmax(model: Any, inputs: np.ndarray) -> np.ndarray:
    session = load_session(model, optimise=True)
    logits = np.concatenate([run(session, {"image": part})[0] for part in np.array_split(inputs, 8)])
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def compare(folder: Path, case: tuple[str, float, bool], train: np.ndarray, threads: int) -> str:
    """Return KL and agreement as a cell."""
    network, factor, given = case
    path = folder / f"{network}_cifar10.onnx"
    request: dict[str, Any] = (
        {"data": {"image": train[:GIVEN]}, "samples": GIVEN} if given else {"mean": MEAN, "std": STD}
    )
    small = prune(path, ratio=1 - 1 / factor, round_to=1, threads=threads, **request).model
    dense, pruned = (log_softmax(model, train[GIVEN:]) for model in (path, small))
    divergence = float((np.exp(dense) * (dense - pruned)).sum(axis=1).mean())
    agreement = float((dense.argmax(axis=1) == pruned.argmax(axis=1)).mean() * 100)
    return f"{divergence:.4f}, {agreement:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    about = describe(machine() | {"threads used": options.threads})
    train, _, _ = images(options.data)
    header = [f"{n}, RF {f:g}, {'images' if given else 'made up'}" for n, f, given in CASES]
    rows = []
    known: dict[int, str] = {}  # with every constant as it is, by case
    for what, module, names, values in VARIED:
        chosen = [getattr(module, name) for name in names]
        for value in values:
            with constants(module, names, value):
                mine = [chosen[0 if given else -1] == value for _, _, given in CASES]
                cells = []
                for i, case in enumerate(CASES):
                    if mine[i] and i not in known:
                        known[i] = compare(options.data, case, train, options.threads)
                    cells.append(known[i] if mine[i] else compare(options.data, case, train, options.threads))
            rows.append([what, f"{value:g}", *(f"**{c}**" if m else c for c, m in zip(cells, mine, strict=True))])
            print(*rows[-1], sep=" | ", flush=True)
            text = TEXT.format(table=table(["what", "value", *header], rows), about=about)
            (options.results / "ablation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
