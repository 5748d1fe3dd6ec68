"""The constants that stand for residual branches that went: the mean of what a sum has lost."""

from __future__ import annotations

import numpy as np

from spa.coupling.analysis import Analysis, Branch
from spa.model.graph import Graph, Node
from spa.obspa.curves import Observation
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.running.padding import only_real
from spa.running.stream import Stream


class LostBranch(ReaderKind):
    """A sum whose branch went, as a reader of the skip: the constant in the branch's place is what is fitted.

    Args:
        branch: the branch.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node of the dense network is the branch's sum."""
        return node.index == self.branch.sum

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Observe nothing: no channels are scored by a sum."""
        return []

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Give the sum the mean that it has in the dense network, per index of the branch's axes.

        The constant also makes up for what earlier cuts have changed of the mean of the skip.
        """
        pruned, axes = reconstruction.pruned, self.branch.axes
        skip, constant = (pruned_node.inputs[i] for i in (1 - self.branch.operand, self.branch.operand))
        total, count = np.zeros(()), 0
        for dense_batch, pruned_batch in zip(reconstruction.dense.live, pruned.live, strict=True):
            kept = reconstruction.kept_part(node.outputs[0], dense_batch)
            lost = kept.astype(np.float64) - pruned.value(skip, pruned_batch)
            if not {0, 1}.intersection(axes):  # those of samples and positions
                lost = only_real(lost, dense_batch.real)
            over = tuple(i for i in range(lost.ndim) if i not in axes)
            total = total + lost.sum(axis=over)
            count += lost.size // max(total.size, 1)
        old = pruned.graph.array(constant)
        pruned.replace(constant, (total / max(count, 1)).reshape(old.shape).astype(old.dtype))
