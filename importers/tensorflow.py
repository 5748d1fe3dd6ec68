"""TensorFlow and Keras to ONNX; :mod:`spa.importers._tf2onnx` says what tf2onnx must be kept from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto, ValueInfoProto

from spa.errors import ModelError
from spa.extras import extra
from spa.importers import Imported
from spa.importers._tf2onnx import (
    Function,
    first_line,
    freeze,
    fresh,
    name_initializers,
    numbers_of,
    rename,
    to_onnx,
    weights_left,
)
from spa.running.feeds import working_feeds
from spa.running.ranges import ranges_for
from spa.running.runtime import input_specs, load_session, run

OPSET = 18  # LayerNormalization and GroupNormalization do not occur; every runtime has it
TOLERANCE = 1e-3


def convert(
    source: Any,
    example_inputs: Any = None,
    *,
    signature: str | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    opset: int = OPSET,
) -> Imported:
    """Convert a TensorFlow or Keras model to ONNX and compare it with the original.

    Open axes of the source stay open. Initializers bear the names of the variables that they were made from.

    Args:
        source: a Keras 3 model, a ``tf.function``, a concrete function, or the path of a ``.keras`` file, a SavedModel
            folder, a frozen graph (``.pb``) or a ``.tflite`` file.
        example_inputs: an array, a list of arrays, or arrays by input name; needed by models that do not say what they
            take (subclassed Keras models that were never called, functions without an input signature), whose first
            axis becomes an open batch axis. Otherwise they are made up.
        signature: which signature of a SavedModel.
        inputs: tensors of a frozen graph that are its inputs; its placeholders by default.
        outputs: tensors of a frozen graph that are its outputs; by default what no operator reads.
        opset: of the ONNX model.

    Returns:
        The ONNX model, the variable that each initializer came from, and the measured difference.

    Raises:
        UnsupportedError: TensorFlow or tf2onnx is not installed.
        ModelError: the source cannot be read or traced, example inputs are missing or do not fit, or the ONNX model
            computes something else.
        UnsupportedError: tf2onnx refuses an operator.
    """
    function = read(source, example_inputs, signature=signature, inputs=inputs, outputs=outputs)
    examples = None if example_inputs is None else _ordered(function, example_inputs)
    notes: tuple[str, ...] = ()
    if function.kind == "tflite":
        model = to_onnx(opset, tflite_path=os.fspath(source), dequantize=True)
        names = {t.name: t.name for t in model.graph.initializer if t.name in function.variables and t.dims}
        notes = ("what TensorFlow Lite's converter has folded stays folded: BatchNormalization, for one.",)
    else:
        frozen = freeze(function)
        model, numbered = to_onnx(opset, frozen), to_onnx(opset, frozen, numbered=True)
        names = name_initializers(model, numbered, frozen)
        notes = _what_became_of(function, names, weights_left(numbered, frozen))
    _name_interface(model, function)
    if examples is None:
        examples = list(example_feeds(model).values())
    actual = run(load_session(model), {i.name: a for i, a in zip(model.graph.input, examples, strict=True)})
    error = difference([o.name for o in model.graph.output], function.run(examples), actual)
    return Imported(model, function.kind, "tf2onnx", names, error, notes)


def _what_became_of(function: Function, names: Mapping[str, str], left: set[str]) -> tuple[str, ...]:
    """What the user should know of the variables."""
    if not names:
        return ("the weights could not be followed through tf2onnx: they bear names of its own.",)
    if not function.variables:
        return ("a frozen graph has no variables: its weights bear the names of its constants.",)
    lost = set(function.variables) - left
    if function.kind == "keras" or not lost:
        return ()
    return (f"{len(lost)} of {len(function.variables)} variables were folded into others, {min(lost)!r} for one.",)


def weight_sources(model: Any) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, tuple[int, int]]]:
    """Where each element of each initializer comes from, for a Keras model that :func:`convert` takes as it is.

    Args:
        model: a Keras model with known inputs.

    Returns:
        By initializer name, two arrays of its shape: the number of each element's source, int64, or -1 where it is a
        constant, and the sign, 1 or -1, that it got; and by variable path the first number of the variable's elements
        and one after the last, in row-major order.
    """
    frozen = freeze(read(model))
    spans = frozen.spans()
    numbered = to_onnx(OPSET, frozen, numbered=True)
    names = name_initializers(numbered, numbered, frozen)
    return {t.name: numbers_of(t, frozen.size) for t in numbered.graph.initializer if t.name in names}, spans


def is_keras(source: Any) -> bool:
    """Whether an object is a Keras model; imports nothing."""
    return any(c.__module__.startswith("keras.") and c.__name__ == "Model" for c in type(source).__mro__)


def is_function(source: Any) -> bool:
    """Whether an object is a ``tf.function`` or a concrete function; imports nothing."""
    return type(source).__module__.startswith("tensorflow.") and callable(source)


# -- sources ---------------------------------------------------------------------------------------------------------


def read(
    source: Any,
    example_inputs: Any = None,
    *,
    signature: str | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Function:
    """Make a function of what :func:`convert` takes; see there."""
    tf = _tensorflow()
    if is_keras(source):
        return _from_keras(tf, source, example_inputs)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise ModelError(f"cannot read {str(path)!r}: there is no such file or folder. Check the path.")
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
        structure, (names, arrays) = examples, _named(examples)
        specs = _open_batch(tf, arrays)

    def call(*flat: Any) -> list[Any]:
        return keras.tree.flatten(model(keras.tree.pack_sequence_as(structure, list(flat)), training=False))

    if not model.built:
        call(*(tf.constant(a) for a in _named(examples)[1]))
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
        specs = _open_batch(tf, _named(examples)[1])
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
    """What a signature takes, gives and reads; Keras writes one function under two names."""
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

    variables = _by_path((v.name.removesuffix(":0"), v) for v in concrete.variables if v.dtype == tf.float32)
    outputs = sorted(structure) if isinstance(structure, Mapping) else ()  # tf.nest flattens in this order
    return Function("tensorflow", call, specs, [s.name for s in specs], outputs, variables, owner)


def _from_frozen_graph(tf: Any, path: Path, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Function:
    """A graph without variables; its own large constants stand for them."""
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
    """The placeholders of a graph and the operators that nobody reads, or what is given instead."""
    read = {name.lstrip("^").split(":")[0] for node in graph.node for name in node.input}
    silent = {"Const", "NoOp", "Assert", "Placeholder", "PlaceholderWithDefault"}
    feeds = list(inputs or (n.name for n in graph.node if n.op == "Placeholder"))
    fetches = list(outputs or (n.name for n in graph.node if n.name not in read and n.op not in silent))
    return feeds, fetches


def _tensor_name(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _named(examples: Any) -> tuple[list[str], list[np.ndarray]]:
    """Example inputs, flat: their names and the arrays."""
    if isinstance(examples, Mapping):
        return list(examples), [np.asarray(a) for a in examples.values()]
    arrays = [np.asarray(a) for a in examples] if isinstance(examples, list | tuple) else [np.asarray(examples)]
    return [f"input_{i}" for i in range(len(arrays))], arrays


def _open_batch(tf: Any, arrays: Sequence[np.ndarray]) -> list[Any]:
    return [tf.TensorSpec((None, *a.shape[1:]) if a.ndim else (), a.dtype) for a in arrays]


def keras_variables(model: Any) -> dict[str, Any]:
    """The float32 variables of a Keras model by path."""
    return _by_path((v.path, v) for v in model.variables if v.dtype == "float32")


def _by_path(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Variables by path; a path that occurs again gets a number."""
    found: dict[str, Any] = {}
    for path, variable in pairs:
        found[fresh(path, found)] = variable
    return found


