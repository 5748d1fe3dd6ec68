"""A PyTorch module against onnxruntime on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spa.errors import ModelError
from spa.frameworks.torch import arguments, array
from spa.model.graph import Graph
from spa.running.feeds import working_feeds
from spa.running.runtime import input_specs, load_session, run
from spa.running.sessions import open_session

Feeds = Mapping[str, np.ndarray]
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def feeds_of(model: ModelProto, example_inputs: Any) -> dict[str, np.ndarray]:
    """Return example inputs as the ONNX model's: by name where they have its names, else in order.

    Raises:
        ModelError: they are not as many as the model's inputs.
    """
    specs = input_specs(model)
    args, kwargs = arguments(example_inputs)
    leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    if kwargs.keys() >= {s.name for s in specs}:
        leaves = [kwargs[s.name] for s in specs]
    if len(leaves) != len(specs):
        wanted = ", ".join(s.name for s in specs)
        raise ModelError(f"the model takes {wanted}; the example inputs hold {len(leaves)} tensors. Give one for each.")
    return {s.name: array(v) for s, v in zip(specs, leaves, strict=True)}


def made_up(model: ModelProto, base: Path | None) -> dict[str, np.ndarray]:
    """Make up inputs on which the model runs."""
    session = load_session(Graph(model, base).self_contained())
    return working_feeds(session, model=model)


def reference(model: ModelProto, base: Path | None, feeds: Feeds) -> list[np.ndarray]:
    """Return onnxruntime's outputs.

    Raises:
        ModelError: it cannot run the model.
    """
    with open_session(model, base) as opened:
        return run(opened, feeds)


def outputs_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
    """Return a module's outputs in evaluation mode; its mode stays as it was."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            return arrays(module(*args, **kwargs))
    finally:
        for each, mode in modes.items():
            each.training = mode


def arrays(result: Any) -> list[np.ndarray]:
    """Return the tensors of a result of any nesting, in order."""
    return [array(v) for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]


def difference(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Return the largest difference of an output over that output's largest magnitude; infinite if shapes differ."""
    if [g.shape for g in got] != [w.shape for w in wanted]:
        return float("inf")
    shares = [0.0]
    for g, w in zip(got, wanted, strict=True):
        if w.size:
            far = np.abs(g.astype(np.float64) - w.astype(np.float64)).max()
            shares.append(float(far) / max(float(np.abs(w.astype(np.float64)).max()), 1e-12))
    return max(shares) if not np.isnan(shares).any() else float("inf")


def tolerance(model: ModelProto) -> float:
    """Return how far apart outputs may be: float32 sums are taken in another order.

    Half precision rounds every product to 2^-11, and quantised values flip between two levels where sums differ.
    """
    graph = model.graph
    coarse = any(t.data_type in HALF for t in graph.initializer) or any("Quantize" in n.op_type for n in graph.node)
    return 2e-2 if coarse else 1e-4
