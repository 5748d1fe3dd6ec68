"""The marks between which the bodies of Loop, Scan and If lie in a flat graph (:mod:`spa.model.bodies`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, TensorProto

from spa.model.graph import Graph, Node
from spa.model.shape_registry import Shape, contrib_shape

FLAT = "spa.flat"  # the domain of the marks
ENTER = ("LoopEnter", "ScanEnter", "IfThen")
MOST_STEPS = 2**20  # of a loop that are counted; more are no network's, and what they would cost says nothing
LEAVE = ("LoopLeave", "ScanLeave", "IfLeave")
Shapes = Sequence["Shape | None"]
Outputs = list[tuple[int, Shape]]


def is_flat(model: ModelProto) -> bool:
    """Return whether bodies lie flat in a model."""
    return any(o.domain == FLAT for o in model.opset_import)


def is_mark(node: Node) -> bool:
    """Return whether a node is where a body begins or ends."""
    return node.domain == FLAT


def marks_around(graph: Graph) -> dict[int, tuple[Node, ...]]:
    """Return by index of a node inside bodies the marks that these begin with, outer ones first."""
    found: dict[int, tuple[Node, ...]] = {}
    around: list[Node] = []
    for node in graph.nodes:
        if is_mark(node) and node.op in LEAVE:
            around.pop()
        if around:
            found[node.index] = tuple(around)
        if is_mark(node) and node.op in ENTER:
            around.append(node)
    return found


@contrib_shape(f"{FLAT}::LoopEnter", by_value=True)
def loop_enter(node: Node, shapes: Shapes, dtypes: Sequence[int], values: Sequence[np.ndarray | None]) -> Outputs:
    """Return the counter, the condition, the states as they begin, and an axis of as many steps as are counted."""
    counter, condition = ((1,) * rank for rank in node.attributes["ranks"])
    most = values[0] if node.attributes["counted"] else None
    steps = -1 if most is None or not 0 < np.ravel(most)[0] <= MOST_STEPS else int(np.ravel(most)[0])
    states = [(dtype, shape or ()) for dtype, shape in zip(dtypes[2:], shapes[2:], strict=True)]
    return [(TensorProto.INT64, counter), (TensorProto.BOOL, condition), *states, (TensorProto.FLOAT, (steps,))]


@contrib_shape(f"{FLAT}::LoopLeave", f"{FLAT}::ScanLeave")
def leave(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return the states, and what the steps gave, laid along an axis of their own."""
    first, states, count = int(node.op == "LoopLeave"), node.attributes["states"], len(node.outputs)
    steps = (shapes[-1] or (-1,))[0]
    outputs = [(d, s or ()) for d, s in zip(dtypes[first:], shapes[first : first + count], strict=False)]
    axes = node.attributes.get("scan_output_axes") or [0] * (count - states)
    for i, axis in enumerate(axes, states):
        dtype, shape = outputs[i]
        at = axis + len(shape) + 1 if axis < 0 else axis
        outputs[i] = (dtype, (*shape[:at], steps, *shape[at:]))
    return outputs


@contrib_shape(f"{FLAT}::ScanEnter")
def scan_enter(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return the states as they begin, what each step is given, and the axis of the steps."""
    scanned = node.attributes["num_scan_inputs"]
    axes = node.attributes.get("scan_input_axes") or [0] * scanned
    outputs = [(dtype, shape or ()) for dtype, shape in zip(dtypes, shapes, strict=True)]
    states, length = len(outputs) - scanned, -1
    for i, axis in enumerate(axes, states):
        dtype, shape = outputs[i]
        length = shape[axis]
        at = axis % len(shape)
        outputs[i] = (dtype, (*shape[:at], *shape[at + 1 :]))
    return [*outputs, (TensorProto.FLOAT, (length,))]


@contrib_shape(f"{FLAT}::IfThen", f"{FLAT}::IfElse")
def branch(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return nothing but a sign of the branch."""
    return [(TensorProto.FLOAT, ())]


@contrib_shape(f"{FLAT}::IfLeave")
def if_leave(node: Node, shapes: Shapes, dtypes: Sequence[int]) -> Outputs:
    """Return what the first branch gives."""
    count = len(node.outputs)
    return [(d, s or ()) for d, s in zip(dtypes[1 : 1 + count], shapes[1 : 1 + count], strict=True)]
