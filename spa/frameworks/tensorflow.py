"""TensorFlow: any model as one function of flat tensors, and how its outputs are compared with another's.

The importer converts that function; the exporter runs the same function of what it rebuilt.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto

from spa.errors import ModelError, UnreadableError
from spa.extras import extra
from spa.frameworks.keras import by_path, keras_variables
from spa.frameworks.reasons import first_line
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Function:
    """A model of whatever form as a function of flat tensors.

    Attributes:
        kind: ``keras``, ``tensorflow`` or ``tflite``.
        call: the function; its outputs, flat.
        specs: the inputs' shapes and types.
        inputs: names of the inputs.
        outputs: names of the outputs, as many as are known.
        variables: float32 variables by path; of a ``.tflite`` file the names of its tensors alone.
        owner: what keeps the variables alive; TensorFlow's functions refer to them weakly.
    """

    kind: str
    call: Callable[..., list[Any]]
    specs: Sequence[Any]
    inputs: Sequence[str]
    outputs: Sequence[str]
    variables: Mapping[str, Any]
    owner: Any = None

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the framework's own outputs."""
        import tensorflow as tf

        tensors = [tf.constant(a, s.dtype) for a, s in zip(arrays, self.specs, strict=True)]
        return [np.asarray(t) for t in self.call(*tensors)]


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    source: Any,
    example_inputs: Any = None,
    *,
    signature: str | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Function:
    """Make a function of what :func:`spa.importers.tensorflow.convert` takes (see there)."""
    tf = _tensorflow()
    if _is_keras(source):
        return _from_keras(tf, source, example_inputs)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise UnreadableError(f"cannot read {str(path)!r}: there is no such file or folder. Check the path.")
        if path.is_dir():
            return _from_saved_model(tf, path, signature)
        if path.suffix in (".keras", ".h5"):
            return _from_keras(tf, _load_keras(path), example_inputs)
        if path.suffix == ".pb":
            return _from_frozen_graph(tf, path, inputs, outputs)
        if path.suffix == ".tflite":
            return _from_tflite(tf, path)
        raise ModelError(f"{str(path)!r} is no .keras, .h5, .pb or .tflite file and no SavedModel. Give one of these.")
    if hasattr(source, "structured_input_signature"):
        return _from_concrete(tf, source)
    if hasattr(source, "get_concrete_function"):
        return _from_tf_function(tf, source, example_inputs)
    raise ModelError(
        f"cannot convert a {type(source).__name__}. Give a Keras model, a tf.function, a concrete function or a path."
    )


def _load_keras(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"Keras cannot load {str(path)!r}: {first_line(error)} "
            "Load it yourself, with its custom objects, and give the model."
        ) from error


def _from_keras(tf: Any, model: Any, examples: Any) -> Function:
    import keras

    if getattr(model, "inputs", None):
        structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        names = [f"input_{i}" if t.name.startswith("keras_tensor") else t.name for i, t in enumerate(model.inputs)]
        specs = [tf.TensorSpec(t.shape, t.dtype) for t in model.inputs]
    elif examples is None:
        raise ModelError(
            f"Keras model {model.name!r} does not say what it takes. Give example_inputs, or begin it with keras.Input."
        )
    else:
        structure, (names, arrays) = examples, flat_examples(examples)
        specs = _open_batch(tf, arrays)

    def call(*flat: Any) -> list[Any]:
        return keras.tree.flatten(model(keras.tree.pack_sequence_as(structure, list(flat)), training=False))

    if not model.built:
        call(*(tf.constant(a) for a in flat_examples(examples)[1]))
    variables = {path: v.value for path, v in keras_variables(model).items()}
    outputs = [model.layers[-1].name] if isinstance(model, keras.Sequential) else getattr(model, "output_names", ())
    return Function("keras", call, specs, names, outputs, variables)


def _from_tf_function(tf: Any, function: Any, examples: Any) -> Function:
    name = getattr(function, "__name__", "function")
    if function.input_signature is None and examples is None:
        raise ModelError(
            f"tf.function {name!r} does not say what it takes. Give example_inputs, or an input_signature."
        )
    try:
        if function.input_signature is not None:
            return _from_concrete(tf, function.get_concrete_function())
        specs = _open_batch(tf, flat_examples(examples)[1])
        if isinstance(examples, Mapping):
            return _from_concrete(tf, function.get_concrete_function(**dict(zip(examples, specs, strict=True))))
        return _from_concrete(tf, function.get_concrete_function(*specs))
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow cannot trace {name!r}: {first_line(error)} Check example_inputs.") from error


def _from_saved_model(tf: Any, path: Path, signature: str | None) -> Function:
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow cannot load {str(path)!r} as a SavedModel: {first_line(error)}") from error
    signatures = dict(loaded.signatures)
    listed = ", ".join(f"{n!r} ({', '.join(f.structured_input_signature[1])})" for n, f in signatures.items())
    if not signatures:
        raise ModelError(f"SavedModel {str(path)!r} has no signature. Save it with signatures=, or give its function.")
    if signature is None:
        if len({_interface(f) for f in signatures.values()}) > 1:
            raise ModelError(f"SavedModel {str(path)!r} has several signatures: {listed}. Choose one with signature=.")
        signature = "serving_default" if "serving_default" in signatures else next(iter(signatures))
    if signature not in signatures:
        raise ModelError(f"SavedModel {str(path)!r} has no signature {signature!r}, but {listed}. Choose one of these.")
    return _from_concrete(tf, signatures[signature], owner=loaded)


def _interface(function: Any) -> str:
    """Return what a signature takes, gives and reads; Keras writes one function under two names."""
    read = [v.name for v in function.variables]
    return repr((function.structured_input_signature, function.structured_outputs, read))


