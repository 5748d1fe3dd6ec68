from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa.errors import ModelError, PlanError, UnreadableError, UnsupportedError
from spa.running.verify import verify

module = sys.modules["spa.running.verify"]

F, F16, D, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64


def value(name: str, dtype: int, shape: list | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs, outputs, initializers=()) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in dict(initializers).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


WEIGHT = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def linear(weight: np.ndarray = WEIGHT, *, x: str = "x", y: str = "y", rows: int | str = "batch") -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", [x, "w"], [y])]
    return model(nodes, [value(x, F, [rows, 3])], [value(y, F, [rows, weight.shape[1]])], {"w": weight})


def unary(*operators: str, dtype: int = F, out: int | None = None, **attributes) -> onnx.ModelProto:
    """x → the operators, in a chain → y, over an axis of 7."""
    names = ["x", *(f"t{at}" for at in range(len(operators) - 1)), "y"]
    nodes = [helper.make_node(op, [names[at]], [names[at + 1]]) for at, op in enumerate(operators)]
    nodes[-1].attribute.extend(helper.make_attribute(key, given) for key, given in attributes.items())
    return model(nodes, [value("x", dtype, [2, 7])], [value("y", out or dtype, [2, 7])])


# -- outputs ---------------------------------------------------------------------------------------------


def test_a_model_equals_itself():
    report = verify(linear(), linear(), atol=0, rtol=0)
    (y,) = report.outputs
    assert report.same_interface
    assert report.interface == ()
    assert report.equal is True
    assert (y.max_abs_diff, y.relative_l2, y.nan_a, y.nan_b, y.equal) == (0.0, 0.0, 0, 0, True)
    assert y.cosine == pytest.approx(1, abs=1e-12)
    assert (y.shape_a, y.shape_b, y.dtype_a, y.dtype_b) == ((2, 5), (2, 5), "float32", "float32")
    assert report.seeds == (0, 1, 2)
    assert report.inputs == {"x": (2, 3)}


def test_one_wrong_weight_is_found_and_measured():
    wrong = WEIGHT.copy()
    wrong[1, 2] += 0.25
    x = np.array([[1, 2, 3]], np.float32)
    report = verify(linear(), linear(wrong), feeds=[{"x": x}], atol=1e-5)
    (y,) = report.outputs
    assert report.same_interface
    assert report.equal is False
    assert y.equal is False
    assert y.max_abs_diff == pytest.approx(0.5, rel=1e-5)
    assert y.relative_l2 == pytest.approx(0.5 / np.linalg.norm(x @ WEIGHT), rel=1e-5)
    a, b = (x @ WEIGHT)[0], (x @ wrong)[0]
    assert y.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)


def test_a_difference_at_any_seed_is_found():
    # They differ only where x > 1.5: somewhere among 20 seeds of 14 values, not at every one.
    clip = model(
        [helper.make_node("Clip", ["x", "", "top"], ["y"])],
        [value("x", F, [2, 7])],
        [value("y", F, [2, 7])],
        {"top": np.array(1.5, np.float32)},
    )
    single = [verify(unary("Identity"), clip, seeds=1, seed=seed).max_abs_diff for seed in range(20)]
    assert min(single) == 0.0
    assert verify(unary("Identity"), clip, seeds=20).max_abs_diff == max(single) > 0.0


def test_without_a_tolerance_nothing_is_called_equal():
    report = verify(linear(), linear())
    assert report.equal is None
    assert report.outputs[0].equal is None


@pytest.mark.parametrize(
    ("tolerance", "equal"),
    [({"atol": 0.011}, True), ({"atol": 0.009}, False), ({"rtol": 0.0011}, True), ({"rtol": 0.0009}, False)],
)
def test_tolerances_are_absolute_and_relative_to_the_first(tolerance, equal):
    feeds = [{"x": np.array([[10, 0, 0]], np.float32)}]
    a, b = (linear(np.full((3, 1), scale, np.float32)) for scale in (1.0, 1.001))
    report = verify(a, b, feeds=feeds, **tolerance)
    assert report.equal is equal
    assert report.outputs[0].max_abs_diff == pytest.approx(0.01, rel=1e-3)


