"""TensorFlow and Keras into ONNX."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from spa.errors import ModelError, UnsupportedError
from spa.running.runtime import load_session, run

tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install 'spa-onnx[tensorflow]'")
keras = pytest.importorskip("keras")
pytest.importorskip("tf2onnx", reason="tf2onnx is not installed: pip install 'spa-onnx[tensorflow]'")

from spa.frameworks.keras import keras_variables  # noqa: E402
from spa.frameworks.tensorflow import read  # noqa: E402
from spa.importers import tensorflow as importer  # noqa: E402
from spa.importers.tensorflow import convert  # noqa: E402
from tests import keras_networks  # noqa: E402

# TensorFlow 2.21 and tf2onnx 1.17 call what numpy 2 deprecates, and protobuf types without __module__.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", keras_networks.NETWORKS)
def test_keras_networks_convert_exactly_and_every_variable_is_found_by_name(name: str) -> None:
    model = keras_networks.random(name)
    imported = convert(model)
    assert imported.kind == "keras" and imported.notes == ()
    assert imported.error < 1e-5
    onnx.checker.check_model(imported.model)
    known = {t.name for t in imported.model.graph.initializer}
    assert set(imported.names) <= known
    found, wanted = set(imported.names.values()), set(keras_variables(model))
    # A bidirectional layer's two kernels are one initializer, which bears the forward one's name.
    assert {path for path in wanted - found if "/backward_" not in path} == set()
    assert found <= wanted


def test_named_initializers_hold_the_variable_up_to_the_order_of_its_axes() -> None:
    model = keras_networks.random("residual")
    imported = convert(model)
    variables = keras_variables(model)
    for tensor in imported.model.graph.initializer:
        if tensor.name in imported.names:
            mine, theirs = numpy_helper.to_array(tensor), np.asarray(variables[imported.names[tensor.name]])
            assert np.array_equal(np.sort(mine, axis=None), np.sort(theirs, axis=None))
            if mine.ndim == 4:
                assert np.array_equal(mine, theirs.transpose(3, 2, 0, 1))


def test_equal_values_do_not_confuse_names() -> None:
    model = keras_networks.residual()  # all gammas one, all betas zero
    imported = convert(model)
    widths = {imported.names.get(t.name): sorted(t.dims) for t in imported.model.graph.initializer}
    assert {v.path: sorted(v.shape) for v in model.variables}.items() <= widths.items()


def test_batch_normalisation_stays_whole_behind_convolutions() -> None:
    imported = convert(keras_networks.random("residual"))
    assert operators(imported.model).count("BatchNormalization") == 3
    assert operators(convert(keras_networks.random("perceptron")).model).count("BatchNormalization") == 1


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("axis", [1, -1])
def test_batch_normalisation_of_any_rank_and_axis_stays_whole(rank: int, axis: int) -> None:
    entry = keras.Input((2, 3, 4, 5)[: rank - 1])
    model = keras.Model(entry, keras.layers.BatchNormalization(axis=axis)(entry))
    for number, variable in enumerate(model.variables):
        variable.assign(np.linspace(0.5, 2.0 + number, variable.shape[0]))
    imported = convert(model)
    assert imported.error < 1e-5
    assert "BatchNormalization" in operators(imported.model)
    assert len(imported.names) == 4


def test_batch_and_sequence_stay_open_and_interfaces_keep_their_names() -> None:
    graph = convert(keras_networks.random("recurrent")).model.graph
    assert [axes(v) for v in graph.input] == [["batch", "sequence", 7]]
    assert axes(graph.output[0]) == ["batch", 5]
    graph = convert(keras_networks.random("siamese")).model.graph
    assert [v.name for v in graph.input] == ["left", "right"]
    assert len(graph.output) == 2


def test_other_batches_and_lengths_run() -> None:
    model = keras_networks.random("recurrent")
    session = load_session(convert(model).model)
    for shape in ((1, 3, 7), (4, 9, 7)):
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        assert np.allclose(run(session, {"input_0": x})[0], np.asarray(model(x, training=False)), atol=1e-5)


def cells(imported: Any) -> list[str]:
    return [op for op in operators(imported.model) if op in ("RNN", "GRU", "LSTM", "Loop")]


def networked(*given: Any, shape: tuple[int | None, ...] = (None, 7)) -> Any:
    model = keras.Sequential([keras.Input(shape), *given])
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(0.4 * rng.standard_normal(variable.shape))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_sequences": True},
        {"go_backwards": True, "return_sequences": True},
        {"reset_after": False},
        {"reset_after": False, "use_bias": False},
        {"use_bias": False, "implementation": 1},
        {"activation": "relu", "recurrent_activation": "tanh"},
        {"dropout": 0.5, "recurrent_dropout": 0.5},
    ],
    ids=str,
)
def test_a_gru_is_an_operator_with_the_weights_of_its_layer(options: dict[str, Any]) -> None:
    model = networked(keras.layers.GRU(5, **options))
    imported = convert(model)
    assert cells(imported) == ["GRU"] and imported.error < 1e-5
    assert set(imported.names.values()) == set(keras_variables(model))
    node = next(n for n in imported.model.graph.node if n.op_type == "GRU")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert bool(attributes.get("linear_before_reset")) is options.get("reset_after", True)
    weights = {t.name: numpy_helper.to_array(t) for t in imported.model.graph.initializer}
    own = [np.asarray(v) for v in model.layers[0].trainable_weights]
    assert np.array_equal(weights[node.input[1]][0], own[0].T) and np.array_equal(weights[node.input[2]][0], own[1].T)


@pytest.mark.parametrize("units", [1, 2, 7])
def test_weights_of_like_shapes_are_not_confused(units: int) -> None:
    for shape in ((4, units), (4, 2)):
        imported = convert(networked(keras.layers.GRU(units), shape=shape))
        assert cells(imported) == ["GRU"] and imported.error < 1e-5


def test_directions_states_and_the_other_cells_are_operators() -> None:
    layers = keras.layers
    for cell, op in ((layers.SimpleRNN, "RNN"), (layers.GRU, "GRU"), (layers.LSTM, "LSTM")):
        both = networked(layers.Bidirectional(cell(5, return_sequences=True, recurrent_dropout=0.1)), cell(4))
        imported = convert(both)
        assert set(cells(imported)) == {op} and imported.error < 1e-5
        entry, state = keras.Input((None, 7)), [keras.Input((5,)) for _ in range(1 + (op == "LSTM"))]
        outputs = cell(5, return_sequences=True, return_state=True)(entry, initial_state=state)
        imported = convert(keras.Model([entry, *state], outputs))
        assert cells(imported) == [op] and imported.error < 1e-5


class Contrary(keras.layers.GRUCell):  # type: ignore[misc]
    """A GRU but for the update gate's sense."""

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        new, _ = super().call(inputs, states)
        return states[0] + inputs[:, :1] - new, [states[0] + inputs[:, :1] - new]


