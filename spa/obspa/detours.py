"""The scale and the shift that stay of detours that went, and the layer before, which learns the rest.

For y = f(x) the scale and the shift are those of the regression of y, as the dense network has it, on what the pruned
network has of x:

    a = Cov(x', y) / Var(x'),    b = E[y] - a E[x'].

Where x = W h comes from a layer that nothing else reads, W is refitted by least squares with (y - b) / a as its target.
"""

from __future__ import annotations

import numpy as np

from spa.coupling.analysis import Analysis, Detour
from spa.model.graph import Graph, Node
from spa.obspa.curves import Observation
from spa.obspa.linear import Linear, linear, uses
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.obspa.readers.linear import LinearLayer
from spa.obspa.readers.rows import Targets, add_rows, draw_positions
from spa.obspa.readers.steps import in_dense
from spa.running.padding import only_real
from spa.running.stream import Stream

Array = np.ndarray
FLAT = 1e-2  # of the median scale; what is scaled by less says nothing of the layer before


class LostDetour(ReaderKind):
    """The end of a detour that went, as a reader of where it began: scale and shift are what is fitted.

    Args:
        detour: the detour.
    """

    def __init__(self, detour: Detour) -> None:
        self.detour, self.axis = detour, detour.axes[0]

    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node of the dense network is the detour's end."""
        return node.index == self.detour.end

    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Observe nothing: no channels are scored by a detour."""
        return []

    def prepare(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Hold where the detour began, and what the layer before is refitted by."""
        pruned = reconstruction.pruned
        pruned.hold(self.detour.source, pruned_node)
        layer = self._layer(reconstruction, pruned_node)
        if layer is not None:
            pruned.hold(layer.source, pruned_node)
            reconstruction.dense.hold(in_dense(reconstruction, layer).source, node)
            reconstruction.dense.hold(self.detour.source, node)

    def _layer(self, reconstruction: Reconstruction, pruned_node: Node) -> Linear | None:
        """Return the layer in the pruned network whose output nothing but this reads."""
        graph = reconstruction.pruned.graph
        maker = graph.producer.get(self.detour.source)
        layer = None if maker is None or not reconstruction.settings.carriers else linear(graph, maker)
        if layer is None or layer.channel_axis is None or len(uses(graph, layer) or ()) != 1:
            return None
        read = [n.index for n, _ in graph.users.get(self.detour.source, ())]
        captured = any(self.detour.source in names for names in graph.captured.values())
        scaled = graph.producer[pruned_node.inputs[0]]
        alone = read == [scaled.index] and not captured and self.detour.source not in graph.outputs
        return layer if alone else None

    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Give the end what it has in the dense network, as far as scale, shift and the layer before can."""
        pruned = reconstruction.pruned
        scaled, shift = pruned_node.inputs
        scale = pruned.graph.producer[scaled].inputs[1]
        self._regress(reconstruction, node, scale, shift)
        layer = self._layer(reconstruction, pruned_node)
        held = {self.detour.source}
        if layer is not None and self._refit_layer(reconstruction, node, layer, scale, shift):
            held = {layer.source}
            pruned.again([self.detour.source], held)
            self._regress(reconstruction, node, scale, shift)
            held.add(self.detour.source)
        pruned.again([scaled], held)

    def _regress(self, reconstruction: Reconstruction, node: Node, scale: str, shift: str) -> None:
        """Fit scale and shift."""
        pruned = reconstruction.pruned
        sums, count = np.zeros(()), 0
        for dense_batch, pruned_batch in zip(reconstruction.dense.live, pruned.live, strict=True):
            y = only_real(reconstruction.kept_part(node.outputs[0], dense_batch), dense_batch.real)
            x = only_real(pruned_batch[self.detour.source], dense_batch.real)
            y, x = (np.moveaxis(v, self.axis, 0).reshape(v.shape[self.axis], -1).astype(np.float64) for v in (y, x))
            sums = sums + np.stack([x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)])
            count += x.shape[1]
        x, y, xx, xy = sums / max(count, 1)
        variance = np.maximum(xx - x * x, 0)
        varies = variance > 1e-12 * np.maximum(xx, 1e-30)
        slope = np.where(varies, (xy - x * y) / np.where(varies, variance, 1), 0)
        for name, value in ((scale, slope), (shift, y - slope * x)):
            old = pruned.graph.array(name)
            pruned.replace(name, value.reshape(old.shape).astype(old.dtype))

    def _refit_layer(self, reconstruction: Reconstruction, node: Node, layer: Linear, scale: str, shift: str) -> bool:
        """Refit the layer before; return False where its outputs cannot be compared."""
        pruned, reader, dense = reconstruction.pruned, LinearLayer(), in_dense(reconstruction, layer)
        a, b = (pruned.graph.array(name).reshape(-1).astype(np.float64) for name in (scale, shift))
        usable = np.abs(a) > FLAT * np.median(np.abs(a))
        rows = reader.rows_for(pruned.graph, layer, reconstruction.samples(dense))
        for dense_batch, pruned_batch in zip(reconstruction.dense.live, pruned.live, strict=True):
            y = reconstruction.kept_part(node.outputs[0], dense_batch)
            now = pruned_batch[self.detour.source]
            if y.shape != now.shape:
                return False
            along = [1] * y.ndim
            along[self.axis] = -1
            wanted = (y - b.reshape(along)) / np.where(usable, a, 1).reshape(along)
            target = np.where(usable.reshape(along), wanted, now).astype(np.float32)
            samples, columns = reconstruction.samples(dense), layer.size(pruned.graph)[2]
            chosen = draw_positions(reconstruction.rng, layer, y.shape, samples, columns)
            x = reconstruction.blended(dense.source, layer.source, dense_batch, pruned_batch)
            add_rows(rows, pruned.graph, layer, x, Targets(target, dense_batch.real), chosen)
        reader.fit(reconstruction, layer, rows)
        return True
