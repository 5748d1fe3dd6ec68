from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.importers import _tidy
from spa.importers._tidy import rename, tidy
from spa.running.runtime import load_session, run

FLOAT = TensorProto.FLOAT


def model_of(text: str) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}')


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def answer(model: ModelProto) -> list[np.ndarray]:
    return run(load_session(model), {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})


def checked(model: ModelProto, parameters: tuple[str, ...] = ()) -> ModelProto:
    """The tidy model, which computes the same."""
    before = answer(model)
    tidied = tidy(model, parameters)
    onnx.checker.check_model(tidied, full_check=True)
    for a, b in zip(before, answer(tidied), strict=True):
        np.testing.assert_array_equal(a, b)
    return tidied


def test_merged_parameters_become_initializers_of_their_own() -> None:
    model = checked(
        model_of("""m (float[2, 3] x) => (float[2, 3] y) <float[3] a = {1, 2, 3}> {
            b = Identity(a)
            c = Identity(b)
            u = Add(x, a)
            v = Mul(u, b)
            y = Sub(v, c)
        }"""),
        ("a", "b"),
    )
    assert operators(model) == ["Add", "Mul", "Sub"]
    assert [t.name for t in model.graph.initializer] == ["a", "b"]
    assert list(model.graph.node[2].input) == ["v", "b"]


def test_identities_go_unless_they_make_an_output_of_what_has_a_name() -> None:
    model = checked(
        model_of("""m (float[2, 3] x) => (float[2, 3] y, float[2, 3] z, float[2, 3] same, float[3] p)
        <float[3] a = {1, 2, 3}> {
            inner = Add(x, a)
            copy = Identity(inner)
            y = Identity(copy)
            z = Identity(inner)
            same = Identity(x)
            p = Identity(a)
        }""")
    )
    assert operators(model) == ["Add", "Identity", "Identity", "Identity"]
    assert list(model.graph.node[0].output) == ["y"]
    assert [n.input[0] for n in model.graph.node[1:]] == ["y", "x", "a"]


def test_identities_that_subgraphs_read_go() -> None:
    model = checked(
        model_of("""m (float[2, 3] x) => (float[2, 3] y) <bool yes = {1}, float[3] a = {1, 2, 3}> {
            copy = Identity(x)
            y = If(yes) <then_branch = t () => (float[2, 3] q) {q = Add(copy, a)},
                         else_branch = e () => (float[2, 3] r) {r = Identity(copy)}>
        }""")
    )
    assert operators(model) == ["If"]


def test_what_is_made_of_constants_alone_is_a_constant_and_what_is_made_of_parameters_is_not() -> None:
    model = checked(
        model_of("""m (float[2, 3] x) => (float[1, 6] y) <float[3] a = {1, 2, 3}> {
            one = Constant <value_ints = [1]> ()
            two = Constant <value_ints = [2]> ()
            three = Add(one, two)
            six = Mul(three, two)
            shape = Concat <axis = 0> (one, six)
            flat = Reshape(x, shape)
            size = Shape(a)
            twice = Concat <axis = 0> (one, size)
            wide = Expand(a, twice)
            both = Concat <axis = 1> (wide, wide)
            y = Add(flat, both)
        }""")
    )
    assert operators(model) == ["Constant", "Constant", "Reshape", "Shape", "Concat", "Expand", "Concat", "Add"]
    shape = next(n for n in model.graph.node if n.output[0] == "shape")
    np.testing.assert_array_equal(numpy_helper.to_array(shape.attribute[0].t), [1, 6])


def test_biases_of_zeros_that_are_expanded_to_a_weights_size_go_and_others_stay() -> None:
    model = checked(
        model_of("""m (float[2, 3] x) => (float[2, 2, 1] y, float[2, 2, 1] z) <float[2, 3, 1] w = {1, 2, 3, 4, 5, 6}> {
            axis = Constant <value_ints = [2]> ()
            wide = Unsqueeze(x, axis)
            size = Shape <end = 1> (w)
            zero = Constant <value_float = 0.0> ()
            nought = CastLike(zero, x)
            none = Expand(nought, size)
            y = Conv(wide, w, none)
            one = Constant <value_float = 1.0> ()
            some = Expand(one, size)
            z = Conv(wide, w, some)
        }""")
    )
    assert [len(n.input) for n in model.graph.node if n.op_type == "Conv"] == [2, 3]
    assert "CastLike" not in operators(model)


def test_large_constants_are_computed_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tidy, "LARGEST_CONSTANT", 16)
    model = checked(
        model_of("""m (float[2, 3] x) => (float[2, 3] y) {
            two = Constant <value_ints = [2]> ()
            three = Constant <value_ints = [3]> ()
            shape = Concat <axis = 0> (two, three)
            big = ConstantOfShape(shape)
            y = Add(x, big)
        }""")
    )
    assert operators(model) == ["Constant", "ConstantOfShape", "Add"]


def test_what_no_output_needs_goes_with_remarks_and_inner_shapes() -> None:
    model = model_of("""m (float[2, 3] x) => (float[2, 3] y) <float[3] a = {1, 2, 3}, float[3] b = {1, 2, 3}, float[2, 3] u> {
        u = Add(x, a)
        lost = Mul(x, b)
        y = Relu(u)
    }""")
    model.graph.node[0].doc_string = "File /home/someone/net.py, line 3"
    model.graph.node[0].metadata_props.add(key="stack_trace", value="/home/someone/net.py")
    model.graph.initializer[0].metadata_props.add(key="name", value="/home/someone/net.py")
    model = checked(model)
    assert operators(model) == ["Add", "Relu"]
    assert [t.name for t in model.graph.initializer] == ["a"]
    assert not model.graph.value_info
    assert b"someone" not in model.SerializeToString()


def test_names_that_are_taken_give_way() -> None:
    model = model_of("""m (float[2, 3] x) => (float[2, 3] y) <bool yes = {1}, float[3] a = {1, 2, 3}> {
        b = Add(x, a)
        b_1 = Relu(b)
        y = If(yes) <then_branch = t () => (float[2, 3] q) {q = Add(b_1, a)},
                     else_branch = e () => (float[2, 3] r) {r = Sub(b, a)}>
    }""")
    before = answer(model)
    rename(model, {"a": "b", "y": "x", "x": "y"})
    assert [i.name for i in model.graph.input] == ["y"]
    assert [o.name for o in model.graph.output] == ["x"]
    assert [t.name for t in model.graph.initializer] == ["yes", "b"]
    assert model.graph.node[0].output[0] not in ("b", "b_1")
    feeds = {"y": np.arange(6, dtype=np.float32).reshape(2, 3)}
    np.testing.assert_array_equal(run(load_session(model), feeds)[0], before[0])


def test_chance_is_not_folded() -> None:
    node = helper.make_node("Bernoulli", ["half"], ["drawn"])
    model = model_of("""m (float[2, 3] x) => (float[2, 3] y) {
        half = Constant <value_floats = [0.5, 0.5, 0.5]> ()
        y = Add(x, drawn)
    }""")
    model.graph.node.insert(1, node)
    assert operators(tidy(model)) == ["Constant", "Bernoulli", "Add"]
