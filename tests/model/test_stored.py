"""Weights are read by blocks from where they lie, and what is missing there is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa.criteria.magnitude import l1, l2
from spa.criteria.parameter import Parameter
from spa.errors import ModelError
from spa.model.graph import Graph
from spa.model.stored import blocks, is_finite, split

Array = np.ndarray


def outside(values: Array, folder: Path, offset: int = 24) -> Graph:
    """A graph with one constant ``w``, whose bytes lie in a file at an offset."""
    (folder / "w.data").write_bytes(b"\7" * offset + values.tobytes() + b"\7" * 5)
    tensor = numpy_helper.from_array(values, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", offset), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return Graph(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), folder)


@pytest.mark.parametrize("size", [1, 60, 10**6])
@pytest.mark.parametrize("shape", [(13,), (5, 7), (2, 3, 11), (0, 7)])
def test_blocks_joined_are_the_tensor(tmp_path: Path, shape: tuple[int, ...], size: int) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    graph = outside(values, tmp_path)
    found = [(rows, block.copy()) for rows, block in blocks(graph, "w", size)]
    assert b"".join(block.tobytes() for _, block in found) == values.tobytes()
    assert [rows.stop - rows.start for rows, _ in found] == [len(block) for _, block in found]


def test_a_file_that_became_shorter_or_vanished_is_said(tmp_path: Path) -> None:
    graph = outside(np.ones((5, 7), np.float32), tmp_path)
    (tmp_path / "w.data").write_bytes(b"\7" * 60)
    with pytest.raises(ModelError, match=r"w\.data' has become shorter while it was read"):
        list(blocks(graph, "w"))
    (tmp_path / "w.data").unlink()
    with pytest.raises(ModelError, match=r"cannot read the data file .*w\.data': No such file"):
        list(blocks(graph, "w"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, np.finfo(np.float32).min])
def test_values_that_are_not_finite_are_found_in_any_block(tmp_path: Path, dtype: type, odd: float) -> None:
    values = np.full((700, 1000), 65504, dtype)
    assert is_finite(outside(values, tmp_path), "w")
    with np.errstate(over="ignore"):
        values[699, 998] = odd
    assert not is_finite(outside(values, tmp_path), "w")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [8, 300, 10**6])
def test_scores_by_blocks_are_those_of_all_values(axis: int, size: int) -> None:
    values = np.random.default_rng(0).standard_normal((5, 7, 11)).astype(np.float32)
    channel = np.array([2, 0, 1, -1, 0, 2, 2, 1, 0, 1, 2][: values.shape[axis]])
    parameter = Parameter(
        name="w",
        load=lambda: values,
        data_type=TensorProto.FLOAT,
        shape=values.shape,
        axis=axis,
        channel=lambda: channel,
        channels=3,
        operator="Conv",
        operand=1,
        blocks=lambda: split(values, size),
    )
    rows = np.moveaxis(values, axis, 0).astype(np.float64)
    expected = [float((rows[channel == c] ** 2).sum()) for c in range(3)]
    np.testing.assert_allclose(l2(parameter), expected, rtol=1e-6)  # squares are taken in single precision


def test_halves_are_scored_as_the_numbers_that_they_are() -> None:
    """All halves: squares of small ones are no halves any more, those of large ones are infinite among them."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = halves[np.isfinite(halves)].reshape(-1, 1)
    channels = len(values)
    parameter = Parameter(
        name="w",
        load=lambda: values,
        data_type=TensorProto.FLOAT16,
        shape=values.shape,
        axis=0,
        channel=lambda: np.arange(channels),
        channels=channels,
        operator="MatMul",
        operand=1,
    )
    np.testing.assert_array_equal(l1(parameter), np.abs(values.astype(np.float64)).reshape(-1))
    np.testing.assert_array_equal(parameter.per_channel(lambda v: v), values.astype(np.float64).reshape(-1))
