from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import spa
from spa.calibration.imagery import Imagery
from spa.calibration.leaves import dead_leaves
from spa.calibration.synthetic import Synthesiser, pink_noise, synthesise
from spa.errors import PlanError
from spa.running.runtime import input_specs, load_session, run

MODELS = Path(__file__).parents[2] / "models"
F, I64 = TensorProto.FLOAT, TensorProto.INT64


def model(nodes, inputs, initializers=()) -> onnx.ModelProto:
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in dict(initializers).items()]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in inputs]
    outputs = [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)]
    outputs[0].type.tensor_type.elem_type = next((dtype for _, dtype, _ in inputs if dtype != I64), F)
    graph = helper.make_graph(nodes, "g", values, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def one_input(name: str = "x", shape=("batch", 3, 32, 32), dtype: int = F) -> onnx.ModelProto:
    return model([helper.make_node("Identity", [name], ["y"])], [(name, dtype, shape)])


def convolution(batch: int | str = "batch") -> onnx.ModelProto:
    weight = np.ones((4, 3, 3, 3), np.float32)
    return model([helper.make_node("Conv", ["image", "w"], ["y"])], [("image", F, [batch, 3, 32, 32])], {"w": weight})


def embedding() -> onnx.ModelProto:
    table = np.ones((11, 5), np.float32)
    return model(
        [helper.make_node("Gather", ["table", "ids"], ["y"])], [("ids", I64, ["batch", "seq"])], {"table": table}
    )


def file(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / f"{name}.onnx")


def slope_of(power: np.ndarray, frequency: np.ndarray) -> float:
    return float(np.polyfit(np.log(frequency), np.log(power), 1)[0])


# -- whole models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [file("digits_resnet"), file("digits_lstm"), convolution(), embedding()],
    ids=["resnet", "lstm", "convolution", "embedding"],
)
def test_a_model_runs_on_what_was_made_for_it(graph):
    session = load_session(graph)
    batches = synthesise(graph, 20, batch=8)
    assert [len(next(iter(feeds.values()))) for feeds in batches] == [8, 8, 4]
    for feeds in batches:
        assert list(feeds) == [spec.name for spec in input_specs(session)]
        for spec in input_specs(session):
            assert feeds[spec.name].dtype == spec.dtype
            sizes = zip(spec.shape, feeds[spec.name].shape, strict=True)
            assert all(size == dim for dim, size in sizes if isinstance(dim, int))
        assert all(np.isfinite(output).all() for output in run(session, feeds))


def test_the_model_is_left_as_it_was():
    graph = convolution()
    before = graph.SerializeToString()
    synthesise(graph, 2)
    assert graph.SerializeToString() == before


@pytest.mark.parametrize("graph", [convolution(), embedding(), one_input(shape=["n", 4, 40])])
def test_the_seed_decides_everything(graph):
    one, same, other = (synthesise(graph, 6, batch=3, seed=seed) for seed in (1, 1, 2))
    (name,) = one[0]
    assert [feeds[name].tobytes() for feeds in one] == [feeds[name].tobytes() for feeds in same]
    # Nor does one seed's second batch repeat as the next seed's first.
    assert len({feeds[name].tobytes() for feeds in one + other}) == 4


def test_ids_stay_within_the_table():
    ids = np.concatenate([feeds["ids"].ravel() for feeds in synthesise(embedding(), 200)])
    assert ids.min() == 0
    assert ids.max() == 10


def test_a_fixed_batch_is_respected():
    batches = synthesise(convolution(batch=5), 12)
    assert [feeds["image"].shape for feeds in batches] == [(5, 3, 32, 32)] * 3


def test_a_batch_that_only_the_graph_fixes_is_found():
    shape = np.array([1, 48], np.int64)
    graph = model([helper.make_node("Reshape", ["x", "to"], ["y"])], [("x", F, ["batch", 3, 4, 4])], {"to": shape})
    assert [feeds["x"].shape for feeds in synthesise(graph, 3)] == [(1, 3, 4, 4)] * 3


def test_sizes_of_dynamic_axes_can_be_given():
    (feeds,) = synthesise(one_input(shape=["batch", 3, "height", "width"]), 2, sizes={"height": 24, "width": 40})
    assert feeds["x"].shape == (2, 3, 24, 40)


