"""Export models to the files of other runtimes, by the name of the target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from spa.errors import OptionError, SizeError, suggestion
from spa.model.diagnosis import diagnosed
from spa.model.graph import tensors_of
from spa.model.io import Source, load

TARGETS = ("onnx", "ort", "openvino", "torch", "tensorflow", "jax")


def export(
    model: Any,
    target: str,
    path: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> Path:
    """Write a model for a runtime or a framework, compared with what onnxruntime computes.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto``, an onnx-graphsurgeon ``Graph``, or the
            :class:`spa.Result` of pruning.
        target: ``onnx``, ``ort`` (``NAME.ort``, for onnxruntime's small builds), ``openvino`` (a folder with
            ``model.xml``), ``torch`` (a folder with ``model.pt2``, which ``torch.export.load`` reads), ``jax`` (a
            folder with ``model.jax`` and ``params.npz``, see :func:`spa.exporters.jax_files.write_jax`) or
            ``tensorflow`` (a SavedModel, or a ``.tflite`` file if the path says so; through JAX, see
            :func:`spa.exporters.saved_model.write_saved_model`. The result of pruning a Keras model is rebuilt as Keras
            layers, in a ``.keras`` file if the path says so).
        path: the file to write, or the folder for ``openvino``, ``torch``, ``jax`` and ``tensorflow``.
        sizes: what open sizes of the inputs become, by name (``{"batch": 1}``); the others stay open.
        options: of the target ``onnx`` alone: ``opset``, ``ir_version``, ``external``, ``optimise`` and ``force`` as
            in :func:`spa.exporters.onnx.write`.

    Returns:
        The file or folder to load.

    Raises:
        OptionError: no such target, an option that it does not have, or one that cannot be met.
        SizeError: no such open size.
        ModelError: the model is malformed.
        UnsupportedError: the target's package is not installed or cannot express the model.
        SpaError: nothing can be written there.
    """
    if target not in TARGETS:
        raise OptionError(f"cannot export to {target!r}. Choose one of {', '.join(TARGETS)}.")
    if target != "onnx" and options:
        raise OptionError(f"the target {target} takes no {', '.join(options)}: that is for onnx. Leave it out.")
    if not _is_result(model):
        source = load(model)
        with diagnosed(source):
            return _write(source, target, path, sizes or {}, options)
    if not sizes and target == "tensorflow" and model.origin is not None and model.origin.imported.kind == "keras":
        from spa.exporters.tensorflow import save

        return save(model.to("keras"), path)
    dense = model.source
    outside = any(t.data_location == TensorProto.EXTERNAL for t in tensors_of(dense.model.graph))
    own = {"external": outside, "name": "the pruned model"} if target == "onnx" else {}
    return _write(replace(dense, model=model.model), target, path, sizes or {}, own | options)


def _is_result(model: Any) -> bool:
    from spa.api import Result

    return isinstance(model, Result)


def _write(
    source: Source, target: str, path: str | os.PathLike[str], sizes: Mapping[str, int], options: dict[str, Any]
) -> Path:
    if sizes:
        source = replace(source, model=_fixed(source.model, sizes))
    if target == "onnx":
        from spa.exporters.onnx import write

        return write(source, path, **options)
    if target == "ort":
        from spa.exporters.ort import write_ort as write_other
    elif target == "openvino":
        from spa.exporters.openvino import write_openvino as write_other
    elif target == "tensorflow":
        from spa.exporters.saved_model import write_saved_model as write_other
    elif target == "jax":
        from spa.exporters.jax_files import write_jax as write_other
    else:
        from spa.exporters.pytorch import save as write_other
    return write_other(source.model, path, source.base)


def _fixed(model: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """Return a copy in which open sizes are numbers."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    found = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    if unknown := sorted(sizes.keys() - found):
        which = (
            f"its open sizes are {', '.join(sorted(found))}" if found else "none of its sizes that has a name is open"
        )
        near = suggestion(unknown[0], found)
        raise SizeError(f"the model has no open size {unknown[0]!r}: {which}.{near} Leave it out.")
    copy = ModelProto()
    copy.CopyFrom(model)
    for name, size in sizes.items():
        make_dim_param_fixed(copy.graph, name, size)
    return copy
