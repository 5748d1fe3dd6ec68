from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa.errors import ModelError, PlanError, UnreadableError, UnsupportedError
from spa.running.feeds import make_feeds, resolve_sizes, working_feeds
from spa.running.ranges import input_ranges
from spa.running.runtime import clean_reason, input_specs, load_graph, load_session, output_specs, run

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name: str, dtype: int, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes, inputs, outputs, initializers=(), functions=(), opset: int = 17) -> onnx.ModelProto:
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in dict(initializers).items()]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    imports += [helper.make_opsetid("mine", 1)] if functions else []
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)


def only_inputs(*inputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    """A model of which only the interface matters."""
    return model([], list(inputs), [])


def table(rows: int, width: int = 5) -> np.ndarray:
    return np.arange(rows * width, dtype=np.float32).reshape(rows, width)


def embedding(*before: onnx.NodeProto, ids: str = "ids", dtype: int = I64, rows: int = 7, **more: np.ndarray):
    """`ids` → `before` → Gather on a table with `rows` rows; the last of `before` writes "at"."""
    nodes = [*before, helper.make_node("Gather", ["table", "at" if before else ids], ["y"])]
    return model(nodes, [value(ids, dtype, ["batch", "seq"])], [value("y", F, None)], {"table": table(rows), **more})


# -- types and seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("onnx_type", "numpy_type"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.INT8, np.int8),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT32, np.int32),
        (TensorProto.INT64, np.int64),
        (TensorProto.UINT64, np.uint64),
        (TensorProto.BOOL, np.bool_),
    ],
)
def test_every_type_is_fed_as_itself_and_is_not_constant(onnx_type, numpy_type):
    (array,) = make_feeds(only_inputs(value("x", onnx_type, [3, 41]))).values()
    assert array.dtype == numpy_type
    assert array.shape == (3, 41)
    assert len(np.unique(array.astype(np.float64))) > 1


def test_strings_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"^Input 'words': no values can be made up for type tensor\(stri"):
        make_feeds(only_inputs(value("words", TensorProto.STRING, [2])))


def test_inputs_too_large_to_make_up_are_refused_before_they_are_drawn():
    with pytest.raises(UnsupportedError, match=r"^Input 'x' of shape \[4611686018427387904\] is too large"):
        make_feeds(only_inputs(value("x", TensorProto.BOOL, [2**62])))


def test_the_same_seed_gives_the_same_values_and_another_seed_others():
    m = only_inputs(value("x", F, [2, 3]))
    first, again, other = (make_feeds(m, seed=seed)["x"] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_values_depend_on_the_name_and_not_on_the_place():
    x, z = value("x", F, [2, 3]), value("z", F, [2, 3])
    forward, backward = make_feeds(only_inputs(x, z)), make_feeds(only_inputs(z, x))
    assert np.array_equal(forward["x"], backward["x"])
    assert not np.array_equal(forward["x"], forward["z"])


def test_a_session_and_its_model_give_the_same_feeds():
    m = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", F, ["n", 3])], [value("y", F, ["n", 3])])
    session = load_session(m)
    assert np.array_equal(make_feeds(session)["x"], make_feeds(m)["x"])
    assert input_specs(session) == input_specs(m)
    assert output_specs(session) == output_specs(m)


def test_initializers_that_are_listed_as_inputs_are_not_fed():
    m = only_inputs(value("x", F, [2]), value("w", F, [2]))
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    assert set(make_feeds(m)) == {"x"}


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["batch", 3, "height", "width"], (2, 3, 64, 64)),
        ([None, 3, None, None], (2, 3, 64, 64)),
        ([None, None, None, 3], (2, 64, 64, 3)),
        (["batch_size", "sequence_length"], (2, 64)),
        (["sequence", "batch", 5], (64, 2, 5)),
        (["N", "n_tokens"], (2, 64)),
        (["batch", 4, "past_sequence_length", 16], (2, 4, 16, 16)),
        (["batch_size", "num_channels", "height", "width"], (2, 3, 64, 64)),
        (["batch", 3, 48, "width"], (2, 3, 48, 288)),
        (["batch", 3, 160, "width"], (2, 3, 160, 160)),
        (["unk__1", "unk__2", "unk__3", 3], (2, 64, 64, 3)),
        ([None, 1, None], (2, 1, 64)),
        (["s0", "s0"], (2, 2)),
        ([], ()),
    ],
)
def test_dynamic_axes_get_sizes_by_name_then_by_place(shape, expected):
    assert make_feeds(only_inputs(value("x", F, shape)))["x"].shape == expected


