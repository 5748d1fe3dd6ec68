"""Gathering and scattering."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spa.exporters.pytorch.operators import number, operator
from spa.model.graph import Node

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _positive(indices: Tensor, size: Any) -> Tensor:
    """Return indices counted from the start."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather", fixed=(1,))
def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Take slices along ``axis``, by indices of any shape."""
    axis = node.attributes.get("axis", 0) % x.ndim
    flat = _positive(indices, x.shape[axis]).flatten()
    return x.index_select(axis, flat).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements", fixed=(1,))
def gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Take elements along ``axis``, one index each."""
    axis = node.attributes.get("axis", 0)
    return x.gather(axis, _positive(indices, x.shape[axis]))


def _rows(shape: Any, indices: Tensor) -> Tensor:
    """Turn index tuples [.. r] into the first r axes into places in these axes, flattened."""
    places = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for axis in range(indices.shape[-1]):
        places = places * shape[axis] + _positive(indices[..., axis], shape[axis])
    return places


@operator("GatherND", fixed=(1,))
def gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Take slices by index tuples, after ``batch_dims`` axes that both share."""
    batch = node.attributes.get("batch_dims", 0)
    count = math.prod(x.shape[:batch])
    depth = indices.shape[-1]
    inner = x.shape[batch : batch + depth]
    rows = _rows(inner, indices.reshape(count, *indices.shape[batch:]))
    first = torch.arange(count, device=x.device).reshape(count, *[1] * (rows.ndim - 1)) * math.prod(inner)
    rest = x.shape[batch + depth :]
    flat = x.reshape(count * math.prod(inner), *rest)
    return flat.index_select(0, (rows + first).flatten()).reshape((*indices.shape[:-1], *rest))


@operator("ScatterElements", "Scatter", fixed=(1,))
def scatter_elements(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Replace elements along ``axis``, or combine them with new ones."""
    axis, reduction = node.attributes.get("axis", 0), node.attributes.get("reduction", "none")
    places = _positive(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction])


@operator("ScatterND", fixed=(1,))
def scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Replace slices by index tuples, or combine them with new ones."""
    depth, reduction = indices.shape[-1], node.attributes.get("reduction", "none")
    rest = x.shape[depth:]
    flat = x.reshape(math.prod(x.shape[:depth]), math.prod(rest))
    rows = _rows(x.shape, indices).flatten()
    places = rows[:, None].expand(rows.shape[0], flat.shape[1])
    values = updates.reshape(places.shape)
    if reduction == "none":
        return flat.scatter(0, places, values).reshape(x.shape)
    return flat.scatter_reduce(0, places, values, REDUCTIONS[reduction]).reshape(x.shape)


@operator("OneHot", host=(1,), fixed=(0, 2))
def one_hot(node: Node, indices: Tensor, depth: Any, values: Tensor) -> Tensor:
    """Mark each index on a new axis of ``depth`` places; one outside marks none."""
    n = int(number(depth))
    axis = node.attributes.get("axis", -1) % (indices.ndim + 1)
    shape = [n if i == axis else 1 for i in range(indices.ndim + 1)]
    marked = _positive(indices, n).unsqueeze(axis) == torch.arange(n, device=indices.device).reshape(shape)
    return torch.where(marked, values[1], values[0])
