"""Operators that move elements about, and those that make tensors from sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from spa.exporters.pytorch.operators import dtype_of, given, ints, number, operator, sizes, tensor, unknown_dtype
from spa.model.graph import Graph, Node


@operator("Shape", fixed=(0,))
def shape(node: Node, x: Tensor) -> np.ndarray:
    """Return sizes, on the host."""
    return sizes(x.shape[slice(node.attributes.get("start", 0), node.attributes.get("end"))])


@operator("Size", fixed=(0,))
def size(node: Node, x: Tensor) -> np.ndarray:
    """Return the number of elements, on the host."""
    return sizes([math.prod(x.shape)]).reshape(())


def _no_such_fill(node: Node, graph: Graph) -> str | None:
    value = node.attributes.get("value")
    return None if value is None else unknown_dtype(value.data_type)


@operator("ConstantOfShape", host=(0,), limit=_no_such_fill)
def constant_of_shape(node: Node, target: Any) -> Tensor:
    """Return a tensor of one number."""
    value = node.attributes.get("value")
    if value is None:
        return torch.zeros(ints(target))
    return torch.full(ints(target), number(numpy_helper.to_array(value)), dtype=dtype_of(value.data_type))


@operator("Range", host=(0, 1, 2))
def arange(node: Node, start: Any, limit: Any, step: Any) -> Tensor:
    """Return numbers from a start, up to a limit, by a step."""
    dtype = start.dtype if isinstance(start, Tensor) else tensor(start).dtype
    return torch.arange(number(start), number(limit), number(step), dtype=dtype)


def _no_such_type(node: Node, graph: Graph) -> str | None:
    return unknown_dtype(node.attributes.get("dtype", 1))


@operator("EyeLike", fixed=(0,), limit=_no_such_type)
def eye_like(node: Node, x: Tensor) -> Tensor:
    """Return ones on a diagonal."""
    code = node.attributes.get("dtype")
    ones = torch.ones(x.shape, dtype=x.dtype if code is None else dtype_of(code), device=x.device)
    k = node.attributes.get("k", 0)
    return ones.triu(k).tril(k)


@operator("Reshape", host=(1,))
def reshape(node: Node, x: Tensor, target: Any) -> Tensor:
    """Reshape; 0 keeps an axis unless ``allowzero``, and -1 is what is left."""
    wanted = ints(target)
    if not node.attributes.get("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """Flatten to two axes: those before ``axis``, and the others."""
    axis = node.attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Put axes into another order, by default in reverse."""
    return x.permute(node.attributes.get("perm", list(range(x.ndim))[::-1]))


@operator("Squeeze", host=(1,))
def squeeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    """Drop some axes of one index, or all of them."""
    listed = given(node, axes, "axes")
    return x.squeeze() if listed is None else x.squeeze(tuple(listed))


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    """Insert axes of one index, at places of the result."""
    listed = given(node, axes, "axes") or []
    for axis in sorted(a % (x.ndim + len(listed)) for a in listed):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(node: Node, *operands: Tensor) -> Tensor:
    """Join along ``axis``."""
    return torch.cat(operands, node.attributes["axis"])


