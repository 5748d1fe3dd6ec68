"""Recurrent cells: PyTorch's own where their law is ONNX's, else step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.pytorch.operators import operator
from spa.exporters.pytorch.operators.layout import _reversed
from spa.model.graph import Graph, Node

Activation = Callable[[Tensor], Tensor]
Cell = Callable[..., "tuple[Tensor, Tensor]"]

# ONNX's gates in PyTorch's order: iofc → ifco, zrh → rzh.
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
BY_DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}

# Each takes the values of activation_alpha and activation_beta; None stands for the default.
ACTIVATIONS: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "softsign": lambda x, a, b: F.softsign(x),
    "softplus": lambda x, a, b: F.softplus(x),
    "affine": lambda x, a, b: (1.0 if a is None else a) * x + (0.0 if b is None else b),
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, 0.01 if a is None else a),
    "thresholdedrelu": lambda x, a, b: torch.where(x > (1.0 if a is None else a), x, 0),
    "hardsigmoid": lambda x, a, b: ((0.2 if a is None else a) * x + (0.5 if b is None else b)).clamp(0, 1),
    "elu": lambda x, a, b: F.elu(x, 1.0 if a is None else a),
}


def _activations(node: Node, directions: int) -> list[list[Activation]]:
    """The functions of each direction."""
    names = node.attributes.get("activations") or BY_DEFAULT[node.op] * directions
    alphas = iter(node.attributes.get("activation_alpha", []))
    betas = iter(node.attributes.get("activation_beta", []))
    found = []
    for name in names:
        key = name.lower()
        alpha = next(alphas, None) if key in ("affine", "leakyrelu", "thresholdedrelu", "hardsigmoid", "elu") else None
        beta = next(betas, None) if key in ("affine", "hardsigmoid") else None
        found.append(_bound(key, alpha, beta))
    each = len(found) // directions
    return [found[i * each : (i + 1) * each] for i in range(directions)]


def _bound(key: str, alpha: float | None, beta: float | None) -> Activation:
    return lambda x: ACTIVATIONS[key](x, alpha, beta)


def _unknown(node: Node, graph: Graph) -> str | None:
    names = node.attributes.get("activations", [])
    return next((f"the activation {n!r}" for n in names if n.lower() not in ACTIVATIONS), None)


def _native(node: Node, lengths: Tensor | None, peepholes: Tensor | None) -> str | None:
    """PyTorch's function with the node's law, or None."""
    at = node.attributes
    names = [n.lower() for n in at.get("activations", [])]
    if lengths is not None or peepholes is not None or "clip" in at or at.get("input_forget", 0):
        return None
    if node.op == "RNN" and set(names) == {"relu"}:
        return "rnn_relu"
    if names and names != [n.lower() for n in BY_DEFAULT[node.op]] * (len(names) // len(BY_DEFAULT[node.op])):
        return None
    if node.op == "GRU":
        return "gru" if at.get("linear_before_reset", 0) else None
    return {"LSTM": "lstm", "RNN": "rnn_tanh"}[node.op]


@operator("RNN", "GRU", "LSTM", fixed=(4,), limit=_unknown)
def recurrent(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
) -> Any:
    """X[s b i], W[d (gates h) i], R[d (gates h) h], B[d (2 gates h)] → Y[s d b h], Y_h[d b h], Y_c[d b h].

    ``layout`` 1 puts the batch first everywhere.
    """
    first = bool(node.attributes.get("layout", 0))
    x = x.transpose(0, 1) if first else x
    zeros = x.new_zeros(w.shape[0], x.shape[1], r.shape[2])
    h, c = (zeros if v is None else v.transpose(0, 1) if first else v for v in (h, c))
    name = _native(node, lengths, p)
    if name is not None:
        y, last = _by_torch(node, name, x, w, r, b, h, c)
    else:
        y, last = _by_steps(node, x, w, r, b, lengths, h, c, p)
    if first:
        return y.permute(2, 0, 1, 3), *(v.transpose(0, 1) for v in last)
    return y, *last


def _by_torch(
    node: Node, name: str, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor, c: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    order = ORDER[node.op]
    backwards = node.attributes.get("direction", "forward") == "reverse"
    halves = [None, None] if b is None else b.chunk(2, -1)
    weights = [_reordered(v[d], order) for d in range(w.shape[0]) for v in (w, r, *halves) if v is not None]
    state = (h, c) if node.op == "LSTM" else h
    x = x.flip(0) if backwards else x
    y, *last = getattr(torch, name)(x, state, weights, b is not None, 1, 0.0, False, w.shape[0] == 2, False)
    y = y.reshape(*y.shape[:2], w.shape[0], -1).permute(0, 2, 1, 3)
    return (y.flip(0) if backwards else y), tuple(last)


def _reordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Gates in another order."""
    gates = weight.chunk(len(order), 0)
    return torch.cat([gates[i] for i in order])


