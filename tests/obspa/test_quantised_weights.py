"""Layers whose weights are integers: what they are decoded to, how they are scored, and refits on their grid."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.criteria.magnitude import l2
from spa.criteria.parameter import parameters
from spa.model.decoded import constant_behind, decoded_by
from spa.model.graph import Graph
from spa.obspa.affine import find_tail
from spa.obspa.linear import linear, store
from spa.obspa.pipeline import Calibrated
from spa.running.runtime import load_session
from spa.running.stream import Stream
from spa.surgery.apply import apply
from tests.obspa.test_refit import FEW, OWN_INPUTS, arrays, group, ridge, samples
from tests.oracle import Net, random_array

Array = np.ndarray
ROWS = 331
GRIDS = {  # integers, scales, zero points, attributes
    "one scale": ((5, 8), np.uint8, (), True, {}),
    "a scale for each row": ((5, 8), np.int8, (5,), False, {"axis": 0}),
    "a scale for each column": ((5, 8), np.int16, (8,), True, {"axis": 1}),
    "blocks": ((5, 8), np.int8, (5, 2), True, {"axis": 1, "block_size": 4}),
    "a kernel": ((4, 3, 2, 2), np.int8, (4,), True, {"axis": 0}),
}


def integers(shape: tuple[int, ...], dtype: type, seed: int = 3) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng([seed, *shape]).integers(info.min, info.max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("name", GRIDS)
def test_integers_are_decoded_as_onnxruntime_does_and_encoded_again(name: str) -> None:
    shape, dtype, scales, zeros, attributes = GRIDS[name]
    net = Net(opset=21)
    stored = integers(shape, dtype)
    operands = [net.constant(stored, name="w"), net.constant(np.abs(random_array(*scales)).astype(np.float32) + 0.01)]
    if zeros:
        operands.append(net.constant(integers(scales, dtype)))
    floats = net.node("DequantizeLinear", *operands, **attributes)
    model = net.model(net.node("Add", floats, net.input("x", list(shape))))
    graph = Graph(model)
    constant = constant_behind(graph, floats)
    assert constant is not None and not constant.exact and constant.shape(graph) == shape
    value = constant.value(graph)
    (made,) = load_session(model).run(None, {"x": np.zeros(shape, np.float32)})
    np.testing.assert_allclose(value, made, rtol=1e-6)
    np.testing.assert_array_equal(constant.encoded(graph, value), stored)
    far = constant.encoded(graph, np.where(value > 0, 1e9, -1e9))  # the grid's ends
    assert set(np.unique(far).tolist()) <= {np.iinfo(dtype).min, np.iinfo(dtype).max}


def test_four_bit_integers_are_decoded_and_encoded() -> None:
    net = Net(opset=21)
    net.weights["w"] = helper.make_tensor("w", TensorProto.INT4, [3, 4], list(range(-6, 6)))
    floats = net.node("DequantizeLinear", "w", net.constant(np.array([0.5, 1, 2], np.float32)), axis=0)
    graph = Graph(net.model(net.node("MatMul", net.input("x", ["n", 3]), floats)))
    constant = constant_behind(graph, floats)
    assert constant is not None
    expected = np.arange(-6, 6).reshape(3, 4) * np.array([[0.5], [1], [2]])
    np.testing.assert_array_equal(constant.value(graph), expected)
    np.testing.assert_array_equal(constant.encoded(graph, expected).astype(int), np.arange(-6, 6).reshape(3, 4))


def packed(bits: int, zeros: str, outputs: int = 7, inputs: int = 48) -> tuple[Net, str]:
    """A MatMulNBits in blocks of 16; zero points are none, packed as the weights are, or floats."""
    net, blocks, size = Net(com_microsoft=1), inputs // 16, 16 * bits // 8
    x = net.input("x", ["n", inputs])
    operands = [net.constant(integers((outputs, blocks, size), np.uint8), name="w")]
    operands.append(net.constant((0.02 + np.abs(random_array(outputs, blocks)) / 50).astype(np.float32)))
    if zeros == "packed":
        operands.append(net.constant(integers((outputs, -(-blocks * bits // 8)), np.uint8)))
    sizes = {"N": outputs, "K": inputs, "bits": bits, "block_size": 16}
    return net, net.node("MatMulNBits", x, *operands, domain="com.microsoft", **sizes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed"])
def test_packed_integers_are_decoded_as_onnxruntime_does_and_encoded_again(bits: int, zeros: str) -> None:
    net, y = packed(bits, zeros)
    model = net.model(y)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[-1])
    assert lin is not None and lin.size(graph) == (1, 7, 48)
    (columns,) = load_session(model).run(None, {"x": np.eye(48, dtype=np.float32)})
    np.testing.assert_allclose(lin.matrix(graph)[0], columns.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(lin.weights_from(lin.matrix(graph), graph), graph.array("w"))


def layers(bits: int = 8, bias: bool = True) -> ModelProto:
    """x → a → Tanh → d → Tanh → head, with d's weights, and its bias, as integers behind a DequantizeLinear."""
    net = Net(seed=5)
    h = net.node("Tanh", net.gemm(net.input("x", ["n", 5]), 5, 13, name="a"))
    w = random_array(13, 4, fan_in=13)
    scale = (np.abs(w).max(axis=0) / (2 ** (bits - 1) - 1)).astype(np.float32)
    codes = net.constant(np.rint(w / scale).astype(np.int8), name="d")
    operands = [h, net.node("DequantizeLinear", codes, net.constant(scale, name="scale"), axis=1)]
    if bias:
        codes = net.constant(np.array([100, -300, 70, 5], np.int32), name="d.bias")
        step = net.constant(np.full(4, STEP, np.float32), name="bias scale")
        operands.append(net.node("DequantizeLinear", codes, step, axis=0))
    return net.model(net.gemm(net.node("Tanh", net.node("Gemm", *operands)), 4, 3, name="head"))


