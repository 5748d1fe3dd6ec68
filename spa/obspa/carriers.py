"""The layer before a residual branch that went: it learns what the branch has added, as far as its inputs tell.

In ``y = x + f(x)`` with ``x = p + W h`` nothing but the sum reads x once f is gone. So W is refitted by least squares
with ``p + W h`` close to the dense y, at no operator more. Where ``x = max(0, p + W h)`` and what follows the sum is
``max(0, y)``, too, the two are one, and

    t = y where y > 0, else min(0, p + W h)

is the target of each of a few fits: the error that it leaves bounds that of ``max(0, p + W h)`` from above and meets it
where the fit began, so no step makes it larger (a majorisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa.model.graph import Graph, Node
from spa.model.marks import marks_around
from spa.obspa.affine import Tail, find_tail
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.readers.base import Reconstruction
from spa.obspa.readers.linear import LinearLayer
from spa.obspa.readers.rows import Rows, Targets, add_rows, draw_positions
from spa.obspa.readers.steps import in_dense, inverse_scale
from spa.running.stream import Feeds

Array = np.ndarray
AFFINE = ("Add", "Mul", "BatchNormalization", "Transpose")
STEPS = 3  # fits through a ReLU


@dataclass(frozen=True)
class Carrier:
    """A linear layer of a pruned network whose output nothing reads but a sum that lost its branch.

    Attributes:
        layer: the layer.
        after: what follows it, up to the next residual sum.
        joined: the tensor in which its output and the addend of that sum come together.
        constants: those that stand for branches on the way from there to the sum that lost its branch.
        clipped: whether ReLUs lie on that way, and behind the sum.
    """

    layer: Linear
    after: Tail
    joined: str
    constants: tuple[str, ...]
    clipped: bool

    @classmethod
    def find(cls, graph: Graph, dense: Graph, node: Node, skip: str) -> Carrier | None:
        """Find the layer of a sum that lost its branch; None if there is none, or if others read its output.

        Args:
            graph: the pruned network.
            dense: the dense network.
            node: the sum.
            skip: what is left of its operands.
        """
        constants, clipped, name, user = [], False, skip, node
        while (maker := _only_for(graph, name, user)) is not None:  # a chain, no search
            stand_ins = [n for n in maker.inputs if n in graph.constants and n not in dense.constants]
            if maker.op == "Relu" and not maker.domain:
                clipped = True
            elif len(stand_ins) == 1 and maker.op == "Add" and not maker.domain:
                constants += stand_ins
            else:
                break
            name, user = next(n for n in maker.inputs if n not in stand_ins), maker
        if maker is None or {maker.index, node.index} & marks_around(graph).keys():
            return None
        if clipped and not only_clipped(graph, node):
            return None
        joined = maker.op == "Add" and not maker.domain
        ends = [n for n in maker.inputs if _only_for(graph, n, maker)] if joined else [name]
        found = [pair for end in ends if (pair := _layer_before(graph, end)) is not None]
        # Where nothing is added, only a ReLU tells that what follows the layer ends before the sum.
        found = [(lin, after) for lin, after in found if (after.addend in maker.inputs if joined else clipped)]
        found = [(lin, after) for lin, after in found if joined or after.addend is None]
        if not found:
            return None
        layer, after = max(found, key=lambda pair: pair[0].node.index)
        return cls(layer, after, name, tuple(constants), clipped)

    def hold(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Hold what :meth:`refit` needs; called before anything has run."""
        twin = in_dense(reconstruction, self.layer)
        addend = [self.after.addend] if self.after.addend else []
        for name in (twin.source, twin.node.outputs[0], self.joined, *addend):
            reconstruction.dense.hold(name, node)
        for name in (self.layer.source, self.joined, *addend):
            reconstruction.pruned.hold(name, pruned_node)

    def refit(self, reconstruction: Reconstruction, node: Node, skip: str) -> None:
        """Refit the layer so that the sum gives what it gave in the dense network.

        Args:
            reconstruction: both networks; the dense one has run through the sum, the pruned one up to it.
            node: the sum in the dense network.
            skip: what is left of its operands in the pruned network.
        """
        pruned, reader = reconstruction.pruned, LinearLayer()
        y = reconstruction.dense.live[0].shape(in_dense(reconstruction, self.layer).node.outputs[0])
        if self.after.aligned(reconstruction.dense.live[0][self.joined]).shape != y:
            return
        for name in self.constants:
            pruned.replace(name, np.zeros_like(pruned.graph.array(name)))
        slot, fixed = None, {self.layer.source, *([self.after.addend] if self.after.addend else [])}
        for step in range(STEPS if self.clipped else 1):
            if step:
                pruned.again([self.joined], fixed)
            rows = reader.rows_for(
                pruned.graph, self.layer, reconstruction.samples(in_dense(reconstruction, self.layer))
            )
            for number in range(len(reconstruction.dense.live)):
                self._gather(reconstruction, node, rows, number)
            slot = reader.fit(reconstruction, self.layer, rows, slot)
        pruned.again([skip], fixed)

    def _gather(self, reconstruction: Reconstruction, node: Node, rows: Rows, number: int) -> None:
        dense_batch, pruned_batch = reconstruction.dense.live[number], reconstruction.pruned.live[number]
        twin, graph = in_dense(reconstruction, self.layer), reconstruction.pruned.graph
        y = reconstruction.kept_part(twin.node.outputs[0], dense_batch)
        lost = self._target(reconstruction, node, dense_batch, pruned_batch)
        lost = lost - reconstruction.kept_part(self.joined, dense_batch)
        if self.after.addend:
            lost = lost + reconstruction.kept_part(self.after.addend, dense_batch) - pruned_batch[self.after.addend]
        chosen = draw_positions(
            reconstruction.rng, self.layer, y.shape, reconstruction.samples(twin), self.layer.size(graph)[2]
        )
        x = reconstruction.blended(twin.source, self.layer.source, dense_batch, pruned_batch)
        more = self.after.aligned(lost)
        add_rows(rows, graph, self.layer, x, Targets(y, dense_batch.real, more, inverse_scale(self.after)), chosen)

    def _target(self, reconstruction: Reconstruction, node: Node, dense_batch: Feeds, pruned_batch: Feeds) -> Array:
        """Return what ``joined`` is to be."""
        target = reconstruction.kept_part(node.outputs[0], dense_batch)
        if not self.clipped:
            return target
        return before_clipping(target, pruned_batch[self.joined])


