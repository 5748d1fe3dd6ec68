"""TensorFlow and Keras to ONNX: tf2onnx, with four habits of it mended.

1. It freezes variables first, so that TensorFlow folds Conv and BatchNormalization. Here variables stay opaque while
   TensorFlow optimises (:func:`_optimised`), Keras' BatchNormalization is traced as one operator, and tf2onnx' own
   merging of Conv and BatchNormalization is left out.
2. It permutes, splits and joins weights and loses their names. Here the graph is converted a second time with every
   weight replaced by its own number, and each initializer tells from what it was made (:func:`_numbers`). No two
   weights are confused, be their values equal or not.
3. It merges constants of equal value. Here it merges operators only.
4. It has no handler for ``Erfc``, of which the exact GELU is made, and leaves unknown operators in the graph.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper

from spa.errors import ModelError, SpaError, UnsupportedError
from spa.feeds import ranges_for, working_feeds
from spa.graph import outer_uses
from spa.importers import Imported
from spa.runtime import input_specs, load_session, run

OPSET = 18  # LayerNormalization and GroupNormalization do not occur; every runtime has it
TOLERANCE = 1e-3
EXTRA = "tensorflow is not installed. Install it with: pip install 'spa-onnx[tensorflow]'."
REMEDY = "Replace that part of the model by layers that it converts, or try another opset."
_COUNTER = re.compile(r"(__\d+)+")
FIRST_TAG = 0x00800000  # the bits of the smallest normal float32; the next 2**31 - 2**24 patterns are finite, too


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
        SpaError: TensorFlow or tf2onnx is not installed.
        ModelError: the source cannot be read or traced, example inputs are missing or do not fit, or the ONNX model
            computes something else.
        UnsupportedError: tf2onnx refuses an operator.
    """
    tf = _tensorflow()
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix == ".tflite":
        return _from_tflite(tf, path, example_inputs, opset)
    function = _function(tf, source, example_inputs, signature, inputs, outputs)
    frozen = _freeze(tf, function)
    model = _to_onnx(tf, frozen, opset)
    names = _name_initializers(model, _to_onnx(tf, frozen, opset, numbered=True), frozen)
    _name_interface(model, function)
    notes = () if names else ("the weights could not be followed through tf2onnx: they bear names of its own.",)
    error = _compare(model, _feeds(example_inputs, model), function.run)
    return Imported(model, function.kind, "tf2onnx", names, error, notes)


def weight_sources(model: Any) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Where each element of each initializer comes from, for a Keras model that :func:`convert` takes as it is.

    Args:
        model: a Keras model with known inputs.

    Returns:
        By initializer name, an int64 array of its shape with the number of each element's source, or -1 where it is a
        constant; and by variable path the first number of its elements and one after the last, in row-major order.
    """
    tf = _tensorflow()
    frozen = _freeze(tf, _from_keras(tf, model, None))
    spans = frozen.spans()
    numbered = _to_onnx(tf, frozen, OPSET, numbered=True)
    names = _name_initializers(numbered, numbered, frozen)
    size = max(last for _, last in spans.values())
    return {t.name: _numbers(t, size) for t in numbered.graph.initializer if t.name in names}, spans


def is_keras(source: Any) -> bool:
    """Whether an object is a Keras model; imports nothing."""
    return any(c.__module__.startswith("keras.") and c.__name__ == "Model" for c in type(source).__mro__)


def is_function(source: Any) -> bool:
    """Whether an object is a ``tf.function`` or a concrete function; imports nothing."""
    return type(source).__module__.startswith("tensorflow.") and hasattr(source, "__call__")


# -- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    """What is converted.

    Attributes:
        kind: what it came from.
        call: the function, of flat tensors; its outputs, flat.
        specs: the inputs' shapes and types.
        inputs: names of the inputs.
        outputs: names of the outputs, as many as are known.
        variables: float32 variables by path.
    """

    kind: str
    call: Callable[..., list[Any]]
    specs: Sequence[Any]
    inputs: Sequence[str]
    outputs: Sequence[str]
    variables: Mapping[str, Any]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The framework's own outputs."""
        import tensorflow as tf

        tensors = [tf.constant(a, s.dtype) for a, s in zip(arrays, self.specs, strict=True)]
        return [np.asarray(t) for t in self.call(*tensors)]


