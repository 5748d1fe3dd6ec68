"""Reductions and pooling: every rule and axis against the masked original.

How to read an expectation: see tests/oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.rules.reductions import STATISTICS, SUMS
from tests.oracle import Data, Net, verify, wrap

Cases = dict[str, tuple[str, Callable[[], ModelProto]]]


def scalar(value: int) -> np.ndarray:
    return np.asarray(value)


def floats(*values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


CASES: Cases = {
    "ReduceSum op13": ("2 5 7 | 2 1 7", lambda: wrap("ReduceSum", Data(2, 5, 7), [1], opset=13)),
    "argmax": ("2 5! 7 | 2 1 7", lambda: wrap("ArgMax", Data(2, 5, 7), axis=1, cast=True)),
    "argmin": ("2 5 7! | 2 5", lambda: wrap("ArgMin", Data(2, 5, 7), axis=-1, keepdims=0, cast=True)),
    "argmax op7": ("2 5! 7 | 2 1 7", lambda: wrap("ArgMax", Data(2, 5, 7), axis=1, cast=True, opset=7)),
    "topk": ("2 5! 7 | 2 3! 7 | 2 3! 7", lambda: wrap("TopK", Data(2, 5, 7), [3], axis=1, outputs=2, read=[0])),
    "topk 7": (
        "2 5! 7 | 2 3! 7 | 2 3! 7",
        lambda: wrap("TopK", Data(2, 5, 7), k=3, axis=1, outputs=2, read=[0], opset=7),
    ),
    "cumsum": ("2 5! 7 | 2 5! 7", lambda: wrap("CumSum", Data(2, 5, 7), scalar(1))),
    "cumprod": ("2 5! 7 | 2 5! 7", lambda: wrap("CumProd", Data(2, 5, 7), scalar(1), opset=26)),
    "MaxPool idx": (
        "2 5 7! 7! | 2 5 5! 5! | 2 5 5! 5!",
        lambda: wrap("MaxPool", Data(2, 5, 7, 7), kernel_shape=[3, 3], outputs=2, read=[0]),
    ),
    "roialign": (
        "2! 5 7! 7! | 3! 5 2! 2!",
        lambda: wrap(
            "RoiAlign",
            Data(2, 5, 7, 7),
            floats([0, 0, 3, 3], [1, 1, 5, 5], [0, 2, 4, 6]),
            np.asarray([0, 1, 1]),
            output_height=2,
            output_width=2,
        ),
    ),
    "maxroi": (
        "2! 5 7! 7! | 2! 5 2! 2!",
        lambda: wrap("MaxRoiPool", Data(2, 5, 7, 7), floats([0, 0, 0, 3, 3], [1, 1, 1, 5, 5]), pooled_shape=[2, 2]),
    ),
}
POOLS = ["MaxPool", "AveragePool", "LpPool"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_is_removed_exactly_and_nothing_else_is_frozen(name: str) -> None:
    expected, build = CASES[name]
    verify(build(), expected)


@pytest.mark.parametrize("name", SUMS + STATISTICS)
def test_a_sum_is_exact_and_a_statistic_crosses_in_every_version(name: str) -> None:
    c = "" if name in SUMS else "~"

    def data(*shape: int) -> Data:
        return Data(*shape, positive=name == "ReduceLogSum")

    verify(wrap(name, data(2, 5, 7), [1], opset=18), f"2 5{c} 7 | 2 1 7")
    verify(wrap(name, data(2, 5, 7), [-1], keepdims=0, opset=20), f"2 5 7{c} | 2 5")
    verify(wrap(name, data(5, 7), opset=18), f"5{c} 7{c} | 1 1")
    verify(wrap(name, data(5, 7), noop_with_empty_axes=1, opset=18), "5 7 | 5 7")
    verify(wrap(name, data(2, 5, 7), axes=[1], opset=11), f"2 5{c} 7 | 2 1 7")
    verify(wrap(name, data(2, 5, 7), axes=[1, 2], keepdims=0, opset=7), f"2 5{c} 7{c} | 2")


@pytest.mark.parametrize("name", POOLS)
def test_pooling_passes_the_channels(name: str) -> None:
    verify(wrap(name, Data(2, 5, 7, 7), kernel_shape=[3, 3], strides=[2, 2]), "2 5 7! 7! | 2 5 3! 3!")
    verify(wrap(name, Data(2, 5, 7), kernel_shape=[3], opset=11), "2 5 7! | 2 5 5!")
    verify(wrap(name, Data(2, 5, 7, 7), kernel_shape=[3, 3], opset=7), "2 5 7! 7! | 2 5 5! 5!")


@pytest.mark.parametrize("name", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
def test_global_pooling_passes_the_channels(name: str) -> None:
    verify(wrap(name, Data(2, 5, 7, 7)), "2 5 7! 7! | 2 5 1 1")


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceSumSquare"])
def test_the_norm_of_a_weight_crosses_and_that_of_activations_reads(op: str) -> None:
    net = Net()
    hidden = net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 67))
    w, axis = net.weight(67, 37), net.constant(np.asarray([0]))
    y = net.node("MatMul", hidden, net.node("Div", w, net.node(op, w, axis, keepdims=1)))
    normal = net.node("Div", y, net.node(op, y, net.constant(np.asarray([1])), keepdims=1))
    analysis = couple(Graph(net.model(net.gemm(normal, 37, 2))))
    assert {g.size: bool(g.crossings) for g in analysis.groups if g.frozen is None} == {67: True, 37: False}
