"""The oracle: what a pruned model must compute, written without any surgery.

Removing channels that nobody reads any more changes nothing. So for every plan whose groups cross no normalisation

    pruned(x) == original(x) with the readers' slices of the removed indices set to zero.

:func:`masked` builds the right-hand side by multiplying each reader's operand with a mask of zeros and ones.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from spa.algebra.op import Read
from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.model.graph import Node
from spa.model.traits import FLOATS


def masked(analysis: Analysis, plan: Plan) -> ModelProto:
    """The original model with the readers' slices of the removed indices set to zero.

    Returns:
        A model of the original sizes that computes what the pruned one must compute.
    """
    kept = analysis.kept(plan.masks(analysis))
    model = ModelProto()
    model.CopyFrom(analysis.graph.model)
    before: dict[int, list[NodeProto]] = {}
    for index, law in analysis.laws.items():
        for number, read in enumerate(law.reads):
            mask = kept.mask(read.expr)
            if not mask.all():
                before.setdefault(index, []).extend(_mask_nodes(analysis, law.node, model, read, mask, number))
    nodes = [n for i, node in enumerate(model.graph.node) for n in (*before.get(i, ()), node)]
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _mask_nodes(
    analysis: Analysis, node: Node, model: ModelProto, read: Read, mask: np.ndarray, number: int
) -> list[NodeProto]:
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
    made = []
    if not zero:
        zero = f"{stem}_zero"
        scalar = np.zeros((), helper.tensor_dtype_to_np_dtype(dtype))
        model.graph.initializer.append(numpy_helper.from_array(scalar, zero))
    elif walk.shape[zero] and walk.shape[zero] != (1,):
        spread = np.ones(rank, np.int64)
        spread[read.zero_axis] = -1
        model.graph.initializer.append(numpy_helper.from_array(spread, f"{stem}_spread"))
        made.append(helper.make_node("Reshape", [zero, f"{stem}_spread"], [f"{stem}_zero"]))
        zero = f"{stem}_zero"
    return [*made, helper.make_node("Where", [stem, name, zero], [out])]