def _function(
    tf: Any,
    source: Any,
    examples: Any,
    signature: str | None,
    inputs: Sequence[str] | None,
    outputs: Sequence[str] | None,
) -> _Function:
    if is_keras(source):
        return _from_keras(tf, source, examples)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise ModelError(f"cannot read {str(path)!r}: there is no such file or folder. Check the path.")
        if path.is_dir():
            return _from_saved_model(tf, path, signature)
        if path.suffix in (".keras", ".h5"):
            return _from_keras(tf, _load_keras(path), examples)
        if path.suffix == ".pb":
            return _from_frozen_graph(tf, path, inputs, outputs)
        raise ModelError(f"{str(path)!r} is none of .keras, .h5, .pb, .tflite and a SavedModel folder. Give one of these.")
    if hasattr(source, "structured_input_signature"):
        return _from_concrete(tf, source)
    if hasattr(source, "get_concrete_function"):
        return _from_tf_function(tf, source, examples)
    raise ModelError(
        f"cannot convert a {type(source).__name__}. Give a Keras model, a tf.function, a concrete function or a path."
    )


def _load_keras(path: Path) -> Any:
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"Keras cannot load {str(path)!r}: {_first_line(error)} "
            "Load it yourself, with its custom objects, and give the model."
        ) from error


def _from_keras(tf: Any, model: Any, examples: Any) -> _Function:
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
    variables = _by_path((v.path, v.value) for v in model.variables if v.dtype == "float32")
    outputs = [model.layers[-1].name] if isinstance(model, keras.Sequential) else getattr(model, "output_names", ())
    return _Function("keras", call, specs, names, outputs, variables)


def _from_tf_function(tf: Any, function: Any, examples: Any) -> _Function:
    name = getattr(function, "__name__", "function")
    if function.input_signature is None and examples is None:
        raise ModelError(
            f"tf.function {name!r} does not say what it takes. Give example_inputs, or an input_signature to tf.function."
        )
    try:
        if function.input_signature is not None:
            return _from_concrete(tf, function.get_concrete_function())
        specs = _open_batch(tf, _named(examples)[1])
        if isinstance(examples, Mapping):
            return _from_concrete(tf, function.get_concrete_function(**dict(zip(examples, specs, strict=True))))
        return _from_concrete(tf, function.get_concrete_function(*specs))
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow cannot trace {name!r}: {_first_line(error)} Check example_inputs.") from error


def _from_saved_model(tf: Any, path: Path, signature: str | None) -> _Function:
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow cannot load {str(path)!r} as a SavedModel: {_first_line(error)}") from error
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
    return _from_concrete(tf, signatures[signature], keep=loaded)


def _interface(function: Any) -> str:
    """What a signature takes, gives and reads; Keras writes one function under two names."""
    read = [v.name for v in function.variables]
    return repr((function.structured_input_signature, function.structured_outputs, read))


def _from_concrete(tf: Any, concrete: Any, keep: Any = None) -> _Function:
    """A concrete function; ``keep`` owns its variables, which TensorFlow refers to weakly."""
    signature = concrete.structured_input_signature
    slots = tf.nest.flatten(signature)
    specs = [s for s in slots if isinstance(s, tf.TensorSpec)]
    structure = concrete.structured_outputs

    def call(*flat: Any, _keep: Any = keep) -> list[Any]:
        given = iter(flat)
        filled = [next(given) if isinstance(s, tf.TensorSpec) else s for s in slots]
        args, kwargs = tf.nest.pack_sequence_as(signature, filled)
        return list(tf.nest.flatten(concrete(*args, **kwargs)))

    variables = _by_path((v.name.removesuffix(":0"), v) for v in concrete.variables if v.dtype == tf.float32)
    outputs = sorted(structure) if isinstance(structure, Mapping) else ()  # tf.nest flattens in this order
    return _Function("tensorflow", call, specs, [s.name for s in specs], outputs, variables)


def _from_frozen_graph(
    tf: Any, path: Path, inputs: Sequence[str] | None, outputs: Sequence[str] | None
) -> _Function:
    """A graph without variables; its own large constants stand for them."""
    graph = tf.compat.v1.GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
        wrapped = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    except (OSError, ValueError, DecodeError) as error:
        raise ModelError(f"{str(path)!r} is no frozen graph: {_first_line(error)} Check the file.") from error
    feeds, fetches = _ends(graph, inputs, outputs)
    try:
        pruned = wrapped.prune([_tensor_name(n) for n in feeds], [_tensor_name(n) for n in fetches])
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{str(path)!r}: {_first_line(error)} Name inputs and outputs of the graph; it has the placeholders "
            f"{', '.join(_ends(graph, None, None)[0]) or 'none'}."
        ) from error
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in pruned.inputs]
    names = [n.removesuffix(":0") for n in fetches]
    return _Function("tensorflow", lambda *flat: list(pruned(*flat)), specs, feeds, names, {})


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


