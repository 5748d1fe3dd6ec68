"""Two networks of which data decides which one runs are pruned side by side, and come back as one with an If."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa.model.alternatives import condition_of, reunited
from spa.model.extents import guesses
from spa.model.io import Source
from spa.model.simplify import simplified
from spa.running.runtime import load_session
from spa.surgery.masking import masked
from tests.fuzz.mutants import _complete
from tests.oracle import distance, random_array

TEXT = """
    net (float[n,7] x, int64 rate) => (float[n,5] y, float[n,3] z) {
        before = MatMul(x, w7x19)
        r = Relu(before)
        fast = Equal(rate, limit)
        m, z = If(fast) <
            then_branch = quick () => (float[n,11] p, float[n,3] pz) {
                a = MatMul(r, w19x61) t = Tanh(a) p = MatMul(t, w61x11) pz = MatMul(t, w61x3) },
            else_branch = slow () => (float[n,11] q, float[n,3] qz) {
                a = MatMul(r, w19x61) k = Sigmoid(a) b = MatMul(k, w61x23) l = Neg(b) q = MatMul(l, w23x11)
                qz = MatMul(k, w61x3) }
        >
        s = Relu(m)
        y = MatMul(s, w11x5)
    }"""


def two(text: str = TEXT) -> ModelProto:
    model = _complete(onnx.parser.parse_graph(text))
    if "limit" in text:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(16), "limit"))
    return model


def outputs(model: ModelProto, x: np.ndarray, rate: int) -> list[np.ndarray]:
    return load_session(model).run(None, {"x": x, "rate": np.asarray(rate)})


def test_taken_apart_and_put_together_it_computes_the_same() -> None:
    model, x = two(), random_array(4, 7)
    before = model.SerializeToString()
    both = simplified(Source(model)).model
    assert [i.name for i in both.graph.input] == ["x@then", "x@else"]
    assert [o.name for o in both.graph.output] == ["y@then", "z@then", "y@else", "z@else"]
    assert condition_of(both) == "fast"
    whole = reunited(both)
    onnx.checker.check_model(whole, full_check=True)
    assert (whole.graph.input, whole.graph.output) == (model.graph.input, model.graph.output)
    assert not whole.metadata_props
    for rate in (16, 17):
        assert all(np.array_equal(a, b) for a, b in zip(outputs(whole, x, rate), outputs(model, x, rate), strict=True))
    assert model.SerializeToString() == before
    assert condition_of(model) is None
    assert reunited(model) is model


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_either_network_is_the_masked_original(tmp_path: Path, criterion: str) -> None:
    result = spa.prune(two(), criterion=criterion, ratio=0.4, round_to=1, ranking="uniform")
    assert {"w19x61[0]", "w19x61[1]", "w61x23[1]", "w23x11[1]"} <= result.plan.kept.keys()  # before, inside, behind
    assert result.prove().holds
    original, x = masked(result.analysis, result.plan), random_array(4, 7)
    expected = load_session(original).run(None, {"x@then": x, "x@else": x})
    for rate, wanted in ((16, expected[:2]), (17, expected[2:])):
        found = outputs(result.model, x, rate)
        assert all(distance(a, b) <= 1e-6 for a, b in zip(found, wanted, strict=True))
    assert distance(expected[0], expected[2]) > 0.01
    assert any("'fast' decides which one runs" in note for note in result.report.notes)
    result.save(tmp_path / "small.onnx")
    assert [i.name for i in onnx.load(tmp_path / "small.onnx").graph.input] == ["x", "rate"]


def test_large_weights_of_both_stay_one() -> None:
    result = spa.prune(two(), criterion="l2", ratio=0.3, round_to=1, ranking="uniform")
    stored = [t for t in result.model.graph.initializer if t.name.startswith("w19x61")]
    kept = result.plan.kept
    assert [tuple(t.dims) for t in stored] == [(len(kept["w19x61[0]"]), len(kept["w19x61[1]"]))]


def test_a_flag_that_is_an_input_decides() -> None:
    text = TEXT.replace("int64 rate", "bool[1] fast").replace("fast = Equal(rate, limit)", "")
    result = spa.prune(two(text), ratio=0.3, samples=32, round_to=1)
    assert result.prove().holds
    assert [i.name for i in result.model.graph.input] == ["x", "fast"]
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.calibration is not None


def test_what_decides_and_is_read_by_one_network_alone_has_two_names() -> None:
    text = TEXT.replace("fast = Equal(rate, limit)", "e = Cast<to=1>(rate) d = Cast<to=7>(e) fast = Equal(d, limit)")
    text = text.replace("p = MatMul(t, w61x11)", "u = Mul(t, e) p = MatMul(u, w61x11)")
    model, x = two(text), random_array(4, 7)
    whole = reunited(simplified(Source(model)).model)
    onnx.checker.check_model(whole, full_check=True)
    assert len({name for node in whole.graph.node for name in node.output}) == 5
    for rate in (16, 17):
        assert all(np.array_equal(a, b) for a, b in zip(outputs(whole, x, rate), outputs(model, x, rate), strict=True))


def of_weights(model: ModelProto) -> None:
    """Let a network decide."""
    model.graph.node[2].CopyFrom(helper.make_node("ReduceMax", ["r"], ["most"], keepdims=0))
    model.graph.node.insert(3, helper.make_node("Cast", ["most"], ["fast"], to=TensorProto.BOOL))
    model.graph.initializer.add().CopyFrom(numpy_helper.from_array(np.ones((19, 61), np.float32), "w"))
    model.graph.node.insert(2, helper.make_node("MatMul", ["r", "w"], ["r2"]))
    model.graph.node[3].input[0] = "r2"


def of_old_files(model: ModelProto) -> None:
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )


def that_gives_its_condition(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("fast", TensorProto.BOOL, []))


def whose_names_are_taken(model: ModelProto) -> None:
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "before@then"


def without_weights_inside(model: ModelProto) -> None:
    branches = model.graph.node[3].attribute
    for branch in branches:
        outputs = [o.name for o in branch.g.output]
        del branch.g.node[:]
        branch.g.node.append(helper.make_node("Identity", ["r"], outputs[:1]))
        branch.g.node.append(helper.make_node("Neg", ["r"], outputs[1:]))
        for output in branch.g.output:
            output.type.tensor_type.shape.dim[1].dim_value = 19
    del model.graph.output[1:]
    model.graph.node[5].input[1] = "w19x5"
    model.graph.initializer.append(numpy_helper.from_array(np.ones((19, 5), np.float32), "w19x5"))


@pytest.mark.parametrize(
    "change",
    [of_weights, of_old_files, that_gives_its_condition, whose_names_are_taken, without_weights_inside],
)
def test_models_that_are_left_as_they_are(change: object) -> None:
    model = two()
    change(model)  # type: ignore[operator]
    load_session(model)
    assert condition_of(simplified(Source(model)).model) is None


def test_each_network_has_its_own_sizes() -> None:
    text = """
        net (float[n,1,t] x, int64 rate) => (float[n,5,u] y) {
            fast = Equal(rate, limit)
            y = If(fast) <
                then_branch = quick () => (float[n,5,u] p) { p = Conv<strides=[16]>(x, w5x1x160) },
                else_branch = slow () => (float[n,5,u] q) { q = Conv<strides=[4]>(x, w5x1x64) }
            >
        }"""
    both = simplified(Source(two(text))).model
    guess = guesses(both)[0]
    assert (guess.of("x@then").series, guess.of("x@else").series) == (1024, 256)
    assert guesses(two(text))[0].halves == ()


def test_the_steps_give_one_network() -> None:
    analysis = spa.analyze(two())
    plan = spa.plan(analysis, spa.score(analysis, criterion="l2"), ratio=0.3, round_to=1)
    pruned = spa.apply(analysis, plan)
    repaired = spa.repair(analysis, plan, pruned, samples=64)
    for model in (pruned, repaired):
        assert [i.name for i in model.graph.input] == ["x", "rate"]
    x = random_array(4, 7)
    assert distance(outputs(pruned, x, 16)[0], outputs(repaired, x, 16)[0]) > 1e-3
    same = spa.repair(analysis, plan, pruned, reconstruct="none")
    assert np.array_equal(outputs(same, x, 17)[0], outputs(pruned, x, 17)[0])


def test_a_metric_measures_one_network() -> None:
    seen = []

    def metric(path: str) -> float:
        seen.append([i.name for i in onnx.load(path).graph.input])
        return 1.0

    spa.prune(two(), criterion="l2", ratio=0.3, round_to=1, evaluate=metric)
    assert seen == [["x", "rate"]] * 2
