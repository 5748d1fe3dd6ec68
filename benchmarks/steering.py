"""Steering by a metric: is what was asked for met on samples that the search never saw, and what does it cost?

    python -m benchmarks.steering tolerance [--splits 3]
    python -m benchmarks.steering cost [MODEL DATA]

``tolerance``: the shipped test set is too small to bound a point of accuracy on one half and to check it on the other.
So the digits' networks are trained anew on 537 of the 1,797 images (recipes of ``models/train.py``), and the rest is
split at random into two times 630 images: one half is the metric (``top1``, ``--max-drop 1``), the other is evaluated
afterwards. Calibration uses the training images. Needs torch and scikit-learn.

``cost``: CPU seconds on one thread of a sweep of seven ratios with given inputs (0.1 to 0.7), beside the mean of three
single runs with the full repair (0.1, 0.4, 0.7); and the change of the outputs at each ratio. The timing of the
networks, a quarter of a second each, is part of the sweep.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spa
from models.builders.export import Network, torchscript
from models.evaluate import accuracy
from models.train import RECIPES, data, fit, name_recurrent_weights

MODELS = Path(__file__).parent.parent / "models"
POINT, TRAINING, HALF = 1.0, 537, 630


def trained(name: str, x: torch.Tensor, y: torch.Tensor) -> bytes:
    """Return a network trained on the first images."""
    build, epochs, rate = RECIPES[name]
    torch.manual_seed(0)
    module = build()
    fit(module, x[:TRAINING], y[:TRAINING], epochs, rate)
    model = torchscript(
        Network(module, {"input": x[:3]}, ["logits"], script={"do_constant_folding": name == "digits_lstm"})
    )
    name_recurrent_weights(model)
    return model.SerializeToString()


def rows(splits: int) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    parts = data(seed=0)
    x, y = torch.cat(parts[::2]), torch.cat(parts[1::2])
    images, labels = x.numpy(), y.numpy()
    for name in RECIPES:
        model = trained(name, x, y)
        for seed in range(splits):
            order = TRAINING + np.random.default_rng(seed).permutation(len(labels) - TRAINING)
            seen, unseen = order[:HALF], order[HALF : 2 * HALF]
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                half = Path(folder) / "half.npz"
                np.savez(half, input=images[seen], label=labels[seen])
                inputs = {"input": images[:TRAINING]}
                result = spa.prune(model, evaluate=f"top1:{half}", max_drop=POINT, data=inputs, seed=seed, threads=1)
            seconds = time.perf_counter() - start
            before, after = (
                100 * accuracy(m, images[unseen], labels[unseen]) for m in (model, result.model.SerializeToString())
            )
            metric = result.report.metric or {}
            yield {
                "network": name,
                "split": seed,
                "dense, unseen": before,
                "MACs removed": result.report.reached,
                "drop, metric": metric["drop"],
                "noise": metric["noise"],
                "drop, unseen": before - after,
                "evaluations": len(metric["evaluations"]),
                "seconds": seconds,
            }


def cost(model: str, data: str) -> None:
    shared: dict[str, Any] = {"data": data, "threads": 1}
    spa.prune(model, ratio=0.2, criterion="l2")  # imports everything

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    singles = [seconds(partial(spa.prune, model, ratio=r, **shared)) for r in (0.1, 0.4, 0.7)]
    single = sum(singles) / len(singles)
    print(f"single run: {single:.1f} CPU s ({', '.join(f'{s:.1f}' for s in singles)})", flush=True)
    for repair in ("auto", "readers", "full"):  # auto: quick
        with tempfile.TemporaryDirectory() as folder:
            sweep = partial(spa.sweep, model, folder, ratio="0.1:0.7:0.1", reconstruct=repair, **shared)
            taken = seconds(sweep)
            points = json.loads((Path(folder) / "sweep.json").read_text())["points"]
        changes = ", ".join(f"{p['change']:.2g}" for p in points)
        print(f"seven ratios, {repair}: {taken:.1f} CPU s, {taken / single:.2f} single runs; {changes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["tolerance", "cost"])
    parser.add_argument("model", nargs="?", default=str(MODELS / "digits_resnet.onnx"))
    parser.add_argument("data", nargs="?", default=str(MODELS / "digits_train.npz"))
    parser.add_argument("--splits", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "cost":
        cost(arguments.model, arguments.data)
        return
    met = []
    for row in rows(arguments.splits):
        print(json.dumps(row), flush=True)
        met.append(row["drop, unseen"] <= POINT)
    print(f"{sum(met)} of {len(met)} within {POINT:g} point on the unseen half")


if __name__ == "__main__":
    main()