def _by_path(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Variables by path; a path that occurs again gets a number."""
    found: dict[str, Any] = {}
    for path, variable in pairs:
        found[_fresh(path, found)] = variable
    return found


def _fresh(name: str, taken: Container[str]) -> str:
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)


# -- freezing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frozen:
    """A graph in which weights are placeholders, as TensorFlow optimises it.

    Attributes:
        graph: the GraphDef.
        weights: (path, Const node) by the placeholder's name.
        inputs: tensor names.
        outputs: tensor names.
    """

    graph: Any
    weights: Mapping[str, tuple[str, Any]]
    inputs: list[str]
    outputs: list[str]

    def spans(self) -> dict[str, tuple[int, int]]:
        """The numbers of each weight's elements: the first, and one after the last."""
        spans, first = {}, 0
        for path, const in self.weights.values():
            last = first + math.prod(d.size for d in const.attr["value"].tensor.tensor_shape.dim)
            spans[path], first = (first, last), last
        return spans

    def filled(self, tf: Any, numbered: bool) -> Any:
        """The graph with its weights, or with a number for each of their elements."""
        graph, spans = tf.compat.v1.GraphDef(), self.spans()
        graph.CopyFrom(self.graph)
        for node in graph.node:
            if node.name in self.weights:
                path, const = self.weights[node.name]
                node.CopyFrom(const)
                if numbered:
                    shape = [d.size for d in const.attr["value"].tensor.tensor_shape.dim]
                    bits = np.arange(*spans[path], dtype=np.uint32) + np.uint32(FIRST_TAG)
                    tags = bits.view(np.float32).reshape(shape)
                    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(tags))
        return graph


def _freeze(tf: Any, function: _Function) -> _Frozen:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
    from tf2onnx import tf_loader

    with _whole_batch_normalisation(tf):
        try:
            traced = tf.function(function.call, autograph=False).get_concrete_function(*function.specs)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ModelError(f"TensorFlow cannot trace the model: {_first_line(error)} Check example_inputs.") from error
    handles = {id(v.handle): path for path, v in function.variables.items()}
    paths = {own.op.name: handles[id(outer)] for outer, own in traced.graph.captures if id(outer) in handles}
    constant = convert_variables_to_constants_v2(traced, lower_control_flow=False, aggressive_inlining=True)
    graph = tf_loader.fix_freezing_errors_part2(constant.graph.as_graph_def(add_shapes=True))
    if not function.variables:
        paths = {n.name: n.name for n in graph.node if _is_weight(tf, n)}
    weights = {n.name: (paths[n.name], _copy(tf, n)) for n in graph.node if n.op == "Const" and n.name in paths}
    for node in graph.node:
        if node.name in weights:
            _make_placeholder(node)
    inputs, outputs = [t.name for t in constant.inputs], [t.name for t in constant.outputs]
    with tf.Graph().as_default():
        tf.import_graph_def(graph, name="")
        return _Frozen(tf_loader.tf_optimize(inputs, outputs, graph), weights, inputs, outputs)


def _is_weight(tf: Any, node: Any) -> bool:
    tensor = node.attr["value"].tensor
    return node.op == "Const" and tensor.dtype == tf.float32.as_datatype_enum and len(tensor.tensor_shape.dim) > 0


def _copy(tf: Any, node: Any) -> Any:
    copy = tf.compat.v1.NodeDef()
    copy.CopyFrom(node)
    return copy


def _make_placeholder(node: Any) -> None:
    tensor = node.attr["value"].tensor
    kind, shape = tensor.dtype, tensor.tensor_shape
    node.op = "Placeholder"
    node.attr["shape"].shape.CopyFrom(shape)
    node.attr["dtype"].type = kind
    del node.attr["value"]


