from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from spa.errors import SizeError
from spa.model.extents import Extent, extent_of, guesses
from spa.model.graph import Graph
from spa.model.shapes import Walker
from spa.model.sizes import Guess, OpenInput, _is_computed, batch_axes, kind_of_axis, resolve, widened
from spa.model.two_points import open_inputs, two_points
from tests.oracle import Net


def test_dots_and_hyphens_belong_to_names() -> None:
    dotted = [OpenInput("x", ("a.0", 3, "a.1", "a.2"))]
    assert resolve(dotted, Guess(image=64), {"a.1": 48}) == {"x[0]": 2, "x[2]": 48, "x[3]": 64}
    with pytest.raises(SizeError, match=r"'a' is not a dynamic axis\..* Choose from: a\.0, a\.1, a\.2\.$"):
        resolve(dotted, Guess(), {"a": 5})
    assert resolve([OpenInput("x", ("batch-size",))], Guess(), {"batch-size": 5}) == {"x[0]": 5}


def test_computed_names_follow_the_names_in_them() -> None:
    cache = [OpenInput("x", ("B", "S", 8)), OpenInput("past", ("B", "P", 16)), OpenInput("mask", ("B", "P + S"))]
    found = resolve(cache, Guess(series=7), {"P": 5})
    assert (found["x[1]"], found["past[1]"], found["mask[1]"]) == (7, 5, 12)
    far = widened(cache, Guess(series=7), {"P": 5}, factors=dict.fromkeys("BSP", 4))
    assert (far["x[0]"], far["x[1]"], far["past[1]"], far["mask[1]"]) == (1031, 112, 80, 192)
    alone = [OpenInput("mask", ("B", "past_len + 1"))]
    assert resolve(alone, Guess(past=9))["mask[1]"] == 10
    assert resolve(alone, Guess(), {"past_len": 3})["mask[1]"] == 4
    assert widened(alone, Guess(past=9), factors={"past_len": 4})["mask[1]"] == 145


@pytest.mark.parametrize(
    ("steps", "past", "whole"),
    [
        ("S", "past", "total"),
        ("seq", "past_len", "attention_mask_length"),
        ("sequence", "past_seq", "past_seq_plus_sequence"),
        ("seq", "P", "kv_len"),
        ("s", "p", None),
        (None, None, None),
        ("sequence_length", "past_sequence_length", "total_sequence_length"),
    ],
)
def test_a_mask_spans_cache_and_steps_in_any_spelling(steps: str | None, past: str | None, whole: str | None) -> None:
    inputs = [
        OpenInput("attention_mask", ("batch", whole), integers=True),  # before what it follows
        OpenInput("x", ("batch", steps, 8)),
        OpenInput("past_key_values.0.key", ("batch", 4, past, 16)),
    ]
    found = resolve(inputs, Guess(series=7, past=5))
    assert (found["x[1]"], found["past_key_values.0.key[2]"], found["attention_mask[1]"]) == (7, 5, 12)
    far = widened(
        inputs,
        Guess(series=7, past=5),
        factors=dict.fromkeys(["batch", steps or "x[1]", past or "past_key_values.0.key[2]"], 4),
    )
    assert far["attention_mask[1]"] == far["x[1]"] + far["past_key_values.0.key[2]"] == 192
    assert resolve(inputs, Guess(), {whole or "attention_mask[1]": 40})["attention_mask[1]"] == 40


def test_masks_of_models_without_a_cache_or_of_the_steps_alone_are_as_long_as_the_steps() -> None:
    plain = [OpenInput("mask", ("batch", "total"), integers=True), OpenInput("x", ("batch", "seq", 8))]
    assert resolve(plain, Guess(sequence=9, series=7))["mask[1]"] == 9
    cached = [OpenInput("x", ("b", "seq", 8)), OpenInput("cache", ("b", "p", 8)), OpenInput("mask", ("b", "seq"))]
    assert resolve(cached, Guess(series=7, past=5))["mask[1]"] == 7


