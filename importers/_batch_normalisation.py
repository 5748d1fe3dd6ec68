"""Batch normalisation in TensorFlow's graphs: one operator again.

``tf.nn.batch_normalization``, and so Keras 3 (in SavedModels, too), writes it as arithmetic of its variables,

    y = x * m + (beta - mean * m)    with    m = gamma * rsqrt(variance + epsilon),

which TensorFlow and tf2onnx compute beforehand, into one factor and one summand, or into a convolution before it. Here
it becomes ``FusedBatchNormV3``. Without gamma, m is the root alone; without beta, the summand is ``-mean * m``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Normalisation:
    """The operands of one normalisation: tensors; gamma and beta may be missing."""

    x: Any
    axis: int
    mean: Any
    variance: Any
    gamma: Any
    beta: Any
    epsilon: float


def join_batch_normalisations(graph: Any, weights: Collection[str]) -> dict[str, str]:
    """Replace the arithmetic of batch normalisations over weights by one operator each, in place.

    Args:
        graph: a ``tf.Graph``.
        weights: names of its operators that give a weight.

    Returns:
        For tensors that are replaced the name of what has their value now.
    """
    replaced = {}
    for op in graph.get_operations():
        normalisation = _normalisation(op, weights)
        if normalisation is not None:
            old = op.outputs[0]
            readers = old.consumers()
            new = _operator(normalisation)
            for reader in readers:
                for i, tensor in enumerate(reader.inputs):
                    if tensor is old:
                        reader._update_input(i, new)
            replaced[old.name] = new.name
    return replaced


# -- finding ---------------------------------------------------------------------------------------------------------


def _normalisation(op: Any, weights: Collection[str]) -> _Normalisation | None:
    """Find the normalisation whose last addition this is, if all of its parameters are weights of one axis."""
    for product, shift in _operands(op, "Add", "AddV2"):
        for beta, mean, factor in _shifts(shift):
            for x, other in _operands(product.op, "Mul"):
                scale = _scale(factor) if source_of(other) is source_of(factor) else None
                if scale is not None:
                    normalisation = _checked(x, mean, *scale, beta, weights)
                    if normalisation is not None:
                        return normalisation
    return None


def _shifts(tensor: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield beta, mean and factor of ``beta - mean * factor`` or ``-mean * factor``, in each order that is possible."""
    op = source_of(tensor).op
    if op.type == "Sub":
        for mean, factor in _operands(op.inputs[1].op, "Mul"):
            yield op.inputs[0], mean, factor
    for negative, factor in _operands(op, "Mul"):
        if source_of(negative).op.type == "Neg":
            yield None, source_of(negative).op.inputs[0], factor


def _scale(factor: Any) -> tuple[Any, Any, float] | None:
    """Return variance, gamma and epsilon of ``gamma * rsqrt(variance + epsilon)``."""
    op, gamma = source_of(factor).op, None
    for root, other in _operands(op, "Mul"):
        if source_of(root).op.type == "Rsqrt":
            op, gamma = source_of(root).op, other
    if op.type != "Rsqrt":
        return None
    for variance, constant in _operands(source_of(op.inputs[0]).op, "Add", "AddV2"):
        epsilon = _constant(constant)
        if epsilon is not None and epsilon.ndim == 0:
            return variance, gamma, float(epsilon)
    return None


def _checked(
    x: Any, mean: Any, variance: Any, gamma: Any, epsilon: float, beta: Any, weights: Collection[str]
) -> _Normalisation | None:
    """Return the normalisation, if each parameter is a weight of float32 that lies along the same axis of x."""
    parameters = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    if x.dtype.name != "float32" or x.shape.rank is None or not 2 <= x.shape.rank <= 5 or epsilon <= 0:
        return None
    axes = {_axis(t, x.shape.rank) for t in parameters.values() if t is not None}
    weight_of = {name: None if t is None else _weight(t, weights) for name, t in parameters.items()}
    axis = axes.pop()
    if axes or axis is None or any(weight_of[n] is None for n, t in parameters.items() if t is not None):
        return None
    if any(w is not None and tuple(w.shape) != (x.shape[axis],) for w in weight_of.values()):
        return None
    return _Normalisation(x, axis, epsilon=epsilon, **weight_of)


def _axis(tensor: Any, rank: int) -> int | None:
    """Return the axis of a tensor of that rank along which a parameter lies when it is broadcast."""
    sizes = tensor.shape.as_list() if tensor.shape.rank else []
    long = [i for i, n in enumerate(sizes) if n != 1]
    if len(sizes) == 1:
        return rank - 1
    return long[0] if len(sizes) == rank and len(long) == 1 else None


def _weight(tensor: Any, weights: Collection[str]) -> Any:
    """Return the weight of rank 1 that a tensor is, or has been made from by a Reshape."""
    tensor = source_of(tensor)
    if tensor.op.type == "Reshape" and _constant(tensor.op.inputs[1]) is not None:
        tensor = source_of(tensor.op.inputs[0])
    return tensor if tensor.op.name in weights and tensor.shape.rank == 1 else None


def _operands(op: Any, *types: str) -> Iterator[tuple[Any, Any]]:
    """Yield the two operands of a commutative operator, in both orders; nothing of other operators."""
    if op.type in types:
        a, b = op.inputs
        yield a, b
        yield b, a


def source_of(tensor: Any) -> Any:
    """Return the tensor that reaches another through nodes ``Identity`` alone."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _constant(tensor: Any) -> np.ndarray | None:
    import tensorflow as tf

    op = source_of(tensor).op
    return tf.make_ndarray(op.get_attr("value")) if op.type == "Const" else None


# -- replacing -------------------------------------------------------------------------------------------------------


def _operator(normalisation: _Normalisation) -> Any:
    """Write the normalisation as the operator, which takes channels last and rank 4 or 5."""
    import tensorflow as tf

    rank = normalisation.x.shape.rank
    last = [*(a for a in range(rank) if a != normalisation.axis), normalisation.axis]
    moved = last != sorted(last)
    y = tf.transpose(normalisation.x, last) if moved else normalisation.x
    for _ in range(4 - rank):
        y = tf.expand_dims(y, 1)
    y = tf.raw_ops.FusedBatchNormV3(
        x=y,
        scale=tf.ones(normalisation.mean.shape) if normalisation.gamma is None else normalisation.gamma,
        offset=tf.zeros(normalisation.mean.shape) if normalisation.beta is None else normalisation.beta,
        mean=normalisation.mean,
        variance=normalisation.variance,
        epsilon=normalisation.epsilon,
        is_training=False,
        data_format="NDHWC" if rank == 5 else "NHWC",
    ).y
    for _ in range(4 - rank):
        y = tf.squeeze(y, 1)
    return tf.transpose(y, np.argsort(last)) if moved else y
