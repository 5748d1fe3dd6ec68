"""How known values pass through operators, one law per family.

A law gives what is known of a node's outputs, or None. It must hold for every finite input; where it cannot tell, it
says that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np

from spa.model.graph import tensor_array
from spa.model.traits import Trait, operators
from spa.rules.recurrent import GATES
from spa.zero.facts import Site
from spa.zero.known import Known, constant, flat, uniform

Array = np.ndarray
Found = Sequence[Known | None] | None
LAWS: dict[str, Callable[[Site], Found]] = {}
_SUMS = operators(Trait.SUM)
# Activations of recurrent cells are named like operators, but for this one.
_ZERO_AT_ZERO = {*operators(Trait.ZERO_AT_ZERO), "ScaledTanh"}


def law(*keys: str) -> Callable[[Callable[[Site], Found]], Callable[[Site], Found]]:
    """Register a law for operators (``domain::Op``, or the bare name of a standard one)."""

    def register(function: Callable[[Site], Found]) -> Callable[[Site], Found]:
        for key in keys:
            LAWS[key] = function
        return function

    return register


# -- element by element -----------------------------------------------------------------------------------------------


@law(*operators(Trait.UNARY), *operators(Trait.BROADCASTING))
def elementwise(at: Site) -> Found:
    """A function of known operands is known."""
    given = [i for i in range(len(at.node.inputs)) if at.has(i)]
    return _computed(at, reduce(np.logical_and, (at.known(i).mask for i in given)))


@law("Mul")
def multiplied(at: Site) -> Found:
    """As any function; and a product with zero is zero."""
    a, b = at.known(0), at.known(1)
    return _computed(at, (a.mask & b.mask) | a.zero | b.zero)


@law("Where")
def chosen(at: Site) -> Found:
    """The operand that a known condition chooses."""
    condition, yes, no = (at.known(i) for i in range(3))
    return _computed(at, condition.mask & np.where(condition.value, yes.mask, no.mask))


def _computed(at: Site, mask: Array) -> Found:
    """What the operator itself makes of known operands."""
    if not mask.any():
        return None
    made = at.evaluate([at.filled(i) if at.has(i) else None for i in range(len(at.node.inputs))])
    return None if made is None else [Known(made[0], mask)]


@law("Dropout")
def dropout(at: Site) -> Found:
    """Outside training it passes its input."""
    training = at.static(2) if at.has(2) else np.zeros(())
    return None if training is None or training.any() else [at.known(0)]


@law("CastLike")
def cast_like(at: Site) -> Found:
    """The first operand, in the type of the second."""
    return [Known(at.known(0).value.astype(at.known(1).value.dtype), at.known(0).mask)]


# -- normalisations ---------------------------------------------------------------------------------------------------


@law("BatchNormalization")
def batch_norm(at: Site) -> Found:
    """An affine map of each channel: known where its input is, or where its scale is zero."""
    x = at.known(0)
    given = [at.value(i) for i in range(1, 5)]
    if at.attr("training_mode", 0) or any(v is None for v in given):
        return None
    scale, shift, mean, variance = (_channels(v.astype(np.float64), x.value.ndim) for v in given if v is not None)
    slope = scale / np.sqrt(variance + at.attr("epsilon", 1e-5))
    value = np.where(x.mask, x.value, mean).astype(np.float64)
    return [Known(((value - mean) * slope + shift).astype(x.value.dtype), x.mask | (scale == 0))]


@law("LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization")
def normalised(at: Site) -> Found:
    """Where the scale is zero, the bias is all that is left."""
    scale, shift = at.value(1), at.value(2) if at.has(2) else np.zeros((), np.float32)
    rank = len(at.shape(0))
    if scale is None or shift is None:
        return None
    if at.node.op in ("InstanceNormalization", "GroupNormalization"):
        repeats = at.shape(0)[1] // scale.size
        scale, shift = (_channels(np.repeat(v, repeats), rank) for v in (scale, shift))
    else:
        scale, shift = (v.reshape((1,) * (rank - v.ndim) + v.shape) for v in (scale, shift))
    return [Known(shift.astype(at.known(0).value.dtype), scale == 0)]


def _channels(vector: Array, rank: int) -> Array:
    """A vector along the second of some axes."""
    return vector.reshape(1, -1, *[1] * (rank - 2))


# -- sums of products -------------------------------------------------------------------------------------------------


def usable(at: Site, operand: int) -> Known:
    """The part of an operand whose contribution to a sum of products is known and can be a bias.

    Beside constant weights that is what is known and reaches every place of the output alike; the borders of a
    padded convolution, and the gaps of a transposed one, see zeros instead. Else it is what is known to be zero.
    """
    known = at.known(operand)
    match at.node.key:
        case "Conv" | "ConvTranspose" if operand == 0:
            known = uniform(known, [i for i in range(known.value.ndim) if i != 1])
            plain = at.node.op == "Conv" and not _padded(at) and at.value(1) is not None
        case "MatMul" | "Gemm" if operand < 2:
            plain = at.value(1 - operand) is not None and min(len(at.shape(0)), len(at.shape(1))) >= 2
        case "Einsum" if len(at.node.inputs) == 2 and operand < 2:
            plain = at.value(1 - operand) is not None and _pairs(at)
        case _:
            plain = False
    return known if plain or at.value(operand) is not None else known.only(known.value == 0)


def _padded(at: Site) -> bool:
    auto = at.attr("auto_pad", "NOTSET")
    return auto.startswith("SAME") or (auto == "NOTSET" and any(at.attr("pads") or ()))


def _pairs(at: Site) -> bool:
    """Whether all letters that an Einsum sums over are in both its operands."""
    left, _, right = at.attr("equation").replace(" ", "").partition("->")
    first, second = left.split(",")
    return "." not in left and not {*left} - {*right, ","} - ({*first} & {*second})


def product(at: Site, first: Known, second: Known) -> Known:
    """The sum of products of a Conv, ConvTranspose, MatMul, Gemm or Einsum, its bias left out.

    Known where each term has a factor zero, or two known ones.
    """
    if at.node.op in ("Conv", "ConvTranspose"):
        return _convolved(at, first)
    if at.node.op == "Einsum":
        return _terms(partial(np.einsum, at.attr("equation")), first, second)
    if at.node.op == "Gemm":
        first = _turned(first) if at.attr("transA", 0) else first
        second = _turned(second) if at.attr("transB", 0) else second
    if first.value.ndim < 2 or second.value.ndim < 2:
        return Known(np.zeros((1,) * len(at.out_shape())), np.zeros((1,) * len(at.out_shape()), bool))
    found = _matrix_product(first, second)
    return Known(found.value * at.attr("alpha", 1.0), found.mask) if at.node.op == "Gemm" else found


def _turned(known: Known) -> Known:
    value, mask = np.broadcast_arrays(known.value, known.mask)
    return Known(value.T, mask.T)


def _matrix_product(a: Known, b: Known) -> Known:
    inner = max(a.value.shape[-1], a.mask.shape[-1], b.value.shape[-2], b.mask.shape[-2])
    if inner > 1:
        a, b = _spread(a, -1, inner), _spread(b, -2, inner)
    return _terms(np.matmul, a, b)


def _spread(known: Known, axis: int, size: int) -> Known:
    def spread(array: Array) -> Array:
        shape = list(array.shape)
        shape[axis] = size
        return np.broadcast_to(array, shape)

    return Known(spread(known.value), spread(known.mask))


def _terms(multiply: Callable[[Array, Array], Array], a: Known, b: Known) -> Known:
    """What is known of sums of products: those of which no term may vary."""
    may_vary = multiply((~a.zero).astype(np.float32), (~b.zero).astype(np.float32))
    if not (a.other.any() and b.other.any()):
        return Known(np.zeros((1,) * may_vary.ndim), may_vary == 0)
    known = multiply(a.other.astype(np.float32), b.other.astype(np.float32))  # counts of terms, exact to 2^24
    value = multiply(np.where(a.other, a.value, 0).astype(np.float64), np.where(b.other, b.value, 0).astype(np.float64))
    return Known(value, may_vary == known)


def _convolved(at: Site, x: Known) -> Known:
    """A convolution of what is alike at all places."""
    w, rank = at.value(1), len(at.shape(0))
    if w is None:
        return Known(np.zeros((1,) * rank), np.zeros((1,) * rank, bool))
    groups, channels = at.attr("group", 1), at.shape(0)[1]
    taps = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    if at.node.op == "ConvTranspose":
        taps = taps.swapaxes(1, 2)
    mask = np.broadcast_to(flat(x.mask, 1, channels), channels).reshape(groups, -1, 1)
    value = np.broadcast_to(x.value.reshape(-1), channels).astype(np.float64).reshape(groups, -1, 1)
    unknown = (taps != 0).any(axis=-1).astype(np.float32) @ ~mask
    total = taps.sum(axis=-1, dtype=np.float64) @ np.where(mask, value, 0)
    return Known(_channels(total.reshape(-1), rank), _channels(unknown.reshape(-1) == 0, rank))


@law(*operators(Trait.BIASED))
def weighted(at: Site) -> Found:
    """A sum of products and a bias."""
    found = product(at, usable(at, 0), usable(at, 1))
    if not found.mask.any():
        return None
    dtype = at.known(0).value.dtype
    if not at.has(2):
        return [Known(found.value.astype(dtype), found.mask)]
    bias = at.known(2)
    value, mask = bias.value.astype(np.float64) * at.attr("beta", 1.0), bias.mask
    if at.node.op != "Gemm":
        value, mask = (_channels(np.broadcast_to(a, bias.value.shape), len(at.shape(0))) for a in (value, mask))
    return [Known((found.value + np.where(mask, value, 0)).astype(dtype), found.mask & mask)]


@law("Einsum")
def einsum(at: Site) -> Found:
    """A sum of products of two operands."""
    terms = at.attr("equation").replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or any(len({*t}) < len(t) for t in terms):
        return None
    found = product(at, usable(at, 0), usable(at, 1))
    return [Known(found.value.astype(at.known(0).value.dtype), found.mask)]


@law("MatMul")
def matmul(at: Site) -> Found:
    """A sum of products; and what softmax takes the mean of stays what it is, where it is the same everywhere."""
    found = product(at, usable(at, 0), usable(at, 1))
    value, mask = found.value, found.mask
    if _sums_to_one(at, at.node.inputs[0]):
        same = uniform(at.known(1), [-2])
        value, mask = np.where(same.mask, same.value, value), mask | same.mask
    return [Known(value.astype(at.known(0).value.dtype), mask)]


def _sums_to_one(at: Site, name: str) -> bool:
    """Whether a tensor is a softmax along its last axis."""
    node = at.facts.graph.producer.get(name)
    if node is None or node.op != "Softmax":
        return False
    rank = len(at.facts.analysis.points.first.shape[name])
    return bool(node.attributes.get("axis", -1 if node.version >= 13 else 1) in (-1, rank - 1))


# -- recurrent cells --------------------------------------------------------------------------------------------------


@law("LSTM", "GRU", "RNN")
def recurrent(at: Site) -> Found:
    """A unit whose candidate is always zero keeps the state zero that it starts with.

    h_t = o ∘ tanh(f ∘ c + i ∘ g), h_t = (1 − z) ∘ n + z ∘ h and h_t = n, with g or n a function of zero.
    """
    w, r = at.value(1), at.value(2)
    bias = at.value(3) if at.has(3) else np.zeros((), np.float32)
    if w is None or r is None or bias is None or not _passes_zero(at):
        return None
    directions, gates, units = w.shape[0], GATES[at.node.op], r.shape[2]
    gate = {"LSTM": 3, "GRU": 2, "RNN": 0}[at.node.op]
    w, r = (v.reshape(directions, gates, units, -1)[:, gate] for v in (w, r))
    bias = np.broadcast_to(bias, (directions, 2 * gates * units)).reshape(directions, 2, gates, units)[:, :, gate]
    x = flat(at.known(0).zero, 2, w.shape[2])
    zero = ~((w != 0) & ~x).any(axis=2) & ~(bias != 0).any(axis=1)
    for operand in (5, 6):
        if at.has(operand):  # d b h, or b d h where the batch comes first
            start = uniform(at.full(operand, at.known(operand)), [0 if at.attr("layout", 0) else 1])
            zero &= start.zero.reshape(directions, units)
    for _ in range(units):
        found = zero & ~((r != 0) & ~zero[:, None, :]).any(axis=2)
        if np.array_equal(found, zero):
            break
        zero = found
    return [
        Known(np.zeros((1,) * len(s), r.dtype), _units(zero, len(s), bool(at.attr("layout", 0)))) for s in _outs(at)
    ]


def _outs(at: Site) -> list[tuple[int, ...]]:
    return [at.out_shape(i) if o else (1, 1, 1) for i, o in enumerate(at.node.outputs)]


def _units(zero: Array, rank: int, batch_first: bool) -> Array:
    """Directions and units as Y [s d b h], Y_h [d b h], or [b s d h] and [b d h]."""
    if batch_first:
        return zero.reshape((1,) * (rank - 2) + zero.shape)
    return zero.reshape((1,) * (rank - 3) + (zero.shape[0], 1, zero.shape[1]))


def _passes_zero(at: Site) -> bool:
    given = at.attr("activations")
    if given is None:
        return True
    count = {"LSTM": 3, "GRU": 2, "RNN": 1}[at.node.op]
    return all(name in _ZERO_AT_ZERO for i, name in enumerate(given) if count == 1 or i % count)


# -- moved elements ---------------------------------------------------------------------------------------------------


@law(*operators(Trait.VIEW))
def viewed(at: Site) -> Found:
    """The same elements in row-major order."""
    known = at.full(0, at.known(0))
    return (
        [Known(known.value.reshape(at.out_shape()), known.mask.reshape(at.out_shape()))] if known.mask.any() else None
    )


@law("Transpose")
def transposed(at: Site) -> Found:
    """The axes permuted."""
    value, mask = np.broadcast_arrays(at.known(0).value, at.known(0).mask)
    perm = at.attr("perm")
    return [Known(value.transpose(perm), mask.transpose(perm))]


@law("Concat")
def joined(at: Site) -> Found:
    """One operand after the other."""
    given = range(len(at.node.inputs))
    if not any(at.known(i).mask.any() for i in given):
        return None
    axis = at.attr("axis", 1) % len(at.shape(0))
    pieces = []
    for operand in given:
        value, mask = np.broadcast_arrays(at.known(operand).value, at.known(operand).mask)
        shape = list(value.shape)
        shape[axis] = at.shape(operand)[axis]
        pieces.append((np.broadcast_to(value, shape), np.broadcast_to(mask, shape)))
    sizes = np.max([[v.shape[i] for i in range(v.ndim)] for v, _ in pieces], axis=0)

    def spread(array: Array) -> Array:
        return np.broadcast_to(array, [array.shape[i] if i == axis else n for i, n in enumerate(sizes)])

    return [Known(*(np.concatenate([spread(p[k]) for p in pieces], axis=axis) for k in (0, 1)))]


@law("Split")
def split(at: Site) -> Found:
    """Consecutive pieces."""
    known = at.known(0)
    axis = at.attr("axis", 0) % known.value.ndim
    value, mask = np.broadcast_arrays(known.value, known.mask)
    if value.shape[axis] == 1:
        return [known] * len(at.node.outputs)
    if not all(at.node.outputs):
        return None
    ends = np.cumsum([at.out_shape(i)[axis] for i in range(len(at.node.outputs))])[:-1]
    return [Known(v, m) for v, m in zip(np.split(value, ends, axis), np.split(mask, ends, axis), strict=True)]


@law("Slice", "Tile", "Pad", "DepthToSpace", "SpaceToDepth")
def moved(at: Site) -> Found:
    """Elements that the operator copies to other places, or that it pads with a constant."""
    known = at.known(0)
    given = range(1, len(at.node.inputs))
    controls = [at.static(i) if at.has(i) else None for i in given]
    if not known.mask.any() or any(at.has(i) and c is None for i, c in zip(given, controls, strict=True)):
        return [uniform(known, range(known.value.ndim))] if at.node.op == "Slice" else None
    # The operator moves the values, and the marks of what is not known.
    full = at.full(0, known)
    values = at.evaluate([np.where(full.mask, full.value, 1).astype(full.value.dtype), *controls])
    blanks = [np.zeros_like(c, np.float32) if c is not None and c.dtype.kind == "f" else c for c in controls]
    unknown = at.evaluate([(~full.mask).astype(np.float32), *blanks])
    return None if values is None or unknown is None else [Known(values[0], unknown[0] == 0)]


@law("Expand")
def expanded(at: Site) -> Found:
    """Axes before the first, and axes of one index, stretch."""
    known = at.known(0)
    value, mask = np.broadcast_arrays(known.value, known.mask)
    before = (1,) * (len(at.out_shape()) - value.ndim)
    return [Known(value.reshape(before + value.shape), mask.reshape(before + mask.shape))]


@law("ConstantOfShape")
def filled(at: Site) -> Found:
    """One value everywhere, however many there are."""
    given = at.attr("value")
    value = np.zeros(1, np.float32) if given is None else tensor_array(given)
    return [constant(value.reshape((1,) * len(at.out_shape())))]


@law("Gather")
def picked(at: Site) -> Found:
    """Picked indices of an axis; where the picks follow the input, what is alike along the axis (an embedding)."""
    known, picks = at.known(0), at.static(1)
    if not known.mask.any():
        return None
    axis, rank = at.attr("axis", 0) % known.value.ndim, len(at.shape(1))
    value, mask = np.broadcast_arrays(known.value, known.mask)
    if value.shape[axis] > 1 and picks is not None:
        return [Known(value.take(picks, axis), mask.take(picks, axis))]
    same = uniform(known, [axis])
    shape = same.mask.shape[:axis] + (1,) * rank + same.mask.shape[axis + 1 :]
    return [Known(same.value.reshape(shape), same.mask.reshape(shape))]


# -- places and statistics --------------------------------------------------------------------------------------------


@law(*operators(Trait.POOLING, Trait.MEAN))
def pooled(at: Site) -> Found:
    """What is the same at all places stays what it is; padding counts in a mean only where it is asked for."""
    same = uniform(at.known(0), range(2, at.known(0).value.ndim))
    counted = at.attr("count_include_pad", 0) and (_padded(at) or at.attr("ceil_mode", 0))
    return [same.only(same.value == 0) if counted else same]


@law("Resize", "Upsample")
def resized(at: Site) -> Found:
    """Places between places that are the same."""
    if at.attr("coordinate_transformation_mode") == "tf_crop_and_resize" or at.shape(0)[:2] != at.out_shape()[:2]:
        return None
    return [uniform(at.known(0), range(2, at.known(0).value.ndim))]


@law(*operators(Trait.STATISTIC, Trait.MEAN), *_SUMS)
def reduced(at: Site) -> Found:
    """A statistic of equal values is that value; a sum of zeros is zero."""
    known = at.known(0)
    rank = known.value.ndim
    given = at.static(1) if at.has(1) else at.attr("axes")
    if (at.has(1) and given is None) or at.node.op == "ReduceLogSum":
        return None
    if given is None or not len(np.ravel(given)):
        if at.attr("noop_with_empty_axes", 0):
            return None
        given = range(rank)
    gone = {int(a) % rank for a in np.ravel(given)}
    same = uniform(known, gone)
    if at.node.op in _SUMS:
        same = same.only(same.value == 0)
    if at.attr("keepdims", 1):
        return [same]
    left = [n for i, n in enumerate(same.mask.shape) if i not in gone]
    return [Known(same.value.reshape(left), same.mask.reshape(left))]
