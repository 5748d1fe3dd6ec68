"""Batches are cut where a tensor of the network would be large."""

from __future__ import annotations

import numpy as np
import pytest

from spa.calibration.batches import in_parts
from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.running.live import PaddedBatch
from spa.running.stream import parted
from tests.oracle import Net


def wide(batch: str | int, positions: str | int = "t"):
    """A network whose largest tensor has 4000 values for each position."""
    net = Net()
    h = net.matmul(net.input("x", [batch, positions, 10]), 10, 4000)
    return couple(Graph(net.model(net.matmul(net.node("Relu", h), 4000, 3))))


@pytest.mark.parametrize("positions", [4, 16])
def test_no_tensor_is_larger_than_allowed(positions: int) -> None:
    batches = [{"x": np.arange(n * positions * 10, dtype=np.float32).reshape(n, positions, 10)} for n in (12, 5)]
    cut = in_parts(wide("n"), batches, most=3 * positions * 4000 * 4)
    assert [len(b["x"]) for b in cut] == [3, 3, 3, 3, 3, 2]
    assert np.array_equal(np.concatenate([b["x"] for b in cut]), np.concatenate([b["x"] for b in batches]))
    assert [len(b["x"]) for b in in_parts(wide("n"), batches, most=1)] == [1] * 17


def test_a_network_of_one_batch_size_keeps_it() -> None:
    batches = [{"x": np.zeros((4, 6, 10), np.float32)}]
    assert in_parts(wide(4, 6), batches, most=1) == batches


def test_marks_of_real_positions_are_cut_too_and_states_are_not() -> None:
    real = np.arange(20).reshape(4, 5) % 3 > 0
    first, second = parted([PaddedBatch({"x": np.zeros((4, 5, 2))}, real)], 3)
    assert isinstance(second, PaddedBatch) and np.array_equal(first.real, real[:3])
    assert np.array_equal(second.real, real[3:])
    states = [{"x": np.zeros((4, 5)), "h": np.zeros((2, 4, 3))}]
    assert parted(states, 1) == states
