"""The masked oracle in double precision: decides whether two outputs differ by rounding or by a wrong network."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

import spa
from spa.coupling.plan import Plan
from spa.model.bodies import nested
from spa.running.feeds import make_feeds
from spa.surgery.apply import apply
from spa.surgery.masking import masked
from spa.surgery.proof import distance

TOLERANCE = 1e-10  # of double precision: sums are taken in another order


def equal_in_double(result: spa.Result, seed: int = 0) -> bool:
    """Return whether a plan's network and the masked original agree in double precision, run by onnx itself.

    The groups that cross a normalisation are left whole, as in :func:`spa.prove`. What onnx cannot run in double
    precision does not agree.
    """
    crossing = {g.name for g in result.analysis.groups if g.crossings}
    kept = {name: indices for name, indices in result.plan.kept.items() if name not in crossing}
    plan = Plan(kept, {name: result.plan.sizes[name] for name in kept}, {})
    feeds = make_feeds(result.analysis.graph.model, seed=seed)
    wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in feeds.items()}
    try:
        found, expected = (
            ReferenceEvaluator(in_double(nested(model))).run(None, wide)
            for model in (apply(result.analysis, plan), masked(result.analysis, plan))
        )
    except Exception:  # of any kernel
        return False
    return all(distance(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


def in_double(model: ModelProto) -> ModelProto:
    """Return a copy of a model in which single precision is double; declarations of what it computes are dropped."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in copy.graph.initializer:
        _widen(tensor)
    _widen_attributes(copy.graph.node)
    return copy


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen_attributes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                _widen_attributes(attribute.g.node)
            elif attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
