"""The oracle for recurrent cells: the input's and the hidden dimension of every cell, in every direction."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from tests.oracle import Data, check, freedom, weight, wrap

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 7, 11


def cell(op: str, direction: str = "forward", bias: bool = True, states: bool = False) -> ModelProto:
    gates, ways = GATES[op], 2 if direction == "bidirectional" else 1
    operands: list[object] = [
        Data(STEPS, BATCH, WIDTH),
        weight(ways, gates * HIDDEN, WIDTH),
        weight(ways, gates * HIDDEN, HIDDEN, seed=1),
        weight(ways, 2 * gates * HIDDEN) if bias else None,
    ]
    if states:
        operands += [np.asarray([5, 3], np.int32), weight(ways, BATCH, HIDDEN, seed=2)]
        if op == "LSTM":
            operands += [weight(ways, BATCH, HIDDEN, seed=3), weight(ways, 3 * HIDDEN, seed=4)]
    return wrap(op, *operands, hidden_size=HIDDEN, direction=direction)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("states", [False, True], ids=["plain", "states"])
def test_input_and_hidden_channels_go_exactly(op: str, direction: str, states: bool) -> None:
    model = cell(op, direction, states=states)
    free = freedom(model)
    assert free["X0"].split()[2] == str(WIDTH)
    assert free["Y0"].split()[-1] == str(HIDDEN)
    sizes = {g.size for g in check(model).groups}
    assert {WIDTH, HIDDEN} <= sizes


@pytest.mark.parametrize("op", GATES)
def test_a_cell_without_bias_is_pruned_too(op: str) -> None:
    assert HIDDEN in {g.size for g in check(cell(op, bias=False)).groups}


@pytest.mark.parametrize("op", GATES)
def test_hidden_size_follows_the_weights(op: str) -> None:
    checked = check(cell(op, "bidirectional"))
    node = next(n for n in checked.pruned.graph.node if n.op_type == op)
    weights = {t.name: tuple(t.dims) for t in checked.pruned.graph.initializer}
    hidden = next(a.i for a in node.attribute if a.name == "hidden_size")
    assert hidden < HIDDEN
    assert weights[node.input[2]] == (2, GATES[op] * hidden, hidden)