def test_loops_that_no_operator_expresses_stay_loops() -> None:
    layers = keras.layers
    masked = networked(layers.Masking(), layers.GRU(5))
    for model in (masked, networked(layers.SimpleRNN(5, activation="gelu")), networked(layers.RNN(Contrary(5)))):
        imported = convert(model)
        assert cells(imported) == ["Loop"] and imported.error < 1e-5
    x = np.random.default_rng(0).standard_normal((2, 6, 7)).astype(np.float32)
    x[0, 3:] = 0
    assert convert(masked, x).error < 1e-5


def test_the_model_is_not_changed() -> None:
    model = keras_networks.random("residual")
    before = [np.asarray(v) for v in model.variables]
    convert(model)
    assert all(np.array_equal(a, np.asarray(v)) for a, v in zip(before, model.variables, strict=True))


def test_equal_models_give_equal_bytes() -> None:
    model = keras_networks.random("transformer")
    first, second = (convert(model).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_the_exact_gelu_converts() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Activation("gelu")])
    imported = convert(model)
    assert imported.error < 1e-6
    assert "Erf" in operators(imported.model)


def test_keras_files_and_saved_models_convert(tmp_path: Path) -> None:
    model = keras_networks.random("residual")
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "saved", verbose=False)
    paths = {v.path for v in model.variables}
    imported = convert(tmp_path / "model.keras")
    assert imported.kind == "keras" and imported.error < 1e-5
    assert set(imported.names.values()) == paths
    imported = convert(str(tmp_path / "saved"))
    assert imported.kind == "tensorflow" and imported.error < 1e-5
    assert set(imported.names.values()) == paths and imported.notes == ()


@pytest.mark.parametrize("name", ["residual", "separable", "nested", "perceptron", "recurrent", "gated"])
def test_saved_models_keep_batch_normalisation_and_keras_paths(tmp_path: Path, name: str) -> None:
    model = keras_networks.random(name)
    model.export(tmp_path / "exported", verbose=False)
    if name != "gated":  # TensorFlow does not find the seeds of its dropout
        tf.saved_model.save(model, str(tmp_path / "saved"))
    own = convert(model)
    for folder in tmp_path.iterdir():
        imported = convert(folder)
        assert imported.kind == "tensorflow" and imported.error < 1e-5 and imported.notes == ()
        assert set(imported.names.values()) == set(own.names.values())
        assert Counter(operators(imported.model)) == Counter(operators(own.model))


