"""Networks as TensorFlow's SavedModels and for TensorFlow Lite, through JAX; these need both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import spa
from spa.errors import SpaError, UnsupportedError
from spa.running.runtime import load_session, run
from tests.oracle import Net

tf = pytest.importorskip("tensorflow", reason="needs  pip install 'spa-onnx[tensorflow]'")

# TensorFlow 2.21 calls what numpy 2 deprecates, and jax2tf what JAX does.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

MODELS = Path(__file__).parents[2] / "models"
PICTURES = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)


def needs_jax() -> Any:
    pytest.importorskip("jax", reason="needs  pip install 'spa-onnx[jax]'")
    from spa.exporters import saved_model

    return saved_model


@pytest.mark.parametrize(
    "name", ["digits_vgg", *(pytest.param(n, marks=pytest.mark.slow) for n in ("digits_vit", "digits_lstm"))]
)
def test_a_saved_model_runs_without_jax_at_any_batch(tmp_path: Path, name: str) -> None:
    needs_jax()
    source = MODELS / f"{name}.onnx"
    output = onnx.load(source).graph.output[0].name
    assert spa.export(source, "tensorflow", tmp_path / "saved") == tmp_path / "saved"
    np.save(tmp_path / "x.npy", PICTURES)
    code = (
        "import sys; sys.modules['jax'] = sys.modules['spa'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        "serve = tf.saved_model.load('saved').signatures['serving_default']\n"
        f"np.save('y.npy', serve(input=tf.constant(np.load('x.npy')))['{output}'])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    expected = run(load_session(source), {"input": PICTURES})[0]
    assert np.allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("digits_vgg", {}),
        pytest.param("digits_resnet", {"batch": 5}, marks=pytest.mark.slow),
        pytest.param("digits_vit", {"batch": 5}, marks=pytest.mark.slow),
        ("digits_lstm", {"batch": 5}),
    ],
)
def test_a_lite_model_computes_the_same(tmp_path: Path, name: str, sizes: dict[str, int]) -> None:
    needs_jax()
    source, target = MODELS / f"{name}.onnx", tmp_path / "model.tflite"
    assert spa.export(source, "tensorflow", target, sizes=sizes) == target
    with pytest.warns(UserWarning, match="tf.lite.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_path=str(target))
    (got,) = interpreter.get_signature_runner()(input=PICTURES).values()
    assert np.allclose(got, run(load_session(source), {"input": PICTURES})[0], atol=1e-5)


def test_a_lite_model_that_the_converter_refuses_names_the_remedy(tmp_path: Path) -> None:
    needs_jax()
    with pytest.raises(UnsupportedError, match=r"Lite refuses the network: .*Fix its open sizes \(--size batch=1"):
        spa.export(MODELS / "digits_lstm.onnx", "tensorflow", tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_a_lite_model_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model = needs_jax()
    monkeypatch.setattr(saved_model._Lite, "__call__", lambda self, feeds: [np.zeros((len(feeds["input"]), 10))])
    with pytest.raises(UnsupportedError, match="TensorFlow Lite's outputs differ from onnxruntime's by 1"):
        spa.export(MODELS / "digits_vgg.onnx", "tensorflow", tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_variables_and_types_and_names_are_the_models(tmp_path: Path) -> None:
    needs_jax()
    net = Net(opset=17)
    ids = net.input("input.ids", ["batch", 3], TensorProto.INT64)
    table = net.weight(9, 4)
    model = net.model(net.node("Gather", table, ids), net.node("ReduceMax", ids, axes=[1], keepdims=0))
    spa.export(model, "tensorflow", tmp_path / "saved")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    serve = loaded.signatures["serving_default"]
    (entry,) = serve.structured_input_signature[1].values()
    assert entry.name == "input_ids" and entry.dtype == tf.int64 and entry.shape.as_list() == [None, 3]
    results = serve(input_ids=tf.constant([[0, 5, 8]], tf.int64))
    assert {y.dtype for y in results.values()} == {tf.float32, tf.int64}
    assert [v.shape.as_list() for v in serve.variables] == [[9, 4]]


def test_the_result_of_pruning_a_keras_model_is_rebuilt_in_keras(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    pytest.importorskip("tf2onnx")
    layers = [keras.Input((20,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    result = spa.prune(keras.Sequential(layers), criterion="l2", ratio=0.4)
    for name in ("small", "small.keras", "small.tflite"):
        assert spa.export(result, "tensorflow", tmp_path / name) == tmp_path / name
        assert spa.convert(tmp_path / name).error < 1e-5
    assert keras.saving.load_model(tmp_path / "small.keras").layers[0].units < 64


def test_a_folder_that_exists_and_a_model_that_differs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model = needs_jax()
    with pytest.raises(SpaError, match="it exists"):
        spa.export(MODELS / "digits_vgg.onnx", "tensorflow", tmp_path)
    with pytest.raises(SpaError, match="only the result of pruning a Keras model"):
        spa.export(MODELS / "digits_vgg.onnx", "tensorflow", tmp_path / "small.keras")
    monkeypatch.setattr(saved_model, "allowed", lambda model: -1.0)
    with pytest.raises(UnsupportedError, match="TensorFlow's outputs differ from onnxruntime's by"):
        spa.export(MODELS / "digits_vgg.onnx", "tensorflow", tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_jax_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setitem(sys.modules, "jax.export", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[jax\]'"):
        spa.export(MODELS / "digits_vgg.onnx", "tensorflow", tmp_path / "saved")
