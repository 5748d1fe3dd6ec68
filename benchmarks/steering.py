"""Steering by a metric: is what was asked for met on samples that the search never saw, and what does it cost?

    python -m benchmarks.steering [--splits 3]

The shipped test set is too small to bound a point of accuracy on one half and to check it on the other. So the digits'
networks are trained anew on 537 of the 1,797 images (recipes of ``models/train.py``), and the rest is split at random
into two times 630 images: one half is the metric (``top1``, ``--max-drop 1``), the other is evaluated afterwards.
Calibration uses 473 of the training images. Needs torch and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spa
from models.builders.export import Network, torchscript
from models.evaluate import accuracy
from models.train import RECIPES, data, fit, name_recurrent_weights

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--splits", type=int, default=3)
    met = []
    for row in rows(parser.parse_args().splits):
        print(json.dumps(row), flush=True)
        met.append(row["drop, unseen"] <= POINT)
    print(f"{sum(met)} of {len(met)} within {POINT:g} point on the unseen half")


if __name__ == "__main__":
    main()