def _from_concrete(tf: Any, concrete: Any, owner: Any = None) -> Function:
    signature = concrete.structured_input_signature
    slots = tf.nest.flatten(signature)
    specs = [s for s in slots if isinstance(s, tf.TensorSpec)]
    structure = concrete.structured_outputs

    def call(*flat: Any) -> list[Any]:
        given = iter(flat)
        filled = [next(given) if isinstance(s, tf.TensorSpec) else s for s in slots]
        args, kwargs = tf.nest.pack_sequence_as(signature, filled)
        return list(tf.nest.flatten(concrete(*args, **kwargs)))

    variables = by_path((v.name.removesuffix(":0"), v) for v in concrete.variables if v.dtype == tf.float32)
    outputs = sorted(structure) if isinstance(structure, Mapping) else ()  # tf.nest flattens in this order
    return Function("tensorflow", call, specs, [s.name for s in specs], outputs, variables, owner)


def _from_frozen_graph(tf: Any, path: Path, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Function:
    """Read a graph without variables; its own large constants stand for them."""
    graph = tf.compat.v1.GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
        wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    except (OSError, ValueError, DecodeError) as error:
        raise ModelError(f"{str(path)!r} is no frozen graph: {first_line(error)} Check the file.") from error
    feeds, fetches = _ends(graph, inputs, outputs)
    try:
        pruned = wrapped.prune([_tensor_name(n) for n in feeds], [_tensor_name(n) for n in fetches])
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{str(path)!r}: {first_line(error)} Name inputs and outputs of the graph; it has the placeholders "
            f"{', '.join(_ends(graph, None, None)[0]) or 'none'}."
        ) from error
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in pruned.inputs]
    names = [n.removesuffix(":0") for n in fetches]
    return Function("tensorflow", lambda *flat: list(pruned(*flat)), specs, feeds, names, {})


def _from_tflite(tf: Any, path: Path) -> Function:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it announces its move to a package of its own
            interpreter = tf.lite.Interpreter(model_path=str(path))
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"TensorFlow Lite cannot load {str(path)!r}: {first_line(error)} Check the file.") from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def call(*flat: Any) -> list[Any]:
        for detail, tensor in zip(inputs, flat, strict=True):
            interpreter.resize_tensor_input(detail["index"], tensor.shape)
        interpreter.allocate_tensors()
        for detail, tensor in zip(inputs, flat, strict=True):
            interpreter.set_tensor(detail["index"], tensor)
        interpreter.invoke()
        return [interpreter.get_tensor(d["index"]) for d in outputs]

    specs = [tf.TensorSpec([None if n < 0 else n for n in d["shape_signature"]], d["dtype"]) for d in inputs]
    constants = {d["name"]: None for d in interpreter.get_tensor_details() if d["dtype"] == np.float32}
    return Function("tflite", call, specs, [d["name"] for d in inputs], [d["name"] for d in outputs], constants)


def _ends(graph: Any, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the placeholders of a graph and the operators that nobody reads, or what is given instead."""
    read = {name.lstrip("^").split(":")[0] for node in graph.node for name in node.input}
    silent = {"Const", "NoOp", "Assert", "Placeholder", "PlaceholderWithDefault"}
    feeds = list(inputs or (n.name for n in graph.node if n.op == "Placeholder"))
    fetches = list(outputs or (n.name for n in graph.node if n.name not in read and n.op not in silent))
    return feeds, fetches


def _tensor_name(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def flat_examples(examples: Any) -> tuple[list[str], list[np.ndarray]]:
    """Return example inputs, flat: their names and the arrays."""
    if isinstance(examples, Mapping):
        return list(examples), [np.asarray(a) for a in examples.values()]
    arrays = [np.asarray(a) for a in examples] if isinstance(examples, list | tuple) else [np.asarray(examples)]
    return [f"input_{i}" for i in range(len(arrays))], arrays


def _open_batch(tf: Any, arrays: Sequence[np.ndarray]) -> list[Any]:
    return [tf.TensorSpec((None, *a.shape[1:]) if a.ndim else (), a.dtype) for a in arrays]


def _is_keras(source: Any) -> bool:
    """Tell whether an object is a Keras model; imports nothing."""
    return any(c.__module__.startswith("keras.") and c.__name__ == "Model" for c in type(source).__mro__)


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on standard error
    with extra("tensorflow"):
        import tensorflow
        import tf2onnx  # noqa: F401
    return tensorflow


# -- comparing ---------------------------------------------------------------------------------------------------------


def example_feeds(model: ModelProto) -> dict[str, np.ndarray]:
    """Make up inputs of an ONNX model, by name and in its order."""
    session = load_session(model)
    return dict(working_feeds(session, model=model))


def difference(
    names: Sequence[str], expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], what: str = "the ONNX model"
) -> float:
    """Compare outputs with the framework's own; return the largest difference, over that output's largest magnitude.

    Args:
        names: of the outputs.
        expected: the framework's.
        actual: those to judge.
        what: gave them.

    Raises:
        ModelError: the difference is above `TOLERANCE`, or shapes differ.
    """
    worst = 0.0
    for name, theirs, mine in zip(names, expected, actual, strict=True):
        if mine.shape != theirs.shape:
            raise ModelError(f"{what} gives {list(mine.shape)} for output {name!r}, expected {list(theirs.shape)}.")
        if mine.size:
            gap = float(np.abs(mine.astype(np.float64) - theirs).max())
            worst = max(worst, gap / (float(np.abs(theirs).max()) or 1.0))
    if not worst <= TOLERANCE:
        raise ModelError(f"the output of {what} is off by {worst:.2g} of its magnitude, more than {TOLERANCE:g}.")
    return worst
