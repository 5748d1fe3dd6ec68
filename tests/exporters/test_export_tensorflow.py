"""Pruned models back into Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.errors import ModelError, SpaError, UnsupportedError

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install 'spa-onnx[tensorflow]'")
keras = pytest.importorskip("keras")
pytest.importorskip("tf2onnx", reason="tf2onnx is not installed: pip install 'spa-onnx[tensorflow]'")

from spa.exporters import tensorflow as exporter  # noqa: E402
from spa.exporters.tensorflow import save, write_back  # noqa: E402
from spa.frameworks.tensorflow import example_feeds  # noqa: E402
from spa.importers.tensorflow import convert  # noqa: E402
from spa.running.runtime import load_session, run  # noqa: E402
from tests import keras_networks  # noqa: E402

# TensorFlow 2.21 and tf2onnx 1.17 call what numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


def pruned(model: Any, **options: Any) -> tuple[spa.api.Result, Any]:
    imported = convert(model)
    result = spa.prune(imported.model, **{"criterion": "l2", "ratio": 0.4, "round_to": 1} | options)
    return result, imported.names


def assert_same_outputs(small: Any, result: spa.api.Result) -> None:
    feeds = example_feeds(result.model)
    given = [tf.constant(a) for a in feeds.values()]
    own = keras.tree.flatten(
        small(dict(zip(feeds, given, strict=True)) if len(given) > 1 else given[0], training=False)
    )
    for mine, theirs in zip(own, run(load_session(result.model), feeds), strict=True):
        assert np.allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-4)


def trains(model: Any) -> bool:
    """Whether one step of training changes every trainable variable's layer without complaint."""
    feeds = example_feeds(convert(model).model)
    x: Any = feeds if len(feeds) > 1 else next(iter(feeds.values()))
    y = keras.tree.map_structure(lambda t: np.zeros((2, *t.shape[1:]), np.float32), model.output)
    before = [np.asarray(v) for v in model.trainable_variables]
    model.compile("sgd", "mse")
    history = model.fit(x, y, batch_size=2, verbose=0)
    moved = [not np.array_equal(a, np.asarray(v)) for a, v in zip(before, model.trainable_variables, strict=True)]
    return bool(np.isfinite(history.history["loss"]).all()) and any(moved)


@pytest.mark.parametrize("name", keras_networks.NETWORKS)
def test_networks_come_back_narrower_equal_and_trainable(name: str) -> None:
    model = keras_networks.random(name)
    result, names = pruned(model)
    small = write_back(model, result, names)
    assert type(small) is type(model)
    assert small.count_params() < 0.9 * model.count_params()
    assert_same_outputs(small, result)
    if not isinstance(model, keras.Sequential):
        assert trains(small)
    assert convert(small).error < 1e-5