def before_clipping(target: Array, current: Array) -> Array:
    """Return what values are to be of which a ReLU shall make what it makes of the target (see above)."""
    return np.where(target > 0, target, np.minimum(current, 0))


def _only_for(graph: Graph, name: str, user: Node) -> Node | None:
    """Return the node that makes a tensor for another node alone; None if others read it, or its other outputs."""
    maker = graph.producer.get(name)
    read = {n.index for n, _ in graph.users.get(name, ())} != {user.index} or len(graph.users[name]) > 1
    captured = any(name in names for names in graph.captured.values())
    return None if maker is None or read or captured or name in graph.outputs or len(maker.outputs) > 1 else maker


def only_clipped(graph: Graph, node: Node) -> bool:
    """Return whether ReLUs alone read what a node makes."""
    output = node.outputs[0]
    users = [n for n, _ in graph.users.get(output, ())]
    return bool(users) and output not in graph.outputs and all(n.op == "Relu" and not n.domain for n in users)


def _layer_before(graph: Graph, name: str) -> tuple[Linear, Tail] | None:
    """Return the linear layer that a tensor is an affine function of, channel by channel, and what follows it."""
    maker = graph.producer.get(name)
    while maker is not None and (lin := linear(graph, maker)) is None:  # a chain, no search
        varying = [n for n in maker.inputs if n and n not in graph.constants]
        maker = _only_for(graph, varying[0], maker) if maker.op in AFFINE and len(varying) == 1 else None
    if maker is None or lin is None or lin.channel_axis is None or len(uses(graph, lin) or ()) != 1:
        return None
    blocks, channels, _ = lin.size(graph)
    return lin, find_tail(graph, lin.node, blocks * channels, lin.channel_axis)
