"""Reading models from every source, and the checks that analysis relies on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from spa.errors import ModelError, UnsupportedError
from spa.model.graph import tensors_of
from spa.model.normalise import normalise
from spa.model.versions import OLDEST_OPSET, covers_opset, newest_opset


@dataclass(frozen=True)
class Source:
    """A model and its origin.

    Attributes:
        model: the message; external data is not loaded.
        path: its file, or None.
        base: the folder that external data lies in, or None.
        sizes: of open axes, by ``input[axis]``, at which the model is known to make sense; it is checked there.
    """

    model: ModelProto
    path: Path | None = None
    base: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


def load(source: Any) -> Source:
    """Read a model and check it for what analysis relies on. The given object is not changed.

    Args:
        source: a path, the file's bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``.

    Raises:
        ModelError: the file does not exist or is not ONNX, the model is malformed, or its external data is missing or
            lies outside its folder.
        UnsupportedError: the opset is too old or too new.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    name = repr(str(path)) if path else "the model"
    if isinstance(source, ModelProto):
        model = source
    elif path is not None or isinstance(source, bytes):
        model = _parse(_read(path) if path else source, name)
    elif type(source).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon as gs

        model = gs.export_onnx(source)
    else:
        raise ModelError(f"cannot read a {type(source).__name__}. Give a path, bytes, a ModelProto or a gs.Graph.")
    base = path.parent if path else None
    _check(model, name, base)
    return Source(normalise(model, own=source is not model), path, base)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror}. Check the path.") from error


def _parse(data: bytes, name: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{name} is truncated or not an ONNX file. Export or copy it again.") from error
    return model


def _check(model: ModelProto, name: str, base: Path | None) -> None:
    if not model.opset_import or not model.HasField("graph") or not (model.graph.node or model.graph.initializer):
        raise ModelError(f"{name} is not an ONNX model: it has no graph or no opset. Export or copy it again.")
    if not model.graph.output:
        raise ModelError(f"{name} has no outputs. Export it again with its outputs named.")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OLDEST_OPSET)
    if not covers_opset(opset):
        remedy = (
            "Export with a newer one" if opset < OLDEST_OPSET else "Export with an older one, or update onnxruntime"
        )
        raise UnsupportedError(f"{name} has opset {opset}; {OLDEST_OPSET} to {newest_opset()} are covered. {remedy}.")
    for tensor in tensors_of(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, name, base)
    _check_order(model, name)


def _check_external(tensor: TensorProto, name: str, base: Path | None) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise ModelError(f"{name}: tensor {tensor.name!r} has external data. Give the model's path instead.")
    root = base.resolve()
    file = (base / location).resolve()
    if not location or os.path.isabs(location) or root not in file.parents:
        raise ModelError(
            f"{name}: tensor {tensor.name!r} lies in {location!r}, outside the model's folder. "
            "Move the data beside the model; other places are refused."
        )
    try:
        available = file.stat().st_size
    except OSError as error:
        raise ModelError(
            f"{name}: the external data file {location!r} of tensor {tensor.name!r} is missing. "
            "Put it beside the model."
        ) from error
    end = int(entries.get("offset", 0) or 0) + int(entries.get("length", 0) or 0)
    if end > available:
        raise ModelError(
            f"{name}: the external data file {location!r} is truncated at tensor {tensor.name!r}. Copy it again."
        )


def _check_order(model: ModelProto, name: str) -> None:
    graph = model.graph
    defined = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    defined |= {t.values.name for t in graph.sparse_initializer} | {""}
    for node in graph.node:
        missing = next((i for i in node.input if i not in defined), None)
        if missing is not None:
            raise ModelError(
                f"{name}: {node.op_type} {node.name!r} reads {missing!r} before any node computes it. "
                "Check the model with onnx.checker."
            )
        defined.update(node.output)
    undefined = next((o.name for o in graph.output if o.name not in defined), None)
    if undefined is not None:
        raise ModelError(f"{name}: no node computes the output {undefined!r}. Check the model with onnx.checker.")
