"""Recurrent cells as readers: of their input, through W, and of their own last state, through R.

A gate's sum, before its activation, is linear in both: W x_t + R h_{t−1} + b. Scores and refits are about these sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, prod

import numpy as np

from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.model.traits import FLOATS
from spa.obspa.curves import MomentReader, Observation
from spa.obspa.moments import Moments, damping_for, least_squares
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.rules.recurrent import GATES
from spa.running.stream import Bias, Stream

Array = np.ndarray
W, R, B, INITIAL = 1, 2, 3, 5  # operands
MAX_ROWS = 40_000  # the most rows (steps of a sample) that scores and fits learn from


@dataclass(frozen=True)
class Cell:
    """An RNN, GRU or LSTM with constant weights of its own.

    In the GRU's last gate the reset gate multiplies the last state, or R times it; that factor is ignored.

    Attributes:
        node: the node.
        reverse: for each direction whether it runs from the last step to the first.
        batch_first: whether the batch is the first axis.
    """

    node: Node
    reverse: tuple[bool, ...]
    batch_first: bool

    def inputs(self, x: Array) -> Array:
        """Return rows of the input, (1, steps · batch, inputs), step by step."""
        x = x.swapaxes(0, 1) if self.batch_first else x
        return x.reshape(1, -1, x.shape[-1])

    def states(self, y: Array, initial: Array | None) -> Array:
        """Return rows of the last states h_{t−1}, (directions, steps · batch, hidden), step by step.

        Args:
            y: the states of all steps, as the node gives them.
            initial: the states before the first step; zeros if None.
        """
        if self.batch_first:
            y = y.transpose(1, 2, 0, 3)
            initial = None if initial is None else initial.swapaxes(0, 1)
        steps, directions, batch, hidden = y.shape
        last = np.zeros((directions, steps, batch, hidden), y.dtype)
        for i, backwards in enumerate(self.reverse):
            first = 0.0 if initial is None else initial[i]
            if backwards:
                last[i, :-1], last[i, -1] = y[1:, i], first
            else:
                last[i, 1:], last[i, 0] = y[:-1, i], first
        return last.reshape(directions, -1, hidden)


def recurrent_cell(graph: Graph, node: Node) -> Cell | None:
    """Return the node as a recurrent cell, or None if it is none or its weights are not constants of its own."""
    if node.domain or node.op not in GATES:
        return None
    for name in node.inputs[W : R + 1]:
        tensor = graph.constants.get(name)
        if tensor is None or tensor.data_type not in FLOATS or len(graph.users[name]) != 1 or name in graph.outputs:
            return None
    direction = node.attributes.get("direction", "forward")
    reverse = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    return Cell(node, reverse, bool(node.attributes.get("layout", 0)))


class RecurrentCell(ReaderKind):
    """A recurrent cell: it reads its input through W, and its own last state through R."""

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is a cell with constant weights of its own."""
        return recurrent_cell(graph, node) is not None

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Observe the cell as two readers, of its input and of its last state; losses are of its gates' sums."""
        cell = recurrent_cell(stream.graph, node)
        law = analysis.laws[node.index]
        x_axes, r_axes = law.inputs[0], law.inputs[R]
        if cell is None or x_axes is None or r_axes is None:
            return []
        x, h = Moments(cross=False), Moments(cross=False)
        for inputs, states, _ in _rows(stream, cell, rng):
            x.add(inputs, inputs)
            h.add(states, states)
        w, r = (stream.graph.array(node.inputs[i]).astype(np.float64) for i in (W, R))
        w = w.reshape(1, -1, w.shape[2])
        energy = sum(float(np.einsum("goi,gij,goj->", m, s.xx, m, optimize=True)) for m, s in ((w, x), (r, h)))
        unit = 1 / np.sqrt(energy if energy > 0 else 1.0)
        resolve = analysis.space.resolve
        return [
            Observation(partial(MomentReader, x.xx, w * unit, rows=x.count), resolve(x_axes[2])),
            Observation(partial(MomentReader, h.xx, r * unit, rows=h.count), resolve(r_axes[2])),
        ]

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Refit W and R of a pruned cell to the dense cell's gate sums; their mean error moves into B.

        W learns from the pruned network's input. R learns from the kept part of the dense network's states: the pruned
        network's own depend on the fit.
        """
        dense, pruned = reconstruction.dense, reconstruction.pruned
        dense_cell, pruned_cell = recurrent_cell(dense.graph, node), recurrent_cell(pruned.graph, pruned_node)
        law = reconstruction.analysis.laws[node.index]
        w_axes, r_axes = law.inputs[W], law.inputs[R]
        if dense_cell is None or pruned_cell is None or w_axes is None or r_axes is None:
            return
        gates, units = reconstruction.kept.mask(w_axes[1]), reconstruction.kept.mask(r_axes[2])
        old_w, old_r = (dense.graph.array(node.inputs[i])[:, gates] for i in (W, R))
        w, r = (pruned.graph.array(pruned_node.inputs[i]).astype(np.float64) for i in (W, R))
        inputs, states = Moments(), Moments()
        for batch, (x, h, chosen) in zip(pruned.live, _rows(dense, dense_cell, reconstruction.rng), strict=True):
            inputs.add(
                pruned_cell.inputs(batch[pruned_node.inputs[0]])[:, chosen], x @ old_w.reshape(-1, old_w.shape[2]).T
            )
            states.add(h[..., units], h @ old_r.swapaxes(1, 2))
        bias = _bias(pruned, pruned_node, w.shape[:2])
        constants = []
        for operand, old, moments in ((W, w, inputs), (R, r, states)):
            matrix = old.reshape(moments.mean_x.shape[0], -1, old.shape[2])
            damping = damping_for(reconstruction.settings.damping, old.shape[2], moments.count)
            fitted = least_squares(moments, matrix, damping, mean=bias is not None)
            constants.append((moments.mean_t - np.einsum("goi,gi->go", fitted, moments.mean_x)).reshape(old.shape[:2]))
            pruned.replace(pruned_node.inputs[operand], fitted.reshape(old.shape).astype(old_w.dtype))
        if bias is not None:
            value = pruned.graph.array(bias)
            pruned.replace(bias, (value + np.concatenate(constants, axis=1)).astype(value.dtype))


def _rows(stream: Stream, cell: Cell, rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array]]:
    """Yield for each batch rows of the input, the last states of the same steps, and the rows' indices."""
    node = cell.node
    has_initial = len(node.inputs) > INITIAL and node.inputs[INITIAL]
    fraction = MAX_ROWS / sum(prod(b.shape(node.inputs[0])[:2]) for b in stream.live)
    for batch, y in zip(stream.live, stream.probe(node, 0), strict=True):
        x = cell.inputs(batch[node.inputs[0]])
        h = cell.states(y, stream.value(node.inputs[INITIAL], batch) if has_initial else None)
        total = x.shape[1]
        chosen = np.sort(rng.choice(total, ceil(min(fraction, 1) * total), replace=False))
        yield x[:, chosen], h[:, chosen], chosen


def _bias(stream: Stream, node: Node, size: tuple[int, ...]) -> str | None:
    """Return the name of the cell's bias, a new one if there is none; None if others read it."""
    name = node.inputs[B] if len(node.inputs) > B else ""
    if not name:
        return stream.add_bias(node, Bias((size[0], 2 * size[1]), node.inputs[W], B))
    own = name in stream.graph.constants and len(stream.graph.users[name]) == 1
    return name if own else None
