"""The constants that stand for residual branches that went: the mean of what the sum has lost."""

from __future__ import annotations

import numpy as np

from spa.coupling.analysis import Branch
from spa.obspa.readers.base import Reconstruction
from spa.running.padding import only_real

Array = np.ndarray


def fit_constant(reconstruction: Reconstruction, branch: Branch) -> None:
    """Give a sum whose branch went the mean that it has in the dense network.

    The constant also makes up for what earlier cuts have changed of the mean of the skip.

    Args:
        reconstruction: both networks, neither of them run beyond the sum.
        branch: the branch that went.
    """
    dense, pruned = reconstruction.dense, reconstruction.pruned
    node = dense.graph.nodes[branch.sum]
    pruned_node = pruned.graph.producer.get(node.outputs[0])
    if pruned_node is None:  # it stood inside another branch that went
        return
    dense.after(node)
    pruned.before(pruned_node)
    name, skip = node.outputs[0], pruned_node.inputs[1 - branch.operand]
    total, count = np.zeros(()), 0
    for dense_batch, pruned_batch in zip(dense.live, pruned.live, strict=True):
        lost = reconstruction.kept_part(name, dense_batch).astype(np.float64) - pruned.value(skip, pruned_batch)
        axes = tuple(i for i in range(lost.ndim) if i not in branch.axes)
        real = only_real(lost, dense_batch.real) if not set(branch.axes) & {0, 1} else lost
        total = total + real.sum(axis=axes, keepdims=True)
        count += int(np.prod([real.shape[i] for i in axes]))
    constant = pruned_node.inputs[branch.operand]
    old = pruned.graph.array(constant)
    pruned.replace(constant, (total / max(count, 1)).reshape(old.shape).astype(old.dtype))
