"""Operators that move elements: shapes, pieces, picks and pads."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper, numpy_helper

from spa.exporters.jax_operators import Array, Call, operator, positive

# -- shapes ----------------------------------------------------------------------------------------------------------


@operator("Shape")
def shape(call: Call, x: Array) -> Array:
    """Return the sizes of the axes from ``start`` to ``end``."""
    return np.asarray(x.shape[call.attr("start", 0) : call.attr("end")], np.int64)


@operator("Size")
def size(call: Call, x: Array) -> Array:
    """Return the number of elements."""
    return np.asarray(math.prod(x.shape), np.int64)


@operator("Reshape", static=[1])
def reshape(call: Call, x: Array, target: Array | None = None) -> Array:
    """Reshape; zeros are the operand's own sizes, unless ``allowzero``."""
    sizes = call.ints("shape", target)
    if not call.attr("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(call: Call, x: Array) -> Array:
    """Flatten to two axes."""
    return x.reshape(math.prod(x.shape[: positive(call.attr("axis", 1), x.ndim)]), -1)


@operator("Transpose")
def transpose(call: Call, x: Array) -> Array:
    """Put axes into another order, reversed by default."""
    return x.transpose(call.attr("perm"))


@operator("Squeeze", static=[1])
def squeeze(call: Call, x: Array, axes: Array | None = None) -> Array:
    """Drop axes of one index."""
    dropped = call.ints("axes", axes)
    return x.squeeze(None if dropped is None else tuple(dropped))


@operator("Unsqueeze", static=[1])
def unsqueeze(call: Call, x: Array, axes: Array | None = None) -> Array:
    """Insert axes of one index."""
    return call.xp.expand_dims(x, tuple(call.ints("axes", axes)))


@operator("Expand", static=[1])
def expand(call: Call, x: Array, target: Array) -> Array:
    """Broadcast in both directions."""
    sizes = tuple(call.ints("shape", target))
    return call.xp.broadcast_to(x, np.broadcast_shapes(x.shape, sizes))


@operator("Tile", static=[1])
def tile(call: Call, x: Array, repeats: Array) -> Array:
    """Put copies side by side."""
    return call.xp.tile(x, call.ints("repeats", repeats))


@operator("Concat")
def concat(call: Call, *pieces: Array) -> Array:
    """Join along an axis."""
    return call.xp.concatenate(pieces, call.attr("axis", 1))


@operator("Split", static=[1])
def split(call: Call, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    """Cut into consecutive pieces; equal ones, the last perhaps smaller, unless sizes are given."""
    axis, count = call.attr("axis", 0), len(call.node.outputs)
    given = call.ints("split", sizes)
    if given is None:
        piece = -(-x.shape[axis] // count)
        ends = [min(piece * i, x.shape[axis]) for i in range(1, count)]
    else:
        ends = list(np.cumsum(given[:-1]))
    return tuple(call.xp.split(x, ends, axis))


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Array) -> Array:
    """Turn channels into blocks: DCR takes them apart as (block block c), CRD as (c block block)."""
    n, c, *spatial = x.shape
    b = call.attr("blocksize")
    h, w = spatial
    if call.attr("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Array) -> Array:
    """Turn blocks into channels: DCR puts them together as (block block c), CRD as (c block block)."""
    n, c, h, w = x.shape
    b = call.attr("blocksize")
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    blocks = x.reshape(n, c, h // b, b, w // b, b).transpose(order)
    return blocks.reshape(n, c * b**2, h // b, w // b)


# -- made up ---------------------------------------------------------------------------------------------------------


@operator("ConstantOfShape", static=[0])
def constant_of_shape(call: Call, sizes: Array) -> Array:
    """Return one value everywhere; zero by default."""
    value = call.attr("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full([int(n) for n in call.known(sizes, "the shape")], fill.ravel()[0], fill.dtype)


@operator("Range", static=[0, 1, 2])
def arange(call: Call, start: Array, limit: Array, delta: Array) -> Array:
    """Return numbers at equal distances."""
    bounds = [call.known(v, "a bound").ravel()[0] for v in (start, limit, delta)]
    return np.arange(*bounds, dtype=start.dtype)


@operator("EyeLike")
def eye_like(call: Call, x: Array) -> Array:
    """Return a diagonal of ones."""
    dtype = helper.tensor_dtype_to_np_dtype(call.attr("dtype")) if call.attr("dtype") else x.dtype
    rows, columns = x.shape
    return np.eye(rows, columns, k=call.attr("k", 0), dtype=dtype)


@operator("OneHot", static=[1])
def one_hot(call: Call, indices: Array, depth: Array, values: Array) -> Array:
    """Return the second value at each index, the first elsewhere; out of range, the first everywhere."""
    count = int(call.known(depth, "the depth").ravel()[0])
    axis = positive(call.attr("axis", -1), indices.ndim + 1)
    places = np.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    wrapped = call.xp.where(indices < 0, indices + count, indices)
    return call.xp.where(call.xp.expand_dims(wrapped, axis) == places, values[1], values[0])


@operator("Trilu", static=[1])
def trilu(call: Call, x: Array, k: Array | None = None) -> Array:
    """Return the upper or lower triangle of the last two axes."""
    diagonal = 0 if k is None else int(call.known(k, "the diagonal"))
    return (call.xp.triu if call.attr("upper", 1) else call.xp.tril)(x, diagonal)


# -- pieces ----------------------------------------------------------------------------------------------------------


@operator("Slice", static=[1, 2, 3, 4])
def slice_(
    call: Call,
    x: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    """Take a run of some axes; ends beyond the axis are clipped, as in Python."""
    first, last = call.ints("starts", starts), call.ints("ends", ends)
    where = call.ints("axes", axes, list(range(len(first))))
    step = call.ints("steps", steps, [1] * len(first))
    index = [slice(None)] * x.ndim
    for a, b, axis, s in zip(first, last, where, step, strict=True):
        index[axis] = slice(*_bounds(a, b, s, x.shape[axis]), s)
    return x[tuple(index)]


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None]:
    """Return bounds for Python, where a descending slice that ends before the first index ends at None."""
    start, end = (v + size if v < 0 else v for v in (start, end))
    if step > 0:
        return max(start, 0), max(end, 0)
    return min(start, size - 1), None if end < 0 else end


@operator("Pad", static=[1, 3])
def pad(
    call: Call, x: Array, pads: Array | None = None, value: Array | None = None, axes: Array | None = None
) -> Array:
    """Add elements before and behind each axis; negative numbers take away."""
    amounts = call.ints("pads", pads)
    where = call.ints("axes", axes, list(range(x.ndim)))
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(where):
        widths[axis] = (amounts[i], amounts[i + len(where)])
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, x.shape, strict=True))
    widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    mode = call.attr("mode", "constant")
    if mode != "constant":
        return call.xp.pad(x[cut], widths, mode=mode)
    fill = call.attr("value", 0) if value is None else value.reshape(())
    return call.xp.pad(x[cut], widths, constant_values=fill)


@operator("CenterCropPad", static=[1])
def center_crop_pad(call: Call, x: Array, sizes: Array) -> Array:
    """Crop, or pad with zeros, around the centre."""
    where = call.attr("axes", list(range(x.ndim)))
    for axis, target in zip(where, call.ints("shape", sizes), strict=True):
        axis, missing = positive(axis, x.ndim), target - x.shape[axis]
        if missing < 0:
            start = -missing // 2
            x = x[(slice(None),) * axis + (slice(start, start + target),)]
        else:
            before = missing // 2
            x = call.xp.pad(x, [(before, missing - before) if i == axis else (0, 0) for i in range(x.ndim)])
    return x


@operator("ReverseSequence")
def reverse_sequence(call: Call, x: Array, lengths: Array) -> Array:
    """Reverse the first ``lengths`` steps of each sequence."""
    time, batch = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    steps = np.arange(x.shape[time]).reshape([-1 if i == time else 1 for i in range(2)])
    each = lengths.reshape([-1 if i == batch else 1 for i in range(2)])
    picks = call.xp.where(steps < each, each - 1 - steps, steps)
    return call.xp.take_along_axis(x, picks.reshape(picks.shape + (1,) * (x.ndim - 2)), time)


# -- picks -----------------------------------------------------------------------------------------------------------


@operator("Gather")
def gather(call: Call, x: Array, indices: Array) -> Array:
    """Pick along one axis."""
    return call.xp.take(x, indices, axis=call.attr("axis", 0))


@operator("GatherElements")
def gather_elements(call: Call, x: Array, indices: Array) -> Array:
    """Pick along one axis for each output element."""
    return x[_elements(call, x, indices, call.attr("axis", 0))]


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Array, indices: Array, updates: Array) -> Array:
    """Replace picked elements, add to them, multiply or bound them."""
    return _scatter(call, x, _elements(call, x, indices, call.attr("axis", 0)), updates)


def _elements(call: Call, x: Array, indices: Array, axis: int) -> tuple[Array, ...]:
    axis = positive(axis, x.ndim)
    grid: list[Any] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = call.xp.where(indices < 0, indices + x.shape[axis], indices)
    return tuple(grid)


@operator("GatherND")
def gather_nd(call: Call, x: Array, indices: Array) -> Array:
    """Pick along several axes at once, behind common batch axes."""
    batch, depth = call.attr("batch_dims", 0), indices.shape[-1]
    shape = indices.shape[:-1]
    picks: list[Any] = []
    for axis in range(batch):
        sizes = [-1 if i == axis else 1 for i in range(len(shape))]
        picks.append(np.arange(x.shape[axis]).reshape(sizes))
    picks += [indices[..., i] for i in range(depth)]
    return x[tuple(picks)]


@operator("ScatterND")
def scatter_nd(call: Call, x: Array, indices: Array, updates: Array) -> Array:
    """Replace pieces, add to them, multiply or bound them."""
    return _scatter(call, x, tuple(indices[..., i] for i in range(indices.shape[-1])), updates)


def _scatter(call: Call, x: Array, index: tuple[Array, ...], updates: Array) -> Array:
    reduction = call.attr("reduction", "none")
    if call.xp is np and reduction == "none":
        copy = np.array(x)
        copy[index] = updates
        return copy
    at = jnp.asarray(x).at[index]
    methods = {"none": at.set, "add": at.add, "mul": at.multiply, "max": at.max, "min": at.min}
    return methods[reduction](updates)


@operator("TensorScatter")
def tensor_scatter(call: Call, cache: Array, update: Array, start: Array | None = None) -> Array:
    """Write an update into a cache [b ... s ...] from each sequence's start on, perhaps around the end."""
    axis, length = positive(call.attr("axis", -2), cache.ndim), cache.shape[positive(call.attr("axis", -2), cache.ndim)]
    first = jnp.zeros(cache.shape[0], jnp.int32) if start is None else jnp.asarray(start)
    steps = first[:, None] + np.arange(update.shape[axis])
    steps = steps % length if call.attr("mode", "linear") == "circular" else steps
    moved = jnp.moveaxis(jnp.asarray(cache), axis, 1).at[np.arange(cache.shape[0])[:, None], steps]
    return jnp.moveaxis(moved.set(jnp.moveaxis(update, axis, 1)), 1, axis)


@operator("Compress", static=[1])
def compress(call: Call, x: Array, condition: Array) -> Array:
    """Return the indices where a known condition holds, of the elements where no axis is given."""
    picks = np.flatnonzero(call.known(condition, "the condition"))
    return call.xp.take(x, picks, axis=call.attr("axis"))


@operator("NonZero", static=[0])
def non_zero(call: Call, x: Array) -> Array:
    """Return the places of what is not zero, where that is known."""
    return np.stack(np.nonzero(call.known(x, "what is zero"))).astype(np.int64)