STEP = 1e-3  # of the bias
KEPT = [0, 2, 3, 6, 7, 8, 11]


def pruned(model: ModelProto, x: Array, kept: list[int] = KEPT) -> dict[str, Array]:
    analysis = couple(Graph(model))
    plan = make_plan(analysis, {group(analysis, "a"): np.array(kept)})
    small = apply(analysis, plan)
    Calibrated(analysis, [{"x": part} for part in np.array_split(x, 3)], False).reconstruct([(plan, small)], "readers")
    return arrays(small)


def test_a_refit_is_the_least_squares_fit_on_the_grid_of_the_integers() -> None:
    x = samples(ROWS, 5)
    model = layers()
    old, new = arrays(model), pruned(model, x)
    h = np.tanh(x @ old["a"].T + old["a.bias"])
    dense, bias = old["d"] * old["scale"], old["d.bias"] * STEP
    w, _ = ridge(h[:, KEPT], h @ dense + bias, dense[KEPT].T, FEW)
    expected = np.rint(w.T / new["scale"])
    changed = (new["d"] != old["d"][KEPT]).any(axis=0)
    assert changed.all()
    assert np.abs(new["d"] - expected).max() <= 1  # rounding may tip
    assert (new["d"] == expected).mean() > 0.9
    stored = new["d"] * new["scale"]
    mean = (h @ dense + bias).mean(axis=0) - h[:, KEPT].mean(axis=0) @ stored
    np.testing.assert_allclose(new["d.bias"] * new["bias scale"], mean, atol=6e-4)

    own, was = np.tanh(h[:, KEPT] @ stored + new["d.bias"] * new["bias scale"]), np.tanh(h @ dense + bias)
    w, _ = ridge(was + OWN_INPUTS * (own - was), was @ old["head"].T + old["head.bias"], old["head"], FEW)
    np.testing.assert_allclose(new["head"], w, atol=1e-4)
    assert np.abs(new["head"] - old["head"]).max() > 1e-3


