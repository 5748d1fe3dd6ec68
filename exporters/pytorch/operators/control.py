"""Control flow: Python's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spa.exporters.pytorch.operators import number, operator, tensor
from spa.model.graph import Graph, Node

Bodies = Mapping[str, Callable[..., "list[Any]"]]


@operator("If", host=(0,), control=True)
def branch(node: Node, condition: Any, *, bodies: Bodies) -> tuple[Any, ...]:
    """Run one of two subgraphs."""
    return tuple(bodies["then_branch" if number(condition) else "else_branch"]())


@operator("Loop", host=(0, 1), control=True)
def loop(node: Node, times: Any, condition: Any, *carried: Any, bodies: Bodies) -> tuple[Any, ...]:
    """Run a subgraph again and again; what it gives besides what is carried is stacked."""
    limit = math.inf if times is None else number(times)
    going = condition is None or bool(number(condition))
    state, kept, i = list(carried), [], 0
    while going and i < limit:
        going, *results = bodies["body"](np.asarray(i, np.int64), np.asarray(True), *state)
        going = bool(number(going))
        state = results[: len(carried)]
        kept.append(results[len(carried) :])
        i += 1
    return (*state, *_stacked(kept, [0] * (len(node.outputs) - len(carried))))


def _stacked(rows: Sequence[Sequence[Any]], axes: Sequence[int]) -> list[Tensor]:
    if not rows:
        return [torch.zeros(0) for _ in axes]
    return [
        torch.stack([tensor(v) for v in column], axis)
        for column, axis in zip(zip(*rows, strict=True), axes, strict=True)
    ]


def _old_scan(node: Node, graph: Graph) -> str | None:
    return "the batch axis of opset 8" if node.version < 9 else None


@operator("Scan", control=True, limit=_old_scan)
def scan(node: Node, *operands: Any, bodies: Bodies) -> tuple[Any, ...]:
    """Run a subgraph for each slice of some operands, with the others as its state."""
    at = node.attributes
    count = at["num_scan_inputs"]
    state, scanned = list(operands[: len(operands) - count]), operands[len(operands) - count :]
    axes = at.get("scan_input_axes") or [0] * count
    ways = at.get("scan_input_directions") or [0] * count
    slices = [(x.flip(axis) if way else x).unbind(axis) for x, axis, way in zip(scanned, axes, ways, strict=True)]
    kept = []
    for items in zip(*slices, strict=True):
        results = bodies["body"](*state, *items)
        kept.append(results[len(state) :])
        state = results[: len(state)]
    outputs = len(node.outputs) - len(state)
    joined = _stacked(kept, at.get("scan_output_axes") or [0] * outputs)
    ways = at.get("scan_output_directions") or [0] * outputs
    axes = at.get("scan_output_axes") or [0] * outputs
    return (*state, *(x.flip(axis) if way else x for x, axis, way in zip(joined, axes, ways, strict=True)))
