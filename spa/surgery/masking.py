"""The masked original: a model that computes what the pruned one must compute, built without any surgery.

Removing channels that no node reads any more changes nothing. So for every plan whose groups cross no normalisation

    pruned(x) == original(x) with the readers' slices of the removed indices set to zero.

:func:`masked` builds the right-hand side by multiplying each reader's operand with a mask of zeros and ones.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spa.algebra.op import Read
from spa.coupling.analysis import Analysis, Branch, Detour
from spa.coupling.plan import Plan, dropped
from spa.model.graph import Node
from spa.model.traits import FLOATS

_NARROW = {TensorProto.INT8, TensorProto.INT16, TensorProto.UINT16}  # which Where lacks before onnxruntime 1.31


def masked(analysis: Analysis, plan: Plan) -> ModelProto:
    """Set the readers' slices of the removed indices to zero in a copy of the original model.

    Args:
        analysis: the original model.
        plan: the channels to keep.

    Returns:
        A model of the original sizes that computes what the pruned one must compute, if no group of the plan crosses a
        normalisation.

    Raises:
        PlanError: the plan does not fit the model.
    """
    kept = analysis.kept(plan.masks(analysis))
    model = ModelProto()
    model.CopyFrom(analysis.graph.model)
    inserted: dict[int, list[NodeProto]] = {}  # by the index of the node that they stand before
    for index, law in analysis.laws.items():
        for number, read in enumerate(law.reads):
            mask = kept.mask(read.expr)
            if not mask.all():
                inserted.setdefault(index, []).extend(_mask_nodes(analysis, law.node, model, read, mask, number))
    for part in dropped(analysis, kept):
        if isinstance(part, Branch):
            zero = Read(part.dim, part.operand, 0)
            found = _mask_nodes(analysis, analysis.graph.nodes[part.end], model, zero, np.zeros(1, bool), 0)
            inserted.setdefault(part.end, []).extend(found)
        elif isinstance(part, Detour):
            inserted.setdefault(part.end + 1, [])[:0] = _without_detour(analysis, model, part)
    nodes = [n for i, node in enumerate(model.graph.node) for n in (*inserted.get(i, ()), node)]
    nodes += inserted.get(len(model.graph.node), [])
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _without_detour(analysis: Analysis, model: ModelProto, detour: Detour) -> list[NodeProto]:
    """Make of y = x + (f(x) - x) what is left once the second addend is masked by zero."""
    node, dtype = model.graph.node[detour.end], analysis.points.first.dtype[detour.source]
    target = analysis.graph.nodes[detour.end].outputs[0]
    whole, change, none, zero = (f"spa_detour_{detour.end}_{what}" for what in ("whole", "change", "none", "zero"))
    node.output[list(node.output).index(target)] = whole
    zeros = np.zeros((), helper.tensor_dtype_to_np_dtype(dtype))
    model.graph.initializer.append(numpy_helper.from_array(zeros, zero))
    return [
        helper.make_node("Sub", [whole, detour.source], [change]),
        helper.make_node("Mul", [change, zero], [none]),
        helper.make_node("Add", [detour.source, none], [target]),
    ]


def _mask_nodes(
    analysis: Analysis, node: Node, model: ModelProto, read: Read, mask: np.ndarray, number: int
) -> list[NodeProto]:
    """Mask one operand of a reader; changes the reader's message and adds constants to the model.

    Args:
        analysis: the original model.
        node: the reader.
        model: the message that is being masked.
        read: the operand and the axis to mask.
        mask: of shape (size of the axis,), True where the index is kept.
        number: the position of ``read`` among those of the node.

    Returns:
        The nodes to insert before the reader: a product for floats; for integers, a choice between the value and the
        zero point.
    """
    target = model.graph.node[node.index]
    name = target.input[read.operand]
    walk = analysis.points.first
    dtype = walk.dtype[node.inputs[read.operand]]
    rank = len(walk.shape[node.inputs[read.operand]])
    shape = [1] * rank
    shape[read.axis] = mask.size
    stem = f"spa_mask_{node.index}_{number}"
    out = f"{stem}_out"
    target.input[read.operand] = out
    if dtype in FLOATS:
        values = mask.reshape(shape).astype(helper.tensor_dtype_to_np_dtype(dtype))
        model.graph.initializer.append(numpy_helper.from_array(values, stem))
        return [helper.make_node("Mul", [name, stem], [out])]
    model.graph.initializer.append(numpy_helper.from_array(mask.reshape(shape), stem))
    zero = node.inputs[read.zero] if read.zero is not None and read.zero < len(node.inputs) else ""
    reshaped = []
    if not zero:
        zero = f"{stem}_zero"
        scalar = np.zeros((), helper.tensor_dtype_to_np_dtype(dtype))
        model.graph.initializer.append(numpy_helper.from_array(scalar, zero))
    elif walk.shape[zero] and walk.shape[zero] != (1,):
        zero_shape = np.ones(rank, np.int64)
        zero_shape[read.zero_axis] = -1
        model.graph.initializer.append(numpy_helper.from_array(zero_shape, f"{stem}_spread"))
        reshaped.append(helper.make_node("Reshape", [zero, f"{stem}_spread"], [f"{stem}_zero"]))
        zero = f"{stem}_zero"
    if dtype not in _NARROW:
        return [*reshaped, helper.make_node("Where", [stem, name, zero], [out])]
    wide_name, wide_zero, wide_out = f"{stem}_wide", f"{stem}_wide_zero", f"{stem}_wide_out"
    return [
        *reshaped,
        helper.make_node("Cast", [name], [wide_name], to=TensorProto.INT32),
        helper.make_node("Cast", [zero], [wide_zero], to=TensorProto.INT32),
        helper.make_node("Where", [stem, wide_name, wide_zero], [wide_out]),
        helper.make_node("Cast", [wide_out], [out], to=dtype),
    ]