def test_scales_grow_where_a_fit_would_be_cut_off_and_those_of_the_bias_with_them() -> None:
    x, kept = samples(ROWS, 5), [0, 6, 9]
    model = layers()
    old, new = arrays(model), pruned(model, x, kept)
    h = np.tanh(x @ old["a"].T + old["a.bias"])
    dense, bias = old["d"] * old["scale"], old["d.bias"] * STEP
    w, _ = ridge(h[:, kept], h @ dense + bias, dense[kept].T, FEW)
    needed = np.abs(w.T / old["scale"]).max(axis=0) / 127
    assert (needed > 1.05).any() and (needed < 1).any()
    growth = new["scale"] / old["scale"]
    np.testing.assert_allclose(growth, np.maximum(needed, 1), rtol=0.01)  # −128 is on the grid, too
    np.testing.assert_allclose(new["bias scale"] / STEP, growth, rtol=1e-5)
    assert (np.abs(new["d"] * new["scale"] - w.T) < 0.6 * new["scale"]).all()
    mean = (h @ dense + bias).mean(axis=0) - h[:, kept].mean(axis=0) @ (new["d"] * new["scale"])
    np.testing.assert_allclose(new["d.bias"] * new["bias scale"], mean, atol=STEP * growth.max())


def test_a_bias_keeps_its_values_where_its_scales_grow() -> None:
    stream = Stream(layers(), None, [{"x": samples(4, 5)}])
    lin = next(
        lin for n in stream.graph.nodes if n.op == "Gemm" and (lin := linear(stream.graph, n)) and lin.weight == "d"
    )
    assert lin.added is not None
    before = lin.added.value(stream.graph)
    store(stream, lin, 3 * lin.matrix(stream.graph))
    np.testing.assert_allclose(stream.graph.array("bias scale"), 3 * STEP, rtol=0.02)
    np.testing.assert_allclose(lin.added.value(stream.graph), before, atol=2 * STEP)
    assert before.max() > 50 * STEP


def test_scales_that_others_read_stay() -> None:
    model = layers()
    graph = Graph(model)
    for node in model.graph.node:  # the bias's scale is that of the weights
        for place, name in enumerate(node.input):
            if name == "bias scale":
                node.input[place] = "scale"
    new = pruned(model, samples(ROWS, 5), [0, 6, 9])
    np.testing.assert_array_equal(new["scale"], graph.array("scale"))
    assert np.abs(new["d"]).max() >= 127


def test_an_output_keeps_its_weights_where_the_rounded_fit_is_farther_from_the_fit() -> None:
    x = samples(ROWS, 5)
    model, kept = layers(bits=4, bias=False), list(range(1, 13))
    old, new = arrays(model), pruned(model, x, kept)
    h = np.tanh(x @ old["a"].T + old["a.bias"])
    dense = old["d"] * old["scale"]
    few = h[:, kept]
    more = FEW * 0.03 * (1 + 10 * len(kept) / ROWS) * np.square(few).mean()  # no bias: about zero
    left = few.T @ few / ROWS + more * np.eye(len(kept))
    fit = np.linalg.solve(left, few.T @ (h @ dense) / ROWS + more * dense[kept])
    rounded = np.clip(np.rint(fit / old["scale"]), -128, 127) * old["scale"]
    far, near = (np.square(few @ (part - fit)).mean(axis=0) for part in (rounded, dense[kept]))
    assert (far > near).any() and (far < near).any()
    expected = np.where(far >= near, dense[kept], rounded)
    np.testing.assert_allclose(new["d"] * old["scale"], expected, atol=1e-6)


def test_no_float_bias_is_put_beside_integer_weights() -> None:
    """With one the layer would not run as integers any more."""
    model = layers(bias=False)
    assert pruned(model, samples(ROWS, 5)).keys() == arrays(model).keys()


def test_layers_that_no_fit_reaches_are_named() -> None:
    net = Net(seed=1)
    step, zero = net.constant(np.float32(0.02)), net.constant(np.uint8(128))
    x = net.node("QuantizeLinear", net.node("Relu", net.gemm(net.input("x", ["n", 4]), 4, 6)), step, zero)
    weights = [net.constant(integers((6, 5), np.int8)), net.constant(np.float32(0.01)), net.constant(np.int8(0))]
    y = net.node("QLinearMatMul", x, step, zero, *weights, step, zero, name="whole")
    model = net.model(net.gemm(net.node("DequantizeLinear", y, step, zero), 5, 2))
    notes = Calibrated(couple(Graph(model)), [{"x": samples(8, 4)}], True).notes()
    (told,) = [note for note in notes if "not refitted" in note]
    assert "the weights of QLinearMatMul 'whole' are" in told
    model = layers()
    assert not Calibrated(couple(Graph(model)), [{"x": samples(8, 5)}], True).notes()


