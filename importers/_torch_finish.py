"""An exported PyTorch network with the network's own names, compared with its own outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import ModelProto, TensorProto, TensorShapeProto, helper

from spa.coupling.analysis import TIED
from spa.errors import SpaError
from spa.frameworks.torch import array
from spa.importers import Imported
from spa.importers._tidy import rename, tidy
from spa.importers._torch_interface import Axes, Run, distinct
from spa.model.graph import tensor_array
from spa.running.runtime import input_specs, output_specs, run
from spa.running.sessions import open_session

TOLERANCE = 1e-3  # of an output's largest magnitude
#: The spacing of numbers near 1; two implementations of a half-precision network are several of these apart.
_EPSILON = {np.dtype(np.float16): 2.0**-10, np.dtype(ml_dtypes.bfloat16): 2.0**-7}
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


class DifferentError(SpaError):
    """An exported network that does not do what the original does."""


def finish(
    model: ModelProto,
    state: Mapping[str, Any],
    inputs: Sequence[str],
    runs: Sequence[Run],
    axes: Sequence[Axes],
    prefix: str,
) -> Imported:
    """Clean the model up, give it the framework's names, and compare it.

    Args:
        model: as an exporter wrote it; changed.
        state: the state_dict.
        inputs: the names of the inputs.
        runs: what to compare with; the first names the outputs.
        axes: which axes of the inputs shall be open, and their names.
        prefix: of all names of parameters.
    """
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    originals = _originals(tensors)
    outputs = distinct((name for name, _ in runs[0].outputs), {*inputs, *tensors})
    _name(model, inputs, outputs, prefix)
    model = tidy(model, [key for key, original in originals.items() if key == original])
    rename(
        model, {t.name: originals[t.name] for t in model.graph.initializer if originals.get(t.name, t.name) != t.name}
    )
    _name_axes(model, inputs, runs, axes)
    names, notes = _parameter_names(model, tensors, originals)
    _mark_tied(model, names, tensors)
    error = _compare(model, inputs, runs)
    aliases = {key: original for key, original in originals.items() if key != original and original in names}
    return Imported(model, "torch", "", names, error, notes, aliases)


def _name(model: ModelProto, inputs: Sequence[str], outputs: Sequence[str], prefix: str) -> None:
    """Name inputs, outputs and parameters."""
    graph = model.graph
    if len(graph.output) != len(outputs):
        raise DifferentError(f"it has {len(graph.output)} outputs, and {len(outputs)} tensors are returned.")
    if graph.input and not graph.input[0].name.startswith("tensors."):
        if len(graph.input) != len(inputs):
            raise DifferentError(f"it has {len(graph.input)} inputs, and {len(inputs)} tensors are given.")
        changes = {info.name: name for info, name in zip(graph.input, inputs, strict=True)}
    else:  # the TorchScript exporter leaves out inputs that nothing depends on
        changes = {f"tensors.{name}": name for name in inputs}
    fixed = {*changes, *(t.name for t in graph.initializer)}
    for info, name in zip(graph.output, outputs, strict=True):
        if info.name in fixed:
            made = f"results.{name}"
            graph.node.append(helper.make_node("Identity", [info.name], [made]))
            info.name = made
        changes[info.name] = name
        fixed.add(info.name)
    if prefix:
        values = (*(t.name for t in graph.initializer), *(name for node in graph.node for name in node.output))
        old = [name for name in values if name.startswith(prefix)]
        changes |= zip(old, distinct((name.removeprefix(prefix) for name in old), changes.values()), strict=True)
    rename(model, changes)


def _originals(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return by key the first key of the same tensor: itself, unless parameters are tied."""
    first: dict[Any, str] = {}
    originals = {}
    for key, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else key
        originals[key] = first.setdefault(place, key)
    return originals


def declared_axes(model: ModelProto) -> tuple[Axes, ...]:
    """Return the open axes of each input; what the first axis of the first input is called becomes ``batch``."""
    shapes = [[d.dim_param for d in info.type.tensor_type.shape.dim] for info in model.graph.input]
    first = next((shape[0] for shape in shapes if shape), "")
    return tuple({a: ("batch" if s == first else s, None) for a, s in enumerate(shape) if s} for shape in shapes)


