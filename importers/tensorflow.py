"""TensorFlow and Keras to ONNX; :mod:`spa.importers._tf2onnx` says what tf2onnx must be kept from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto

from spa.errors import ModelError
from spa.frameworks.keras import fresh
from spa.frameworks.tensorflow import Function, difference, example_feeds, flat_examples, read
from spa.importers import Imported
from spa.importers._tf2onnx import (
    freeze,
    name_initializers,
    numbers_of,
    rename,
    to_onnx,
    weights_left,
)
from spa.running.runtime import load_session, run

OPSET = 18  # LayerNormalization and GroupNormalization do not occur; every runtime has it


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
    """Return notes on variables that have no initializer of their own."""
    if not names:
        return ("the weights could not be followed through tf2onnx: they bear names of its own.",)
    if not function.variables:
        return ("a frozen graph has no variables: its weights bear the names of its constants.",)
    lost = set(function.variables) - left
    if function.kind == "keras" or not lost:
        return ()
    return (f"{len(lost)} of {len(function.variables)} variables were folded into others, {min(lost)!r} for one.",)


def weight_sources(model: Any) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, tuple[int, int]]]:
    """Trace each element of each initializer to its source, for a Keras model that :func:`convert` takes as it is.

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


# -- the interface ---------------------------------------------------------------------------------------------------


def _name_interface(model: ModelProto, function: Function) -> None:
    """Name inputs and outputs, and their open axes by what they count; in place."""
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


# -- example inputs ----------------------------------------------------------------------------------------------------


def _ordered(function: Function, examples: Any) -> list[np.ndarray]:
    """Return example inputs in the function's order.

    Raises:
        ModelError: they do not fit.
    """
    names, arrays = flat_examples(examples)
    known = [name.removesuffix(":0") for name in function.inputs]
    by_name = isinstance(examples, Mapping)
    if len(arrays) != len(known) or (by_name and set(names) != set(known)):
        raise ModelError(f"example_inputs are {', '.join(names)}; the model takes {', '.join(known)}. Give these.")
    feeds = dict(zip(names if by_name else known, arrays, strict=True))
    for name, spec in zip(known, function.specs, strict=True):
        if not spec.shape.is_compatible_with(feeds[name].shape):
            expected = ["any" if n is None else n for n in spec.shape]
            raise ModelError(
                f"example_inputs: {name!r} has shape {list(feeds[name].shape)}, expected {expected}. Change it."
            )
    return [feeds[n].astype(s.dtype.as_numpy_dtype, copy=False) for n, s in zip(known, function.specs, strict=True)]
