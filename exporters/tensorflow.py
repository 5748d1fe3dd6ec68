"""Pruned ONNX models back into Keras: the same layers, narrower, with the pruned weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from spa.errors import ModelError, SpaError, UnsupportedError
from spa.exporters.keras_narrowing import remember
from spa.exporters.keras_sizes import WIDTHS, Config, Widths
from spa.frameworks.keras import OPERATORS, ORDER, keras_variables
from spa.frameworks.reasons import first_line, refuse_lost_branches
from spa.frameworks.tensorflow import difference, example_feeds, read
from spa.importers.tensorflow import convert, weight_sources
from spa.model.writing import drafts
from spa.running.runtime import load_session, run

if TYPE_CHECKING:
    from spa.api import Result


def write_back(keras_model: Any, result: Result, names: Mapping[str, str]) -> Any:
    """Rebuild a Keras model so that it computes what a pruned ONNX model does.

    Its layers are built from their own configurations, with the widths that are left (units, filters, groups, heads,
    sizes of Reshape), its variables hold the pruned model's weights, and it is compiled as the original was.

    Args:
        keras_model: the functional or sequential model that was converted; not changed.
        result: what :func:`spa.prune` made of its conversion.
        names: variable paths by initializer, as the importer gave them.

    Returns:
        The narrower model.

    Raises:
        ModelError: the result belongs to another model.
        UnsupportedError: a layer cannot be narrowed: its size is written where this function does not know it.
    """
    import keras

    if not isinstance(keras_model, keras.Sequential) and not hasattr(keras_model, "output_names"):
        raise UnsupportedError(
            f"Keras model {keras_model.name!r} is a subclass with code of its own. Build it from keras.Input, or "
            "narrow it by hand: result.plan says which channels are kept."
        )
    if keras_model.compute_dtype != "float32":
        raise UnsupportedError(
            f"Keras model {keras_model.name!r} computes in {keras_model.compute_dtype}, to which its conversion has "
            "cast the weights. Convert, prune and write back a float32 copy of it."
        )
    refuse_lost_branches(result.report.gone, f"Keras model {keras_model.name!r}")
    pruned = Pruned.of(keras_model, result, names)
    small = Builder(pruned).model(keras_model)
    _verify(small, result.model)
    remember(keras_model, small, pruned)
    return small


# -- which weights are left ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """The pruned model in Keras' terms, by variable.

    Attributes:
        arrays: the new value by the old variable's id.
        kept: the kept indices of each of its axes, by the same.
        groups: of the convolution that reads a kernel, by the kernel's id.
        biases: what a reconstruction added to a convolution or a recurrent cell without bias, by the kernel's id; None
            for a bias that begins with zeros.
    """

    arrays: Mapping[int, np.ndarray]
    kept: Mapping[int, tuple[np.ndarray, ...]]
    groups: Mapping[int, int]
    biases: Mapping[int, np.ndarray | None]

    @classmethod
    def of(cls, keras_model: Any, result: Result, names: Mapping[str, str]) -> Pruned:
        """Sort what pruning left by the variables of a Keras model.

        Args:
            keras_model: the dense model.
            result: of pruning its conversion.
            names: variable paths by initializer.

        Raises:
            ModelError: the result belongs to another model.
            UnsupportedError: what is left of a variable is no block.
        """
        sources, spans = weight_sources(keras_model)
        dense = {t.name: tuple(t.dims) for t in result.source.model.graph.initializer}
        stranger = next((n for n, (s, _) in sources.items() if dense.get(n) != s.shape or n not in names), None)
        if stranger is not None:
            raise ModelError(
                f"{stranger!r} of Keras model {keras_model.name!r} is not in the pruned model. Convert this model, "
                "prune what comes out, and give that result."
            )
        variables = keras_variables(keras_model)
        weights = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
        _join_biases(result.model, weights)
        pieces = _pieces(sources, result, weights)
        blocks = {id(v): _block(path, v, spans.get(path, (0, 0)), pieces) for path, v in variables.items()}
        groups: dict[int, int] = {}
        biases: dict[int, np.ndarray | None] = {}
        for node in result.model.graph.node:
            if node.op_type == "Conv" and node.input[1] in names:
                kernel = id(variables[names[node.input[1]]])
                groups[kernel] = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "group"), 1)
                if len(node.input) > 2 and node.input[2] not in dense:
                    biases[kernel] = weights[node.input[2]]
        biases |= {id(variables[path]): b for path, b in _recurrent_biases(result.model, weights, sources, spans)}
        arrays = {key: array for key, (array, _) in blocks.items()}
        return cls(arrays, {key: kept for key, (_, kept) in blocks.items()}, groups, biases)


def _join_biases(model: ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Put the sum of ONNX's two biases, ``B[d (2 g h)]``, in the place of both, where Keras has one."""
    for node in model.graph.node:
        cell = node.op_type in OPERATORS.values() and not _resets_after(node)
        if cell and len(node.input) > 3 and node.input[3] in weights:
            both = weights[node.input[3]]
            total = both.reshape(len(both), 2, -1).sum(axis=1)
            weights[node.input[3]] = np.concatenate([total, total], axis=1)