# -- which content -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "numpy_type"), [(TensorProto.FLOAT16, np.float16), (F, np.float32), (TensorProto.DOUBLE, np.float64)]
)
@pytest.mark.parametrize("shape", [("batch", 3, 32, 32), ("batch", 4, 40), ("batch", 5)])
def test_the_type_of_floats_is_kept(dtype, numpy_type, shape):
    (feeds,) = synthesise(one_input(shape=shape, dtype=dtype), 2)
    assert feeds["x"].dtype == numpy_type


@pytest.mark.parametrize(("shape", "axis"), [(("n", 3, 16, 24), 1), (("n", 16, 24, 3), 3), (("n", 1, 9, 9), 1)])
def test_images_have_their_channels_where_the_model_has_them(shape, axis):
    (feeds,) = synthesise(one_input(shape=shape), 8, imagery=Imagery(mean=0, std=1))
    images = np.moveaxis(feeds["x"], axis, 1)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.corrcoef(images[..., 1:].ravel(), images[..., :-1].ravel())[0, 1] > 0.6


def test_images_are_normalised_as_asked():
    plain, default, own = (
        synthesise(one_input(), 4, imagery=Imagery(**options))[0]["x"]
        for options in ({"mean": 0, "std": 1}, {}, {"mean": [0.1, 0.2, 0.3], "std": 0.5})
    )
    mean, std = np.reshape([0.485, 0.456, 0.406], (3, 1, 1)), np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    np.testing.assert_allclose(default, (plain - mean) / std, atol=1e-5)
    np.testing.assert_allclose(own, (plain - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"), [("x", ("n", 4, 64)), ("waveform", ("n", 400)), ("mel", ("n", 80, 100)), ("audio", ("n", 64))]
)
def test_series_are_smooth(name, shape):
    (feeds,) = synthesise(one_input(name, shape), 32)
    series = feeds[name]
    assert np.corrcoef(series[..., 1:].ravel(), series[..., :-1].ravel())[0, 1] > 0.3
    np.testing.assert_allclose(series.std(axis=-1), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", ("n", 64)),
        ("x", ("n", 8, 8)),
        ("past_key", ("n", 4, 8, 64)),
        ("hidden", ("n", 8, 64)),
        ("x", ("n", 7, 9, 9)),
    ],
)
def test_other_floats_are_standard_normal(name, shape):
    (feeds,) = synthesise(one_input(name, shape), 64)
    values = feeds[name]
    assert abs(np.corrcoef(values[..., 1:].ravel(), values[..., :-1].ravel())[0, 1]) < 0.1
    assert values.std() == pytest.approx(1, abs=0.1)


def test_masks_remain_masks():
    (feeds,) = synthesise(one_input("attention_mask", ("n", 4, 40)), 3)
    assert set(np.unique(feeds["attention_mask"])) <= {0, 1}


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"batch": 0},
        {"imagery": Imagery(std=0)},
        {"imagery": Imagery(mean=[0.1, 0.2])},
        {"sizes": {"no": 1}},
    ],
)
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(PlanError):
        synthesise(one_input(), **{"samples": 2, **options})


@pytest.mark.parametrize(
    ("declared", "time"),
    [
        (("batch", 64, 6), 1),
        (("batch", 6, 64), 2),
        (("batch", "time", 80), 1),
        (("batch", 80, "time"), 2),
        (("batch", 40, 64), 2),
    ],
    ids=["few channels last", "few channels first", "open steps first", "open steps last", "both long"],
)
def test_series_go_on_along_the_axis_of_time(declared, time):
    series = np.moveaxis(synthesise(one_input("eeg", declared), 16)[0]["eeg"], time, -1)
    np.testing.assert_allclose(series.std(axis=-1), 1, rtol=1e-3)
    steps = [
        np.corrcoef(
            np.take(series, range(1, series.shape[a]), a).ravel(),
            np.take(series, range(series.shape[a] - 1), a).ravel(),
        )[0, 1]
        for a in (2, 1)
    ]
    assert steps[0] > 0.3 > steps[1] + 0.1


# -- the statistics of images and series ---------------------------------------------------------------------