@operator("Split", host=(1,))
def split(node: Node, x: Tensor, parts: Any = None) -> tuple[Tensor, ...]:
    """Cut into pieces of given sizes along ``axis``, or equal ones of which the last may be smaller."""
    axis = node.attributes.get("axis", 0)
    listed = given(node, parts, "split")
    if listed is None:
        listed = -(-x.shape[axis] // len(node.outputs))
    return x.split(listed, axis)


@operator("Expand", host=(1,))
def expand(node: Node, x: Tensor, target: Any) -> Tensor:
    """Broadcast, both ways."""
    wanted = ints(target)
    wanted = [1] * (x.ndim - len(wanted)) + wanted
    have = [1] * (len(wanted) - x.ndim) + list(x.shape)
    return x.expand([h if w == 1 else w for h, w in zip(have, wanted, strict=True)])


@operator("Tile", host=(1,))
def tile(node: Node, x: Tensor, repeats: Any) -> Tensor:
    """Repeat along each axis."""
    return x.repeat(ints(repeats))


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Turn channels into places of blocks: X[n (h w c) y x] → [n c (y h) (x w)], or X[n (c h w) y x]."""
    n, c, h, w = x.shape
    b = node.attributes["blocksize"]
    if node.attributes.get("mode", "DCR") == "DCR":
        blocks = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Turn places of blocks into channels: X[n c (y h) (x w)] → [n (h w c) y x], or → [n (c h w) y x]."""
    n, c, h, w = x.shape
    b = node.attributes["blocksize"]
    order = (0, 3, 5, 1, 2, 4) if node.attributes.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return blocks.reshape(n, c * b**2, h // b, w // b)


@operator("Pad", host=(1, 2, 3))
def pad(node: Node, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Add places before and behind each axis: constant, or taken from the tensor; negative ones cut."""
    counts = given(node, pads, "pads") or []
    listed = list(range(x.ndim)) if axes is None else [a % x.ndim for a in ints(axes)]
    pairs = dict(zip(listed, zip(counts[: len(listed)], counts[len(listed) :], strict=True), strict=True))
    mode = node.attributes.get("mode", "constant")
    if mode == "constant":
        fill = node.attributes.get("value", 0.0) if value is None else number(value)
        flat = [n for axis in reversed(range(x.ndim)) for n in pairs.get(axis, (0, 0))]
        return F.pad(x, flat, value=fill)
    for axis, (before, after) in pairs.items():
        n = x.shape[axis]
        places = torch.arange(-before, n + after, device=x.device)
        if mode == "edge":
            places = places.clamp(0, n - 1)
        elif mode == "wrap":
            places = places % n
        else:
            period = max(2 * (n - 1), 1)
            places = places % period
            places = torch.minimum(places, period - places) if n > 1 else places * 0
        x = x.index_select(axis, places)
    return x


@operator("Slice", host=(1, 2, 3, 4))
def slices(node: Node, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    """Take runs along axes; PyTorch knows no negative steps, so these are looked up."""
    first, last = given(node, starts, "starts") or [], given(node, ends, "ends") or []
    listed = given(node, axes, "axes") or list(range(len(first)))
    strides = [1] * len(first) if steps is None else ints(steps)
    for axis, start, end, step in zip(listed, first, last, strides, strict=True):
        n = x.shape[axis]
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
        else:
            run = slice(start, None if end < -n else end, step)
            x = x.index_select(axis, torch.arange(n, device=x.device)[list(range(*run.indices(n)))])
    return x


@operator("CenterCropPad", host=(1,))
def center_crop_pad(node: Node, x: Tensor, target: Any) -> Tensor:
    """Cut or pad axes to a size, alike on both sides."""
    axes = node.attributes.get("axes", list(range(x.ndim)))
    for axis, wanted in zip(axes, ints(target), strict=True):
        n = x.shape[axis]
        if wanted < n:
            x = x.narrow(axis, (n - wanted) // 2, wanted)
        else:
            before = (wanted - n) // 2
            behind = x.ndim - 1 - axis % x.ndim
            x = F.pad(x, [0, 0] * behind + [before, wanted - n - before])
    return x


@operator("ReverseSequence", fixed=(1,))
def reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the first steps of each sample, as many as its length says."""
    time, batch = node.attributes.get("time_axis", 0), node.attributes.get("batch_axis", 1)
    return reversed_steps(x.movedim((time, batch), (0, 1)), lengths).movedim((0, 1), (time, batch))


def reversed_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """Return X[s b ..] with the first lengths[b] steps in reverse."""
    step = torch.arange(x.shape[0], device=x.device)[:, None]
    places = torch.where(step < lengths, lengths - 1 - step, step)
    return x.gather(0, places.reshape(*places.shape, *[1] * (x.ndim - 2)).expand_as(x))


NEAREST = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _resize_limit(node: Node, graph: Graph) -> str | None:
    if node.attributes.get("antialias", 0):
        return "antialias"
    mode = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    return f"the mode {mode!r}" if mode == "tf_crop_and_resize" else None


@operator("Resize", host=(1, 2, 3), limit=_resize_limit)
def resize(node: Node, x: Tensor, roi: Any = None, scales: Any = None, target: Any = None) -> Tensor:
    """Resample along each axis, one after the other."""
    if node.version == 10:  # two operands then
        roi, scales = None, roi
    axes = [a % x.ndim for a in node.attributes.get("axes", range(x.ndim))]
    old = [x.shape[a] for a in axes]
    if scales is not None and np.size(scales):
        factors = ints(scales)
        new = [_scaled(n, s) for n, s in zip(old, factors, strict=True)]
    else:
        new = _by_policy(node, old, ints(target))
        factors = [n / o for n, o in zip(new, old, strict=True)]
    for axis, wanted, factor in zip(axes, new, factors, strict=True):
        if factor != 1:
            x = _resample(node, x, axis, wanted, factor)
    return x


def _scaled(size: Any, factor: float) -> Any:
    return size * int(factor) if factor == int(factor) else math.floor(size * factor)


def _by_policy(node: Node, old: list[Any], wanted: list[Any]) -> list[Any]:
    policy = node.attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return wanted
    factors = [n / o for n, o in zip(wanted, old, strict=True)]
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(o * factor + 0.5) for o in old]


@operator("Upsample", host=(1,))
def upsample(node: Node, x: Tensor, scales: Any = None) -> Tensor:
    """Resize as older versions do: places are divided by the scales."""
    factors = node.attributes["scales"] if scales is None else ints(scales)
    for axis, factor in enumerate(factors):
        if factor != 1:
            x = _resample(node, x, axis, _scaled(x.shape[axis], factor), factor)
    return x


def _resample(node: Node, x: Tensor, axis: int, wanted: Any, factor: Any) -> Tensor:
    """Resample one axis: each new place is a mixture of old ones."""
    at = node.attributes
    n = x.shape[axis]
    by_default = "asymmetric" if node.op == "Upsample" or node.version == 10 else "half_pixel"
    new = torch.arange(wanted, dtype=torch.float32, device=x.device)
    place = _places(at.get("coordinate_transformation_mode", by_default), new, n, wanted, factor)
    if at.get("mode", "nearest") == "nearest":
        nearest = at.get("nearest_mode", "floor" if by_default == "asymmetric" else "round_prefer_floor")
        return x.index_select(axis, NEAREST[nearest](place).long().clamp(0, n - 1))
    indices, weights = _taps(node, place)
    if at.get("exclude_outside", 0):
        weights = [w * ((i >= 0) & (i < n)) for w, i in zip(weights, indices, strict=True)]
        total = torch.stack(weights).sum(0)
        weights = [w / total for w in weights]
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    wide = x if x.is_floating_point() else x.float()
    pieces = [
        wide.index_select(axis, i.clamp(0, n - 1)) * w.to(wide.dtype).reshape(shape)
        for i, w in zip(indices, weights, strict=True)
    ]
    return torch.stack(pieces).sum(0).to(x.dtype)


def _taps(node: Node, place: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the neighbours of places, and what each of them counts."""
    base = place.floor()
    t = place - base
    if node.attributes["mode"] == "linear":
        return [base.long(), base.long() + 1], [1 - t, t]
    return [base.long() + tap for tap in (-1, 0, 1, 2)], _cubic(t, node.attributes.get("cubic_coeff_a", -0.75))


def _places(mode: str, new: Tensor, old_size: Any, new_size: Any, factor: Any) -> Tensor:
    """Return where places of the new axis lie on the old one."""
    match mode:
        case "asymmetric":
            return new / factor
        case "align_corners":
            return new * ((old_size - 1) / (new_size - 1)) if new_size > 1 else new * 0
        case "pytorch_half_pixel" if new_size == 1:
            return new * 0
        case "half_pixel_symmetric":
            shift = old_size / 2 * (1 - new_size / (factor * old_size))
            return shift + (new + 0.5) / factor - 0.5
        case "tf_half_pixel_for_nn":
            return (new + 0.5) / factor
    return (new + 0.5) / factor - 0.5


def _cubic(t: Tensor, a: float) -> list[Tensor]:
    """Return weights of four neighbours: R. Keys, Cubic convolution interpolation (1981), equations 15 and 25."""
    far, near = t + 1, 2 - t
    return [
        ((a * far - 5 * a) * far + 8 * a) * far - 4 * a,
        ((a + 2) * t - (a + 3)) * t * t + 1,
        ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
        ((a * near - 5 * a) * near + 8 * a) * near - 4 * a,
    ]


SAMPLING = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic"}


@operator("GridSample")
def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """Look places up at a grid."""
    at = node.attributes
    return F.grid_sample(
        x,
        grid,
        SAMPLING.get(at.get("mode", "linear"), "nearest"),
        at.get("padding_mode", "zeros"),
        bool(at.get("align_corners", 0)),
    )


@operator("AffineGrid", host=(1,))
def affine_grid(node: Node, theta: Tensor, target: Any) -> Tensor:
    """Return a grid of places for each transform."""
    return F.affine_grid(theta, ints(target), bool(node.attributes.get("align_corners", 0)))


@operator("SequenceConstruct")
def sequence(node: Node, *operands: Tensor) -> list[Tensor]:
    """Return a list."""
    return list(operands)


@operator("SequenceEmpty")
def sequence_empty(node: Node) -> list[Tensor]:
    """Return an empty list."""
    return []


@operator("SequenceInsert", host=(2,))
def sequence_insert(node: Node, items: list[Tensor], item: Tensor, at: Any = None) -> list[Tensor]:
    """Return a list with one item more."""
    place = len(items) if at is None else int(number(at))
    return [*items[:place], item, *items[place:]]


@operator("SequenceAt", host=(1,))
def sequence_at(node: Node, items: list[Tensor], at: Any) -> Tensor:
    """Return one item of a list."""
    return items[int(number(at))]


@operator("SequenceLength")
def sequence_length(node: Node, items: list[Tensor]) -> np.ndarray:
    """Count the items of a list."""
    return np.asarray(len(items), np.int64)


@operator("SplitToSequence", host=(1,))
def split_to_sequence(node: Node, x: Tensor, parts: Any = None) -> list[Tensor]:
    """Return a list of pieces along ``axis``; of one place each where no sizes are given."""
    axis = node.attributes.get("axis", 0)
    if parts is None:
        pieces = x.split(1, axis)
        return list(pieces) if node.attributes.get("keepdims", 1) else [p.squeeze(axis) for p in pieces]
    return list(x.split(int(number(parts)) if np.ndim(parts) == 0 else ints(parts), axis))


@operator("ConcatFromSequence")
def concat_from_sequence(node: Node, items: list[Tensor]) -> Tensor:
    """Join a list along an axis, which may be new."""
    return (torch.stack if node.attributes.get("new_axis", 0) else torch.cat)(items, node.attributes["axis"])


@operator("Compress", fixed=(1,))
def compress(node: Node, x: Tensor, condition: Tensor) -> Tensor:
    """Return the indices of ``axis`` that a condition marks; without ``axis``, of all elements in a row."""
    axis = node.attributes.get("axis")
    places = torch.nonzero(condition)[:, 0]
    return x.flatten()[places] if axis is None else x.index_select(axis, places)


@operator("NonZero", fixed=(0,))
def non_zero(node: Node, x: Tensor) -> Tensor:
    """Return where elements are not zero: [rank count]."""
    return torch.nonzero(x).T