def test_a_size_that_names_nothing_is_answered_with_the_nearest() -> None:
    with pytest.raises(SizeError, match=r"'hieght' is not a dynamic axis\. Did you mean 'height'\?") as refused:
        resolve([OpenInput("x", ("n", "height"))], Guess(), {"hieght": 3})
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("inputs", "axes"),
    [
        ([("x", ("batch", 8)), ("state", (2, "batch", 16))], [0, 1]),
        ([("x", (None, 8)), ("state", (2, None, 16))], [0, 1]),
        ([("state", (2, "batch", 16)), ("x", ("batch", 8)), ("rate", ())], [1, 0, None]),
        ([("x", (1, 512)), ("h", (2, 1, 64)), ("c", (2, 1, 64)), ("sr", ())], [0, 1, 1, None]),
        ([("x", ("n", 3)), ("table", (5, 3))], [0, None]),
        ([("x", (4, 3)), ("table", (5, 3))], [0, None]),
        ([("tokens", ("seq", "batch"))], [1]),
        ([("scalar", ())], [None]),
        ([("frames", ("seq", 576)), ("h", (1, 1, 128))], [None, None]),
    ],
)
def test_samples_lie_along_any_axis_or_none(
    inputs: list[tuple[str, tuple[int | str | None, ...]]], axes: list[int | None]
) -> None:
    assert list(batch_axes([OpenInput(*each) for each in inputs]).values()) == axes


def test_what_an_axis_counts() -> None:
    def kinds(*shape: int | str | None, integers: bool = False) -> list[str]:
        of = OpenInput("x", shape, integers)
        return [kind_of_axis(of, a) for a, dim in enumerate(shape) if not isinstance(dim, int)]

    assert kinds("batch", "n_tokens", integers=True) == ["batch", "sequence"]
    assert kinds("batch", "samples") == ["batch", "series"]
    assert kinds(None, 80, None) == ["batch", "series"]
    assert kinds(3, None, None) == ["image", "image"]
    assert kinds("b", 4, "past_len", 64) == ["batch", "past"]


def strided(*strides: int | list[int], kernel: int = 3) -> ModelProto:
    net = Net()
    h, width = net.input("x", ["n", 3, "h", "w"]), 3
    for stride in strides:
        steps = [stride] * 2 if isinstance(stride, int) else stride
        h, width = net.conv(h, width, 4, (kernel, kernel), strides=steps, pads=[1] * 4), 4
    return net.model(net.node("GlobalAveragePool", h))


def test_images_have_seven_cells_at_the_deepest_stride() -> None:
    assert extent_of(strided(2, 1, 2).graph) == Extent(stride=4, rows=4, columns=4, field=11)
    assert guesses(strided(2, 1, 2))[0].image == 64
    assert guesses(strided(2, 2, 2, 2))[0].image == 128
    assert guesses(strided(2, 2, 2, 2, 2))[0].image == 224
    assert guesses(strided(2, 2, 2, 2, 2, 2))[0].image == 448


def test_images_whose_height_shrinks_far_more_are_lines() -> None:
    line, few = strided(2, [2, 1], [2, 1], [2, 1]), strided(2, [2, 1])
    assert extent_of(line.graph) == Extent(stride=16, rows=16, columns=2, field=31)
    assert (guesses(line)[0].image, guesses(line)[0].columns) == (32, 128)
    assert two_points(Graph(line)).sizes[0]["x"] == (2, 3, 32, 128)
    high = strided(2, *[[2, 1]] * 6)
    assert (guesses(high)[0].image, guesses(high)[0].columns) == (64, 256)
    assert (guesses(few)[0].image, guesses(few)[0].columns) == (64, None)


def test_series_fill_the_receptive_field() -> None:
    net = Net()
    h = net.input("sound", ["n", 1, "samples"])
    for width, (kernel, stride, dilation) in zip((1, 4, 4), ((10, 5, 1), (3, 2, 1), (101, 1, 2)), strict=True):
        h = net.conv(h, width, 4, (kernel,), strides=[stride], dilations=[dilation])
    model = net.model(h)
    field = 10 + 2 * 5 + 200 * 10
    assert extent_of(model.graph) == Extent(stride=10, rows=10, columns=10, field=field)
    assert guesses(model)[0].series == 2020 >= field
    assert two_points(Graph(model)).sizes[0]["sound"] == (2, 1, 2020)


def test_both_walks_take_the_sizes_that_the_graph_accepts_and_differ_in_the_batch() -> None:
    net = Net()
    tokens = net.node("Reshape", net.conv(net.input("x", ["n", 3, "h", "w"]), 3, 5, (64, 64), strides=[64, 64], pads=[0] * 4),
                      net.constant(np.array([0, 5, -1])))  # fmt: skip
    points = two_points(Graph(net.model(net.matmul(tokens, 64, 64))))
    assert [s["x"] for s in points.sizes] == [(1, 3, 512, 512), (1031, 3, 512, 512)]
    assert (points.batch, points.chosen) == (1, {"x[2]": 512, "x[3]": 512})