def test_one_name_has_one_size_everywhere():
    feeds = make_feeds(only_inputs(value("a", F, ["batch", "k"]), value("b", F, ["k", 3])), sizes={"k": 11})
    assert (feeds["a"].shape, feeds["b"].shape) == ((2, 11), (11, 3))


def test_a_name_without_meaning_keeps_the_size_of_its_first_place():
    feeds = make_feeds(only_inputs(value("a", F, ["foo.1", 2]), value("b", F, [4, 4, "foo.1"])))
    assert feeds["a"].shape[0] == feeds["b"].shape[2]


def test_sums_and_products_of_names_are_computed():
    m = only_inputs(
        value("ids", I64, ["batch", "sequence_length"]),
        value("kv", F, ["batch", 2, "past_sequence_length", 4]),
        value("mask", I64, ["batch", "past_sequence_length + sequence_length"]),
        value("all", I64, ["batch", "total_sequence_length"]),
        value("x", F, ["2*batch", "(sequence_length - 1)//2"]),
    )
    feeds = make_feeds(m, batch=3, sizes={"sequence_length": 5, "past_sequence_length": 6})
    assert {name: array.shape for name, array in feeds.items()} == {
        "ids": (3, 5),
        "kv": (3, 2, 6, 4),
        "mask": (3, 11),
        "all": (3, 11),
        "x": (6, 2),
    }


def test_batch_and_sizes_override_the_guesses():
    m = only_inputs(value("x", F, ["batch", 3, "height", None]))
    assert make_feeds(m, batch=5, sizes={"height": 13, "x[3]": 17})["x"].shape == (5, 3, 13, 17)


def test_a_size_for_an_axis_that_is_not_dynamic_is_refused_with_the_list():
    specs = input_specs(only_inputs(value("x", F, ["batch", 3, None])))
    with pytest.raises(PlanError, match=r"^sizes: 'hieght' is not a dynamic axis\. Choose from: batch, x\[2\]\.$"):
        resolve_sizes(specs, sizes={"hieght": 3})
    with pytest.raises(PlanError, match=r"^sizes: 'batch' is 0\. Give at least 1\.$"):
        resolve_sizes(specs, sizes={"batch": 0})


# -- values by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [I64, F, BOOL])
def test_a_mask_is_ones_then_zeros_and_its_first_place_is_valid(dtype):
    m = only_inputs(value("attention_mask", dtype, [31, 8]))
    mask = make_feeds(m)["attention_mask"].astype(int)
    assert set(np.unique(mask)) == {0, 1}
    assert (mask[:, 0] == 1).all()
    assert (np.diff(mask, axis=1) <= 0).all()


def test_positions_count_up_and_segments_are_zero_or_one():
    m = only_inputs(value("position_ids", I64, [2, 5]), value("token_type_ids", I64, [7, 11]))
    feeds = make_feeds(m)
    assert np.array_equal(feeds["position_ids"], [[0, 1, 2, 3, 4]] * 2)
    assert set(np.unique(feeds["token_type_ids"])) == {0, 1}


def test_lengths_are_the_shortest_sequence_axis():
    m = only_inputs(value("x", F, ["batch", "seq", 2]), value("input_lengths", I64, ["batch"]))
    assert np.array_equal(make_feeds(m, sizes={"seq": 13})["input_lengths"], [13, 13])


def test_bytes_use_their_whole_range():
    pixels = make_feeds(only_inputs(value("x", TensorProto.UINT8, [64, 64])))["x"]
    assert pixels.min() < 5
    assert pixels.max() > 250


# -- ranges ----------------------------------------------------------------------------------------------

SHAPE = {"shape": np.array([-1])}