def _by_steps(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor,
    p: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    results = []
    for d, functions in enumerate(_activations(node, w.shape[0])):
        backwards = d == 1 or node.attributes.get("direction", "forward") == "reverse"
        biases = (None, None) if b is None else b[d].chunk(2)
        results.append(
            _one_way(
                node, x, w[d], r[d], biases, lengths, h[d], c[d], None if p is None else p[d], functions, backwards
            )
        )
    y, h_last, c_last = (torch.stack(parts) for parts in zip(*results, strict=True))
    return y.transpose(0, 1), (h_last, c_last) if node.op == "LSTM" else (h_last,)


def _one_way(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    biases: Any,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor,
    p: Tensor | None,
    functions: list[Activation],
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps = x.shape[0]
    every = torch.full((x.shape[1],), steps, device=x.device) if lengths is None else lengths.long()
    x = _reversed(x, every) if backwards else x
    given = F.linear(x, w, biases[0])
    clip = node.attributes.get("clip")
    cell = CELLS[node.op]
    outputs = []
    for t in range(steps):
        new_h, new_c = cell(node, given[t], h, c, r, biases[1], p, functions, clip)
        alive = (t < every)[:, None]
        h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
        outputs.append(torch.where(alive, new_h, 0))
    y = torch.stack(outputs)
    return (_reversed(y, every) if backwards else y), h, c


def _clipped(v: Tensor, clip: float | None) -> Tensor:
    return v if clip is None else v.clamp(-clip, clip)


def _lstm(
    node: Node,
    given: Tensor,
    h: Tensor,
    c: Tensor,
    r: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    functions: list[Activation],
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    f, g, out = functions
    i, o, forget, new = (given + F.linear(h, r, bias)).chunk(4, -1)
    pi, po, pf = (0, 0, 0) if p is None else p.chunk(3)
    i = f(_clipped(i + pi * c, clip))
    forget = 1 - i if node.attributes.get("input_forget", 0) else f(_clipped(forget + pf * c, clip))
    c = forget * c + i * g(_clipped(new, clip))
    return f(_clipped(o + po * c, clip)) * out(c), c


def _gru(
    node: Node,
    given: Tensor,
    h: Tensor,
    c: Tensor,
    r: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    functions: list[Activation],
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    f, g = functions
    size = h.shape[-1]
    z, reset, new = given.chunk(3, -1)
    of_h = F.linear(h, r[: 2 * size], None if bias is None else bias[: 2 * size])
    z, reset = f(_clipped(z + of_h[:, :size], clip)), f(_clipped(reset + of_h[:, size:], clip))
    last = None if bias is None else bias[2 * size :]
    if node.attributes.get("linear_before_reset", 0):
        new = new + reset * F.linear(h, r[2 * size :], last)
    else:
        new = new + F.linear(reset * h, r[2 * size :], last)
    return (1 - z) * g(_clipped(new, clip)) + z * h, c


def _rnn(
    node: Node,
    given: Tensor,
    h: Tensor,
    c: Tensor,
    r: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    functions: list[Activation],
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    return functions[0](_clipped(given + F.linear(h, r, bias), clip)), c


CELLS: dict[str, Cell] = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}
