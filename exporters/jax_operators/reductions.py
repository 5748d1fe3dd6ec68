"""Reductions along axes, sums along them, and picks of the largest."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spa.exporters.jax_operators import Array, Call, operator, positive

PLAIN = {
    "ReduceMax": "max",
    "ReduceMean": "mean",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceSum": "sum",
}


@operator(*PLAIN, static=[1])
def plain(call: Call, x: Array, axes: Array | None = None) -> Array:
    """Call the function that numpy has."""
    return _reduced(call, x, axes, getattr(call.xp, PLAIN[call.node.op]))


@operator("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", static=[1])
def composed(call: Call, x: Array, axes: Array | None = None) -> Array:
    """Sum a function of the elements, and return a function of the sum."""
    if call.attr("noop_with_empty_axes", 0) and not call.ints("axes", axes):
        return _noop(call, x)
    if call.node.op == "ReduceLogSumExp":
        return _reduced(call, x, axes, jax.scipy.special.logsumexp)
    before = {"ReduceL1": call.xp.abs, "ReduceLogSum": lambda v: v}.get(call.node.op, call.xp.square)
    after = {"ReduceL2": call.xp.sqrt, "ReduceLogSum": call.xp.log}.get(call.node.op, lambda v: v)
    return after(_reduced(call, before(x), axes, call.xp.sum)).astype(x.dtype)


def _noop(call: Call, x: Array) -> Array:
    """Return what remains of a reduction over no axes: the elements' own function."""
    functions = {"ReduceL1": call.xp.abs, "ReduceL2": call.xp.abs, "ReduceSumSquare": call.xp.square}
    return functions.get(call.node.op, call.xp.log if call.node.op == "ReduceLogSum" else lambda v: v)(x)


def _reduced(call: Call, x: Array, axes: Array | None, function: Callable[..., Array]) -> Array:
    over = call.ints("axes", axes)
    if not over and call.attr("noop_with_empty_axes", 0):
        return x
    reduced = function(x, axis=tuple(over) if over else None, keepdims=bool(call.attr("keepdims", 1)))
    return reduced.astype(x.dtype)


@operator("ArgMax", "ArgMin")
def arg_extreme(call: Call, x: Array) -> Array:
    """Return the first place of the extreme, or the last."""
    axis, last = call.attr("axis", 0), bool(call.attr("select_last_index", 0))
    function = call.xp.argmax if call.node.op == "ArgMax" else call.xp.argmin
    found = function(call.xp.flip(x, axis) if last else x, axis=axis, keepdims=bool(call.attr("keepdims", 1)))
    return x.shape[axis] - 1 - found if last else found


@operator("TopK", static=[1])
def top_k(call: Call, x: Array, k: Array | None = None) -> tuple[Array, Array]:
    """Return the largest or smallest, in order, and their places."""
    count = int(call.attr("k") if k is None else call.known(k, "the number").ravel()[0])
    axis = positive(call.attr("axis", -1), x.ndim)
    order = jnp.argsort(jnp.asarray(x), axis, descending=bool(call.attr("largest", 1)), stable=True)
    places = jax.lax.slice_in_dim(order, 0, count, axis=axis)
    return jnp.take_along_axis(jnp.asarray(x), places, axis), places


@operator("CumSum", "CumProd", static=[1])
def cumulative(call: Call, x: Array, axis: Array) -> Array:
    """Sum or multiply up to each element, with it or without, from either end."""
    along = int(call.known(axis, "the axis").ravel()[0])
    product = call.node.op == "CumProd"
    x = call.xp.flip(x, along) if call.attr("reverse", 0) else x
    if call.attr("exclusive", 0):
        neutral = call.xp.full_like(call.xp.take(x, np.asarray([0]), axis=along), 1 if product else 0)
        rest = call.xp.take(x, np.arange(x.shape[along] - 1), axis=along)
        x = call.xp.concatenate([neutral, rest], along)
    total = (call.xp.cumprod if product else call.xp.cumsum)(x, axis=along).astype(x.dtype)
    return call.xp.flip(total, along) if call.attr("reverse", 0) else total
