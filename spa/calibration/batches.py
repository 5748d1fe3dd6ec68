"""The number of samples that run together while calibrating."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import helper

from spa.coupling.analysis import Analysis
from spa.running.stream import Feeds, parted, samples_in

LARGEST = 1 << 27  # bytes of the largest tensor of a batch
MAX_SAMPLES = 64
MAX_BYTES = 10 << 20  # of inputs: activations take some hundred times that, all layers together


def comfortable(feeds: Mapping[str, np.ndarray], samples: int = 1) -> int:
    """Return a batch size at which the inputs of a batch stay small.

    Args:
        feeds: the inputs of some samples.
        samples: the number of these samples.

    >>> comfortable({"x": np.zeros((1, 3, 224, 224), np.float32)})
    17
    """
    sample_bytes = sum(array.nbytes for array in feeds.values()) / max(samples, 1)
    return int(max(1, min(MAX_SAMPLES, MAX_BYTES // max(sample_bytes, 1))))


def in_parts(analysis: Analysis, batches: Sequence[Feeds], most: int = LARGEST) -> list[Feeds]:
    """Cut batches so that no tensor of the network is larger than allowed, where the network takes any batch.

    Args:
        analysis: the network. Its tensors are taken to be larger or smaller than there in proportion to its inputs.
        batches: the inputs.
        most: bytes.
    """
    shapes, dtypes = analysis.points.first.shape, analysis.points.first.dtype
    inputs = {i.name: i for i in analysis.graph.model.graph.input if any(i.name in b for b in batches)}
    if any(i.type.tensor_type.shape.dim and i.type.tensor_type.shape.dim[0].dim_value for i in inputs.values()):
        return list(batches)
    made = (n for node in analysis.graph.nodes for n in node.outputs if n in shapes and dtypes.get(n))
    sizes = (math.prod(shapes[n]) * helper.tensor_dtype_to_np_dtype(dtypes[n]).itemsize for n in made)
    there = sum(math.prod(shapes[n]) for n in inputs) / analysis.points.batch
    here = sum(b[n].size for b in batches for n in inputs) / max(samples_in(batches), 1)
    of_sample = max(sizes, default=0) / analysis.points.batch * here / max(there, 1)
    return parted(batches, max(1, int(most / max(of_sample, 1))))