@pytest.mark.parametrize("name", ["perceptron", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_sequential_models_train_on(name: str) -> None:
    model = keras_networks.random(name)
    small = write_back(model, *pruned(model))
    small.compile("sgd", "mse")
    x = next(iter(example_feeds(convert(small).model).values()))
    width = small.output_shape[-1]
    history = small.fit(x, np.zeros((len(x), width), np.float32), verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("criterion", ["obspa", "flap"])
@pytest.mark.parametrize("name", ["residual", "separable", "perceptron", "recurrent", "gated", "transformer"])
def test_reconstructed_weights_and_new_biases_come_back(name: str, criterion: str) -> None:
    model = keras_networks.random(name)
    result, names = pruned(model, criterion=criterion, samples=32)
    assert_same_outputs(write_back(model, result, names), result)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_cells_without_a_bias_get_the_one_of_the_reconstruction(cell: str) -> None:
    keras.utils.clear_session()
    make = getattr(keras.layers, cell)
    body = [keras.layers.Bidirectional(make(11, use_bias=False, return_sequences=True)), make(13, use_bias=False)]
    model = keras.Sequential([keras.Input((None, 7)), *body, keras.layers.Dense(5)])
    for number, variable in enumerate(model.trainable_variables):
        variable.assign(0.4 * np.random.default_rng(number).standard_normal(variable.shape))
    result, names = pruned(model, criterion="obspa", samples=128)
    small = write_back(model, result, names)
    assert len(small.trainable_variables) > len(model.trainable_variables)
    assert_same_outputs(small, result)


def test_an_empty_plan_gives_the_same_model() -> None:
    model = keras_networks.random("transformer")
    imported = convert(model)
    same = write_back(model, spa.prune(imported.model, plan=spa.Plan({}, {}, {})), imported.names)
    for old, new in zip(model.variables, same.variables, strict=True):
        assert old.path == new.path
        assert np.array_equal(np.asarray(old), np.asarray(new))


def test_kept_channels_are_those_of_the_plan() -> None:
    model = keras_networks.random("residual")
    result, names = pruned(model)
    small = write_back(model, result, names)
    group = next(g for g in result.plan.kept if result.plan.sizes[g] == 23)
    kept = list(result.plan.kept[group])
    narrow, wide = (np.asarray(m.get_layer(model.layers[4].name).kernel) for m in (small, model))
    assert wide.shape[-1] == 23 and np.array_equal(narrow, wide[:, :, list(_inputs(result)), :][..., kept])


def _inputs(result: spa.api.Result) -> tuple[int, ...]:
    return next(kept for name, kept in result.plan.kept.items() if result.plan.sizes[name] == 13)


def test_the_original_is_not_changed_and_compiling_is_kept() -> None:
    model = keras_networks.random("residual")
    model.compile("adam", "mse")
    before = [np.asarray(v) for v in model.variables]
    result, names = pruned(model)
    assert write_back(model, result, names).compiled
    assert all(np.array_equal(a, np.asarray(v)) for a, v in zip(before, model.variables, strict=True))


def test_another_models_result_is_refused() -> None:
    result, names = pruned(keras_networks.random("residual"))
    with pytest.raises(ModelError, match=r"is not in the pruned model. Convert this model"):
        write_back(keras_networks.random("transformer"), result, names)


def test_subclassed_models_are_refused() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    result, names = pruned(keras_networks.random("perceptron"))
    with pytest.raises(UnsupportedError, match="is a subclass with code of its own"):
        write_back(Own(), result, names)


def test_half_precision_is_refused() -> None:
    result, names = pruned(keras_networks.random("perceptron"))
    dense = keras.layers.Dense(3, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((5,)), dense])
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    with pytest.raises(UnsupportedError, match=r"computes in float16.*float32 copy"):
        write_back(model, result, names)


def test_operations_that_are_no_layers_come_back() -> None:
    image = keras.Input((4, 4, 3))
    x = keras.ops.reshape(keras.layers.Conv2D(13, 3, padding="same")(image), (-1, 16, 13))
    model = keras.Model(image, keras.layers.Dense(2)(keras.ops.mean(x, axis=1) * 3.0))
    result, names = pruned(model)
    assert_same_outputs(write_back(model, result, names), result)


@keras.saving.register_keras_serializable("spa-tests")
class Stubborn(keras.layers.Layer):  # type: ignore[misc]
    """A layer with its width written into it."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 21), name="kernel", initializer="random_normal")

    def call(self, x: Any) -> Any:
        return x @ self.kernel


def test_layers_with_a_width_written_into_them_are_named() -> None:
    layers = [keras.Input((12,)), Stubborn(name="stubborn"), keras.layers.ReLU(), keras.layers.Dense(5)]
    model = keras.Sequential(layers)
    with pytest.raises(UnsupportedError, match=r"layer 'stubborn' \(Stubborn\) cannot be narrowed"):
        write_back(model, *pruned(model))
    result, names = pruned(model, ratio=None, plan=spa.Plan({}, {}, {}))
    assert_same_outputs(write_back(model, result, names), result)


def test_a_wrong_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = exporter._pieces

    def sabotaged(*args: Any) -> Any:
        numbers, values = original(*args)
        return numbers, values * np.float32(1.05)

    monkeypatch.setattr(exporter, "_pieces", sabotaged)
    model = keras_networks.random("perceptron")
    with pytest.raises(UnsupportedError, match="off by"):
        write_back(model, *pruned(model))


@pytest.mark.parametrize("file", ["small.keras", "small", "small.tflite"])
@pytest.mark.parametrize("name", ["residual", "siamese"])
def test_saved_models_are_the_same(tmp_path: Path, file: str, name: str) -> None:
    model = keras_networks.random(name)
    path = save(write_back(model, *pruned(model)), tmp_path / file)
    assert path.exists()
    assert convert(path).error < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_saving_refuses_other_suffixes_and_folders_that_exist(tmp_path: Path) -> None:
    model = keras_networks.random("perceptron")
    with pytest.raises(SpaError, match=r"choose .keras, .tflite"):
        save(model, tmp_path / "small.onnx")
    with pytest.raises(SpaError, match="the folder exists"):
        save(model, tmp_path)


def test_what_tflite_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"TensorFlow Lite refuses Keras model .*Save it as .keras"):
        save(keras_networks.random("recurrent"), tmp_path / "small.tflite")
    assert list(tmp_path.iterdir()) == []