def normalised(x: Any, variance: Any, **options: Any) -> Any:
    mean, beta, gamma = (tf.Variable(np.linspace(a, 2.0, 7, dtype=np.float32), name=n) for a, n in MEANS)
    given = {"offset": beta, "scale": gamma, "mean": mean} | options
    return tf.function(lambda x: tf.nn.batch_normalization(x, variance=variance, variance_epsilon=0.01, **given)), x


MEANS = ((-1.0, "mean"), (0.5, "beta"), (-0.7, "gamma"))
PICTURE = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)


@pytest.mark.parametrize("missing", [[], ["offset"], ["scale"], ["offset", "scale"]])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_functions_keep_batch_normalisation_with_and_without_scale_and_offset(missing: list[str], rank: int) -> None:
    variance = tf.Variable(np.linspace(0.3, 3.0, 7, dtype=np.float32), name="variance")
    imported = convert(*normalised(PICTURE[(0,) * (4 - rank)], variance, **dict.fromkeys(missing)))
    node = next(n for n in imported.model.graph.node if n.op_type == "BatchNormalization")
    assert imported.error < 1e-6
    own = {"scale": "gamma", "offset": "beta"}
    assert set(imported.names.values()) == {"mean", "variance", *(own[n] for n in own if n not in missing)}
    assert [imported.names.get(i) for i in node.input[3:]] == ["mean", "variance"]
    assert next(a.f for a in node.attribute if a.name == "epsilon") == np.float32(0.01)


def test_what_only_resembles_batch_normalisation_stays_as_it_is() -> None:
    weight = tf.Variable(np.linspace(0.3, 3.0, 7, dtype=np.float32), name="weight")
    computed, _ = normalised(PICTURE, tf.abs(weight) + tf.nn.relu(weight))
    matrix, _ = normalised(PICTURE, weight, mean=tf.Variable(np.ones((5, 7), np.float32)))
    wider, _ = normalised(PICTURE[..., :1], weight)

    @tf.function
    def other(x: Any) -> Any:
        root = tf.math.rsqrt(weight + 0.1)
        return x * (root * weight) + (weight - weight * (root * tf.abs(weight)))

    for function, x in ((computed, PICTURE), (matrix, PICTURE), (wider, PICTURE[..., :1]), (other, PICTURE)):
        imported = convert(function, x)
        assert imported.error < 1e-5
        assert "BatchNormalization" not in operators(imported.model)


def test_saved_models_with_several_signatures_ask_which(tmp_path: Path) -> None:
    module = tf.Module()
    module.weight = tf.Variable(np.eye(4, 3, dtype=np.float32), name="weight")

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
    def score(x: Any) -> Any:
        return {"score": x @ module.weight}

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="z")])
    def decode(z: Any) -> Any:
        return {"decoded": tf.matmul(z, module.weight, transpose_b=True)}

    module.score, module.decode = score, decode
    signatures = {"score": score.get_concrete_function(), "decode": decode.get_concrete_function()}
    tf.saved_model.save(module, str(tmp_path / "two"), signatures=signatures)
    with pytest.raises(ModelError, match=r"several signatures: .*'decode' \(z\).*signature="):
        convert(tmp_path / "two")
    with pytest.raises(ModelError, match="no signature 'third'"):
        convert(tmp_path / "two", signature="third")
    imported = convert(tmp_path / "two", signature="decode")
    assert [v.name for v in imported.model.graph.input] == ["z"]
    assert [v.name for v in imported.model.graph.output] == ["decoded"]
    assert "weight" in imported.names.values()


def test_functions_convert_with_a_signature_or_example_inputs() -> None:
    weight = tf.Variable(np.arange(12, dtype=np.float32).reshape(4, 3), name="weight")
    plain = tf.function(lambda x: tf.nn.relu(x @ weight))
    with pytest.raises(ModelError, match=r"Give example_inputs"):
        convert(plain)
    for imported in (
        convert(plain, np.ones((2, 4), np.float32)),
        convert(plain.get_concrete_function(tf.TensorSpec((None, 4), tf.float32))),
    ):
        assert imported.error < 1e-6
        assert axes(imported.model.graph.input[0]) == ["batch", 4]
        assert list(imported.names.values()) == ["weight"]


def test_subclassed_models_need_example_inputs() -> None:
    class Doubled(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x: Any) -> Any:
            return 2 * self.dense(x)

    with pytest.raises(ModelError, match=r"does not say what it takes. Give example_inputs"):
        convert(Doubled())
    imported = convert(Doubled(), np.ones((2, 4), np.float32))
    assert imported.error < 1e-6 and len(imported.names) == 2


