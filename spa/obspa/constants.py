"""The constants that stand for residual branches that went: the mean of what a sum has lost."""

from __future__ import annotations

import numpy as np

from spa.coupling.analysis import Analysis, Branch
from spa.model.graph import Graph, Node
from spa.obspa.carriers import STEPS, Carrier, before_clipping, only_clipped
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

    def prepare(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Hold what the layer before the sum is refitted by."""
        carrier = self._carrier(reconstruction, pruned_node)
        if carrier is not None:
            carrier.hold(reconstruction, node, pruned_node)

    def _carrier(self, reconstruction: Reconstruction, pruned_node: Node) -> Carrier | None:
        if not reconstruction.settings.carriers:
            return None
        skip = pruned_node.inputs[1 - self.branch.operand]
        return Carrier.find(reconstruction.pruned.graph, reconstruction.dense.graph, pruned_node, skip)

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Give the sum the mean that it has in the dense network, per index of the branch's axes.

        Before that the layer that the skip comes from is refitted, where there is one (:mod:`spa.obspa.carriers`). The
        constant also makes up for what earlier cuts have changed of the mean of the skip.
        """
        carrier = self._carrier(reconstruction, pruned_node)
        if carrier is not None:
            carrier.refit(reconstruction, node, pruned_node.inputs[1 - self.branch.operand])
        old = reconstruction.pruned.graph.array(pruned_node.inputs[self.branch.operand])
        constant = np.zeros(old.shape)
        clipped = only_clipped(reconstruction.dense.graph, node)
        for _ in range(STEPS if clipped else 1):
            constant = constant + self._lost(reconstruction, node, pruned_node, constant, clipped).reshape(old.shape)
        reconstruction.pruned.replace(pruned_node.inputs[self.branch.operand], constant.astype(old.dtype))

    def _lost(
        self, reconstruction: Reconstruction, node: Node, pruned_node: Node, constant: np.ndarray, clipped: bool
    ) -> np.ndarray:
        """Return the mean of what the sum lacks with a constant in the branch's place, per index of its axes."""
        pruned, axes, skip = reconstruction.pruned, self.branch.axes, pruned_node.inputs[1 - self.branch.operand]
        total, count = np.zeros(()), 0
        for dense_batch, pruned_batch in zip(reconstruction.dense.live, pruned.live, strict=True):
            target = reconstruction.kept_part(node.outputs[0], dense_batch)
            current = pruned.value(skip, pruned_batch) + constant
            if clipped:
                target = before_clipping(target, current)
            lost = target.astype(np.float64) - current
            if not {0, 1}.intersection(axes):  # those of samples and positions
                lost = only_real(lost, dense_batch.real)
            over = tuple(i for i in range(lost.ndim) if i not in axes)
            total = total + lost.sum(axis=over)
            count += lost.size // max(total.size, 1)
        return total / max(count, 1)