def _name_axes(model: ModelProto, inputs: Sequence[str], runs: Sequence[Run], axes: Sequence[Axes]) -> None:
    """Give open axes their names; those of outputs that are computed from no input's follow from their sizes."""
    declared = {info.name: info.type.tensor_type.shape.dim for info in model.graph.input}
    labels: dict[str, str] = {}
    by_sizes = {}
    for at, (name, open_) in enumerate(zip(inputs, axes, strict=True)):
        for axis, (label, _) in open_.items():
            by_sizes[tuple(r.inputs[at].shape[axis] for r in runs)] = label
            if name not in declared:
                continue
            dim = declared[name][axis]
            if not dim.dim_param:
                raise DifferentError(f"axis {axis} of {name!r} became fixed at {dim.dim_value}.")
            dim.dim_param = labels.setdefault(dim.dim_param, label)
    for at, info in enumerate(model.graph.output):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.dim_param:
                continue
            if labels.keys() >= set(_SYMBOL.findall(dim.dim_param)):
                dim.dim_param = _SYMBOL.sub(lambda match: labels[match[0]], dim.dim_param)
            else:  # the TorchScript exporter makes up names
                label = by_sizes.get(tuple(r.outputs[at][1].shape[axis] for r in runs))
                dim.CopyFrom(TensorShapeProto.Dimension(dim_param=label))


def _parameter_names(
    model: ModelProto, tensors: Mapping[str, torch.Tensor], originals: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return keys by initializer: of the same name and value, or else of the same value if only one has that."""
    initializers = {t.name: t for t in model.graph.initializer}
    keys = [key for key, original in originals.items() if key == original]
    names = {key: key for key in keys if key in initializers and _same(initializers[key], tensors[key])}
    left = [t for name, t in initializers.items() if name not in names]
    for key in keys:
        alike = [t for t in left if _same(t, tensors[key])] if key not in names else []
        if len(alike) == 1 and alike[0].name not in names:
            names[alike[0].name] = key
    changed = [key for key in keys if key in initializers and key not in names]
    notes = (f"{', '.join(changed[:3])} and others changed their values on the way",) if changed else ()
    return names, notes


def _mark_tied(model: ModelProto, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Mark parameters that several nodes read as one, unless the exporter merged equal ones of several modules."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    for tensor in model.graph.initializer:
        if tensor.name in names and readers[tensor.name] > 1:
            own = tensors[names[tensor.name]]
            others = (t for key, t in tensors.items() if key not in names.values() and t.data_ptr() != own.data_ptr())
            if not any(t.shape == own.shape and torch.equal(t, own) for t in others):
                tensor.metadata_props.add(key=TIED, value="true")


def _same(initializer: TensorProto, tensor: torch.Tensor) -> bool:
    return tuple(initializer.dims) == tuple(tensor.shape) and bool(
        np.array_equal(tensor_array(initializer), array(tensor))
    )


# -- comparing ---------------------------------------------------------------------------------------------------


def _compare(model: ModelProto, inputs: Sequence[str], runs: Sequence[Run]) -> float:
    """Return the largest difference to one of the network's own outputs, over that output's largest magnitude."""
    worst = 0.0
    with open_session(model, name="the network in ONNX") as opened:
        wanted = {spec.name for spec in input_specs(opened)}
        for own in runs:
            feeds = {name: array(t) for name, t in zip(inputs, own.inputs, strict=True) if name in wanted}
            results = run(opened, feeds, name="the network in ONNX")
            for spec, result, (_, tensor) in zip(output_specs(opened), results, own.outputs, strict=True):
                where = f"output {spec.name!r} of inputs {' '.join(str(list(t.shape)) for t in own.inputs)}"
                worst = max(worst, _difference(where, np.asarray(result), array(tensor)))
    return worst


def _difference(where: str, result: np.ndarray, expected: np.ndarray) -> float:
    if result.shape != expected.shape:
        raise DifferentError(f"{where} is {list(result.shape)}, expected {list(expected.shape)}.")
    a, b = result.astype(np.float64), expected.astype(np.float64)
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    if alike.all():
        return 0.0
    difference = np.abs(a - b)[~alike].max()
    finite = np.abs(b[np.isfinite(b)])
    error = float(difference / finite.max()) if finite.any() else np.inf
    tolerance = max(TOLERANCE, 8 * _EPSILON.get(expected.dtype, 0.0))
    if not error <= tolerance:
        raise DifferentError(f"{where} differs by {error:.1e} of its largest value, more than {tolerance:g}.")
    return error