def test_given_sizes_stay_open() -> None:
    model = strided(2, 2)
    points = two_points(Graph(model), {"h": 40, "n": 5})
    assert [s["x"] for s in points.sizes] == [(5, 3, 40, 64), (1031, 3, 160, 256)]
    assert points.batch == 5
    with pytest.raises(SizeError, match="'height' is not a dynamic axis"):
        two_points(Graph(model), {"height": 40})
    assert [each.shape for each in open_inputs(model)] == [("n", 3, "h", "w")]


def test_a_sign_for_any_size_is_no_name() -> None:
    net = Net()
    model = net.model(net.conv(net.input("x", ["?", 3, "?", "?"]), 3, 5))
    assert [each.shape for each in open_inputs(model)] == [(None, 3, None, None)]
    assert [s["x"] for s in two_points(Graph(model)).sizes] == [(2, 3, 64, 64), (1031, 3, 256, 256)]


def test_lines_of_text_have_one_height_and_any_width() -> None:
    """A recogniser squeezes 48 rows into one; at other heights its reshape fails. The width alone can differ."""
    net = Net()
    h = net.conv(net.input("x", ["n", 3, "?", "width"]), 3, 5, (12, 3), strides=[12, 1], pads=[0, 1, 0, 1])
    h = net.conv(h, 5, 7, (4, 3), pads=[0, 1, 0, 1])
    rows = net.node("Reshape", h, net.constant(np.array([0, 7, -1])))
    model = net.model(net.node("Add", net.node("Squeeze", h, net.constant(np.array([2]))), rows))
    assert [s["x"] for s in two_points(Graph(model)).sizes] == [(2, 3, 48, 320), (1031, 3, 48, 1280)]


def test_a_series_that_comes_in_pieces_is_one_stride_long() -> None:
    net = Net()
    h = net.conv(net.input("sound", ["batch", 1, "samples"]), 1, 4, (300,), strides=[100], pads=[0, 0])
    after = net.node("Identity", net.input("state", [2, "batch", 5]))
    assert guesses(net.model(h, after))[0].series == 100


def test_windows_inside_a_branch_count() -> None:
    net = Net()
    x = net.input("x", ["n", 3, "h", "w"])
    weight = net.constant(np.zeros((3, 3, 1, 1), np.float32))
    branch = helper.make_graph(
        [helper.make_node("Conv", [x, weight], ["b"], strides=[16, 16])],
        "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )  # fmt: skip
    y = net.node("If", net.constant(np.array(True)), then_branch=branch, else_branch=branch)
    assert extent_of(net.model(y).graph).stride == 16


def test_windows_whose_attributes_are_malformed_have_no_extent() -> None:
    nodes = [
        helper.make_node("SpaceToDepth", ["x"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=5),
        helper.make_node("AveragePool", ["b"], ["c"], kernel_shape=[3, 3], strides=[4, 2]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, "h", "w"]) for n in "xc")
    assert extent_of(helper.make_graph(nodes, "odd", [x], [y])) == Extent(4, 4, 2, 3)


@pytest.mark.parametrize(
    ("dim", "declared", "computed"),
    [
        ("batch-size", set(), False),
        ("batch-size", {"batch"}, True),
        ("past + 1", set(), True),
        ("2*steps", {"steps"}, True),
        ("total_sequence_length", set(), True),
        ("a.0", {"a"}, False),
    ],
)
def test_a_name_is_an_expression_by_its_parts_or_its_signs(dim: str, declared: set[str], computed: bool) -> None:
    assert _is_computed(dim, declared) is computed


def test_axes_that_all_grow_take_two_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    model = net.model(net.matmul(net.input("x", ["batch", "steps", 7]), 7, 5))
    walk, walks = Walker.walk, []

    def counted(self: Walker, *args: object, **options: object) -> object:
        walks.append(args[1])
        return walk(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Walker, "walk", counted)
    points = two_points(Graph(model))
    assert len(walks) == 2
    assert all(a != b for a, b in zip(*(sizes["x"][:2] for sizes in points.sizes), strict=True))
