"""Optimal brain surgery on groups, against brute force; reconstruction, on networks whose answer is known."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import make_plan
from spa.criteria import Context, Curve
from spa.errors import ModelError, PlanError
from spa.model.graph import Graph
from spa.obspa.affine import find_tail
from spa.obspa.criterion import loss_curves
from spa.obspa.curves import MomentReader, greedy
from spa.obspa.linear import linear
from spa.obspa.moments import OUTER_ROWS, Damped, Moments, least_squares
from spa.obspa.pipeline import Calibrated
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.statistics import with_batch_statistics
from spa.running.change import Yardstick
from spa.running.runtime import load_session, run
from spa.running.stream import Stream
from spa.surgery.apply import apply
from spa.widths.allocation import allocate
from spa.widths.budget import Budget

Array = np.ndarray


def network(nodes: list[onnx.NodeProto], weights: dict[str, Array], shape: list[object], rank: int) -> ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    model.ir_version = 8
    return onnx.shape_inference.infer_shapes(model)


def outputs(model: ModelProto, x: Array) -> Array:
    return np.asarray(run(load_session(model), {"x": x})[0])


def residual_net(rng: np.random.Generator, bias: bool = True, norm: bool = True) -> ModelProto:
    """Two residual blocks with 3x3 convolutions, a pool and a classifier."""
    weights: dict[str, Array] = {"stem": rng.standard_normal((6, 3, 3, 3)) * 0.3}
    nodes = [helper.make_node("Conv", ["x", "stem"], ["s0"], pads=[1, 1, 1, 1])]
    for b in range(2):
        weights[f"a{b}"] = rng.standard_normal((11, 6, 3, 3)) * 0.2
        weights[f"b{b}"] = rng.standard_normal((6, 11, 3, 3)) * 0.1
        nodes.append(helper.make_node("Conv", [f"s{b}", f"a{b}"], [f"h{b}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"h{b}"], [f"r{b}"]))
        nodes.append(helper.make_node("Conv", [f"r{b}", f"b{b}"], [f"c{b}"], pads=[1, 1, 1, 1]))
        out = f"c{b}"
        if norm:
            for n, low, high in (("g", 0.5, 1.5), ("be", -0.5, 0.5), ("m", -0.2, 0.2), ("v", 0.5, 1.5)):
                weights[f"{n}{b}"] = rng.uniform(low, high, 6)
            nodes.append(helper.make_node("BatchNormalization", [out, f"g{b}", f"be{b}", f"m{b}", f"v{b}"], [f"n{b}"]))
            out = f"n{b}"
        nodes.append(helper.make_node("Add", [f"s{b}", out], [f"s{b + 1}"]))
    weights["w"] = rng.standard_normal((5, 6))
    nodes.append(helper.make_node("GlobalAveragePool", ["s2"], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    if bias:
        weights["bias"] = rng.standard_normal(5)
    nodes.append(helper.make_node("Gemm", ["f", "w", *(["bias"] if bias else [])], ["y"], transB=1))
    return network(nodes, weights, ["batch", 3, 9, 7], 2)


def group(analysis: Analysis, name: str) -> str:
    return next(g.name for g in analysis.free if g.name.startswith(name))


@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_loss_is_what_least_squares_leaves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 400, 12)) @ rng.standard_normal((12, 12))
    h = np.matmul(x.transpose(0, 2, 1), x) / 400
    w = rng.standard_normal((2, 7, 12))
    columns = rng.permutation(12).reshape(6, 2)
    curve = greedy([MomentReader(h, w, columns)], 6, damping=1e-9)
    assert sorted(curve.order) == list(range(6))
    for gone in range(1, 6):
        kept = np.setdiff1d(np.arange(12), columns[curve.order[:gone]])
        loss = 0.0
        for g in range(2):
            fitted = np.linalg.solve(h[g][np.ix_(kept, kept)], h[g][kept] @ w[g].T).T
            error = w[g].copy()
            error[:, kept] -= fitted
            loss += float(np.einsum("oi,ij,oj->", error, h[g], error))
        assert curve.loss[gone] == pytest.approx(loss, rel=1e-5)


def test_paddings_of_channels_with_fewer_inputs_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 5))
    h, w = (x.T @ x / 300)[None], rng.standard_normal((1, 3, 5))
    ragged = greedy([MomentReader(h, w, np.array([[0, 1], [2, -1], [3, 4]]))], 3)
    alone = greedy([MomentReader(h, w, np.array([[2]]))], 1)
    assert np.isfinite(ragged.loss).all()
    at = list(ragged.order).index(1)
    if at == 0:
        assert ragged.loss[1] == pytest.approx(alone.loss[1], rel=1e-9)
    assert ragged.loss[-1] == pytest.approx(float(np.einsum("goi,gij,goj->", w, h, w)), rel=1e-2)


def test_a_channel_that_others_can_replace_goes_first_and_for_nothing() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 7))
    x[:, 4] = x[:, [0, 2]] @ [0.7, -1.3]
    curve = greedy(
        [MomentReader((x.T @ x / 500)[None], rng.standard_normal((1, 5, 7)), np.arange(7)[:, None])], 7, damping=1e-9
    )
    assert curve.order[0] in (0, 2, 4)
    assert curve.loss[1] < 1e-5 * curve.loss[2]


def test_least_squares_finds_the_matrix_and_the_mean_in_several_batches() -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((3, 4, 5))
    moments = Moments()
    for rows in (50, 170, 3):
        x = (rng.standard_normal((3, rows, 5)) + 100).astype(np.float32)
        moments.add(x, (np.matmul(x.astype(np.float64), w.transpose(0, 2, 1)) + 7).astype(np.float32))
    fitted = least_squares(moments, np.zeros_like(w), 1e-12)
    np.testing.assert_allclose(fitted, w, atol=1e-3)  # float32 targets of size 1e3
    constant = moments.mean_t - np.einsum("goi,gi->go", fitted, moments.mean_x)
    np.testing.assert_allclose(constant, 7, atol=0.1)  # float32 about a mean of 100


def test_damping_grows_until_the_matrix_can_be_factored() -> None:
    for blocks in (1, 3):
        h = np.tile([[[1.0, 2.0], [2.0, 1.0]]], (blocks, 1, 1))
        matrix = Damped(h.copy(), 1e-3)
        assert (matrix.added >= 1).all()
        whole = h + matrix.added[:, None, None] * np.eye(2)
        right = np.arange(blocks * 6.0).reshape(blocks, 3, 2)
        np.testing.assert_allclose(matrix.solve(right) @ whole, right, atol=1e-12)
        np.testing.assert_allclose(matrix.inverse() @ whole, np.tile(np.eye(2), (blocks, 1, 1)), atol=1e-12)
        dead = Damped(np.tile(np.diag([0.0, 4.0]), (blocks, 1, 1)), 1e-3).inverse()
        assert (dead[:, 0, 0] <= 1).all()
        with pytest.raises(ModelError, match="not finite"):
            Damped(np.full((blocks, 2, 2), np.nan), 1e-3)


def test_a_large_matrix_is_factored_in_place_and_mirrored() -> None:
    n = 2 * OUTER_ROWS + 17
    x = np.random.default_rng(4).standard_normal((n, 50))
    h = (x @ x.T)[None]
    matrix = Damped(h.copy(), 0.1)
    np.testing.assert_allclose(
        matrix.inverse() @ (h + matrix.added[:, None, None] * np.eye(n)), np.eye(n)[None], atol=1e-9
    )


@pytest.mark.parametrize("mean", [True, False])
def test_many_small_batches_have_the_moments_of_one_large(mean: bool) -> None:
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal((2, 9000, OUTER_ROWS + 3)) + 3, rng.standard_normal((2, 9000, 4)) - 1
    many, parts = Moments(), [Moments() for _ in range(3)]
    for i, start in enumerate(range(0, 9000, 300)):
        many.add(x[:, start : start + 300], t[:, start : start + 300])
        parts[i % 3].add(x[:, start : start + 300] + i % 3, t[:, start : start + 300])
    shift = mean * x.mean(axis=1, keepdims=True)
    xx, tx = many.products(mean)
    np.testing.assert_allclose(xx, (x - shift).transpose(0, 2, 1) @ (x - shift) / 9000, atol=1e-10)
    about = t - mean * t.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(tx, about.transpose(0, 2, 1) @ (x - shift) / 9000, atol=1e-10)
    np.testing.assert_allclose(many.tt, t.var(axis=1), atol=1e-10)
    joint = Moments.about_own_means(iter(parts))
    assert joint.count == 9000
    centred = [x[:, np.arange(9000) // 300 % 3 == i] for i in range(3)]
    expected = sum(np.matmul(c.transpose(0, 2, 1), c) for c in (p - p.mean(axis=1, keepdims=True) for p in centred))
    np.testing.assert_allclose(joint.xx, expected / 9000, atol=1e-10)


@pytest.mark.parametrize(
    ("space", "kernel", "attributes"),
    [
        ((9, 7), (3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ((9, 8), (3, 3), {"dilations": [2, 1], "group": 2}),
        ((11,), (5,), {"auto_pad": "SAME_UPPER", "strides": [3]}),
        ((10, 9), (2, 4), {"auto_pad": "SAME_LOWER"}),
        ((5, 4, 6), (2, 3, 1), {"auto_pad": "VALID"}),
    ],
)
def test_unfolded_inputs_times_the_matrix_are_the_convolution(
    space: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, object]
) -> None:
    rng = np.random.default_rng(3)
    groups = int(str(attributes.get("group", 1)))
    w = rng.standard_normal((6, 4 // groups, *kernel))
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    model = network([node], {"w": w, "b": rng.standard_normal(6)}, ["n", 4, *space], len(space) + 2)
    x = rng.standard_normal((3, 4, *space)).astype(np.float32)
    y = outputs(model, x)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    chosen = rng.permutation(lin.positions(y.shape))[:5]
    rows = lin.input_rows(x, y.shape, graph, chosen)
    expected = np.matmul(rows, lin.matrix(graph).transpose(0, 2, 1)) + graph.array("b").reshape(groups, 1, -1)
    np.testing.assert_allclose(lin.output_rows(y, chosen), expected, atol=1e-5)
    np.testing.assert_array_equal(lin.weights_from(lin.matrix(graph), graph), graph.array("w"))


@pytest.mark.parametrize(("op", "turned"), [("Gemm", 0), ("Gemm", 1), ("MatMul", None), ("MatMul", "transpose")])
def test_every_form_of_a_matrix_product_is_read_and_written_back(op: str, turned: object) -> None:
    rng = np.random.default_rng(12)
    by_rows = bool(turned)
    w = rng.standard_normal((5, 7) if by_rows else (7, 5)).astype(np.float32)
    nodes = [helper.make_node("Transpose", ["w"], ["t"])] if turned == "transpose" else []
    attributes = {"transB": turned} if op == "Gemm" else {}
    nodes.append(helper.make_node(op, ["x", "t" if nodes else "w"], ["y"], **attributes))
    model = network(nodes, {"w": w}, ["n", 7], 2)
    x = rng.standard_normal((4, 7)).astype(np.float32)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[-1])
    assert lin is not None
    rows = lin.input_rows(x, (4, 5), graph, np.arange(1))
    expected = lin.output_rows(outputs(model, x), np.arange(1))
    np.testing.assert_allclose(np.matmul(rows, lin.matrix(graph).transpose(0, 2, 1)), expected, atol=1e-5)
    np.testing.assert_array_equal(lin.weights_from(lin.matrix(graph), graph), w)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_network_run_in_steps_gives_what_it_gives_at_once(memory: int) -> None:
    model = residual_net(np.random.default_rng(4))
    rng = np.random.default_rng(5)
    batches = [{"x": rng.standard_normal((n, 3, 9, 7)).astype(np.float32)} for n in (4, 3)]
    stream = Stream(model, None, batches, memory=memory)
    for node in stream.graph.nodes[::3]:
        stream.after(node)
        assert set(node.outputs) <= set(stream.live[0])
    for batch, result in zip(batches, stream.finish(), strict=True):
        np.testing.assert_array_equal(result["y"], outputs(model, batch["x"]))


def test_the_tail_of_a_convolution_is_its_scale_and_the_skip_path() -> None:
    model = residual_net(np.random.default_rng(6))
    graph = Graph(model)
    node = graph.producer["c0"]
    tail = find_tail(graph, node, 6, 1)
    np.testing.assert_allclose(tail.scale, graph.array("g0") / np.sqrt(graph.array("v0") + 1e-5), rtol=1e-6)
    assert (tail.addend, tail.mean, tail.bias) == ("s0", "m0", None)
    assert find_tail(graph, graph.producer["h0"], 11, 1).addend is None


def test_the_tail_of_a_matrix_has_the_normalisation_behind_it() -> None:
    rng = np.random.default_rng(6)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "g", "be", "m", "v"], ["n"]),
        helper.make_node("Gemm", ["n", "u"], ["y"]),
    ]
    weights = {"w": rng.standard_normal((5, 7)), "u": rng.standard_normal((7, 3))}
    weights |= {n: rng.uniform(0.5, 1.5, 7) for n in ("g", "be", "m", "v")}
    graph = Graph(network(nodes, weights, ["n", 5], 2))
    tail = find_tail(graph, graph.nodes[0], 7, -1)
    np.testing.assert_allclose(tail.scale, graph.array("g") / np.sqrt(graph.array("v") + 1e-5), rtol=1e-6)
    assert tail.mean == "m"


def channels_last(model: ModelProto, early: bool) -> ModelProto:
    """The same network, its residual sums with channels last, as code from JAX writes them.

    The skip path is transposed where it begins (early) or where it ends.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Add":
            nodes.append(node)
            continue
        names = [f"{x}_of_{node.output[0]}" for x in node.input]
        for old, new in zip(node.input, names, strict=True):
            at = 1 + next(i for i, n in enumerate(nodes) if old in n.output) if early else len(nodes)
            nodes.insert(at, helper.make_node("Transpose", [old], [f"{new}_half"], perm=[0, 3, 2, 1]))
            nodes.insert(at + 1, helper.make_node("Transpose", [f"{new}_half"], [new], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Add", names, [f"{node.output[0]}_last"]))
        nodes.append(helper.make_node("Transpose", [f"{node.output[0]}_last"], list(node.output), perm=[0, 3, 1, 2]))
    other = ModelProto()
    other.CopyFrom(model)
    del other.graph.node[:]
    other.graph.node.extend(nodes)
    return other


@pytest.mark.parametrize("early", [True, False])
def test_what_a_residual_sum_has_lost_is_seen_through_transpositions(early: bool) -> None:
    rng = np.random.default_rng(6)
    model = residual_net(rng)
    other = channels_last(model, early)
    x = rng.standard_normal((40, 3, 9, 7)).astype(np.float32)
    np.testing.assert_allclose(outputs(other, x), outputs(model, x), atol=1e-5)
    graph = Graph(other)
    tail = find_tail(graph, graph.producer["c1"], 6, 1)
    assert tail.mean == "m1"
    assert (tail.addend, tail.order) == (("s1_of_s2", (0, 2, 3, 1)) if early else ("s1", (0, 1, 2, 3)))
    curves, results = [], []
    for each in (model, other):
        analysis = couple(Graph(each))
        name = group(analysis, "a0")
        inputs = Calibrated(analysis, [{"x": x}], False).inputs()
        curves.append(loss_curves(Context(analysis, analysis.free, inputs=inputs)).candidates[0][name])
        kept = {group(analysis, "stem"): np.array([0, 1, 3, 4]), name: np.array([1, 2, 5, 7, 8, 10])}
        plan = make_plan(analysis, kept)
        pruned = apply(analysis, plan)
        reconstruct(analysis, plan, pruned, [{"x": x}], FitSettings(producer_rounds=1))
        results.append(outputs(pruned, x))
    np.testing.assert_allclose(*(c.loss for c in curves), rtol=1e-4)
    np.testing.assert_allclose(*results, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_channels_that_others_can_replace_are_reconstructed_without_loss(norm: bool) -> None:
    rng = np.random.default_rng(7)
    model = residual_net(rng, norm=norm)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    for name in ("a0", "a1"):  # channels 3 and 8 are other channels, doubled: so are they behind the Relu
        weights[name][3], weights[name][8] = 2 * weights[name][1], 2 * weights[name][5]
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    analysis = couple(Graph(model))
    x = rng.standard_normal((40, 3, 9, 7)).astype(np.float32)
    kept = np.delete(np.arange(11), [3, 8])
    plan = make_plan(analysis, {group(analysis, "a0"): kept, group(analysis, "a1"): kept})
    pruned = apply(analysis, plan)
    want = outputs(model, x)
    assert np.abs(outputs(pruned, x) - want).max() > 1e-2
    reconstruct(analysis, plan, pruned, [{"x": x[:24]}, {"x": x[24:]}], FitSettings(damping=1e-8))
    np.testing.assert_allclose(outputs(pruned, x), want, atol=2e-4)  # a solve with damping 1e-8 in float32 weights


@pytest.mark.parametrize("bias", [True, False])
def test_reconstruction_brings_every_kind_of_group_nearer_to_the_dense_network(bias: bool) -> None:
    rng = np.random.default_rng(8)
    model = residual_net(rng, bias=bias, norm=bias)
    analysis = couple(Graph(model))
    x = rng.standard_normal((96, 3, 9, 7)).astype(np.float32)
    kept = {g.name: np.sort(rng.permutation(g.size)[: g.size // 2 + 1]) for g in analysis.free}
    plan = make_plan(analysis, kept)
    pruned = apply(analysis, plan)
    want, before = outputs(model, x[64:]), outputs(pruned, x[64:])
    original = model.SerializeToString()
    reconstruct(analysis, plan, pruned, [{"x": x[:64]}])
    onnx.checker.check_model(pruned)
    assert model.SerializeToString() == original
    after = outputs(pruned, x[64:])
    assert np.square(after - want).sum() < 0.5 * np.square(before - want).sum()


def test_batch_statistics_are_those_of_the_inputs_and_leave_the_original_alone() -> None:
    rng = np.random.default_rng(9)
    model = residual_net(rng)
    x = rng.standard_normal((50, 3, 9, 7)).astype(np.float32) * 3
    original = model.SerializeToString()
    twin = with_batch_statistics(Graph(model), [{"x": x[:30]}, {"x": x[30:]}])
    assert twin is not None
    assert model.SerializeToString() == original
    stream = Stream(twin, None, [{"x": x}])
    stream.after(stream.graph.producer["n1"])
    value = stream.live[0]["n1"]
    np.testing.assert_allclose(value.mean(axis=(0, 2, 3)), stream.graph.array("be1"), atol=1e-4)
    np.testing.assert_allclose(value.std(axis=(0, 2, 3)), np.abs(stream.graph.array("g1")), rtol=1e-3)
    assert with_batch_statistics(Graph(residual_net(rng, norm=False)), [{"x": x}]) is None


def test_synthetic_inputs_change_weights_and_biases_but_no_variance() -> None:
    rng = np.random.default_rng(10)
    model = residual_net(rng)
    analysis = couple(Graph(model))
    calibrated = Calibrated(analysis, [{"x": rng.standard_normal((64, 3, 9, 7)).astype(np.float32)}], synthetic=True)
    losses = loss_curves(Context(analysis, analysis.free, inputs=calibrated.inputs())).candidates[0]
    assert set(losses) == {g.name for g in analysis.free}
    choice = allocate(analysis, analysis.free, losses, Budget(0.4, round_to=1))
    plan = make_plan(analysis, choice.kept)
    pruned = apply(analysis, plan)
    before = calibrated.change(pruned).error
    variance = {t.name: t.SerializeToString() for t in pruned.graph.initializer if t.name.startswith("v")}
    calibrated.reconstruct([(plan, pruned)])
    after = calibrated.change(pruned).error
    assert before is not None and after is not None and after < before
    assert variance == {t.name: t.SerializeToString() for t in pruned.graph.initializer if t.name.startswith("v")}


def test_the_allocation_takes_first_what_costs_least_and_meets_the_budget() -> None:
    rng = np.random.default_rng(11)
    analysis = couple(Graph(residual_net(rng)))
    groups = [g for g in analysis.free if g.size == 11]
    cheap, dear = groups
    order = np.arange(11)
    curves = {
        cheap.name: Curve(order, np.linspace(0, 1, 12) ** 2),
        dear.name: Curve(order, 5 * np.linspace(0, 1, 12) ** 2),
    }
    reached = []
    for ratio in (0.1, 0.25, 0.4, 0.6):
        choice = allocate(analysis, groups, curves, Budget(ratio, round_to=1))
        widths = [len(choice.kept.get(g.name, order)) for g in groups]
        assert widths[0] <= widths[1]
        assert abs(choice.reached - ratio) < 0.06  # eleven channels are coarse
        reached.append(choice.reached)
    assert reached == sorted(reached)
    with pytest.raises(PlanError, match="at most"):
        allocate(analysis, groups, curves, Budget(0.99, round_to=1))


def test_scores_become_a_curve_of_shares() -> None:
    curve = Curve.of_scores(np.array([3.0, 1.0, 0.0]))
    assert curve.order.tolist() == [2, 1, 0]
    np.testing.assert_allclose(curve.loss, [0, 0, 0.25, 1])


def test_weights_behind_a_transpose_are_reconstructed_too() -> None:
    rng = np.random.default_rng(13)
    a, b = rng.standard_normal((9, 6)), rng.standard_normal((4, 9))
    a[5] = 3 * a[2]  # behind the Relu, channel 5 is channel 2, tripled
    nodes = [
        helper.make_node("Transpose", ["a"], ["at"]),
        helper.make_node("Transpose", ["b"], ["bt"]),
        helper.make_node("MatMul", ["x", "at"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "bt"], ["m"]),
        helper.make_node("MatMul", ["m", "c"], ["y"]),
    ]
    model = network(nodes, {"a": a, "b": b, "c": rng.standard_normal((4, 3))}, ["n", 6], 2)
    analysis = couple(Graph(model))
    x = rng.standard_normal((500, 6)).astype(np.float32)
    plan = make_plan(analysis, {group(analysis, "a["): np.delete(np.arange(9), 5)})
    pruned = apply(analysis, plan)
    want = outputs(model, x)
    assert np.abs(outputs(pruned, x) - want).max() > 1e-2
    reconstruct(analysis, plan, pruned, [{"x": x[:300]}, {"x": x[300:]}], FitSettings(damping=1e-8))
    np.testing.assert_allclose(outputs(pruned, x), want, atol=1e-3)  # float32 weights, outputs of size 30


def test_changes_are_of_the_inputs_held_out() -> None:
    rng = np.random.default_rng(21)
    analysis = couple(Graph(residual_net(rng)))
    fit, other = ([{"x": rng.standard_normal((n, 3, 9, 7)).astype(np.float32)}] for n in (8, 6))
    group = analysis.free[0]
    pruned = apply(analysis, make_plan(analysis, {group.name: np.arange(1, group.size)}))
    found = Calibrated(analysis, fit, False, held_out=other).change(pruned)
    assert found == Yardstick(analysis.graph, other).change(pruned)
    assert found != Yardstick(analysis.graph, fit).change(pruned)
