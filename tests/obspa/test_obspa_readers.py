"""Each kind of reader against brute force: its statistics, its curve, and its fit where the answer is known."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa import dual
from spa.obspa.affine import Tail
from spa.obspa.curves import MomentReader, greedy
from spa.obspa.linear import linear, uses
from spa.obspa.moments import Moments, least_squares
from spa.obspa.readers.base import FitSettings
from spa.obspa.readers.steps import inverse_scale
from spa.obspa.refit import reconstruct
from spa.obspa.score import curves
from spa.surgery.apply import apply
from tests.obspa.test_obspa import group, network, outputs
from tests.oracle import Net

Array = np.ndarray


def rebuilt(
    model: ModelProto, name: str, kept: Array, x: Array, damping: float = 1e-3, batch_axis: int = 0
) -> tuple[ModelProto, Array, Array, Array]:
    """The refitted model; outputs of the dense network, of the pruned one and of the refitted one."""
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, name): kept})
    pruned = apply(analysis, plan)
    before = outputs(pruned, x)
    halves = [{"x": part} for part in np.array_split(x, 2, axis=batch_axis)]
    reconstruct(analysis, plan, pruned, halves, FitSettings(damping=damping))
    onnx.checker.check_model(pruned)
    return pruned, outputs(model, x), before, outputs(pruned, x)


def error(a: Array, b: Array) -> float:
    return float(np.square(a.astype(np.float64) - b.astype(np.float64)).sum())


def check_reader(
    model: ModelProto, name: str, gone: int, size: int, x: Array, atol: float = 2e-4, batch_axis: int = 0
) -> None:
    """A channel that others replace is restored; with half of the channels gone, a fit never harms; scores agree."""
    kept = np.delete(np.arange(size), gone)
    _, want, before, after = rebuilt(model, name, kept, x, 1e-8, batch_axis)
    scale = np.abs(want).max()
    assert np.abs(before - want).max() > 1e-2 * scale
    np.testing.assert_allclose(after, want, atol=atol * scale)
    few = np.sort(np.random.default_rng(1).permutation(size)[: size // 2])
    _, want, before, after = rebuilt(model, name, few, x, 1e-3, batch_axis)
    assert error(after, want) < error(before, want)
    analysis = couple(Graph(model))
    curve = curves(analysis, analysis.free, [{"x": x}])[0][group(analysis, name)]
    assert curve.loss[1] < 1e-2 * curve.loss[-1]
    assert curve.order[0] in (gone, PARTNER)


PARTNER = 2  # of the channel that is redundant


def producer(rng: np.random.Generator, rows: int, columns: int, gone: int) -> Array:
    """Weights with an output for each row, one of which is another one, tripled: so it is behind a Relu."""
    w = rng.standard_normal((rows, columns))
    w[gone] = 3 * w[PARTNER]
    return w


def form_network(form: str, rng: np.random.Generator) -> tuple[ModelProto, str]:
    """x [n 6] -> nine channels -> Relu -> a reader of some form -> y."""
    a = producer(rng, 9, 6, 5)
    weights: dict[str, Array] = {"a": a, "c": rng.standard_normal(4)}
    left = [
        helper.make_node("Transpose", ["x"], ["xt"]),
        helper.make_node("MatMul", ["a", "xt"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
    ]
    right = [helper.make_node("Gemm", ["x", "a"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["r"])]
    match form:
        case "alpha and beta":
            weights["b"] = rng.standard_normal((4, 9))
            tail = [helper.make_node("Gemm", ["r", "b", "c"], ["y"], transB=1, alpha=0.5, beta=-2.0)]
            return network(right + tail, weights, ["n", 6], 2), "a["
        case "alpha, no bias":
            weights["b"] = rng.standard_normal((9, 4))
            return network([*right, helper.make_node("Gemm", ["r", "b"], ["y"], alpha=3.0)], weights, ["n", 6], 2), "a["
        case "bias of two axes":
            weights |= {"b": rng.standard_normal((9, 4)), "c": rng.standard_normal((1, 4))}
            return network([*right, helper.make_node("Gemm", ["r", "b", "c"], ["y"])], weights, ["n", 6], 2), "a["
        case "transA":
            weights["b"] = rng.standard_normal((9, 4))
            return network(
                [*left, helper.make_node("Gemm", ["r", "b", "c"], ["y"], transA=1)], weights, ["n", 6], 2
            ), "a["
        case "constant on the left":
            weights |= {"b": rng.standard_normal((4, 9)), "c": rng.standard_normal((4, 1))}
            tail = [helper.make_node("MatMul", ["b", "r"], ["m"]), helper.make_node("Add", ["m", "c"], ["y"])]
            return network(left + tail, weights, ["n", 6], 2), "a["
        case "Einsum":
            weights["b"] = rng.standard_normal((9, 4))
            tail = [helper.make_node("Einsum", ["r", "b"], ["m"], equation="nk,ko->no")]
            return network([*right, *tail, helper.make_node("Add", ["m", "c"], ["y"])], weights, ["n", 6], 2), "a["
        case "Einsum, two axes":
            weights |= {"a": a.reshape(3, 3, 6), "b": rng.standard_normal((4, 3, 3))}
            weights["a"][:, 1] = 3 * weights["a"][:, 2]
            nodes = [
                helper.make_node("Einsum", ["a", "x"], ["h"], equation="hki,ni->nhk"),
                helper.make_node("Relu", ["h"], ["r"]),
                helper.make_node("Einsum", ["b", "r"], ["y"], equation="ohk,nhk->on"),
            ]
            return network(nodes, weights, ["n", 6], 2), "a[1]"
    raise AssertionError(form)


@pytest.mark.parametrize(
    "form",
    ["alpha and beta", "alpha, no bias", "bias of two axes", "transA", "constant on the left", "Einsum"],
)
def test_every_form_of_a_product_is_scored_and_refitted(form: str) -> None:
    rng = np.random.default_rng(0)
    model, name = form_network(form, rng)
    check_reader(model, name, 5, 9, rng.standard_normal((400, 6)).astype(np.float32))


def test_a_product_over_two_axes_is_scored_and_refitted() -> None:
    rng = np.random.default_rng(1)
    model, name = form_network("Einsum, two axes", rng)
    check_reader(model, name, 1, 3, rng.standard_normal((400, 6)).astype(np.float32))


@pytest.mark.parametrize(
    ("op", "attributes", "w", "x", "y"),
    [
        ("Gemm", {"alpha": 0.5, "transA": 1}, (7, 5), (7, 4), (4, 5)),
        ("Gemm", {"alpha": -2.0, "transB": 1}, (5, 7), (4, 7), (4, 5)),
        ("MatMul", "left", (5, 7), (2, 7, 3), (2, 5, 3)),
        ("MatMul", "left", (5, 7), (7, 3), (5, 3)),
        ("Einsum", "bsk,ko->bso", (7, 5), (2, 3, 7), (2, 3, 5)),
        ("Einsum", "bks,okh->sbho", (5, 7, 2), (3, 7, 4), (4, 3, 2, 5)),
        ("Einsum", "bsij,jio->bos", (7, 3, 5), (2, 4, 3, 7), (2, 5, 4)),
    ],
)
def test_rows_times_the_matrix_are_the_products_output(
    op: str, attributes: dict[str, object] | str, w: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(2)
    left = attributes == "left"
    more = {"equation": attributes} if op == "Einsum" else {} if isinstance(attributes, str) else attributes
    node = helper.make_node(op, ["w", "x"] if left else ["x", "w"], ["y"], **more)
    model = network([node], {"w": rng.standard_normal(w)}, [*x], len(y))
    value = rng.standard_normal(x).astype(np.float32)
    result = outputs(model, value)
    assert result.shape == y
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    assert lin.size(graph) == lin.matrix(graph).shape
    chosen = rng.permutation(lin.positions(y))[:3]
    rows = lin.input_rows(value, y, graph, chosen)
    assert rows.shape[1] == lin.samples(y) * len(chosen)
    expected = np.matmul(rows, lin.matrix(graph).transpose(0, 2, 1))
    np.testing.assert_allclose(lin.output_rows(result, chosen), expected, atol=1e-5)
    np.testing.assert_allclose(lin.weights_from(lin.matrix(graph), graph), graph.array("w"), rtol=1e-6)


@pytest.mark.parametrize("equation", ["bk,bko->bo", "bk,ko->bko", "bk,ko->", "...k,ko->...o", "kk,ko->o"])
def test_an_einsum_that_is_no_plain_product_is_no_reader(equation: str) -> None:
    shapes = {"bk,bko->bo": (3, 3, 5), "kk,ko->o": (3, 5)}
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)
    graph = Graph(network([node], {"w": np.ones(shapes.get(equation, (3, 5)))}, [3, 3], equation.count("o")))
    assert linear(graph, graph.nodes[0]) is None


@pytest.mark.parametrize(
    ("space", "kernel", "attributes"),
    [
        ((5, 4), (3, 2), {}),
        ((5, 4), (3, 2), {"strides": [2, 3], "pads": [1, 0, 2, 1], "output_padding": [1, 2]}),
        ((6, 5), (3, 3), {"group": 2, "dilations": [2, 1], "strides": [1, 2]}),
        ((7,), (4,), {"auto_pad": "SAME_UPPER", "strides": [3]}),
        ((7,), (4,), {"auto_pad": "SAME_LOWER", "strides": [3]}),
        ((5, 4), (3, 4), {"strides": [2, 2], "output_shape": [10, 9]}),
        ((3, 4, 2), (2, 1, 3), {"auto_pad": "VALID", "strides": [2, 1, 2]}),
    ],
)
def test_gathered_inputs_times_the_matrix_are_the_transposed_convolution(
    space: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, object]
) -> None:
    rng = np.random.default_rng(3)
    groups = int(str(attributes.get("group", 1)))
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)
    weights = {"w": rng.standard_normal((4, 6 // groups, *kernel)), "b": rng.standard_normal(6)}
    model = network([node], weights, ["n", 4, *space], len(space) + 2)
    x = rng.standard_normal((3, 4, *space)).astype(np.float32)
    y = outputs(model, x)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    assert lin.size(graph) == lin.matrix(graph).shape
    chosen = rng.permutation(lin.positions(y.shape))[:11]
    rows = lin.input_rows(x, y.shape, graph, chosen)
    expected = np.matmul(rows, lin.matrix(graph).transpose(0, 2, 1)) + graph.array("b").reshape(groups, 1, -1)
    np.testing.assert_allclose(lin.output_rows(y, chosen), expected, atol=1e-5)
    np.testing.assert_array_equal(lin.weights_from(lin.matrix(graph), graph), graph.array("w"))


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_is_scored_and_refitted(bias: bool) -> None:
    rng = np.random.default_rng(4)
    weights = {
        "a": producer(rng, 7, 3 * 9, 5).reshape(7, 3, 3, 3),
        "b": rng.standard_normal((7, 4, 3, 2)),
        "c": rng.standard_normal(4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node(
            "ConvTranspose",
            ["r", "b", "c"][: 2 + bias],
            ["y"],
            strides=[2, 1],
            pads=[1, 0, 0, 1],
            output_padding=[1, 0],
        ),
    ]
    model = network(nodes, weights, ["n", 3, 8, 7], 4)
    check_reader(model, "a[", 5, 7, rng.standard_normal((40, 3, 8, 7)).astype(np.float32))


def of_type(model: ModelProto, dtype: type) -> ModelProto:
    """The network with weights and computation of another type between casts."""
    model.graph.initializer.sort(key=lambda t: t.name)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model.graph.input[0].type.tensor_type.elem_type = code
    model.graph.output[0].type.tensor_type.elem_type = code
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-6), (np.float16, 1e-2)])
@pytest.mark.parametrize("form", ["alpha and beta", "Einsum"])
def test_weights_of_other_types_keep_them(dtype: type, atol: float, form: str) -> None:
    rng = np.random.default_rng(5)
    model, name = form_network(form, rng)
    x = rng.standard_normal((400, 6)).astype(dtype)
    model = of_type(model, dtype)
    check_reader(model, name, 5, 9, x, atol)
    small, *_ = rebuilt(model, name, np.arange(7), x)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert {t.data_type for t in small.graph.initializer} == {code}


def test_weights_in_bfloat16_are_read_and_written_back() -> None:
    # onnxruntime has hardly any kernel for them on the CPU, so that no whole network is run.
    rng = np.random.default_rng(6)
    model = network([helper.make_node("Gemm", ["x", "b"], ["y"])], {"b": rng.standard_normal((7, 5))}, ["n", 7], 2)
    graph = Graph(of_type(model, ml_dtypes.bfloat16))
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    assert lin.matrix(graph).dtype == np.float64
    written = lin.weights_from(lin.matrix(graph), graph)
    assert written.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(written, graph.array("b"))
    moments, x = Moments(), rng.standard_normal((1, 50, 7)).astype(ml_dtypes.bfloat16)
    moments.add(x, x[:, :, :3])
    np.testing.assert_allclose(least_squares(moments, np.zeros((1, 3, 7)), 1e-9)[0], np.eye(7)[:3], atol=1e-5)


def siamese(rng: np.random.Generator, bias: str) -> ModelProto:
    """Two inputs' halves through the same two layers, then their difference; biases are shared, own or absent; a MatMul
    gets none.

    The shared weights have more than 1024 elements, so that they are tied.
    """
    size = 40
    weights = {"a": producer(rng, size, 30, 5), "b": rng.standard_normal((size, size)) / 6}
    nodes = [helper.make_node("Split", ["x", "cut"], ["x0", "x1"], axis=1)]
    for i in range(2):
        weights[f"b_own{i}"] = rng.standard_normal(size)
        bs = {"shared": ["b_own0"], "own": [f"b_own{i}"]}.get(bias, [])
        nodes += [
            helper.make_node("Gemm", [f"x{i}", "a"], [f"h{i}"], transB=1),
            helper.make_node("Relu", [f"h{i}"], [f"r{i}"]),
            helper.make_node("MatMul" if bias == "no place" else "Gemm", [f"r{i}", "b", *bs], [f"y{i}"]),
            helper.make_node("Tanh", [f"y{i}"], [f"t{i}"]),
        ]
    nodes.append(helper.make_node("Sub", ["t0", "t1"], ["y"]))
    model = network(nodes, weights, ["n", 60], 2)
    model.graph.initializer.append(numpy_helper.from_array(np.array([30, 30], np.int64), "cut"))
    return model


@pytest.mark.parametrize("bias", ["shared", "own", "none", "no place"])
def test_weights_of_two_branches_are_refitted_together(bias: str) -> None:
    rng = np.random.default_rng(7)
    model = siamese(rng, bias)
    graph = Graph(model)
    lin = linear(graph, graph.producer["y0"])
    assert lin is not None
    assert [u.node.outputs[0] for u in uses(graph, lin) or []] == ["y0", "y1"]
    x = rng.standard_normal((600, 60)).astype(np.float32)
    x[:, 30:] = 2 * x[:, 30:] + 1
    check_reader(model, "a[", 5, 40, x)
    few = np.sort(rng.permutation(40)[:20])
    small = rebuilt(model, "a[", few, x)[0]
    assert sum(t.name == "b" for t in small.graph.initializer) == 1
    assert [n.input[1] for n in small.graph.node if len(n.input) > 1 and n.op_type in ("Gemm", "MatMul")] == [
        "a",
        "b",
        "a",
        "b",
    ]


def test_weights_that_another_operator_reads_stay_and_means_are_put_right() -> None:
    rng = np.random.default_rng(8)
    weights = {"e": rng.standard_normal((30, 40)) + 0.3, "c": np.zeros(30)}
    nodes = [
        helper.make_node("Gather", ["e", "x"], ["h"]),
        helper.make_node("Gemm", ["h", "e", "c"], ["y"], transB=1),
    ]
    model = network(nodes, weights, ["n"], 2)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    graph = Graph(model)
    lin = linear(graph, graph.producer["y"])
    assert lin is not None
    assert uses(graph, lin) is None
    kept = np.delete(np.arange(40), [3, 11, 12, 30])
    small, want, before, after = rebuilt(model, "e[", kept, rng.integers(0, 30, 200))
    assert error(after, want) < error(before, want)
    stored = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    np.testing.assert_array_equal(stored["e"], weights["e"].astype(np.float32)[:, kept])
    np.testing.assert_allclose(after.mean(axis=0), want.mean(axis=0), atol=1e-4)


# -- products with more inputs than second moments afford ------------------------------------------------------


def test_rows_give_the_curve_and_the_fit_that_moments_give() -> None:
    rng = np.random.default_rng(12)
    x = (rng.standard_normal((60, 90)) @ rng.standard_normal((90, 90)) + 5).astype(np.float32)  # fewer rows than inputs
    w = rng.standard_normal((1, 7, 90))
    t = (x @ w[0].T + rng.standard_normal((60, 7))).astype(np.float32)
    rows, moments = dual.Rows(), Moments()
    for part in (slice(0, 25), slice(25, 60)):
        rows.add(x[None, part], t[None, part])
        moments.add(x[None, part], t[None, part])
    np.testing.assert_allclose(rows.mean_x, moments.mean_x, rtol=1e-5)
    np.testing.assert_allclose(rows.mean_t, moments.mean_t, rtol=1e-4)
    np.testing.assert_allclose(rows.tt, moments.tt, rtol=1e-4)
    single = w.astype(np.float32)
    for mean in (True, False):
        expected = least_squares(copy.deepcopy(moments), w, 0.01, mean)
        np.testing.assert_allclose(dual.least_squares(rows, single, 0.01, mean), expected, atol=1e-3)
    columns = rng.permutation(90).reshape(30, 3)
    columns[4, 2] = columns[11, 1] = -1
    centred = rows.centred()[0]
    curve = greedy([dual.RowReader(centred, single, columns, rounds=30)], 30, damping=0.1)
    expected_curve = greedy([MomentReader(moments.xx, w, columns, rows=60)], 30, damping=0.1)
    np.testing.assert_array_equal(curve.order, expected_curve.order)
    np.testing.assert_allclose(curve.loss, expected_curve.loss, rtol=1e-4)


def test_mixed_outputs_estimate_the_loss_of_all() -> None:
    rng = np.random.default_rng(13)
    w, unit = rng.standard_normal((1, 900, 20)).astype(np.float32), rng.uniform(0.5, 2, 900)
    mixed = dual.sketch(w, unit, rng)
    assert mixed.shape == (1, dual.SKETCH_OUTPUTS, 20)
    exact = np.square(w * unit[:, None]).sum(axis=(0, 1))
    np.testing.assert_allclose(np.square(mixed).sum(axis=(0, 1)), exact, rtol=0.35)  # four standard errors of 9 %
    few = w[:, :7]
    np.testing.assert_allclose(dual.sketch(few, unit[:7], rng), few * unit[:7, None], rtol=1e-6)


def test_a_product_with_very_many_inputs_is_scored_and_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "MAX_MOMENT_INPUTS", 100)
    rng = np.random.default_rng(14)
    weights = {
        "a": producer(rng, 11, 3 * 9, 5).reshape(11, 3, 3, 3),
        "b": rng.standard_normal((4, 11 * 42)),
        "c": rng.standard_normal(4),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "b", "c"], ["y"], transB=1),
    ]
    model = network(nodes, weights, ["n", 3, 8, 9], 2)
    check_reader(model, "b[1]", 5, 11, rng.standard_normal((700, 3, 8, 9)).astype(np.float32), atol=1e-3)


# -- what they share -------------------------------------------------------------------------------------------


def test_a_channel_that_never_moves_goes_first_and_costs_nothing() -> None:
    rng = np.random.default_rng(20)
    x = rng.standard_normal((300, 6))
    x[:, 4] = 0
    w = rng.standard_normal((1, 3, 6))
    columns = np.arange(6)[:, None]
    by_moments = greedy([MomentReader((x.T @ x / 300)[None], w, columns)], 6)
    by_rows = greedy([dual.RowReader(x[None].astype(np.float32), w.astype(np.float32), columns)], 6)
    for curve in (by_moments, by_rows):
        assert curve.order[0] == 4
        assert curve.loss[1] < 1e-2 * curve.loss[2]


def test_rows_may_be_examples_times_pruned_channels() -> None:
    """As in a token mixer that an exporter writes with Gemm: the layer's rows are (n c), and c is pruned."""
    rng = np.random.default_rng(0)
    net = Net(17)
    h = net.node("MatMul", net.input("x", ["n", 3, 4]), net.constant(producer(rng, 9, 4, 5).T.astype(np.float32), "a"))
    h = net.node(
        "Reshape", net.node("Transpose", net.node("Relu", h), perm=[0, 2, 1]), net.constant(np.asarray([-1, 3]))
    )
    h = net.node("Reshape", net.gemm(h, 3, 5, name="mix"), net.constant(np.asarray([-1, 9, 5])))
    y = net.node("MatMul", net.node("Transpose", net.node("Relu", h), perm=[0, 2, 1]), net.weight(9, 2, name="read"))
    x = rng.standard_normal((14, 3, 4)).astype(np.float32)
    _, want, before, after = rebuilt(net.model(y), "a", np.delete(np.arange(9), 5), x)
    assert error(after, want) < 0.2 * error(before, want)


def test_scales_that_let_next_to_nothing_through_ask_nothing_of_a_layer() -> None:
    scale = np.array([2.0, -4.0, 0.019, 0.0, 1.0])  # of which the median is one
    np.testing.assert_allclose(inverse_scale(Tail(scale)), [0.5, -0.25, 1 / 0.019, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(inverse_scale(Tail(scale * [1, 1, 0.5, 1, 1])), [0.5, -0.25, 0, 0, 1], rtol=1e-6)