def test_a_nan_in_one_model_is_an_infinite_difference():
    # log of a negative number; the inputs of seed 0 have some.
    report = verify(unary("Identity"), unary("Log"), atol=1e9)
    (y,) = report.outputs
    assert y.nan_a == 0
    assert y.nan_b > 0
    assert y.max_abs_diff == math.inf
    assert y.relative_l2 == math.inf
    assert report.equal is False


def test_the_same_nans_in_both_are_counted_and_equal():
    report = verify(unary("Log"), unary("Log"), atol=0)
    (y,) = report.outputs
    assert y.nan_a == y.nan_b > 0
    assert (y.max_abs_diff, report.equal) == (0.0, True)


def test_infinities_of_different_sign_differ():
    feeds = [{"x": np.zeros((2, 7), np.float32)}]
    report = verify(unary("Reciprocal"), unary("Reciprocal", "Neg"), feeds=feeds, atol=1e9)
    assert report.outputs[0].max_abs_diff == math.inf
    assert verify(unary("Reciprocal"), unary("Reciprocal"), feeds=feeds, atol=0).equal is True


def test_another_type_is_a_difference_even_where_values_agree():
    report = verify(unary("Identity"), unary("Cast", out=D, to=D), atol=0)
    (y,) = report.outputs
    assert report.interface == ("Output 'y': its type is tensor(float) in a and tensor(double) in b.",)
    assert (y.dtype_a, y.dtype_b, y.max_abs_diff, y.equal) == ("float32", "float64", 0.0, False)
    assert report.equal is False


def test_large_integers_that_float64_cannot_tell_apart_differ():
    big = np.full((2, 7), 2**60, np.int64)
    plus = model(
        [helper.make_node("Add", ["x", "one"], ["y"])],
        [value("x", I64, [2, 7])],
        [value("y", I64, [2, 7])],
        {"one": np.array(1)},
    )
    report = verify(unary("Identity", dtype=I64), plus, feeds=[{"x": big}], atol=0.5)
    assert (report.outputs[0].max_abs_diff, report.equal) == (1.0, False)


def test_half_precision_and_booleans_are_compared():
    assert verify(unary("Identity", dtype=F16), unary("Neg", dtype=F16)).max_abs_diff > 1
    flip = verify(unary("Identity", dtype=TensorProto.BOOL), unary("Not", dtype=TensorProto.BOOL), atol=0)
    assert (flip.max_abs_diff, flip.equal) == (1.0, False)


def test_sequences_are_compared_item_by_item():
    def pair(second: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Neg", ["x"], ["n"]),
            helper.make_node("SequenceConstruct", ["x", second], ["y"]),
        ]
        return model(nodes, [value("x", F, [3])], [helper.make_tensor_sequence_value_info("y", F, None)])

    same, other = verify(pair("n"), pair("n"), atol=0), verify(pair("n"), pair("x"), atol=0)
    assert (same.equal, other.equal) == (True, False)
    assert same.outputs[0].shape_a == (2,)
    assert other.max_abs_diff > 0


def test_strings_are_compared_without_numbers():
    def words(dtype: int, then: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node(then, ["x"], ["t"]),
            helper.make_node("Cast", ["t"], ["y"], to=TensorProto.STRING),
        ]
        return model(nodes, [value("x", dtype, [3])], [value("y", TensorProto.STRING, [3])])

    same, other = (verify(words(I64, "Identity"), words(I64, op), atol=0) for op in ("Identity", "Neg"))
    assert (same.equal, other.equal) == (True, False)
    assert (other.outputs[0].max_abs_diff, other.max_abs_diff) == (None, None)


def test_pieces_add_up_to_the_whole(monkeypatch):
    a, b = linear(), linear(WEIGHT * 1.5)
    whole = verify(a, b).outputs
    monkeypatch.setattr(module, "_PIECE", 3)
    (one,), (other,) = whole, verify(a, b).outputs
    assert other.max_abs_diff == one.max_abs_diff
    assert other.relative_l2 == pytest.approx(one.relative_l2, rel=1e-12)
    assert other.cosine == pytest.approx(one.cosine, rel=1e-12)


def test_large_outputs_are_compared_while_both_sessions_are_open(monkeypatch):
    a, b = linear(), linear(WEIGHT * 1.5)
    kept = verify(a, b)
    monkeypatch.setattr(module, "_KEEP_BYTES", 0)
    assert verify(a, b) == kept