@contextlib.contextmanager
def _whole_batch_normalisation(tf: Any) -> Iterator[None]:
    """Trace Keras' inference BatchNormalization as one operator; Keras 3 writes it as arithmetic, which is folded."""
    import keras.src.backend.tensorflow.nn as backend

    original = backend.batch_normalization

    def whole(
        x: Any, mean: Any, variance: Any, axis: int, offset: Any = None, scale: Any = None, epsilon: float = 1e-3
    ) -> Any:
        rank = len(x.shape)
        if rank > 4 or mean.shape.rank != 1 or x.dtype != tf.float32:
            return original(x, mean, variance, axis, offset, scale, epsilon)
        last = [*(a for a in range(rank) if a != axis % rank), axis % rank]
        y = tf.transpose(x, last) if last != sorted(last) else x
        for _ in range(4 - rank):
            y = tf.expand_dims(y, 1)
        y = tf.raw_ops.FusedBatchNormV3(
            x=y,
            scale=tf.ones(mean.shape) if scale is None else scale,
            offset=tf.zeros(mean.shape) if offset is None else offset,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            is_training=False,
        ).y
        for _ in range(4 - rank):
            y = tf.squeeze(y, 1)
        return tf.transpose(y, np.argsort(last)) if last != sorted(last) else y

    backend.batch_normalization = whole
    try:
        yield
    finally:
        backend.batch_normalization = original


# -- tf2onnx ---------------------------------------------------------------------------------------------------------


def _to_onnx(tf: Any, frozen: _Frozen, opset: int, numbered: bool = False) -> ModelProto:
    from tf2onnx import optimizer, tfonnx, utils

    utils.INTERNAL_NAME = 1  # the counter behind its names: the same model shall give the same bytes
    with _quiet(), tf.Graph().as_default(), tf.device("/cpu:0"):
        tf.import_graph_def(frozen.filled(tf, numbered), name="")
        graph = _process(
            lambda: tfonnx.process_tf_graph(
                tf.compat.v1.get_default_graph(),
                opset=opset,
                input_names=frozen.inputs,
                output_names=frozen.outputs,
                custom_op_handlers={"Erfc": (_erfc, [])},
            )
        )
        return _finished(optimizer.optimize_graph(graph, catch_errors=False, optimizers=_optimisers()), opset)


