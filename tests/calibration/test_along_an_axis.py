"""Samples lie along any axis of an input, and images are cut off or squeezed as the model's size says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spa.calibration.images import Pictures
from spa.calibration.interface import interface_of
from spa.calibration.pieces import Piece, joined
from spa.calibration.samples import rows_of
from tests.oracle import Net


def test_pieces_are_joined_along_the_axis_of_each_input() -> None:
    states = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    rows = np.arange(5 * 4).reshape(5, 4)
    pieces = [
        Piece(
            {"x": rows[part], "state": states[:, part], "rate": np.asarray(8)}, None, {"x": 0, "state": 1, "rate": None}
        )
        for part in (slice(0, 2), slice(2, 5))
    ]
    whole = joined(pieces)
    assert np.array_equal(whole.feeds["x"], rows)
    assert np.array_equal(whole.feeds["state"], states)
    assert whole.feeds["rate"] == 8


def test_rows_of_ragged_lists_take_their_part_of_a_state_along_its_axis() -> None:
    net = Net()
    x, state = net.input("x", ["batch", "steps", 4]), net.input("state", [3, "batch", 4])
    model = net.model(
        net.node(
            "Add",
            net.node("ReduceMax", x, net.constant(np.asarray([1])), keepdims=0),
            net.node("ReduceMax", state, net.constant(np.asarray([0])), keepdims=0),
        )
    )
    states = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    lines = [np.zeros((n, 4), np.float32) for n in (5, 7)]
    rows = rows_of("the data", {"x": lines, "state": states}, interface_of(model))
    assert rows is not None
    assert [len(row["x"]) for row in rows] == [5, 7]
    assert all(np.array_equal(row["state"], states[:, i]) for i, row in enumerate(rows))


@pytest.mark.parametrize("crops", [True, False])
def test_what_is_too_long_is_cut_off_or_squeezed(tmp_path: Path, crops: bool) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "a.png")
    zero, one = np.zeros(3), np.ones(3)
    pictures = Pictures([tmp_path / "a.png"], 1, 3, 8, 8, zero, one, crops)
    read = pictures.read(0)
    assert read.shape == (1, 3, 8, 8)
    assert (read == 1).all() if crops else 0.2 < read.mean() < 0.5
