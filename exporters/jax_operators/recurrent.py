"""RNN, GRU and LSTM as scans over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa.exporters.jax_operators import Array, Call, operator
from spa.exporters.operands import Recurrent
from spa.model.graph import Node

Function = Callable[[Array], Array]


def _function(name: str, alpha: float | None, beta: float | None) -> Function:
    """Return an activation by ONNX's name, which is not case sensitive."""
    a, b = {"leakyrelu": (0.01, 0), "hardsigmoid": (0.2, 0.5), "elu": (1, 0)}.get(name.lower(), (1, 0))
    a, b = a if alpha is None else alpha, b if beta is None else beta
    return {
        "tanh": jnp.tanh,
        "sigmoid": jax.nn.sigmoid,
        "relu": jax.nn.relu,
        "affine": lambda x: a * x + b,
        "leakyrelu": lambda x: jax.nn.leaky_relu(x, a),
        "thresholdedrelu": lambda x: jnp.where(x > a, x, 0),
        "scaledtanh": lambda x: a * jnp.tanh(b * x),
        "hardsigmoid": lambda x: jnp.clip(a * x + b, 0, 1),
        "elu": lambda x: jax.nn.elu(x, a),
        "softsign": jax.nn.soft_sign,
        "softplus": jax.nn.softplus,
    }[name.lower()]


def _functions(call: Call, defaults: list[str], directions: int) -> list[list[Function]]:
    """Return the activations of each direction."""
    names = call.attr("activations") or defaults * directions
    alphas, betas = list(call.attr("activation_alpha", [])), list(call.attr("activation_beta", []))
    functions = []
    for name in names:
        takes_alpha = name.lower() not in ("tanh", "sigmoid", "relu", "softsign", "softplus")
        takes_beta = name.lower() in ("affine", "scaledtanh", "hardsigmoid")
        alpha = alphas.pop(0) if alphas and takes_alpha else None
        beta = betas.pop(0) if betas and takes_beta else None
        functions.append(_function(name, alpha, beta))
    per = len(defaults)
    return [functions[i * per : (i + 1) * per] for i in range(directions)]


def _recurrent(
    call: Call, layer: Recurrent, defaults: list[str], step: Callable[..., tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Run all directions of a recurrent layer with g gates.

    Args:
        call: the node.
        layer: its operands.
        defaults: the activations of one direction.
        step: from (functions, states, x W + biases [b (g h)], R, the recurrent bias, peepholes) to new states.

    Returns:
        Y [t d b h] of the first state, and the last of each state [d b h].
    """
    x, w, r, lengths = jnp.asarray(layer.x), layer.w, layer.r, layer.sequence_lens
    states = [layer.initial_h, layer.initial_c] if call.node.op == "LSTM" else [layer.initial_h]
    batch_first = bool(call.attr("layout", 0))
    if batch_first:
        x = x.swapaxes(0, 1)
        states = [None if s is None else s.swapaxes(0, 1) for s in states]
    directions, rows, hidden = w.shape[0], w.shape[1], r.shape[-1]
    functions = _functions(call, defaults, directions)
    bias = jnp.zeros((directions, 2 * rows), x.dtype) if layer.b is None else layer.b
    zeros = jnp.zeros((directions, x.shape[1], hidden), x.dtype)
    start = [zeros if s is None else jnp.asarray(s) for s in states]
    outputs, lasts = [], []
    for d in range(directions):
        backward = call.attr("direction", "forward") == "reverse" or d == 1
        w_bias, r_bias = bias[d, :rows], bias[d, rows:]
        entering = jnp.einsum("tbi,gi->tbg", x, w[d]) + w_bias
        times = np.arange(x.shape[0])
        p = None if layer.p is None else layer.p[d]

        def body(carry: Any, item: Any, d: int = d, p: Any = p, r_bias: Any = r_bias) -> Any:
            now, time = item
            new = step(functions[d], carry, now, r[d], r_bias, p)
            if lengths is None:
                return new, new[0]
            alive = (time < lengths)[:, None]
            kept = tuple(jnp.where(alive, a, b) for a, b in zip(new, carry, strict=True))
            return kept, jnp.where(alive, new[0], 0)

        last, seen = jax.lax.scan(body, tuple(s[d] for s in start), (entering, times), reverse=backward)
        outputs.append(seen)
        lasts.append(last)
    y = jnp.stack(outputs, 1)
    finals = [jnp.stack([last[i] for last in lasts]) for i in range(len(start))]
    if batch_first:
        return (y.transpose(2, 0, 1, 3), *(f.swapaxes(0, 1) for f in finals))
    return (y, *finals)


def _clipped(call: Call, x: Array) -> Array:
    limit = call.attr("clip")
    return x if limit is None else jnp.clip(x, -limit, limit)


@operator("RNN")
def rnn(call: Call, *operands: Array | None) -> tuple[Array, ...]:
    """Compute h' = f(W x + R h + b)."""

    def step(f: list[Function], state: Any, now: Array, r: Array, r_bias: Array, p: Any) -> tuple[Array, ...]:
        return (f[0](_clipped(call, now + state[0] @ r.T + r_bias)),)

    return _recurrent(call, Recurrent(*operands), ["Tanh"], step)


@operator("GRU")
def gru(call: Call, *operands: Array | None) -> tuple[Array, ...]:
    """Compute gates z, r, h. With linear_before_reset the reset gate is applied behind the recurrent product."""

    def step(f: list[Function], state: Any, now: Array, r: Array, r_bias: Array, p: Any) -> tuple[Array, ...]:
        (h,) = state
        size = h.shape[-1]
        gates = now[:, : 2 * size] + h @ r[: 2 * size].T + r_bias[: 2 * size]
        update, reset = jnp.split(f[0](_clipped(call, gates)), 2, -1)
        if call.attr("linear_before_reset", 0):
            inner = reset * (h @ r[2 * size :].T + r_bias[2 * size :])
        else:
            inner = (reset * h) @ r[2 * size :].T + r_bias[2 * size :]
        return ((1 - update) * f[1](_clipped(call, now[:, 2 * size :] + inner)) + update * h,)

    return _recurrent(call, Recurrent(*operands), ["Sigmoid", "Tanh"], step)


def _coupled(node: Node) -> str | None:
    return "its input and forget gates are coupled" if node.attributes.get("input_forget") else None


@operator("LSTM", refusal=_coupled)
def lstm(call: Call, *operands: Array | None) -> tuple[Array, ...]:
    """Compute gates i, o, f, c, with peepholes from the cell to i, o and f."""

    def step(f: list[Function], state: Any, now: Array, r: Array, r_bias: Array, p: Any) -> tuple[Array, ...]:
        h, c = state
        into, out, forget, new = jnp.split(now + h @ r.T + r_bias, 4, -1)
        p_in, p_out, p_forget = (0, 0, 0) if p is None else jnp.split(p, 3)
        into, forget = (f[0](_clipped(call, g + q * c)) for g, q in ((into, p_in), (forget, p_forget)))
        c = forget * c + into * f[1](_clipped(call, new))
        return f[0](_clipped(call, out + p_out * c)) * f[2](c), c

    return _recurrent(call, Recurrent(*operands), ["Sigmoid", "Tanh", "Tanh"], step)
