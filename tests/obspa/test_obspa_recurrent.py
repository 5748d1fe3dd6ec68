"""Recurrent cells as readers, against brute force and where the answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa.readers.recurrent import recurrent_cell
from spa.obspa.refit import reconstruct
from spa.running.stream import Stream
from spa.surgery.apply import apply
from tests.obspa.test_obspa import group, network, outputs
from tests.obspa.test_obspa_readers import PARTNER, check_reader, producer

Array = np.ndarray


def cell_network(op: str, rng: np.random.Generator, **attributes: object) -> ModelProto:
    """x [s b 5] -> seven channels -> Relu -> a cell of six units -> Y, or Y_h, and a product behind it."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    directions = 1 + (attributes.get("direction") == "bidirectional")
    hidden, bias, last = 6, attributes.pop("bias"), attributes.pop("last")
    w = 0.5 * rng.standard_normal((directions, gates, hidden, 7))
    r = 0.4 * rng.standard_normal((directions, gates, hidden, hidden))
    b = 0.3 * rng.standard_normal((directions, 2, gates, hidden))
    for of in (w, r):  # unit 4 does what unit 2 does
        of[:, :, 4] = of[:, :, PARTNER]
    b[..., 4] = b[..., PARTNER]
    weights = {
        "a": producer(rng, 7, 5, 5).T,
        "w": w.reshape(directions, gates * hidden, 7),
        "r": r.reshape(directions, gates * hidden, hidden),
        "b": b.reshape(directions, -1),
        "o": rng.standard_normal((hidden, 4)),
    }
    layout = bool(attributes.get("layout"))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["u"]),
        helper.make_node(
            op,
            ["u", "w", "r", *(["b"] if bias else [])],
            ["", "z"] if last else ["z"],
            hidden_size=hidden,
            **attributes,
        ),
        helper.make_node("MatMul", ["z", "o"], ["y"]),
    ]
    if not bias:
        del weights["b"]
    shape: list[object] = ["b", 9, 5] if layout else [9, "b", 5]
    return network(nodes, weights, shape, 3 if last else 4)


CELLS = [
    ("RNN", {"bias": True, "last": False}),
    ("LSTM", {"bias": True, "last": False}),
    ("LSTM", {"bias": False, "last": True, "direction": "bidirectional"}),
    ("GRU", {"bias": True, "last": False, "direction": "reverse"}),
    ("GRU", {"bias": False, "last": True, "linear_before_reset": 1}),
]


@pytest.mark.parametrize(("op", "attributes"), CELLS)
@pytest.mark.parametrize(("name", "gone", "size"), [("a[", 5, 7), ("w[", 4, 6)], ids=["input", "state"])
def test_a_cell_is_scored_and_refitted(op: str, attributes: dict[str, object], name: str, gone: int, size: int) -> None:
    rng = np.random.default_rng(9)
    model = cell_network(op, rng, **dict(attributes))
    first = bool(attributes.get("layout"))
    x = rng.standard_normal((60, 9, 5) if first else (9, 60, 5)).astype(np.float32)
    check_reader(model, name, gone, size, x, batch_axis=0 if first else 1)


def test_the_rows_of_a_cell_make_its_next_states() -> None:
    rng = np.random.default_rng(11)
    weights = {
        "w": rng.standard_normal((2, 4, 3)),
        "r": rng.standard_normal((2, 4, 4)),
        "h": rng.standard_normal((2, 5, 4)),
    }
    node = helper.make_node("RNN", ["x", "w", "r", "", "", "h"], ["y"], hidden_size=4, direction="bidirectional")
    model = network([node], weights, [7, 5, 3], 4)
    x = rng.standard_normal((7, 5, 3)).astype(np.float32)
    y = outputs(model, x)
    graph = Graph(model)
    cell = recurrent_cell(graph, graph.nodes[0])
    assert cell is not None
    w, r, h = (graph.array(n) for n in "wrh")
    states = cell.states(y, h)
    sums = cell.inputs(x) @ w.swapaxes(1, 2) + states @ r.swapaxes(1, 2)
    expected = y.transpose(1, 0, 2, 3).reshape(2, -1, 4)
    np.testing.assert_allclose(np.tanh(sums), expected, atol=1e-5)
    other = replace(cell, batch_first=True)  # onnxruntime has no such kernel
    np.testing.assert_array_equal(other.inputs(x.swapaxes(0, 1)), cell.inputs(x))
    np.testing.assert_array_equal(other.states(y.transpose(2, 0, 1, 3), h.swapaxes(0, 1)), states)


def test_edits_of_a_cell_are_repeated_on_another_model() -> None:
    rng = np.random.default_rng(21)
    model = cell_network("LSTM", rng, bias=False, last=True)
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, "w["): np.array([0, 2, 3, 5])})
    x = rng.standard_normal((9, 30, 5)).astype(np.float32)
    first, second = apply(analysis, plan), apply(analysis, plan)
    learnt = reconstruct(analysis, plan, first, [{"x": x}])
    assert learnt.biases
    Stream(second, None, ()).repeat(learnt)
    np.testing.assert_allclose(outputs(second, x), outputs(first, x), atol=1e-5)
