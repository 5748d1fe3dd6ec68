"""Apply what merely rearranges a parameter in jax2onnx's graphs to the parameter itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from spa.frameworks.jax import Step, record_layout, take


def join(model: ModelProto, names: set[str]) -> None:
    """Make constants of Concats of constants that are no parameters, in place: jax2onnx writes shapes so."""
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer if t.name not in names}
    kept = []
    for node in graph.node:
        if node.op_type == "Concat" and all(name in tensors for name in node.input):
            pieces = [numpy_helper.to_array(tensors[name]) for name in node.input]
            joined = numpy_helper.from_array(np.concatenate(pieces, node.attribute[0].i), node.output[0])
            tensors[joined.name] = joined
            graph.initializer.append(joined)
        else:
            kept.append(_copied(node))
    graph.ClearField("node")
    graph.node.extend(kept)


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def fold(model: ModelProto, names: set[str]) -> None:
    """Apply the layout operators that parameters pass first to the parameters themselves, in place.

    Done where all uses of a parameter are the same operator with the same result. What was done is recorded in the
    initializer (:func:`spa.frameworks.jax.record_layout`).

    Args:
        model: the model.
        names: the initializers to look at.
    """
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {o.name for o in graph.output}
    gone: dict[str, str] = {}
    steps: dict[str, list[Step]] = {}
    for name in sorted(names & tensors.keys()):
        value, readers = numpy_helper.to_array(tensors[name]), users.get(name, [])
        while readers and not any(o in outputs for n in readers for o in n.output):
            encoded = {json.dumps(_step(n, value.shape, tensors)) for n in readers}
            step = json.loads(encoded.pop())
            if encoded or step is None:
                break
            steps.setdefault(name, []).append(step)
            value = take(step, value)
            gone |= {n.output[0]: name for n in readers}
            readers = [u for n in readers for u in users.get(n.output[0], [])]
        if name in steps:
            tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
            record_layout(tensors[name], steps[name])
    kept = []
    for node in graph.node:
        if node.output[0] not in gone:
            copy = _copied(node)
            copy.input[:] = [gone.get(i, i) for i in node.input]
            kept.append(copy)
    graph.ClearField("node")
    graph.node.extend(kept)


def _step(node: NodeProto, shape: tuple[int, ...], tensors: Mapping[str, TensorProto]) -> list[Any] | None:
    """Return the layout step that an operator takes with a parameter of that shape, or None for other operators."""
    attributes = {a.name: list(a.ints) for a in node.attribute}
    if node.op_type == "Transpose":
        return ["transpose", attributes.get("perm", list(range(len(shape)))[::-1])]
    if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze") or node.input[1] not in tensors:
        return None
    operand = [int(v) for v in numpy_helper.to_array(tensors[node.input[1]]).ravel()]
    empty = np.empty(shape, np.bool_)
    if node.op_type == "Reshape":
        return ["reshape", list(empty.reshape(operand).shape)] if 0 not in operand else None
    changed = np.squeeze(empty, tuple(operand)) if node.op_type == "Squeeze" else np.expand_dims(empty, tuple(operand))
    return ["reshape", list(changed.shape)]
