"""Recurrent cells: the hidden dimension is read by the cell itself as well as by what follows it."""

from __future__ import annotations

from spa.algebra.notation import apply
from spa.algebra.op import Op
from spa.rules import rule

CELL = "hidden_size = h; frozen d: runs one direction for each index; frozen s: steps along it"
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule("RNN", "GRU", "LSTM")
def recurrent(op: Op) -> None:
    """Make gates of h units, per direction; R reads the last step's h, and all directions share their units.

    ``layout`` 1 puts the batch first. Spec: https://onnx.ai/onnx/operators/onnx__LSTM.html.
    """
    gates = GATES[op.node.op]
    if op.attr("layout", 0):
        x, state, y = "b s i", "b d h", "b s d h"
    else:
        x, state, y = "s b i", "d b h", "s d b h"
    cell = f", initial_c?[{state}], P?[d (3 h)]" if op.node.op == "LSTM" else ""
    last = f", Y_c[{state}]" if op.node.op == "LSTM" else ""
    apply(
        op,
        f"X[{x}], W[d ({gates} h) i], R[d ({gates} h) h!], B?[d ({2 * gates} h)], sequence_lens?[b], "
        f"initial_h?[{state}]{cell} -> Y[{y}], Y_h[{state}]{last}; {CELL}; "
        f"macs = s b d {gates} h i + s b d {gates} h h",
    )
