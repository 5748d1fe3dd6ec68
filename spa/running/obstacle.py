"""Obstacles that keep onnxruntime from running a valid model: an operator or type without a kernel, inputs of strings.

Criteria that look at the weights alone need no run, and such a model is pruned and written unrun, which is said. Any
other reason for which a model does not load counts against the model.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

from onnx import ModelProto, TensorProto

from spa.errors import ModelError
from spa.model.graph import Graph, domain_of, schema_of, tensors_of
from spa.model.shape_registry import shape_function
from spa.running.guarded import guarded
from spa.running.runtime import Model, input_specs, load_session
from spa.running.sessions import open_session

_LACKS = re.compile(r"Could not find an implementation for|No Op registered for|is not a registered function/op")
_OWN = frozenset({"ai.onnx.ml", "com.microsoft"})  # domains of onnxruntime itself
_SECONDS = 300.0


def obstacle(graph: Graph) -> str | None:
    """Return what keeps onnxruntime from running a model, a clause, or None; only a model that may have one is loaded.

    Args:
        graph: the model.
    """
    if not _may_have_one(graph):
        return None
    try:
        return guarded(found, graph.model, graph.base, name="the model", seconds=_SECONDS)
    except ModelError:
        return None  # said where the model is checked


def found(model: Model, base: Path | None = None) -> str | None:
    """Load a model; return what keeps onnxruntime from running it.

    Args:
        model: a path, the bytes of a file, or a parsed model.
        base: the folder of a parsed model's external data.

    Raises:
        ModelError: it does not load for another reason.
    """
    try:
        with (
            open_session(model, base) if isinstance(model, ModelProto) else nullcontext(load_session(model)) as session
        ):
            specs = input_specs(session)
    except ModelError as error:
        if _LACKS.search(str(error)) is None:
            raise
        return f"onnxruntime cannot load it ({str(error).partition(': ')[2].rstrip('.')})"
    strings = [spec.name for spec in specs if spec.dtype is None]
    return f"no values can be made up for input {strings[0]!r}" if strings else None


def _may_have_one(graph: Graph) -> bool:
    inputs = {info.type.tensor_type.elem_type for info in graph.model.graph.input}
    types = inputs | {tensor.data_type for tensor in tensors_of(graph.model.graph)}
    usual = {TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.INT8}
    unknown = any(
        schema_of(node) is None and domain_of(node.proto) not in _OWN and shape_function(node.key) is None
        for node in graph.nodes
    )
    return unknown or not types <= usual | {TensorProto.UINT8}
