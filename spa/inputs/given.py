"""Inputs from the user's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from spa.calibration.data import Calibration, Images, read_data
from spa.calibration.imagery import IMAGES, misfits
from spa.coupling.analysis import Analysis
from spa.inputs.runs import running
from spa.request import Request
from spa.running.stream import first_samples

STRANGE = 4.0  # misfit to the statistics of BatchNormalizations (10 at most) above which inputs are of another scale


def read(analysis: Analysis, request: Request) -> Calibration:
    """Read the inputs that a request names, and note where they are other than the model expects."""
    inputs, seed, graph = request.inputs, request.timing.seed, analysis.graph
    calibration = read_data(
        inputs.data,
        graph.model,
        labels=inputs.labels,
        samples=inputs.samples,
        seed=seed,
        images_as=Images(inputs.mean, inputs.std, request.timing.sizes, inputs.value_range),
        preprocess=inputs.preprocess,
        hold_out=True,
    )
    strange = _other_values(analysis, calibration, request.timing.threads)
    others = _other_sizes(analysis, calibration.batches[0])
    return replace(calibration, notes=(*calibration.notes, *others, *strange))


def _other_sizes(analysis: Analysis, batch: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Say where the sizes of given inputs are not those that MACs are counted at."""
    chosen = analysis.points.chosen
    found = {key: batch[key.rpartition("[")[0]].shape[int(key.rpartition("[")[2][:-1])] for key in chosen}
    if found != chosen:
        counted, given = (", ".join(f"{k} {v}" for k, v in sizes.items()) for sizes in (chosen, found))
        yield f"MACs are counted at {counted}; the first inputs given have {given}. --size counts at theirs"


def _other_values(analysis: Analysis, read: Calibration, threads: int) -> Iterator[str]:
    """Say where given inputs are far from what the network's BatchNormalizations have seen."""
    if not any(node.op == "BatchNormalization" for node in analysis.graph.nodes):
        return
    with running():
        found = misfits(analysis.graph.self_contained(), first_samples(read.batches, IMAGES), threads)
    if found and np.mean(found) > STRANGE:
        yield (
            f"the inputs are far from the statistics of the network's BatchNormalizations ({np.mean(found):.2g}; usual "
            "below 1): they may be scaled otherwise than for its training (--mean, --std, --range for images)"
        )
