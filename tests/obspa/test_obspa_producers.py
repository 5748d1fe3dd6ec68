"""Refits of the layer before a cut."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa import producers
from spa.obspa.linear import linear
from spa.obspa.producers import find_pair
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.surgery.apply import apply
from tests.obspa.test_obspa import group, network, outputs, residual_net
from tests.obspa.test_obspa_readers import of_type

Array = np.ndarray


def refitted(
    model: ModelProto, name: str, kept: Array, x: Array, before: bool, pruned_fraction: float = 1.0
) -> ModelProto:
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, name): kept})
    pruned = apply(analysis, plan)
    halves = [{"x": part} for part in np.array_split(x, 2)]
    reconstruct(
        analysis,
        plan,
        pruned,
        halves,
        FitSettings(damping=1e-6, pruned_input_fraction=pruned_fraction, producer_rounds=int(before)),
    )
    onnx.checker.check_model(pruned)
    return pruned


def error(model: ModelProto, pruned: ModelProto, x: Array) -> float:
    want = outputs(model, x).astype(np.float64)
    return float(np.square(outputs(pruned, x) - want).mean() / want.var())


@pytest.mark.parametrize(
    ("op", "attributes", "w", "x"),
    [
        ("Conv", {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}, (6, 2, 3, 2), (3, 4, 7, 6)),
        ("Conv", {"auto_pad": "SAME_LOWER", "strides": [3]}, (5, 4, 4), (3, 4, 7)),
        ("ConvTranspose", {"strides": [2, 3], "pads": [1, 0, 2, 1]}, (4, 3, 3, 2), (3, 4, 5, 4)),
        ("Gemm", {"alpha": 0.5, "transA": 1}, (7, 5), (7, 4)),
        ("MatMul", {}, (7, 5), (2, 3, 7)),
        ("Einsum", {"equation": "bks,okh->sbho"}, (5, 7, 2), (3, 7, 4)),
    ],
)
def test_spreading_inverts_and_back_transposes(
    op: str, attributes: dict[str, object], w: tuple[int, ...], x: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    more = {"group": 2} if w[:2] == (6, 2) else {}
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes, **more)
    rank = 4 if op == "Einsum" else len(x)
    model = network([node], {"w": rng.standard_normal(w)}, [*x], rank)
    value = rng.standard_normal(x).astype(np.float32)
    y = outputs(model, value)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    every = np.arange(lin.positions(y.shape))
    np.testing.assert_array_equal(lin.output_from_rows(lin.output_rows(y, every), y.shape), y)
    rows = lin.input_rows(value, y.shape, graph, every)
    np.testing.assert_allclose(
        lin.output_rows(y, every), rows @ lin.matrix(graph).transpose(0, 2, 1), rtol=1e-4, atol=1e-4
    )
    last = lin.input_rows(value, y.shape, graph, every[-1:])
    np.testing.assert_array_equal(last, rows[:, len(every) - 1 :: len(every)])
    other = rng.standard_normal(y.shape)
    gradient = lin.input_gradient(other, lin.matrix(graph), value.shape, graph)
    assert gradient.shape == value.shape
    assert (gradient * value).sum() == pytest.approx((y * other).sum(), rel=1e-4)


def two_layers(form: str, rng: np.random.Generator) -> tuple[ModelProto, Array]:
    """Layers with nothing between them that is not linear: what the second gives has rank two."""
    if form == "conv":
        a, c = rng.standard_normal((8, 4, 3, 3)), rng.standard_normal((2, 8, 1, 1))
        nodes = [helper.make_node("Conv", ["x", "a"], ["h"], pads=[1] * 4), helper.make_node("Conv", ["h", "c"], ["z"])]
        x = rng.standard_normal((60, 4, 6, 5))
        shape: list[object] = ["n", 4, 6, 5]
    else:
        a, c = rng.standard_normal((4, 8)), rng.standard_normal((8, 2))
        nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "c"], ["z"])]
        x = rng.standard_normal((60, 7, 4))
        shape = ["n", 7, 4]
    nodes.append(helper.make_node("Relu", ["z"], ["y"]))
    return network(nodes, {"a": a, "c": c}, shape, len(shape)), x.astype(np.float32)


@pytest.mark.parametrize("pruned_fraction", [1.0, 0.8])
@pytest.mark.parametrize("form", ["conv", "matmul"])
def test_two_channels_are_enough_for_an_output_of_rank_two(form: str, pruned_fraction: float) -> None:
    model, x = two_layers(form, np.random.default_rng(1))
    kept = np.array([2, 5])
    without = error(model, refitted(model, "a", kept, x, False, pruned_fraction), x)
    assert without > 0.05
    assert error(model, refitted(model, "a", kept, x, True, pruned_fraction), x) < 0.01 * without


@pytest.mark.parametrize(("bias", "norm"), [(True, True), (False, False)])
@pytest.mark.parametrize(("pruned_fraction", "rows"), [(1.0, 40_000), (0.8, 40_000), (0.8, 3_000)])
def test_it_brings_a_network_nearer_on_inputs_not_seen(
    bias: bool, norm: bool, pruned_fraction: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producers, "MAX_ROWS", rows)  # 3,000: half of the samples
    rng = np.random.default_rng(2)
    model = residual_net(rng, bias, norm)
    x = rng.standard_normal((96, 3, 9, 7)).astype(np.float32)
    unseen = rng.standard_normal((96, 3, 9, 7)).astype(np.float32)
    kept = np.arange(0, 11, 2)
    without = error(model, refitted(model, "a0", kept, x, False, pruned_fraction), unseen)
    assert error(model, refitted(model, "a0", kept, x, True, pruned_fraction), unseen) < 0.95 * without


def gelu_net(rng: np.random.Generator) -> ModelProto:
    """x + an MLP, its Gelu written out as exporters do, the first layer's bias beside it."""
    weights = {
        "a": rng.standard_normal((6, 24)),
        "b": rng.standard_normal(24),
        "c": rng.standard_normal((24, 6)) * 0.3,
        "d": rng.standard_normal(6),
        "half": np.full(1, 0.5),
        "root": np.full(1, 2**0.5),
        "one": np.ones(1),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Add", ["xa", "b"], ["h"]),
        helper.make_node("Mul", ["h", "half"], ["hh"]),
        helper.make_node("Div", ["h", "root"], ["hr"]),
        helper.make_node("Erf", ["hr"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["e1"]),
        helper.make_node("Mul", ["hh", "e1"], ["g"]),
        helper.make_node("MatMul", ["g", "c"], ["gc"]),
        helper.make_node("Add", ["gc", "d"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    return network(nodes, weights, ["n", 5, 6], 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_activation_of_several_operators_is_crossed(dtype: type) -> None:
    rng = np.random.default_rng(3)
    model = of_type(gelu_net(rng), dtype)
    x, unseen = (rng.standard_normal((400, 5, 6)).astype(dtype) for _ in range(2))
    kept = np.arange(0, 24, 2)
    small = refitted(model, "a[", kept, x, True)
    assert error(model, small, unseen) < 0.7 * error(model, refitted(model, "a[", kept, x, False), unseen)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert {t.data_type for t in small.graph.initializer} == {code}


def has_pair(model: ModelProto, reader: str) -> bool:
    graph = Graph(model)
    lin = linear(graph, graph.producer[reader])
    assert lin is not None
    return find_pair(graph, lin) is not None


def test_a_pair_is_two_layers_that_nobody_else_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gelu_net(np.random.default_rng(4))
    assert has_pair(model, "gc")
    assert not has_pair(model, "xa")  # nobody makes its inputs
    seen = helper.make_tensor_value_info("hr", TensorProto.FLOAT, [None] * 3)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.output.append(seen)
    assert not has_pair(other, "gc")
    residual = residual_net(np.random.default_rng(4))
    assert has_pair(residual, "c0") and has_pair(residual, "c1")
    assert not has_pair(residual, "h1")  # it reads a sum
    monkeypatch.setattr(producers, "MAX_INPUTS", 50)  # of the first layer's 6 times 9
    assert not has_pair(residual, "c0")


def test_samples_along_another_axis_leave_the_producer_as_it_is() -> None:
    rng = np.random.default_rng(5)
    weights = {"a": rng.standard_normal((9, 6)), "c": rng.standard_normal((4, 9))}
    nodes = [
        helper.make_node("MatMul", ["a", "x"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["c", "r"], ["y"]),
    ]
    model = network(nodes, weights, [6, "n"], 2)
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, "a["): np.arange(5)})
    results = []
    for before in (False, True):
        pruned = apply(analysis, plan)
        x = np.random.default_rng(6).standard_normal((6, 300)).astype(np.float32)
        reconstruct(analysis, plan, pruned, [{"x": x}], FitSettings(producer_rounds=int(before)))
        results.append(outputs(pruned, x))
    np.testing.assert_array_equal(*results)


def between(middle: list[onnx.NodeProto], constant: Array, rng: np.random.Generator, places: int = 5) -> ModelProto:
    """x [n places 6] -> nine channels h -> Relu r -> operators that make g -> a second layer and a Relu."""
    weights = {"a": rng.standard_normal((6, 9)), "k": constant, "c": rng.standard_normal((9, 4))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        *middle,
        helper.make_node("MatMul", ["g", "c"], ["z"]),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    return network(nodes, weights, ["n", places, 6], max(3, constant.ndim))


def test_a_slope_that_is_not_finite_is_none() -> None:
    rng = np.random.default_rng(7)
    model = between([helper.make_node("Sqrt", ["r"], ["g"])], np.ones(1), rng)
    graph = Graph(model)
    x, unseen = (rng.standard_normal((400, 5, 6)).astype(np.float32) for _ in range(2))
    lin = linear(graph, graph.producer["z"])
    assert lin is not None and find_pair(graph, lin) is not None
    kept = np.arange(0, 9, 2)
    without = error(model, refitted(model, "a[", kept, x, False), unseen)
    assert error(model, refitted(model, "a[", kept, x, True), unseen) < without


@pytest.mark.parametrize("shape", [(5, 9), (3, 1, 1, 9)])
def test_a_constant_with_axes_of_its_own_leaves_the_producer_as_it_is(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    model = between([helper.make_node("Add", ["r", "k"], ["g"])], rng.standard_normal(shape), rng, places=1)
    x = rng.standard_normal((40, 1, 6)).astype(np.float32)
    kept = np.arange(0, 9, 2)
    pruned = [refitted(model, "a[", kept, x, before) for before in (False, True)]
    np.testing.assert_array_equal(*(outputs(p, x) for p in pruned))


def test_sequences_of_different_lengths_refit_a_producer_by_the_most_frequent() -> None:
    rng = np.random.default_rng(21)
    weights = {"a": rng.standard_normal((6, 12)), "b": rng.standard_normal((12, 5)) / 3}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    model = network(nodes, weights, ["n", "length", 6], 3)
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, "a["): np.arange(7)})
    long = rng.standard_normal((40, 9, 6)).astype(np.float32)
    batches = [{"x": long[:20]}, {"x": rng.standard_normal((3, 30, 6)).astype(np.float32)}, {"x": long[20:]}]
    errors = []
    for rounds in (0, 1):
        pruned = apply(analysis, plan)
        reconstruct(analysis, plan, pruned, batches, FitSettings(damping=1e-3, producer_rounds=rounds))
        errors.append(error(model, pruned, rng.standard_normal((50, 4, 6)).astype(np.float32)))
    assert errors[1] < 0.9 * errors[0]