def _from_tflite(tf: Any, path: Path, examples: Any, opset: int) -> Imported:
    from tf2onnx import optimizer, tfonnx

    try:
        interpreter = tf.lite.Interpreter(model_path=str(path))
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"TensorFlow Lite cannot load {str(path)!r}: {_first_line(error)} Check the path.") from error
    with _quiet():
        graph = _process(
            lambda: tfonnx.process_tf_graph(
                None, opset=opset, tflite_path=str(path), custom_op_handlers={"Erfc": (_erfc, [])}, dequantize=True
            )
        )
        model = _finished(optimizer.optimize_graph(graph, catch_errors=False, optimizers=_optimisers()), opset)

    def evaluate(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        given = interpreter.get_input_details()
        for detail, array in zip(given, arrays, strict=True):
            interpreter.resize_tensor_input(detail["index"], array.shape)
        interpreter.allocate_tensors()
        for detail, array in zip(given, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]

    names = {t.name: t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims}
    return Imported(model, "tflite", "tf2onnx", names, _compare(model, _feeds(examples, model), evaluate))


def _process(step: Callable[[], Any]) -> Any:
    """Run tf2onnx, and say as one of our errors what it refuses."""
    try:
        return step()
    except (SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:  # tf2onnx raises whatever its handlers meet
        raise UnsupportedError(f"tf2onnx refuses the model: {_first_line(error)} {REMEDY}") from error


def _finished(graph: Any, opset: int) -> ModelProto:
    """The message of tf2onnx' graph, in which each operator must be ONNX's."""
    model = graph.make_model("tf2onnx")
    unknown: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, opset):
            unknown.setdefault(node.op_type, []).append(node.name)
    if unknown:
        listed = ", ".join(f"{op} ({names[0]!r}, {len(names)} in all)" for op, names in unknown.items())
        raise UnsupportedError(f"tf2onnx has no handler for {listed}. {REMEDY}")
    _order(model)
    return model


def _order(model: ModelProto) -> None:
    """Bring operators into one order, depth first from the outputs, and count names anew; in place.

    tf2onnx iterates over sets: its order and the numbers in its names change from run to run.
    """
    graph = model.graph
    producer = {o: i for i, n in enumerate(graph.node) for o in n.output}
    operands = [
        [*n.input, *(name for a in n.attribute for sub in (a.g, *a.graphs) for name in outer_uses(sub))]
        for n in graph.node
    ]
    done: dict[int, None] = {}
    stack = [producer[o.name] for o in reversed(graph.output) if o.name in producer]
    while stack:
        missing = [producer[o] for o in operands[stack[-1]] if o in producer and producer[o] not in done]
        if missing:
            stack.append(missing[0])
        else:
            done.setdefault(stack.pop())
    tensors = {t.name: t for t in graph.initializer}
    used = dict.fromkeys(name for i in done for name in operands[i] if name in tensors)
    nodes, weights = [graph.node[i] for i in done], [tensors[name] for name in used]
    model.graph.ClearField("node")
    model.graph.ClearField("initializer")
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    interface = {t.name for t in (*graph.input, *graph.output)}
    taken, names = set(interface), {"": ""}
    for name in (*(o for n in graph.node for o in n.output), *used):
        if name not in names and name not in interface:
            names[name] = _fresh(_COUNTER.sub("", name), taken)
            taken.add(names[name])
    _rename(model, names)
    called: set[str] = set()
    for node in graph.node:
        node.name = _fresh(_COUNTER.sub("", node.name), called)
        called.add(node.name)


def _erfc(context: Any, node: Any, name: str, args: Any) -> None:
    """Erfc(x) = 1 - Erf(x)."""
    from tf2onnx.utils import make_name, map_onnx_to_numpy_type

    node.type = "Erf"
    kind = map_onnx_to_numpy_type(context.get_dtype(node.input[0]))
    one = context.make_const(make_name(name), np.ones((), kind)).output[0]
    rest = context.insert_new_node_on_output("Sub", node.output[0], name=make_name(name))
    context.replace_inputs(rest, [one, node.output[0]])


def _optimisers() -> OrderedDict[str, Any]:
    """tf2onnx' optimisers, without merging of Conv with BatchNormalization and of constants, and with Einsum kept."""
    from tf2onnx import optimizer
    from tf2onnx.optimizer import back_to_back_optimizer, merge_duplicated_nodes_optimizer

    class Nodes(merge_duplicated_nodes_optimizer.MergeDuplicatedNodesOptimizer):
        @staticmethod
        def _skip_node_type(node: Any) -> bool:
            skipped = merge_duplicated_nodes_optimizer.MergeDuplicatedNodesOptimizer._skip_node_type(node)
            return bool(node.is_const() or skipped)

    class BackToBack(back_to_back_optimizer.BackToBackOptimizer):
        def _optimize_at_current_graph_level(self, graph: Any) -> Any:
            rewrites = back_to_back_optimizer._func_map
            merging = rewrites.pop(("Conv", "BatchNormalization"))
            try:
                return super()._optimize_at_current_graph_level(graph)
            finally:
                rewrites[("Conv", "BatchNormalization")] = merging

    chosen = OrderedDict(optimizer._get_optimizers())
    chosen |= {"merge_duplication": Nodes, "remove_back_to_back": BackToBack}
    del chosen["einsum_optimizer"]
    return chosen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tf2onnx' log: what matters in it is raised."""
    logger = logging.getLogger("tf2onnx")
    level, disabled = logger.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)


# -- names -----------------------------------------------------------------------------------------------------------


def _numbers(tensor: TensorProto, size: int) -> np.ndarray:
    """The number of each element's source, -1 for constants; int64 of the tensor's shape."""
    array = numpy_helper.to_array(tensor)
    if array.dtype != np.float32:
        return np.full(array.shape, -1)
    numbers = np.ascontiguousarray(array).view(np.uint32).astype(np.int64) - FIRST_TAG
    return np.where((numbers >= 0) & (numbers < size), numbers, -1).reshape(array.shape)


def _name_initializers(model: ModelProto, numbered: ModelProto, frozen: _Frozen) -> dict[str, str]:
    """Name each initializer after the weight that it was made from, in place; the weight's path by that name.

    Args:
        model: the model to change.
        numbered: the same with numbers for weights; it may be the same message.
        frozen: where both came from.

    Returns:
        Nothing where the two graphs differ.
    """
    pairs = _pairs(model, numbered)
    spans = frozen.spans()
    size = max((last for _, last in spans.values()), default=0)
    starts, paths = np.array([first for first, _ in spans.values()]), list(spans)
    tensors = {t.name: t for t in numbered.graph.initializer}
    taken = {o for n in model.graph.node for o in n.output} | {v.name for v in model.graph.input}
    renamed: dict[str, str] = {}
    names: dict[str, str] = {}
    for own, other in pairs.items():
        numbers = _numbers(tensors[other], size)
        found = numbers[numbers >= 0]
        if found.size:
            path = paths[int(np.searchsorted(starts, found[0], side="right")) - 1]
            renamed[own] = _fresh(path, taken | names.keys())
            names[renamed[own]] = path
    _rename(model, renamed)
    return names