def _resets_after(node: NodeProto) -> bool:
    """Tell whether a node is a GRU of the kind that has two biases in Keras, too."""
    return any(a.name == "linear_before_reset" and a.i for a in node.attribute)


def _recurrent_biases(
    model: ModelProto,
    weights: Mapping[str, np.ndarray],
    sources: Mapping[str, tuple[np.ndarray, np.ndarray]],
    spans: Mapping[str, tuple[int, int]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield Keras' biases of cells that had none, by the path of the kernel."""
    for node in model.graph.node:
        if node.op_type not in OPERATORS.values() or node.input[1] not in sources:
            continue
        stored = weights[node.input[3]]
        if node.input[3] in sources or not stored.any():
            continue
        gates = next(g for g, op in OPERATORS.items() if op == node.op_type)
        for bias, numbers in zip(stored, sources[node.input[1]][0], strict=True):
            both = bias.reshape(2, gates, -1)[:, np.argsort(ORDER[gates])].reshape(2, -1)
            path = next(p for p, (first, end) in spans.items() if first <= numbers.flat[0] < end)
            yield path, both if _resets_after(node) else both[0]


def _pieces(
    sources: Mapping[str, tuple[np.ndarray, np.ndarray]], result: Result, weights: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all elements that are left, sorted, and their values."""
    numbers, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for name, (source, sign) in sources.items():
        for axis, kept in result.plan.parameters.get(name, {}).items():
            source, sign = np.take(source, kept, axis), np.take(sign, kept, axis)
        numbers.append(source[source >= 0])
        values.append((weights[name] * sign)[source >= 0])
    every, first = np.unique(np.concatenate(numbers), return_index=True)
    return every, np.concatenate(values)[first]


def _block(
    path: str, variable: Any, span: tuple[int, int], pieces: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Return a variable's new value, or the old one if the ONNX model lacks it, and what is kept of each axis."""
    numbers, values = pieces
    begin, end = np.searchsorted(numbers, span)
    if begin == end:
        return np.asarray(variable), tuple(np.arange(n) for n in variable.shape)
    kept = tuple(np.unique(axis) for axis in np.unravel_index(numbers[begin:end] - span[0], variable.shape))
    shape = tuple(axis.size for axis in kept)
    if math.prod(shape) != end - begin:
        raise UnsupportedError(
            f"what is left of variable {path!r} is no block, and no Keras layer holds it. Prune with ignore=['{path}']."
        )
    return values[begin:end].reshape(shape), kept  # numbers are in row-major order


# -- narrower layers -------------------------------------------------------------------------------------------------


@dataclass
class Builder:
    """Builds narrower copies of layers as they are called, so that each knows the shape of its input.

    Attributes:
        pruned: what is left of the variables.
        rescales: whether queries make up for the scale of attention, which follows the size of a head.
    """

    pruned: Pruned
    rescales: bool = True

    def __post_init__(self) -> None:
        self.clones: dict[int, Any] = {}

    def model(self, old: Any, inputs: Any = None) -> Any:
        """Return a narrower copy of a model; of one within another, on the inputs that it is to have there."""
        import keras

        if isinstance(old, keras.Sequential):
            if inputs is None:
                inputs = _input_like(old.inputs[0], old.inputs[0])
            layers, x = [inputs], inputs
            for layer in old.layers:
                x = self.call(layer, x)
                layers.append(self.clones[id(layer)])
            small = keras.Sequential(layers, name=old.name, trainable=old.trainable)
            if old.compiled:
                small.compile_from_config(old.get_compile_config())
            return small
        return keras.models.clone_model(
            old, input_tensors=inputs, clone_function=lambda layer: layer, call_function=self.call
        )

    def call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the narrower copy of a layer, which is made at its first call."""
        import keras

        if not isinstance(layer, keras.layers.Layer) and type(layer).__name__ != "Reshape":
            return self._run(layer, layer, args, kwargs)
        if id(layer) in self.clones:
            return self._run(layer, self.clones[id(layer)], args, kwargs)
        if isinstance(layer, keras.Model):
            inputs = keras.tree.map_structure(_input_like, layer.inputs, keras.tree.flatten(args[0]))
            packed = (
                inputs[0] if isinstance(layer, keras.Sequential) else keras.tree.pack_sequence_as(layer.input, inputs)
            )
            clone = self.clones[id(layer)] = self.model(layer, packed)
            return self._run(layer, clone, args, kwargs)
        clone = self.clones[id(layer)] = self._clone(layer, args)
        outputs = self._run(layer, clone, args, kwargs)
        if isinstance(layer, keras.layers.Layer):
            self._fill(layer, clone)
        return outputs

    def _run(self, layer: Any, clone: Any, args: Any, kwargs: Any) -> Any:
        try:
            return clone(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise _fixed(layer, f"it does not take its narrower input ({first_line(error)})") from error

    def _clone(self, layer: Any, args: Any) -> Any:
        name = type(layer).__name__
        if name == "Reshape":
            return _reshaped(layer, args[0].shape)
        config = layer.get_config()
        self._narrow(layer, config)
        try:
            return type(layer).from_config(config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _fixed(layer, "it cannot be built from its configuration") from error

    def _narrow(self, layer: Any, config: Config) -> None:
        """Write new widths into a layer's configuration; wrappers hold their layers' configurations."""
        for key in ("layer", "backward_layer", "cell"):
            if isinstance(config.get(key), dict):
                inner = getattr(layer, {"layer": "forward_layer"}.get(key, key), None) or layer.layer
                config[key].pop("build_config", None)  # the widths that it was built with
                self._narrow(inner, config[key]["config"])
        if type(layer).__name__ in WIDTHS:
            WIDTHS[type(layer).__name__](config, Widths(layer, self.pruned))

    def _fill(self, layer: Any, clone: Any) -> None:
        """Give a layer's copy its variables."""
        same = list(clone.variables)
        if len(same) > len(layer.variables):  # it has a bias that it had not; an LSTM's begins with ones
            for bias in (v for v in same if v.name == "bias"):
                bias.assign(np.zeros(bias.shape))
            same = [v for v in same if v.name != "bias"]
        pairs = list(zip(layer.variables, same, strict=True))
        for old, new in pairs:
            value = self.pruned.arrays.get(id(old))
            if value is None:
                value = np.asarray(old)
            if tuple(new.shape) != value.shape:
                raise _fixed(layer, f"{old.path!r} should have shape {list(value.shape)} and gets {list(new.shape)}")
            new.assign(value * _rescaled(layer, clone, old) if self.rescales else value)
        for old, kernel in pairs:
            bias = self.pruned.biases.get(id(old))
            if bias is not None:
                if old.name == "depthwise_kernel":  # inside a separable convolution: the pointwise one takes it along
                    pointwise = next(v for v in clone.variables if v.name == "pointwise_kernel")
                    bias = bias @ np.asarray(pointwise).reshape(bias.size, -1)
                path = f"{kernel.path.rpartition('/')[0]}/bias"
                new = next(v for v in clone.variables if v.path == path)
                new.assign(np.asarray(new) + bias)


def _fixed(layer: Any, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"Keras layer {layer.name!r} ({type(layer).__name__}) cannot be narrowed: {why}. Sizes are written into it. "
        "Prune with ignore=[...] what it reads and writes, or narrow it by hand."
    )


def _input_like(old: Any, tensor: Any) -> Any:
    import keras

    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=old.name)


def _reshaped(layer: Any, shape: Sequence[int | None]) -> Any:
    """Fit a Reshape to a narrower input: its last axis that can takes the change."""
    is_layer = hasattr(layer, "target_shape")
    target = list(layer.target_shape if is_layer else layer.newshape)
    known = [n for n in (shape[1:] if is_layer else shape) if n is not None]
    total, fixed = int(np.prod(known)), int(np.prod([n for n in target if n > 0]))
    if (-1 not in target and total != fixed) or (-1 in target and total % fixed):
        axes = [a for a in reversed(range(len(target))) if target[a] > 0 and total * target[a] % fixed == 0]
        if not axes:
            raise _fixed(layer, f"{target} does not fit {list(shape)}")
        target[axes[0]] = total * target[axes[0]] // fixed
    if is_layer:
        return type(layer).from_config({**layer.get_config(), "target_shape": tuple(target)})
    return type(layer)(tuple(target))


def _rescaled(layer: Any, clone: Any, variable: Any) -> float:
    """Return the factor that undoes the change of attention's scale, 1/sqrt(head size), by the narrower head."""
    key = {"MultiHeadAttention": "key_dim", "GroupedQueryAttention": "head_dim"}.get(type(layer).__name__)
    if key is None or "/query/" not in variable.path:
        return 1.0
    return float(np.sqrt(clone.get_config()[key] / layer.get_config()[key]))


def _verify(small: Any, pruned: ModelProto) -> None:
    feeds = example_feeds(pruned)
    names = [o.name for o in pruned.graph.output]
    expected, actual = run(load_session(pruned), feeds), read(small).run(list(feeds.values()))
    try:
        difference(names, expected, actual, f"the narrower Keras model {small.name!r}")
    except ModelError as error:
        raise UnsupportedError(f"{error} One of its layers computes with a size that is written into it.") from error


# -- files -----------------------------------------------------------------------------------------------------------


def save(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a Keras model, read it back and compare.

    Args:
        model: the model.
        path: a ``.keras`` file, a ``.tflite`` file, or, without a suffix, the folder of a SavedModel.

    Returns:
        The path.

    Raises:
        SpaError: it cannot be written there.
        UnsupportedError: TensorFlow Lite's converter refuses the model.
        ModelError: what was written computes something else.
    """
    target = Path(path)
    if target.suffix not in ("", ".keras", ".tflite"):
        raise SpaError(f"cannot write {str(target)!r}: choose .keras, .tflite or, for a SavedModel, no suffix.")
    if target.is_dir():
        raise SpaError(f"cannot write {str(target)!r}: the folder exists. Choose another name.")
    with drafts(target) as drafted:
        draft = drafted.folder / target.name
        _write(model, draft)
        _check(model, draft)
        drafted.publish_one(draft)
    return target


def _write(model: Any, draft: Path) -> None:
    if draft.suffix == ".keras":
        model.save(draft)
    elif draft.suffix == ".tflite":
        draft.write_bytes(_to_tflite(model, draft))
    else:
        model.export(draft, verbose=False)


def _to_tflite(model: Any, draft: Path) -> bytes:
    import tensorflow as tf

    saved = draft.with_suffix(".saved")  # its way from Keras models themselves fails at several named inputs
    model.export(saved, verbose=False)
    try:
        return bytes(tf.lite.TFLiteConverter.from_saved_model(str(saved)).convert())
    except Exception as error:  # the converter's own class derives from Exception alone
        reason = first_line(error).rpartition("): ")[2]  # behind a long location
        raise UnsupportedError(
            f"TensorFlow Lite refuses Keras model {model.name!r}: {reason} Save it as .keras, or fix its input shapes."
        ) from error


def _check(model: Any, draft: Path) -> None:
    rebuilt, reread = read(model), read(draft)
    feeds = list(example_feeds(convert(model).model).values())
    outputs, order = list(range(len(rebuilt.outputs))), list(range(len(feeds)))
    if reread.kind != "keras":  # these sort inputs by name; so do converted outputs
        order = [next(i for i, t in enumerate(model.inputs) if t.name in name) for name in reread.inputs]
        outputs.sort(key=lambda i: reread.outputs[i])
    written = reread.run([feeds[i] for i in order])
    difference(rebuilt.outputs, rebuilt.run(feeds), [written[i] for i in outputs], draft.name)
