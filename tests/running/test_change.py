"""The change of outputs: compared before a last softmax or sigmoid, and by the decisions that are read from them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.coupling.analysis import couple
from spa.model.graph import Graph
from spa.obspa.pipeline import Calibrated
from spa.running.change import Compared, Yardstick, classes_seen, compared_tensors, relative_error
from tests.oracle import Net

WEIGHTS = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [1, 1, 0]], np.float32)


def network(*tail: tuple[str, dict[str, object]], weights: np.ndarray = WEIGHTS, opset: int = 17) -> ModelProto:
    """Return x W, followed by operators of one input; its tensors are t0, t1 …, and y."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t0"])]
    for at, (op, attributes) in enumerate(tail):
        name = "y" if at == len(tail) - 1 else f"t{at + 1}"
        constants = [c for c in ("shape",) if op == "Reshape"]
        nodes.append(helper.make_node(op, [f"t{at}", *constants], [name], **attributes))
    if not tail:
        nodes[0].output[0] = "y"
    initializers = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([-1, 3, 1]), "shape")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    used = [t for t in initializers if any(t.name in n.input for n in nodes)]
    graph = helper.make_graph(nodes, "g", [x], [y], used)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def inputs(seed: int = 0, samples: int = 40) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(seed).standard_normal((samples, 4)).astype(np.float32)
    return [{"x": x[: samples // 2]}, {"x": x[samples // 2 :]}]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ((), Compared("y", "y")),
        ((("Relu", {}),), Compared("y", "y")),
        ((("Softmax", {"axis": 1}),), Compared("y", "t0", "softmax", 1)),
        ((("LogSoftmax", {}),), Compared("y", "t0", "softmax", -1)),
        ((("Sigmoid", {}),), Compared("y", "t0", "sigmoid")),
        (
            (("Relu", {}), ("Sigmoid", {}), ("Reshape", {}), ("Transpose", {}), ("Identity", {})),
            Compared("y", "t1", "sigmoid"),
        ),
        ((("Sigmoid", {}), ("Relu", {})), Compared("y", "y")),
    ],
)
def test_outputs_are_compared_before_their_last_softmax_or_sigmoid(tail: tuple, expected: Compared) -> None:
    assert compared_tensors(Graph(network(*tail))) == (expected,)


def test_before_opset_13_a_softmax_is_over_the_second_axis_by_default() -> None:
    assert compared_tensors(Graph(network(("Softmax", {}), opset=11)))[0].axis == 1


def test_a_saturated_probability_hides_nothing() -> None:
    saturated = WEIGHTS * 40
    change = Yardstick(Graph(network(("Sigmoid", {}), weights=saturated)), inputs()).change(
        network(("Sigmoid", {}), weights=saturated * 0.5)
    )
    assert change.error is not None
    assert change.error == pytest.approx(0.25, rel=0.1)  # (1 - 0.5)² of the logits; of the probabilities almost 0
    assert change.agreement == {"y": 1.0}


def test_what_a_softmax_is_blind_to_is_no_change() -> None:
    dense = Yardstick(Graph(network(("Softmax", {"axis": -1}))), inputs())
    same = dense.change(
        network(("Softmax", {"axis": -1}), weights=WEIGHTS + np.array([[7], [0], [-2], [1]], np.float32))
    )
    assert same.error is not None
    assert same.error < 1e-10
    assert same.agreement == {"y": 1.0}


def test_agreement_counts_equal_top_classes() -> None:
    dense = Yardstick(Graph(network(("Softmax", {"axis": -1}))), inputs())
    swapped = dense.change(network(("Softmax", {"axis": -1}), weights=WEIGHTS[:, [1, 0, 2]]))
    x = np.concatenate([b["x"] for b in inputs()])
    expected = np.mean((x @ WEIGHTS).argmax(1) == (x @ WEIGHTS[:, [1, 0, 2]]).argmax(1))
    assert swapped.agreement["y"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_the_overlap_of_entries_above_one_half_is_dices() -> None:
    dense = Yardstick(Graph(network(("Sigmoid", {}))), inputs())
    other = WEIGHTS[:, [1, 0, 2]]
    x = np.concatenate([b["x"] for b in inputs()])
    a, b = x @ WEIGHTS > 0, x @ other > 0
    expected = 2 * (a & b).sum() / (a.sum() + b.sum())
    assert dense.change(network(("Sigmoid", {}), weights=other)).agreement["y"] == pytest.approx(expected)


def test_the_error_is_relative_to_the_variance_over_the_samples() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((200, 3)) * 2 + 100
    assert relative_error([(a[:90], a[:90] + 1), (a[90:], a[90:] + 1)]) == pytest.approx(1 / a.var(axis=0).mean())
    constant = np.ones((5, 3))
    assert relative_error([(constant, constant + 1)]) == 15  # nothing to be relative to


def test_outputs_of_several_lengths_are_compared() -> None:
    rng = np.random.default_rng(2)
    short, long = rng.standard_normal((4, 3, 2)), rng.standard_normal((4, 9, 2))
    everything = np.concatenate([short.ravel(), long.ravel()])
    expected = everything.size * 0.01 / np.square(everything - everything.mean()).sum()
    assert relative_error([(short, short + 0.1), (long, long + 0.1)]) == pytest.approx(expected)


def test_outputs_that_hardly_differ_between_inputs_are_named() -> None:
    assert Yardstick(Graph(network()), inputs()).unvarying == ()
    same = [{"x": np.ones((6, 4), np.float32)}]
    assert Yardstick(Graph(network()), same).unvarying == ("y",)


def test_top_classes_that_the_inputs_show() -> None:
    model = network(("Softmax", {"axis": -1}))
    x = np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32)
    seen, classes = classes_seen(Graph(model), [{"x": x[:1]}, {"x": x[1:]}])["y"]
    assert seen.tolist() == [0, 2]
    assert classes == 3


@pytest.mark.parametrize(("synthetic", "named"), [(False, True), (True, False)])
def test_classes_that_given_inputs_never_show_are_named(synthetic: bool, named: bool) -> None:
    x = np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32)
    notes = Calibrated(couple(Graph(network(("Softmax", {"axis": -1})))), [{"x": x}], synthetic).notes()
    assert any(note.startswith("1 of the 3 classes of output 'y' (1) are never") for note in notes) == named