def _pairs(model: ModelProto, other: ModelProto) -> dict[str, str]:
    """Initializers of two graphs with the same operators, in the order of use; none where the graphs differ."""
    weights = {t.name for t in model.graph.initializer}
    if [n.op_type for n in model.graph.node] != [n.op_type for n in other.graph.node]:
        return {}
    pairs: dict[str, str] = {}
    for mine, theirs in zip(model.graph.node, other.graph.node, strict=True):
        for a, b in zip(mine.input, theirs.input, strict=True):
            if a in weights:
                pairs.setdefault(a, b)
    return pairs


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename tensors everywhere in a model, subgraphs included."""

    def within(graph: GraphProto) -> None:
        for tensor in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            tensor.name = names.get(tensor.name, tensor.name)
        for node in graph.node:
            node.input[:] = [names.get(i, i) for i in node.input]
            node.output[:] = [names.get(o, o) for o in node.output]
            for attribute in node.attribute:
                for sub in (attribute.g, *attribute.graphs):
                    within(sub)

    within(model.graph)


def _name_interface(model: ModelProto, function: _Function) -> None:
    """Give inputs and outputs their names, and their open axes names that say what they count; in place."""
    graph = model.graph
    names: dict[str, str] = {}
    wanted = [*function.inputs, *function.outputs][: len(graph.input) + len(graph.output)]
    if len(function.outputs) != len(graph.output):
        wanted = [*function.inputs, *(f"output_{i}" for i in range(len(graph.output)))]
    taken = {t.name for t in graph.initializer}
    for tensor, name in zip((*graph.input, *graph.output), wanted, strict=True):
        names[tensor.name] = _fresh(name.removesuffix(":0"), taken)
        taken.add(names[tensor.name])
    _rename(model, names)
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


def _feeds(examples: Any, model: ModelProto) -> dict[str, np.ndarray]:
    """Inputs by name: the examples, or made up."""
    session = load_session(model)
    specs = input_specs(session)
    if examples is None:
        return dict(working_feeds(session, ranges=ranges_for(model, specs)))
    names, arrays = _named(examples)
    known = [s.name for s in specs]
    if len(arrays) != len(known) or (isinstance(examples, Mapping) and set(names) != set(known)):
        raise ModelError(f"example_inputs are {', '.join(names)}; the model takes {', '.join(known)}. Give these.")
    feeds = dict(zip(names if isinstance(examples, Mapping) else known, arrays, strict=True))
    for spec in specs:
        array = feeds[spec.name]
        fits = array.ndim == len(spec.shape) and all(
            not isinstance(d, int) or d == n for d, n in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise ModelError(
                f"example_inputs: {spec.name!r} has shape {list(array.shape)}, expected {list(spec.shape)}. Change it."
            )
        feeds[spec.name] = array.astype(spec.dtype, copy=False)
    return {name: feeds[name] for name in known}


def _compare(
    model: ModelProto, feeds: Mapping[str, np.ndarray], evaluate: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
) -> float:
    """The largest difference of an output to the framework's own, over that output's largest magnitude."""
    expected = evaluate(list(feeds.values()))
    actual = run(load_session(model), feeds)
    worst = 0.0
    for tensor, mine, theirs in zip(model.graph.output, actual, expected, strict=True):
        if mine.shape != theirs.shape:
            raise ModelError(
                f"the ONNX model gives {list(mine.shape)} for {tensor.name!r}, TensorFlow {list(theirs.shape)}. "
                "Convert it with inputs of a fixed shape."
            )
        if mine.size:
            difference = float(np.abs(mine.astype(np.float64) - theirs).max())
            worst = max(worst, difference / (float(np.abs(theirs).max()) or 1.0))
    if not worst <= TOLERANCE:
        raise ModelError(
            f"the ONNX model's output differs from TensorFlow's by {worst:.2g} of its magnitude, over {TOLERANCE:g}. "
            "Please report the operator that tf2onnx converts wrongly."
        )
    return worst


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on standard error
    try:
        import tensorflow
        import tf2onnx  # noqa: F401
    except ImportError as error:
        raise SpaError(EXTRA) from error
    return tensorflow