@pytest.mark.parametrize(
    ("before", "more", "expected"),
    [
        ([], {}, 7),
        ([("Cast", ["ids"], {"to": TensorProto.INT32})], {}, 7),
        ([("Reshape", ["ids", "shape"], {})], SHAPE, 7),
        ([("Unsqueeze", ["ids", "zero"], {})], {"zero": np.array([0])}, 7),
        ([("Clip", ["ids", "zero", "top"], {})], {"zero": np.array(0), "top": np.array(99)}, 7),
        ([("Add", ["ids", "two"], {})], {"two": np.array(2)}, 5),
        ([("Add", ["two", "ids"], {})], {"two": np.array([2])}, 5),
        ([("Sub", ["ids", "two"], {})], {"two": np.array(2)}, 7),
        ([("Concat", ["ids", "ids"], {"axis": 1})], {}, 7),
        ([("Mul", ["ids", "two"], {})], {"two": np.array(2)}, None),
        ([("Shape", ["ids"], {})], {}, None),
    ],
)
def test_ids_stay_below_the_rows_of_their_table_through(before, more, expected):
    nodes = [helper.make_node(op, inputs, ["at"], **attributes) for op, inputs, attributes in before]
    m = embedding(*nodes, **more)
    assert input_ranges(m).get("ids") == expected
    ids = make_feeds(m, sizes={"seq": 99})["ids"]
    if expected is not None:
        assert ids.max() == expected - 1
        assert ids.min() == 0


def test_a_bound_survives_a_chain_of_carriers_and_a_constant_node():
    nodes = [
        helper.make_node("Constant", [], ["three"], value_int=3),
        helper.make_node("Cast", ["ids"], ["a"], to=I64),
        helper.make_node("Add", ["a", "three"], ["b"]),
        helper.make_node("Identity", ["b"], ["at"]),
    ]
    m = embedding(*nodes, dtype=F)
    assert input_ranges(m) == {"ids": 4}
    ids = make_feeds(m)["ids"]  # Keras' way: ids that are fed as floats
    assert ids.dtype == np.float32
    assert np.array_equal(ids, ids.round())
    assert ids.max() < 4


def test_wrapping_negative_ids_costs_no_bound():
    nodes = [
        helper.make_node("Less", ["ids", "zero"], ["negative"]),
        helper.make_node("Add", ["ids", "count"], ["wrapped"]),
        helper.make_node("Where", ["negative", "wrapped", "ids"], ["at"]),
    ]
    assert input_ranges(embedding(*nodes, zero=np.array(0), count=np.array(7))) == {"ids": 7}


def test_the_smallest_of_several_tables_counts():
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["y"]),
        helper.make_node("Transpose", ["small"], ["turned"], perm=[1, 0]),
        helper.make_node("Gather", ["turned", "ids"], ["z"]),
    ]
    inputs, outputs = [value("ids", I64, ["batch", "seq"])], [value("y", F, None), value("z", F, None)]
    assert input_ranges(model(nodes, inputs, outputs, {"table": table(7), "small": table(5, 3)})) == {"ids": 3}


def test_the_gathered_axis_counts_and_not_the_first():
    m = embedding()
    m.graph.node[0].attribute.append(helper.make_attribute("axis", -1))
    assert input_ranges(m) == {"ids": 5}


def test_ids_that_are_gathered_from_are_no_indices():
    nodes = [
        helper.make_node("Gather", ["ids", "which"], ["some"], axis=1),
        helper.make_node("Gather", ["table", "some"], ["y"]),
    ]
    inputs = [value("ids", I64, ["batch", "seq"]), value("which", I64, [2])]
    m = model(nodes, inputs, [value("y", F, None)], {"table": table(7)})
    assert input_ranges(m) == {"ids": 7}


def test_one_hot_and_embed_layer_normalization_bound_their_ids():
    nodes = [
        helper.make_node("OneHot", ["label", "depth", "onoff"], ["y"]),
        helper.make_node(
            "EmbedLayerNormalization",
            ["ids", "seg", "word", "pos", "types", "gamma", "beta"],
            ["z", "index"],
            domain="com.microsoft",
        ),
    ]
    tables = {"word": table(11), "pos": table(13), "types": table(2), "gamma": np.ones(5, np.float32)}
    tables |= {
        "beta": np.ones(5, np.float32),
        "depth": np.array(3),
        "onoff": np.array([0.0, 1.0], np.float32),
    }
    inputs = [
        value("label", I64, ["batch"]),
        value("ids", TensorProto.INT32, ["batch", "seq"]),
        value("seg", TensorProto.INT32, ["batch", "seq"]),
    ]
    m = model(nodes, inputs, [value("y", F, None), value("z", F, None)], tables)
    assert input_ranges(m) == {"label": 3, "ids": 11, "seg": 2}
    run(load_session(m), make_feeds(m, sizes={"seq": 13}))