def test_optimisations_are_off():
    # onnxruntime 1.31 merges this Pad into the MaxPool, which is wrong for negative inputs (STACK); where the
    # padded tensor is an output too, it cannot.
    def pooled(kept: bool) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Pad", ["x", "pads"], ["p"]),
            helper.make_node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3]),
        ]
        outputs = [value("y", F, None)] + ([value("p", F, None)] if kept else [])
        pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
        return model(nodes, [value("x", F, [1, 1, 5, 5])], outputs, {"pads": pads})

    negative = [{"x": -np.ones((1, 1, 5, 5), np.float32)}]
    for kept in (False, True):
        report = verify(pooled(kept), pooled(not kept), feeds=negative)
        assert report.outputs[0].max_abs_diff == 0.0


# -- interface -------------------------------------------------------------------------------------------


def test_a_renamed_output_is_found_and_not_compared():
    report = verify(linear(), linear(y="z"), atol=1)
    assert report.interface == ("Output 'y' of a is missing in b.", "Output 'z' of b is not in a.")
    assert report.same_interface is False
    assert report.outputs == ()
    assert report.equal is False


def test_a_renamed_input_stops_the_comparison_of_outputs():
    report = verify(linear(), linear(x="q"), atol=1)
    assert report.interface == ("Input 'x' of a is missing in b.", "Input 'q' of b is not in a.")
    assert (report.outputs, report.equal, report.inputs) == ((), False, {})


def test_another_order_of_outputs_is_found_and_matched_by_name():
    def two(*order: str) -> onnx.ModelProto:
        nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
        return model(nodes, [value("x", F, [3])], [value(name, F, [3]) for name in order])

    report = verify(two("y", "z"), two("z", "y"))
    assert report.interface == ("Outputs are in the order y, z in a and z, y in b.",)
    assert [(o.name, o.max_abs_diff) for o in report.outputs] == [("y", 0.0), ("z", 0.0)]


def test_another_width_is_found_in_the_declaration_and_in_the_run():
    report = verify(linear(), linear(WEIGHT[:, :4]), atol=1e9)
    assert report.interface == (
        "Output 'y': axis 1 is fixed at 5 in a and fixed at 4 in b.",
        "Output 'y': the same inputs give shape [2, 5] in a and [2, 4] in b.",
    )
    (y,) = report.outputs
    assert (y.max_abs_diff, y.relative_l2, y.cosine, y.equal) == (None, None, None, False)


def test_a_shape_that_only_the_run_shows_is_found():
    a, b = linear(), linear(WEIGHT[:, :4])
    for each in (a, b):
        each.graph.output[0].CopyFrom(value("y", F, ["batch", "classes"]))
    report = verify(a, b)
    assert "Output 'y': the same inputs give shape [2, 5] in a and [2, 4] in b." in report.interface


@pytest.mark.parametrize("swap", [False, True])
def test_a_batch_that_became_fixed_is_found_and_fed(swap):
    models = [linear(), linear(rows=4)]
    report = verify(*(reversed(models) if swap else models))
    said = ("dynamic ('batch')", "fixed at 4")
    one, other = reversed(said) if swap else said
    assert report.interface == (f"Input 'x': axis 0 is {one} in a and {other} in b.",)
    assert report.inputs == {"x": (4, 3)}
    assert report.max_abs_diff == 0.0


def test_a_batch_that_one_input_fixes_is_fed_to_all():
    def total(*rows: int | str) -> onnx.ModelProto:
        inputs = [value(name, F, [size, 3]) for name, size in zip("xz", rows, strict=True)]
        return model([helper.make_node("Add", ["x", "z"], ["y"])], inputs, [value("y", F, None)])

    report = verify(total("batch", "batch"), total(5, "batch"))
    assert report.inputs == {"x": (5, 3), "z": (5, 3)}


def test_a_dynamic_axis_with_another_name_is_the_same():
    assert verify(linear(rows="batch"), linear(rows="N")).same_interface