def test_scores_are_those_of_the_decoded_weights() -> None:
    """Rows of one size as integers, whose scales differ."""
    net, rows = Net(), np.array([4.0, 1.0, 3.0, 2.0, 5.0], np.float32)
    codes = net.constant(np.full((5, 3), 100, np.uint8), name="w")
    zeros = net.constant(np.full(5, 90, np.uint8))
    floats = net.node("DequantizeLinear", codes, net.constant(rows), zeros, axis=0)
    h = net.node("Relu", net.node("Gemm", net.input("x", ["n", 3]), floats, transB=1))
    analysis = couple(Graph(net.model(net.node("Softmax", net.gemm(h, 5, 2)))))
    first = next(g for g in analysis.free if g.size == 5)
    (parameter,) = (p for p in parameters(analysis, first) if p.name == "w")
    np.testing.assert_allclose(l2(parameter), 300 * np.square(rows), rtol=1e-6)
    np.testing.assert_allclose(parameter.load(), np.broadcast_to(10 * rows[:, None], (5, 3)))


def test_scores_of_packed_weights_are_those_of_the_matrix() -> None:
    net, y = packed(4, "packed")
    analysis = couple(Graph(net.model(net.node("Softmax", net.gemm(net.node("Relu", y), 7, 2)))))
    first = next(g for g in analysis.free if g.size == 7)
    (parameter,) = (p for p in parameters(analysis, first) if p.name == "w")
    coded = decoded_by(analysis.graph, analysis.graph.nodes[0], 1)
    assert coded is not None
    np.testing.assert_allclose(l2(parameter), np.square(coded.value(analysis.graph)).sum(axis=1), rtol=1e-5)


def test_a_quantised_residual_network_survives_the_loss_of_half_its_channels() -> None:
    """Every activation is rounded to a byte; the skip and what is added to it are, too."""
    rng = np.random.default_rng(0)
    net = Net(seed=2)

    def rounded(y: str, scale: float) -> str:
        step, zero = net.constant(np.float32(scale)), net.constant(np.uint8(128))
        return net.node("DequantizeLinear", net.node("QuantizeLinear", y, step, zero), step, zero)

    def conv(y: str, inputs: int, outputs: int, rank: int) -> str:
        w = rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, inputs * 9)) / np.sqrt(rank * inputs * 9)
        scale = (np.abs(w).max(axis=1) / 127).astype(np.float32)
        codes = net.constant(np.rint(w / scale[:, None]).reshape(outputs, inputs, 3, 3).astype(np.int8))
        weights = net.node("DequantizeLinear", codes, net.constant(scale), axis=0)
        bias = net.node("DequantizeLinear", net.constant(np.zeros(outputs, np.int32)), net.constant(np.float32(1e-3)))
        return net.node("Conv", y, weights, bias, pads=[1] * 4)

    x = rounded(net.input("x", ["n", 3, 6, 6]), 0.03)
    skip = rounded(conv(x, 3, 8, 8), 0.03)
    hidden = rounded(conv(skip, 8, 24, 5), 0.03)  # 24 channels that span five dimensions, and no bend between
    y = rounded(net.node("Add", rounded(conv(hidden, 24, 8, 8), 0.05), skip), 0.06)
    model = net.model(net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", y))))
    analysis = couple(Graph(model))
    last = [n for n in analysis.graph.nodes if n.op == "Conv"][-1]
    assert find_tail(analysis.graph, last, 8, 1).addend == skip  # rounding in between counts as nothing
    wide = next(g for g in analysis.free if g.size == 24)
    plan = make_plan(analysis, {wide.name: np.arange(0, 24, 2)})
    small = apply(analysis, plan)
    batch = {"x": rng.standard_normal((128, 3, 6, 6)).astype(np.float32)}
    calibrated = Calibrated(analysis, [batch], False)
    before = calibrated.change(small).error
    calibrated.reconstruct([(plan, small)])
    after = calibrated.change(small).error
    assert before is not None and after is not None
    assert after < before / 20
    for tensor in small.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            assert numpy_helper.to_array(tensor).dtype == np.int8