def test_ids_are_followed_into_local_functions_and_branches():
    function = helper.make_function(
        "mine", "Look", ["t", "i"], ["o"], [helper.make_node("Gather", ["t", "i"], ["o"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    branch = helper.make_graph(
        [helper.make_node("Gather", ["small", "ids"], ["b"])], "branch", [], [value("b", F, None)],
        [onnx.numpy_helper.from_array(table(3), "small")],
    )  # fmt: skip
    nodes = [
        helper.make_node("Look", ["table", "other"], ["y"], domain="mine"),
        helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=branch),
    ]
    inputs = [value("ids", I64, [2]), value("other", I64, [2]), value("flag", BOOL, [])]
    outputs = [value("y", F, None), value("z", F, None)]
    m = model(nodes, inputs, outputs, {"table": table(7)}, [function])
    assert input_ranges(m) == {"ids": 3, "other": 7}


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_categories_compared_with_a_list_of_numbers_span_the_list(first, dtype):
    """jax.nn.one_hot, as jax2tf writes it; a list that starts elsewhere is no one-hot of categories from 0."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Unsqueeze", ["bytes", "last"], ["column"]),
        helper.make_node("Cast", ["column"], ["cast"], to=kind),
        helper.make_node("Equal", ["cast", "list"], ["y"]),
    ]
    stored = {"last": np.array([-1]), "list": np.arange(first, 257, dtype=dtype)[None, None]}
    m = model(nodes, [value("bytes", TensorProto.INT32, ["n", 64])], [value("y", BOOL, None)], stored)
    assert input_ranges(m) == ({"bytes": 257} if first == 0 else {})
    assert (make_feeds(m)["bytes"].max() > 200) is np.bool_(first == 0)


def test_reading_ranges_leaves_the_model_as_it_was():
    m = embedding()
    before = m.SerializeToString()
    input_ranges(m)
    assert m.SerializeToString() == before


def test_positions_stay_inside_their_table():
    m = embedding(ids="position_ids", rows=3)
    ids = make_feeds(m, sizes={"seq": 8})["position_ids"]
    assert np.array_equal(ids[0], [0, 1, 2, 0, 1, 2, 0, 1])


# -- attempts --------------------------------------------------------------------------------------------


def flattened(inner: int) -> onnx.ModelProto:
    """Runs only at one image size: a classifier over flattened pixels."""
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    inputs, outputs = [value("x", F, ["batch", 1, "height", "width"])], [value("y", F, ["batch", 2])]
    return model(nodes, inputs, outputs, {"w": np.ones((inner, 2), np.float32)})


def test_another_image_size_is_tried_where_the_first_is_refused():
    m = flattened(512 * 512)
    assert make_feeds(m)["x"].shape == (2, 1, 64, 64)
    assert working_feeds(load_session(m), model=m)["x"].shape == (1, 1, 512, 512)


def test_another_batch_is_tried_unless_it_was_given():
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    m = model(nodes, [value("x", F, ["n", 3])], [value("y", F, None)], {"shape": np.array([1, 3])})
    session = load_session(m)
    assert working_feeds(session)["x"].shape == (1, 3)
    with pytest.raises(ModelError, match=r"inputs tried: x\[4, 3\]\)\. Give the sizes of its dynamic axes: n\.$"):
        working_feeds(session, batch=4)


def test_giving_up_quotes_the_first_reason_and_says_what_was_tried():
    with pytest.raises(ModelError) as caught:
        working_feeds(load_session(flattened(7)), name="odd.onnx")
    text = str(caught.value)
    assert text.startswith("onnxruntime cannot run odd.onnx: Non-zero status code returned while running MatMul")
    assert "MatMul dimension mismatch" in text or "dimension" in text
    assert "inputs tried: x[2, 1, 224, 224]; x[2, 1, 48, 320];" in text
    assert text.endswith("Give the sizes of its dynamic axes: batch, height, width.")
    assert "\n" not in text


def test_sizes_that_are_given_are_kept_in_every_attempt():
    session = load_session(flattened(13 * 17))
    assert working_feeds(session, sizes={"height": 13, "width": 17})["x"].shape[2:] == (13, 17)


def test_integers_about_which_nothing_is_known_become_smaller():
    # The table is computed, so its rows are unknown: two.
    nodes = [
        helper.make_node("Relu", ["t"], ["computed"]),
        helper.make_node("Gather", ["computed", "i"], ["y"]),
    ]
    inputs = [value("i", I64, ["batch", "seq"])]
    session = load_session(model(nodes, inputs, [value("y", F, None)], {"t": table(2)}))
    assert working_feeds(session)["i"].max() == 1


# -- the runtime door ------------------------------------------------------------------------------------


def test_bfloat16_goes_in_and_comes_out():
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=F),
        helper.make_node("Cast", ["f"], ["y"], to=TensorProto.BFLOAT16),
    ]
    inputs = [value("x", TensorProto.BFLOAT16, [3, 5])]
    session = load_session(model(nodes, inputs, [value("y", TensorProto.BFLOAT16, [3, 5])]))
    feeds = make_feeds(session)
    (y,) = run(session, feeds)
    assert y.dtype == ml_dtypes.bfloat16
    assert np.array_equal(y, feeds["x"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"garbage" * 9, "Failed to load model because protobuf parsing failed."),
        (lambda: model([], [], [], opset=99), "ONNX Runtime only *guarantees* support"),
        (lambda: embedding(helper.make_node("Foo", ["ids"], ["at"])), "No Op registered for Foo"),
    ],
)
def test_a_model_that_does_not_load_is_refused_with_a_clean_reason(make, reason):
    with pytest.raises(ModelError) as caught:
        load_session(make(), name="bad")
    text = str(caught.value)
    assert text.startswith("onnxruntime cannot load bad: ")
    assert reason in text
    assert "[ONNXRuntimeError]" not in text
    assert ".cc:" not in text
    assert "\n" not in text


def test_a_file_that_is_not_there_is_said_before_onnxruntime_looks():
    with pytest.raises(UnreadableError, match=r"^cannot read '/nowhere/at/all\.onnx': No such file or directory"):
        load_session("/nowhere/at/all.onnx", name="bad")


def test_reading_a_file_that_is_no_model_is_refused(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"garbage" * 9)
    with pytest.raises(ModelError, match=r"bad\.onnx is not an ONNX model, or is cut short: protobuf cannot parse"):
        load_graph(bad)
    with pytest.raises(ModelError, match=r"cannot read '.*none\.onnx': No such file or directory\."):
        load_graph(tmp_path / "none.onnx")


def test_reasons_lose_their_source_lines_and_signatures():
    raw = (
        "[ONNXRuntimeError] : 1 : FAIL : While running Add node. Status Message: "
        "/src/core/element_wise_ops.h:563 void onnxruntime::B<T, (U)3>::Init(ptrdiff_t, ptrdiff_t) "
        "const [with T = float] axis == 1 was false. 2 by 3\n"
    )
    assert clean_reason(raw) == "While running Add node. Status Message: axis == 1 was false. 2 by 3"
    assert clean_reason("[ONNXRuntimeError] : 1 : FAIL : a.cc:1 no signature") == "no signature"
    assert clean_reason(RuntimeError("")) == "RuntimeError"


def test_failures_say_nothing_on_standard_error():
    code = (
        "import onnx, sys; sys.path.insert(0, '.'); from tests.running.test_feeds import flattened\n"
        "from spa.errors import SpaError; from spa.running.feeds import working_feeds\n"
        "from spa.running.runtime import load_session\n"
        "try: working_feeds(load_session(flattened(7)))\n"
        "except SpaError: pass\n"
        "try: load_session(b'garbage' * 9)\n"
        "except SpaError: pass\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_profile_lands_under_the_prefix(tmp_path):
    m = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", F, [2])], [value("y", F, [2])])
    session = load_session(m, profiling=str(tmp_path / "p"))
    run(session, make_feeds(session))
    assert session.end_profiling().startswith(str(tmp_path / "p"))