# -- the interface ---------------------------------------------------------------------------------------------------


def _name_interface(model: ModelProto, function: Function) -> None:
    """Give inputs and outputs their names, and their open axes names that say what they count; in place."""
    graph = model.graph
    names: dict[str, str] = {}
    wanted = [*function.inputs, *function.outputs][: len(graph.input) + len(graph.output)]
    if len(function.outputs) != len(graph.output):
        wanted = [*function.inputs, *(f"output_{i}" for i in range(len(graph.output)))]
    taken = {t.name for t in graph.initializer}
    for tensor, name in zip((*graph.input, *graph.output), wanted, strict=True):
        names[tensor.name] = fresh(name.removesuffix(":0"), taken)
        taken.add(names[tensor.name])
    rename(model, names)
    for tensor in graph.input:
        _name_axes(tensor, f"{tensor.name}_" if len(graph.input) > 1 else "")
    for tensor in graph.output:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_param = "batch" if axis == 0 else f"{tensor.name}_{axis}"
    del graph.value_info[:]


def _name_axes(tensor: ValueInfoProto, prefix: str) -> None:
    dims = tensor.type.tensor_type.shape.dim
    image = ("height", "width") if len(dims) == 4 else ("sequence",)
    for axis, dim in enumerate(dims):
        if not dim.HasField("dim_value"):
            dim.dim_param = "batch" if axis == 0 else f"{prefix}{image[axis - 1] if axis <= len(image) else axis}"


# -- comparing -------------------------------------------------------------------------------------------------------


def example_feeds(model: ModelProto) -> dict[str, np.ndarray]:
    """Made-up inputs of an ONNX model by name, in its order."""
    session = load_session(model)
    return dict(working_feeds(session, ranges=ranges_for(model, input_specs(session))))


def _ordered(function: Function, examples: Any) -> list[np.ndarray]:
    """Example inputs in the function's order.

    Raises:
        ModelError: they do not fit.
    """
    names, arrays = _named(examples)
    known = [name.removesuffix(":0") for name in function.inputs]
    by_name = isinstance(examples, Mapping)
    if len(arrays) != len(known) or (by_name and set(names) != set(known)):
        raise ModelError(f"example_inputs are {', '.join(names)}; the model takes {', '.join(known)}. Give these.")
    given = dict(zip(names if by_name else known, arrays, strict=True))
    for name, spec in zip(known, function.specs, strict=True):
        if not spec.shape.is_compatible_with(given[name].shape):
            expected = ["any" if n is None else n for n in spec.shape]
            raise ModelError(
                f"example_inputs: {name!r} has shape {list(given[name].shape)}, expected {expected}. Change it."
            )
    return [given[n].astype(s.dtype.as_numpy_dtype, copy=False) for n, s in zip(known, function.specs, strict=True)]


def difference(
    names: Sequence[str], expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], what: str = "the ONNX model"
) -> float:
    """The largest difference of an output to the framework's own, over that output's largest magnitude.

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


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on standard error
    with extra("tensorflow"):
        import tensorflow
        import tf2onnx  # noqa: F401
    return tensorflow
