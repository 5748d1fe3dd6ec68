"""Criteria of the weights alone, NORM and AGG: against the papers' formulas in loops, and numbers by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto

from spa import criteria
from spa.coupling.analysis import Analysis, Group, couple
from spa.criteria import AGGREGATES, NORMS, Parameter
from spa.criteria.magnitude import fpgm, l1, l2, lamp
from spa.model.graph import Graph
from tests.oracle import Net

Array = np.ndarray


def parameter(values: Array, axis: int, channel: list[int]) -> Parameter:
    """A parameter whose index i of an axis belongs to channel[i], -1 to none."""
    return Parameter(
        name="w",
        load=lambda: values,
        data_type=TensorProto.FLOAT,
        shape=values.shape,
        axis=axis,
        channel=lambda: np.array(channel),
        channels=max(channel) + 1,
        operator="Conv",
        operand=1,
    )


def drawn() -> tuple[Parameter, list[list[float]]]:
    """A kernel whose second axis holds three channels in two blocks and an index of none; the weights of each channel."""
    values = np.random.default_rng(3).standard_normal((5, 7, 2)) * np.linspace(0.2, 2, 7)[:, None]
    channel = [2, 0, 1, -1, 1, 2, 0]
    of_channel: list[list[float]] = [[], [], []]
    for index, c in enumerate(channel):
        if c >= 0:
            of_channel[c] += [float(v) for v in values[:, index].reshape(-1)]
    return parameter(values, 1, channel), of_channel


def test_l1_is_the_sum_of_absolute_weights_of_a_channel() -> None:
    kernel, rows = drawn()
    np.testing.assert_allclose(l1(kernel), [sum(abs(v) for v in row) for row in rows], rtol=1e-12)


def test_l2_is_the_sum_of_squared_weights_of_a_channel() -> None:
    kernel, rows = drawn()
    np.testing.assert_allclose(l2(kernel), [sum(v * v for v in row) for row in rows], rtol=1e-12)


def test_fpgm_is_the_sum_of_distances_to_all_other_channels() -> None:
    kernel, rows = drawn()
    expected = [sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 for y in rows) for x in rows]
    np.testing.assert_allclose(fpgm(kernel), expected, rtol=1e-9)


def test_fpgm_is_lowest_for_the_channel_between_all_others() -> None:
    kernel = parameter(np.array([[0.0, 9.0], [4.0, 9.5], [9.0, 9.0]]), 0, [0, 1, 2])
    assert np.argmin(fpgm(kernel)) == 1  # not the one of the least norm


def test_lamp_divides_by_the_squares_of_all_channels_that_are_not_smaller() -> None:
    kernel, rows = drawn()
    squares = [sum(v * v for v in row) for row in rows]
    expected = [s / sum(t for t in squares if t >= s) for s in squares]
    np.testing.assert_allclose(lamp(kernel), expected, rtol=1e-12)
    by_hand = parameter(np.array([[1.0], [3.0], [2.0]]), 0, [0, 1, 2])
    np.testing.assert_allclose(lamp(by_hand), [1 / 14, 1, 4 / 13])


def test_lamp_of_weights_that_are_zero_is_zero() -> None:
    np.testing.assert_array_equal(lamp(parameter(np.zeros((3, 2)), 0, [0, 1, 2])), [0, 0, 0])


def norm_net() -> tuple[Analysis, Group, dict[str, Array]]:
    """A convolution, its BatchNormalization and a second convolution; the group between them and its weights."""
    net = Net(seed=5)
    h = net.conv(net.input("x", ["n", 2, 5, 5]), 2, 5, name="a", bias=False)
    h = net.batch_norm(h, 5)
    analysis = couple(Graph(net.model(net.conv(net.node("Relu", h), 5, 3, (1, 2), name="b", pads=[0] * 4))))
    group = next(g for g in analysis.free if g.size == 5)
    norm = next(n for n in analysis.graph.nodes if n.op == "BatchNormalization")
    names = {"a": "a", "b": "b", "scale": norm.inputs[1]}
    return analysis, group, {key: analysis.graph.array(name).astype(np.float64) for key, name in names.items()}


def test_bn_scale_is_the_absolute_scale_and_no_other_parameter() -> None:
    analysis, group, arrays = norm_net()
    found = criteria.score(analysis, [group], "bn_scale", "none", "sum")[group.name]
    np.testing.assert_allclose(found, [abs(float(s)) for s in arrays["scale"]], rtol=1e-6)
    assert (arrays["scale"] < 0).any()


def test_bn_scale_of_a_group_without_a_norm_is_l1() -> None:
    net = Net(seed=6)
    h = net.node("Relu", net.gemm(net.input("x", ["n", 3]), 3, 5, name="a"))
    analysis = couple(Graph(net.model(net.gemm(h, 5, 2, name="b"))))
    (group,) = [g for g in analysis.free if g.size == 5]
    found, plain = (criteria.score(analysis, [group], n)[group.name] for n in ("bn_scale", "l1"))
    np.testing.assert_array_equal(found, plain)


NORMALISED = {  # of 1, -3, 8
    "none": [1, -3, 8],
    "sum": [1 / 12, -3 / 12, 8 / 12],
    "mean": [1 / 4, -3 / 4, 8 / 4],
    "max": [1 / 8, -3 / 8, 8 / 8],
    "standardise": [-1 / 62**0.5 * 3**0.5, -5 / 62**0.5 * 3**0.5, 6 / 62**0.5 * 3**0.5],
}
COMBINED = {  # of 1, 5, 2 and 3, 2, -4
    "sum": [4, 7, -2],
    "mean": [2, 3.5, -1],
    "max": [3, 5, 2],
    "prod": [3, 10, -8],
    "l2": [10**0.5, 29**0.5, 20**0.5],
}


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_by_hand(norm: str) -> None:
    np.testing.assert_allclose(NORMS[norm](np.array([1.0, -3.0, 8.0])), NORMALISED[norm])
    np.testing.assert_array_equal(NORMS[norm](np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("agg", AGGREGATES)
def test_each_aggregate_by_hand(agg: str) -> None:
    np.testing.assert_allclose(AGGREGATES[agg](np.array([[1.0, 5.0, 2.0], [3.0, 2.0, -4.0]])), COMBINED[agg])


def test_norm_and_agg_have_no_other_names() -> None:
    assert [*NORMS] == [*NORMALISED] and [*AGGREGATES] == [*COMBINED]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("agg", AGGREGATES)
def test_scores_are_normalised_in_each_parameter_and_then_combined(norm: str, agg: str) -> None:
    analysis, group, arrays = norm_net()
    into = [float(np.abs(arrays["a"][c]).sum()) for c in range(5)]
    out = [float(np.abs(arrays["b"][:, c]).sum()) for c in range(5)]

    def normalised(v: list[float]) -> list[float]:
        mean = sum(v) / 5
        deviation = (sum((s - mean) ** 2 for s in v) / 5) ** 0.5
        if norm == "standardise":
            return [(s - mean) / deviation for s in v]
        return [s / {"none": 1, "sum": sum(v), "mean": mean, "max": max(v)}[norm] for s in v]

    combine: dict[str, Callable[[float, float], float]] = {
        "sum": lambda p, q: p + q,
        "mean": lambda p, q: (p + q) / 2,
        "max": max,
        "prod": lambda p, q: p * q,
        "l2": lambda p, q: (p * p + q * q) ** 0.5,
    }
    expected = [combine[agg](p, q) for p, q in zip(normalised(into), normalised(out), strict=True)]
    found = criteria.score(analysis, [group], "l1", norm, agg)[group.name]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # weights are float32