def test_wrong_example_inputs_are_refused_before_work_with_the_right_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras_networks.random("siamese")
    left = np.ones((2, 16), np.float32)
    assert convert(model, {"right": left, "left": 2 * left}).error < 1e-5
    monkeypatch.setattr(importer, "freeze", lambda function: pytest.fail("work has begun"))
    with pytest.raises(ModelError, match="the model takes left, right"):
        convert(model, {"left": left, "wrong": left})
    with pytest.raises(ModelError, match=r"'right' has shape \[2, 5\], expected \['any', 16\]"):
        convert(model, {"left": left, "right": np.ones((2, 5), np.float32)})


def frozen(tmp_path: Path) -> Path:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    kernel = tf.Variable(np.random.default_rng(0).standard_normal((3, 3, 2, 5)).astype(np.float32), name="kernel")
    function = tf.function(lambda x: {"a": tf.nn.conv2d(x, kernel, 1, "SAME"), "b": tf.nn.relu(x)})
    constant = convert_variables_to_constants_v2(
        function.get_concrete_function(tf.TensorSpec((None, 6, 6, 2), tf.float32, name="picture"))
    )
    path = tmp_path / "graph.pb"
    path.write_bytes(constant.graph.as_graph_def().SerializeToString())
    return path


def test_frozen_graphs_keep_batch_normalisation_that_was_not_folded(tmp_path: Path) -> None:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    model = keras_networks.random("residual")
    function = tf.function(lambda x: model(x, training=False))
    constant = convert_variables_to_constants_v2(function.get_concrete_function(tf.TensorSpec((None, 16, 16, 3))))
    path = tmp_path / "graph.pb"
    path.write_bytes(constant.graph.as_graph_def().SerializeToString())
    imported = convert(path)
    assert operators(imported.model).count("BatchNormalization") == 3 and len(imported.names) == 17


def test_frozen_graphs_convert_with_guessed_or_given_ends(tmp_path: Path) -> None:
    path = frozen(tmp_path)
    imported = convert(path)
    assert [v.name for v in imported.model.graph.input] == ["picture"]
    assert len(imported.model.graph.output) == 2
    assert imported.notes == ("a frozen graph has no variables: its weights bear the names of its constants.",)
    assert [list(t.dims) for t in imported.model.graph.initializer if t.name in imported.names] == [[5, 2, 3, 3]]
    assert len(convert(path, inputs=["picture"], outputs=["Relu"]).model.graph.output) == 1
    with pytest.raises(ModelError, match="placeholders picture"):
        convert(path, outputs=["nothing"])


def test_tflite_files_convert(tmp_path: Path) -> None:
    model = keras_networks.random("residual")
    path = tmp_path / "model.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    imported = convert(path)
    assert imported.kind == "tflite" and imported.error < 1e-5
    assert operators(imported.model).count("Conv") == 3
    assert imported.notes == ("what TensorFlow Lite's converter has folded stays folded: BatchNormalization, for one.",)
    assert set() < set(imported.names.values()) <= set(read(path).variables)


def test_operators_that_tf2onnx_lacks_are_named() -> None:
    function = tf.function(lambda x: tf.raw_ops.Betainc(a=x, b=x, x=x))
    with pytest.raises(UnsupportedError, match=r"no handler for Betainc \('.*Betainc', 1 in all\)"):
        convert(function, np.full((2, 3), 0.5, np.float32))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pb").write_text("no graph")
    (tmp_path / "text.tflite").write_text("no graph")
    (tmp_path / "text.keras").write_text("no graph")
    (tmp_path / "text.txt").write_text("no graph")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("missing.keras", "no such file"),
        ("text.pb", "is no frozen graph"),
        ("text.tflite", "TensorFlow Lite cannot load"),
        ("text.keras", "Keras cannot load"),
        ("text.txt", "is no .keras"),
        ("folder", "cannot load .* as a SavedModel"),
    ):
        with pytest.raises(ModelError, match=message):
            convert(tmp_path / name)
    with pytest.raises(ModelError, match="cannot convert a list"):
        convert([1, 2])


def test_a_wrong_conversion_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importer.to_onnx

    def sabotaged(*args: Any, **kwargs: Any) -> onnx.ModelProto:
        model = original(*args, **kwargs)
        if not kwargs.get("numbered"):
            tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
        return model

    monkeypatch.setattr(importer, "to_onnx", sabotaged)
    with pytest.raises(ModelError, match="off by"):
        convert(keras_networks.random("perceptron"))


def test_a_missing_tensorflow_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from spa.importers.tensorflow import convert\n"
        "try: convert('model.keras')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith(UnsupportedError.__name__) and "pip install 'spa-onnx[tensorflow]'" in out
