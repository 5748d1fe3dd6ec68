"""Recurrent cells: the hidden dimension is read by the cell itself as well as by what follows it."""

from __future__ import annotations

from spa.algebra.notation import apply
from spa.algebra.op import Op
from spa.rules import rule

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule("RNN", "GRU", "LSTM")
def recurrent(op: Op) -> None:
    """Gates of h units, per direction; R reads the last step's h. All directions share their units.

    Spec: https://onnx.ai/onnx/operators/onnx__LSTM.html and its siblings; ``layout`` 1 puts the batch first.
    """
    gates = GATES[op.node.op]
    if op.attr("layout", 0):
        x, state, y = "b s i", "b d h", "b s d h"
    else:
        x, state, y = "s b i", "d b h", "s d b h"
    cell = f", initial_c?[{state}], P?[d (3 h)]" if op.node.op == "LSTM" else ""
    last = f", Y_c[{state}]" if op.node.op == "LSTM" else ""
    line = (
        f"X[{x}], W[d ({gates} h) i], R[d ({gates} h) h!], B?[d ({2 * gates} h)], sequence_lens?[b], "
        f"initial_h?[{state}]{cell} -> Y[{y}], Y_h[{state}]{last}"
    )
    letters = apply(op, line)
    op.freeze(letters["d"], "a direction of")
    op.freeze(letters["s"], "a step of")
    if "hidden_size" in op.node.attributes:
        op.tie_attribute("hidden_size", letters["h"])
    for read in ("i", "h"):
        op.count_macs(letters["s"], letters["b"], letters["d"], op.dim(gates), letters["h"], letters[read])