def test_outputs_that_do_not_vary_are_said_once_they_were_compared() -> None:
    model = network()
    calibrated = Calibrated(couple(Graph(model)), [{"x": np.ones((6, 4), np.float32)}], True)
    assert calibrated.notes() == ()
    calibrated.change(model)
    assert [note for note in calibrated.notes() if note.startswith("output 'y' hardly differs")]


def test_values_that_are_not_finite_are_equal_or_an_infinite_error() -> None:
    dense = np.asarray([[1.0, -np.inf, 3.0], [2.0, -np.inf, np.nan]])
    near = dense.copy()
    near[0, 0] = 1.5
    assert relative_error([(dense, dense)]) == 0
    assert 0 < relative_error([(dense, near)]) < 1
    for value in (0.0, np.inf, np.nan):
        other = dense.copy()
        other[0, 1] = value
        assert relative_error([(dense, other)]) == np.inf


def test_memory_does_not_grow_with_the_samples_of_a_large_output() -> None:
    """A text recogniser's head: steps times thousands of classes for each sample, held one batch at a time."""
    net = Net()
    h = net.node("Relu", net.conv(net.input("x", ["n", 5, 40]), 5, 8, (1,)))
    logits = net.matmul(net.node("Transpose", h, perm=[0, 2, 1]), 8, 3001)
    model = net.model(net.node("Softmax", logits, axis=-1))
    peaks = []
    for count in (4, 16):
        rng = np.random.default_rng(count)
        batches = [{"x": rng.standard_normal((4, 5, 40)).astype(np.float32)} for _ in range(count)]
        tracemalloc.start()
        try:
            yardstick = Yardstick(Graph(model), batches)
            assert yardstick.change(model).error == 0 and not yardstick.unvarying
            assert [n for _, n in classes_seen(Graph(model), batches).values()] == [3001]
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 16e6, peaks  # of 4 samples times 40 times 3001 in double precision, 4 MB, some copies
