"""Recurrent cells: PyTorch's own where their law is ONNX's, else step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.operands import Recurrent
from spa.exporters.pytorch.operators import operator
from spa.exporters.pytorch.operators.layout import reversed_steps
from spa.model.graph import Graph, Node

Activation = Callable[[Tensor], Tensor]

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
    """Return the functions of each direction."""
    names = node.attributes.get("activations") or BY_DEFAULT[node.op] * directions
    alphas = iter(node.attributes.get("activation_alpha", []))
    betas = iter(node.attributes.get("activation_beta", []))
    functions = []
    for name in names:
        key = name.lower()
        alpha = next(alphas, None) if key in ("affine", "leakyrelu", "thresholdedrelu", "hardsigmoid", "elu") else None
        beta = next(betas, None) if key in ("affine", "hardsigmoid") else None
        functions.append(_bound(key, alpha, beta))
    each = len(functions) // directions
    return [functions[i * each : (i + 1) * each] for i in range(directions)]


def _bound(key: str, alpha: float | None, beta: float | None) -> Activation:
    return lambda x: ACTIVATIONS[key](x, alpha, beta)


def _unknown(node: Node, graph: Graph) -> str | None:
    names = node.attributes.get("activations", [])
    return next((f"the activation {n!r}" for n in names if n.lower() not in ACTIVATIONS), None)


def _native(node: Node, o: Recurrent) -> str | None:
    """Return PyTorch's function with the node's law, or None."""
    at = node.attributes
    names = [n.lower() for n in at.get("activations", [])]
    if o.sequence_lens is not None or o.p is not None or "clip" in at or at.get("input_forget", 0):
        return None
    if node.op == "RNN" and set(names) == {"relu"}:
        return "rnn_relu"
    if names and names != [n.lower() for n in BY_DEFAULT[node.op]] * (len(names) // len(BY_DEFAULT[node.op])):
        return None
    if node.op == "GRU":
        return "gru" if at.get("linear_before_reset", 0) else None
    return {"LSTM": "lstm", "RNN": "rnn_tanh"}[node.op]


@operator("RNN", "GRU", "LSTM", fixed=(4,), limit=_unknown)
def recurrent(node: Node, *operands: Tensor | None) -> Any:
    """Return Y[t d b h], Y_h[d b h] and Y_c[d b h]; ``layout`` 1 puts the batch first everywhere."""
    o, batch_first = Recurrent(*operands), bool(node.attributes.get("layout", 0))
    x = o.x.transpose(0, 1) if batch_first else o.x
    zeros = x.new_zeros(o.w.shape[0], x.shape[1], o.r.shape[2])
    states = (o.initial_h, o.initial_c)
    h, c = (zeros if s is None else s.transpose(0, 1) if batch_first else s for s in states)
    o = o._replace(x=x, initial_h=h, initial_c=c)
    name = _native(node, o)
    y, last = _by_steps(node, o) if name is None else _by_torch(node, name, o)
    if batch_first:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return y, *last


def _by_torch(node: Node, name: str, o: Recurrent) -> tuple[Tensor, tuple[Tensor, ...]]:
    order, directions = ORDER[node.op], o.w.shape[0]
    backwards = node.attributes.get("direction", "forward") == "reverse"
    halves = [None, None] if o.b is None else o.b.chunk(2, -1)
    weights = [_reordered(v[d], order) for d in range(directions) for v in (o.w, o.r, *halves) if v is not None]
    state = (o.initial_h, o.initial_c) if node.op == "LSTM" else o.initial_h
    x = o.x.flip(0) if backwards else o.x
    y, *last = getattr(torch, name)(x, state, weights, o.b is not None, 1, 0.0, False, directions == 2, False)
    y = y.reshape(*y.shape[:2], directions, -1).permute(0, 2, 1, 3)
    return (y.flip(0) if backwards else y), tuple(last)


def _reordered(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return gates in another order."""
    gates = weight.chunk(len(order), 0)
    return torch.cat([gates[i] for i in order])


