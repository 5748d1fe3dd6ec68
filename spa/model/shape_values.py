"""Constant folding of the small integer tensors (shapes, sizes, indices) that control other operators.

One function per operator: (node, argument arrays) → result arrays, or None for a result that counts as data. Each
follows the ONNX specification of its operator, as far as shape arithmetic uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from spa.model.graph import Node

LARGEST_VALUE = 1 << 20  # elements that are computed at all; a walk keeps fewer, unless another found fewer

Arguments = Sequence[Any]
Folder = Callable[[Node, Arguments], "list[np.ndarray] | None"]


def is_larger(node: Node, arguments: Arguments, most: int) -> bool:
    """Return whether a result would have more than some number of elements, told from its operands before it is made.

    Operators that are not listed make no more elements than they take, or say so themselves.
    """
    given = [a for a in arguments if a is not None]
    if node.op == "Tile":
        size = arguments[0].size * math.prod(max(0, int(v)) for v in np.ravel(arguments[1]))
    elif node.op == "Expand":
        size = math.prod(np.broadcast_shapes(arguments[0].shape, _few(arguments[1])))
    elif node.op == "Gather":
        size = arguments[1].size * (arguments[0].size // max(1, arguments[0].shape[node.attributes.get("axis", 0)]))
    elif node.op == "Concat":
        size = sum(a.size for a in given)
    elif node.op in BROADCAST:
        size = math.prod(np.broadcast_shapes(*(a.shape for a in given)))
    else:
        return False
    return size > most


def _few(shape: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in np.ravel(shape))


def _integers(node: Node, arguments: Arguments, name: str, position: int) -> list[int] | None:
    """Return the integers of an operand that was an attribute in older versions."""
    if len(arguments) > position and arguments[position] is not None:
        return [int(v) for v in np.ravel(arguments[position])]
    return node.attributes.get(name)


def _shape(node: Node, a: Arguments) -> list[np.ndarray]:
    return [a[0][slice(node.attributes.get("start", 0), node.attributes.get("end"))]]


def _size(node: Node, a: Arguments) -> list[np.ndarray]:
    return [np.asarray(np.prod(a[0], dtype=np.int64))]


def _cast(node: Node, a: Arguments) -> list[np.ndarray]:
    return [a[0].astype(helper.tensor_dtype_to_np_dtype(node.attributes["to"]))]


def _unsqueeze(node: Node, a: Arguments) -> list[np.ndarray]:
    axes = _integers(node, a, "axes", 1) or []
    return [np.expand_dims(a[0], tuple(axes))]


def _squeeze(node: Node, a: Arguments) -> list[np.ndarray]:
    axes = _integers(node, a, "axes", 1)
    return [np.squeeze(a[0], None if axes is None else tuple(axes))]


def _slice(node: Node, a: Arguments) -> list[np.ndarray]:
    starts, ends = _integers(node, a, "starts", 1) or [], _integers(node, a, "ends", 2) or []
    axes = _integers(node, a, "axes", 3) or list(range(len(starts)))
    steps = _integers(node, a, "steps", 4) or [1] * len(starts)
    index = [slice(None)] * a[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = a[0].shape[axis]
        stop = None if step < 0 and end < -size else end
        index[axis] = slice(start, stop, step)
    return [a[0][tuple(index)]]


def _divide(node: Node, a: Arguments) -> list[np.ndarray]:
    if a[0].dtype.kind == "f":
        return [a[0] / a[1]]
    quotient = np.abs(a[0]) // np.abs(a[1])  # ONNX truncates towards zero
    return [(quotient * np.sign(a[0]) * np.sign(a[1])).astype(a[0].dtype)]


def _mod(node: Node, a: Arguments) -> list[np.ndarray]:
    return [np.fmod(a[0], a[1]) if node.attributes.get("fmod") else np.mod(a[0], a[1])]


def _clip(node: Node, a: Arguments) -> list[np.ndarray]:
    result = a[0]
    for name, position, bounded in (("min", 1, np.maximum), ("max", 2, np.minimum)):  # max wins over a larger min
        bound = a[position] if len(a) > position else node.attributes.get(name)  # an attribute before version 11
        if bound is not None:
            result = bounded(result, np.asarray(bound, a[0].dtype))
    return [np.asarray(result)]


def _constant_of_shape(node: Node, a: Arguments) -> list[np.ndarray] | None:
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    if fill.dtype.kind == "f":
        return None  # data, even where it is small
    shape = [int(v) for v in a[0]]
    if math.prod(shape) > LARGEST_VALUE:
        return None
    return [np.full(shape, fill.reshape(-1)[0], dtype=fill.dtype)]


def _range(node: Node, a: Arguments) -> list[np.ndarray] | None:
    start, limit, step = (np.ravel(v)[0] for v in a)
    if not abs((float(limit) - float(start)) / float(step)) <= LARGEST_VALUE:  # NaN, too
        return None
    return [np.arange(start, limit, step, dtype=a[0].dtype)]


def _reshape(node: Node, a: Arguments) -> list[np.ndarray]:
    target = [int(v) for v in a[1]]
    if not node.attributes.get("allowzero"):
        target = [a[0].shape[i] if v == 0 else v for i, v in enumerate(target)]
    return [a[0].reshape(target)]


def _split(node: Node, a: Arguments) -> list[np.ndarray]:
    axis = node.attributes.get("axis", 0)
    sizes = _integers(node, a, "split", 1)
    if sizes is None:
        count = len(node.outputs)
        chunk = -(-a[0].shape[axis] // count)
        sizes = [min(chunk, a[0].shape[axis] - i * chunk) for i in range(count)]
    return np.split(a[0], np.cumsum(sizes)[:-1], axis=axis)


def _reduce(function: Callable[..., Any]) -> Folder:
    def fold(node: Node, a: Arguments) -> list[np.ndarray]:
        axes = _integers(node, a, "axes", 1)
        keep = bool(node.attributes.get("keepdims", 1))
        if not axes and node.attributes.get("noop_with_empty_axes"):
            return [a[0]]
        reduced = function(a[0], axis=tuple(axes) if axes else None, keepdims=keep)
        return [np.asarray(reduced, dtype=a[0].dtype)]

    return fold


def _plain(function: Callable[..., Any]) -> Folder:
    def fold(node: Node, a: Arguments) -> list[np.ndarray]:
        return [np.asarray(function(*a))]

    return fold


def _variadic(function: Callable[..., Any]) -> Folder:
    def fold(node: Node, a: Arguments) -> list[np.ndarray]:
        result = a[0]
        for other in a[1:]:
            result = function(result, other)
        return [np.asarray(result)]

    return fold


BROADCAST = frozenset(
    "Add Sub Mul Div Mod Pow Equal Greater GreaterOrEqual Less LessOrEqual And Or Where Min Max".split()
)
FOLDERS: dict[str, Folder] = {
    "Shape": _shape,
    "Size": _size,
    "Cast": _cast,
    "CastLike": lambda node, a: [a[0].astype(a[1].dtype)],
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Div": _divide,
    "Mod": _mod,
    "Clip": _clip,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Reshape": _reshape,
    "Split": _split,
    "Identity": _plain(lambda x: x),
    "Gather": lambda node, a: [np.asarray(np.take(a[0], a[1], axis=node.attributes.get("axis", 0)))],
    "Concat": lambda node, a: [np.concatenate(a, axis=node.attributes["axis"])],
    "Transpose": lambda node, a: [np.transpose(a[0], node.attributes.get("perm"))],
    "Expand": lambda node, a: [np.broadcast_to(a[0], np.broadcast_shapes(a[0].shape, tuple(int(v) for v in a[1])))],
    "Tile": lambda node, a: [np.tile(a[0], [int(v) for v in a[1]])],
    "Add": _plain(np.add),
    "Sub": _plain(np.subtract),
    "Mul": _plain(np.multiply),
    "Pow": lambda node, a: [np.power(a[0], a[1]).astype(a[0].dtype)],
    "Neg": _plain(np.negative),
    "Abs": _plain(np.abs),
    "Floor": _plain(np.floor),
    "Ceil": _plain(np.ceil),
    "Round": _plain(np.round),
    "Sqrt": _plain(np.sqrt),
    "Reciprocal": _plain(lambda x: (1 / x).astype(x.dtype)),
    "Equal": _plain(np.equal),
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "Less": _plain(np.less),
    "LessOrEqual": _plain(np.less_equal),
    "And": _plain(np.logical_and),
    "Or": _plain(np.logical_or),
    "Not": _plain(np.logical_not),
    "Where": _plain(np.where),
    "Min": _variadic(np.minimum),
    "Max": _variadic(np.maximum),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
}