def test_another_rank_and_another_type_of_an_input_are_found():
    deep = unary("Identity")
    deep.graph.input[0].CopyFrom(value("x", F, [1, 2, 7]))
    deep.graph.output[0].CopyFrom(value("y", F, [1, 2, 7]))
    report = verify(unary("Identity"), deep)
    assert "Input 'x': it has 2 axes in a and 3 in b." in report.interface
    assert report.outputs == ()
    report = verify(unary("Identity"), unary("Identity", dtype=D))
    assert "Input 'x': its type is tensor(float) in a and tensor(double) in b." in report.interface
    assert report.outputs == ()


def test_an_input_that_the_second_lacks_is_found_and_left_out():
    more = linear()
    more.graph.input.append(value("unused", F, [2]))
    report = verify(more, linear())
    assert report.interface == ("Input 'unused' of a is missing in b.",)
    assert report.max_abs_diff == 0.0


# -- what is accepted, what is refused -------------------------------------------------------------------


def test_paths_bytes_and_protos_are_accepted(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(linear(), path)
    assert verify(path, str(path)).max_abs_diff == 0.0
    assert verify(path.read_bytes(), linear()).max_abs_diff == 0.0


def test_ids_stay_in_the_vocabulary():
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    m = model(nodes, [value("ids", I64, ["batch", "seq"])], [value("y", F, None)], {"table": rows})
    report = verify(m, m, seeds=5, sizes={"seq": 50})
    assert report.inputs == {"ids": (2, 50)}


def test_a_second_model_that_does_not_run_is_named_with_the_reason(tmp_path):
    bad = linear()
    bad.graph.node.add(op_type="Reshape", input=["y", "shape"], output=["z"])
    bad.graph.initializer.append(numpy_helper.from_array(np.array([1, 5]), "shape"))
    bad.graph.output[0].CopyFrom(value("z", F, ["batch", 5]))
    good = linear(y="z")
    onnx.save(bad, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"^onnxruntime cannot run .*bad\.onnx: Non-zero status code .* Reshape node"):
        verify(good, tmp_path / "bad.onnx")


def test_a_model_that_does_not_load_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"garbage" * 9)
    with pytest.raises(ModelError, match=r"^onnxruntime cannot load .*bad\.onnx: Protobuf parsing failed\.$"):
        verify(linear(), tmp_path / "bad.onnx")


def test_impossible_requests_are_refused():
    with pytest.raises(PlanError, match="'width' is not a dynamic axis"):
        verify(linear(), linear(), sizes={"width": 3})
    with pytest.raises(ValueError, match=r"seeds is 0\. Give at least 1"):
        verify(linear(), linear(), seeds=0)
    strings = unary("Identity", dtype=TensorProto.STRING)
    with pytest.raises(UnsupportedError, match="Input 'x': no values can be made up"):
        verify(strings, strings)


def test_the_inputs_are_left_as_they_were():
    a, b = linear(), linear(WEIGHT * 2)
    before = a.SerializeToString(), b.SerializeToString()
    verify(a, b)
    assert (a.SerializeToString(), b.SerializeToString()) == before


# -- the report ------------------------------------------------------------------------------------------


def test_the_report_is_json_also_where_numbers_are_not():
    plain = verify(unary("Identity"), unary("Log"), atol=1e-5).to_dict()
    read = json.loads(json.dumps(plain, allow_nan=False))
    assert read == plain
    assert read["max_abs_diff"] == "Infinity"
    assert read["outputs"][0]["max_abs_diff"] == "Infinity"
    assert read["outputs"][0]["shape_a"] == [2, 7]
    assert (read["equal"], read["atol"], read["rtol"], read["seeds"]) == (False, 1e-5, None, [0, 1, 2])


def test_the_report_is_frozen():
    with pytest.raises(AttributeError):
        verify(linear(), linear()).equal = True


def test_more_seeds_are_more_inputs():
    assert verify(linear(), linear(), seeds=2, seed=7).seeds == (7, 8)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'seedz'"):
        verify(linear(), linear(), seedz=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_what_is_no_file_is_refused_before_onnxruntime_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    onnx.save(linear(), tmp_path / "a.onnx")
    for name, words in {
        "pipe": "it is a pipe, a device or a socket",
        "none": "No such file",
        ".": "it is a folder",
        "circle": "Too many levels",
    }.items():
        for pair in ((name, "a.onnx"), ("a.onnx", name)):
            with pytest.raises(UnreadableError, match=f"cannot read .*: {words}.*Check the path"):
                verify(*(tmp_path / file for file in pair))