@pytest.mark.parametrize(("count", "side"), [(64, 32), (16, 128)])
def test_the_power_of_dead_leaves_falls_with_frequency_as_in_photographs(count, side):
    images = dead_leaves(count, 3, side, side, np.random.default_rng(0))
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    window = np.hanning(side)
    centred = (images - images.mean(axis=(2, 3), keepdims=True)) * window[:, None] * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(axis=(0, 1))
    frequency = np.fft.fftfreq(side, 1 / side)
    radius = np.rint(np.hypot(frequency[:, None], frequency)).astype(int).ravel()
    radial = np.bincount(radius, power.ravel()) / np.bincount(radius)
    at = np.arange(2, side // 2)
    assert -3.5 < slope_of(radial[at], at) < -1.0


def test_channels_of_dead_leaves_are_strongly_correlated_but_not_equal():
    images = dead_leaves(32, 3, 48, 48, np.random.default_rng(0))
    correlation = np.corrcoef(images.transpose(1, 0, 2, 3).reshape(3, -1))[np.triu_indices(3, 1)]
    assert (correlation > 0.6).all()
    assert (correlation < 0.99).all()


def test_images_differ_from_each_other():
    images = dead_leaves(4, 1, 16, 16, np.random.default_rng(0)).reshape(4, -1)
    assert (np.abs(np.corrcoef(images)[np.triu_indices(4, 1)]) < 0.9).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 8, 100), (3, 4, 100, 8), (0, 3, 8, 8), (2, 6, 9, 9)])
def test_dead_leaves_come_in_any_size(shape):
    images = dead_leaves(*shape, np.random.default_rng(0))
    assert images.shape == shape
    assert np.isfinite(images).all()


def test_the_power_of_pink_noise_falls_with_frequency():
    series = pink_noise((200, 3, 512), np.random.default_rng(0))
    assert series.dtype == np.float32
    power = (np.abs(np.fft.rfft(series * np.hanning(512))) ** 2).reshape(600, -1)
    at = np.arange(2, 256)
    assert -2.0 < slope_of(power.mean(axis=0)[at], at) < -0.5
    # Slopes are mixed.
    assert np.std([slope_of(each[at], at) for each in power[:50]]) > 0.2


@pytest.mark.parametrize("shape", [(), (3,), (4, 1), (0, 5), (2, 2), (2, 3, 33)])
def test_pink_noise_comes_in_any_shape(shape):
    series = pink_noise(shape, np.random.default_rng(0))
    assert series.shape == shape
    assert series.dtype == np.float32
    assert np.isfinite(series).all()


@pytest.mark.parametrize(("side", "made"), [(8, 512), (512, 85), (1024, 32)])
def test_large_inputs_are_made_in_numbers_that_fit_into_memory(side: int, made: int) -> None:
    maker = Synthesiser(one_input(shape=("batch", 3, side, side)), 0)
    assert maker.affordable(512) == made
    assert maker.affordable(20) == 20


def test_fewer_made_up_inputs_than_asked_for_are_said() -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)}
    weights["v"] = np.random.default_rng(1).standard_normal((2, 4, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[64, 64]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"]),
    ]
    report = spa.prune(
        model(nodes, [("x", F, ["n", 3, 1024, 1024])], weights), ratio=0.3, round_to=1, insist=True
    ).report
    assert report.calibration is not None
    assert report.calibration["samples"] == 32
    assert any("32 inputs are made up, not 512" in note for note in report.notes)


# -- a range of values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("x", ("n", 40, 6)), ("features", ("n", 12)), ("audio", ("n", 400))])
def test_a_given_range_holds_for_series_and_other_floats(name: str, shape: tuple) -> None:
    (batch,) = Synthesiser(one_input(name, shape), value_range=(10, 14)).batches(16)
    assert 10 <= batch[name].min() < 11 and 13 < batch[name].max() <= 14
    assert abs(batch[name].mean() - 12) < 0.5 and 0.2 < batch[name].std() < 0.9


def test_a_given_range_fits_some_input() -> None:
    with pytest.raises(PlanError, match=r"value_range: no input of the model takes images.*Leave it out"):
        Synthesiser(embedding(), value_range=(0, 1))
    states = one_input("h0", (2, "n", 8))
    with pytest.raises(PlanError, match="value_range"):
        Synthesiser(states, value_range=(0, 1))