# -- step by step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One direction of a recurrent layer with g gates.

    Attributes:
        node: the layer.
        w: [(g h) i].
        r: [(g h) h].
        w_bias: [(g h)], or None.
        r_bias: [(g h)], or None.
        peepholes: [(3 h)], or None.
        functions: the activations.
        backwards: whether it reads the last step first.
    """

    node: Node
    w: Tensor
    r: Tensor
    w_bias: Tensor | None
    r_bias: Tensor | None
    peepholes: Tensor | None
    functions: list[Activation]
    backwards: bool

    def clipped(self, v: Tensor) -> Tensor:
        """Return what enters an activation, within ``clip``."""
        clip = self.node.attributes.get("clip")
        return v if clip is None else v.clamp(-clip, clip)


def _by_steps(node: Node, o: Recurrent) -> tuple[Tensor, tuple[Tensor, ...]]:
    reverse, results = node.attributes.get("direction", "forward") == "reverse", []
    for d, functions in enumerate(_activations(node, o.w.shape[0])):
        w_bias, r_bias = (None, None) if o.b is None else o.b[d].chunk(2)
        peepholes = None if o.p is None else o.p[d]
        cell = _Cell(node, o.w[d], o.r[d], w_bias, r_bias, peepholes, functions, backwards=d == 1 or reverse)
        results.append(_one_way(cell, o.x, o.sequence_lens, o.initial_h[d], o.initial_c[d]))
    y, h_last, c_last = (torch.stack(parts) for parts in zip(*results, strict=True))
    return y.transpose(0, 1), (h_last, c_last) if node.op == "LSTM" else (h_last,)


def _one_way(cell: _Cell, x: Tensor, lengths: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs [t b h] of one direction and its last states [b h]."""
    steps = x.shape[0]
    every = torch.full((x.shape[1],), steps, device=x.device) if lengths is None else lengths.long()
    x = reversed_steps(x, every) if cell.backwards else x
    entering = F.linear(x, cell.w, cell.w_bias)
    step, outputs = STEPS[cell.node.op], []
    for t in range(steps):
        new_h, new_c = step(cell, entering[t], h, c)
        alive = (t < every)[:, None]
        h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
        outputs.append(torch.where(alive, new_h, 0))
    y = torch.stack(outputs)
    return (reversed_steps(y, every) if cell.backwards else y), h, c


def _lstm(cell: _Cell, entering: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, out = cell.functions
    i, o, forget, new = (entering + F.linear(h, cell.r, cell.r_bias)).chunk(4, -1)
    p_i, p_o, p_f = (0, 0, 0) if cell.peepholes is None else cell.peepholes.chunk(3)
    i = f(cell.clipped(i + p_i * c))
    forget = 1 - i if cell.node.attributes.get("input_forget", 0) else f(cell.clipped(forget + p_f * c))
    c = forget * c + i * g(cell.clipped(new))
    return f(cell.clipped(o + p_o * c)) * out(c), c


def _gru(cell: _Cell, entering: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g = cell.functions
    size, r, bias = h.shape[-1], cell.r, cell.r_bias
    z, reset, new = entering.chunk(3, -1)
    of_h = F.linear(h, r[: 2 * size], None if bias is None else bias[: 2 * size])
    z, reset = f(cell.clipped(z + of_h[:, :size])), f(cell.clipped(reset + of_h[:, size:]))
    last = None if bias is None else bias[2 * size :]
    if cell.node.attributes.get("linear_before_reset", 0):
        new = new + reset * F.linear(h, r[2 * size :], last)
    else:
        new = new + F.linear(reset * h, r[2 * size :], last)
    return (1 - z) * g(cell.clipped(new)) + z * h, c


def _rnn(cell: _Cell, entering: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return cell.functions[0](cell.clipped(entering + F.linear(h, cell.r, cell.r_bias))), c


STEPS: dict[str, Callable[[_Cell, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN": _rnn,
}
