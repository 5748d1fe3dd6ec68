"""Measure what the outputs lose when a part of one group alone goes, on a few inputs that no curve has seen.

A loss curve knows the error of the group's readers on the inputs that it was made of. It knows neither how much of that
error arrives at the outputs nor how much of the repair was learnt by heart (a last layer that sees one row per sample
repairs everything, in sample). One point of each curve is therefore measured: the group is cut, its readers get the
weights that the second moments of their inputs determine, and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spa.algebra.axes import Axes, Kept
from spa.coupling.analysis import Analysis, Group
from spa.coupling.plan import make_plan
from spa.criteria.answers import Curve
from spa.errors import PlanError, UnsupportedError
from spa.model.graph import Node
from spa.model.marks import marks_around
from spa.obspa.affine import find_tail
from spa.obspa.bias_slot import BiasSlot
from spa.obspa.curves import MomentReader, Reader
from spa.obspa.linear import Linear, linear, uses
from spa.running.change import Start, Yardstick
from spa.running.stream import Feeds, Stream, sliced
from spa.surgery.apply import apply

Array = np.ndarray
FRACTION = 0.3  # of a group's channels, gone where its curve is measured
# The exponent of a measured loss in the product with the estimated one, whose exponent is the rest: both are right
# about something, see decision 26.
TRUST = 0.75
FARTHEST = 100.0  # from the median, as a factor, that a measured loss over the estimated one is taken for true


@dataclass(frozen=True)
class Use:
    """A group's reader where it is used.

    Attributes:
        node: the node that reads.
        reader: it, as optimal brain surgery sees it.
        weights: the name of the weights, if other nodes read them, too.
        mean: the mean of its inputs, (blocks, inputs); None if it is not known.
    """

    node: Node
    reader: Reader
    weights: str | None
    mean: Array | None


@dataclass(frozen=True)
class Measured:
    """A measured point of a loss curve: the change of the outputs once so many channels are gone."""

    removed: int
    change: float


class Gauge:
    """Measures groups of a dense network.

    Args:
        analysis: the network.
        batches: the inputs on which outputs are compared; curves have not seen them.
        damping: of the readers' fits, a fraction of their mean input variance.
        threads: of onnxruntime.
    """

    def __init__(self, analysis: Analysis, batches: Sequence[Feeds], damping: float, threads: int = 2) -> None:
        self.analysis, self.damping = analysis, damping
        self._yardstick = Yardstick(analysis.graph, batches, threads)

    def starts(self, groups: Sequence[Group]) -> Starts:
        """Return where the cuts of groups begin to change the network."""
        return Starts(self.analysis, groups, self._yardstick)

    def measure(
        self, group: Group, order: Array, readers: Sequence[Use], start: Start | None = None
    ) -> Measured | None:
        """Cut the first channels of an order and compare the outputs; None where that says nothing.

        Args:
            group: the group.
            order: its channels in the order in which they go.
            readers: those of its readers whose weights make up for the loss.
            start: the dense network where the cut begins to change it.
        """
        removed = round(FRACTION * group.size)
        if not 0 < removed < group.size:
            return None
        gone, left = order[:removed], np.sort(order[removed:])
        try:
            plan = make_plan(self.analysis, {group.name: left})
            stream = Stream(apply(self.analysis, plan), self.analysis.graph.base, ())
        except (PlanError, UnsupportedError):  # of a part that only another group's cut makes possible
            return None
        kept = self.analysis.kept(plan.masks(self.analysis))
        for use in readers:
            lin = linear(self.analysis.graph, use.node)
            if isinstance(use.reader, MomentReader) and use.mean is not None and lin is not None:
                edit = use.reader.regression(gone, self.damping)
                _make_up(self.analysis, kept, stream, lin, edit, use.mean)
        error = self._yardstick.change(stream.graph.model, start).error
        return None if error is None or not np.isfinite(error) else Measured(removed, error)


class Starts:
    """The dense network, run to where the cut of each group begins to change it, so that no cut is run from the inputs.

    Args:
        analysis: the network.
        groups: the groups.
        yardstick: has the inputs.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], yardstick: Yardstick) -> None:
        graph = analysis.graph
        self._dense = Stream(graph.model, graph.base, yardstick.batches, yardstick.threads)
        self._dense.keep(yardstick.tensors)
        self._left = sorted(((min(_touched(analysis, g), default=0), g.name) for g in groups), reverse=True)
        self._found: dict[str, Start] = {}

    def take(self, group: Group, index: int) -> Start | None:
        """Return where a group's cut begins, once; None where the network cannot be run from there on.

        Args:
            group: the group.
            index: of a node behind that place, no smaller than in earlier calls.
        """
        while self._left and self._left[-1][0] <= index:
            first, name = self._left.pop()
            node = self._dense.graph.nodes[first]
            if not marks_around(self._dense.graph):
                self._dense.before(node)
                self._found[name] = Start(next(o for o in node.outputs if o), self._dense.fork().live)
        return self._found.pop(group.name, None)


def _touched(analysis: Analysis, group: Group) -> Iterator[int]:
    """Yield the indices of the nodes that compute or read a group's channels, or its parameters."""
    yield from (*group.operators, *group.writers, *group.readers)
    for place in group.places:
        yield from (node.index for node, _ in analysis.graph.users.get(place.tensor, ()))


def _make_up(
    analysis: Analysis, kept: Kept, stream: Stream, lin: Linear, regression: tuple[Array, Array, Array], mean: Array
) -> None:
    """Give a reader in the pruned network the weights that make up for removed inputs.

    Args:
        analysis: the dense network.
        kept: what the pruned one keeps of it.
        stream: the pruned network's.
        lin: the reader in the dense network.
        regression: see :meth:`spa.obspa.curves.MomentReader.regression`.
        mean: the mean of its inputs, (blocks, inputs).
    """
    graph = stream.graph
    cut = linear(graph, graph.producer[lin.node.outputs[0]])
    if cut is None or cut.channel_axis is None or len(uses(graph, cut) or ()) != 1:
        return
    gone, left, share = regression
    matrix = lin.matrix(analysis.graph).copy()
    lost = matrix[:, :, gone]
    matrix[:, :, left] += lost @ share
    axes = _axes_of(analysis, lin)
    outputs = kept.mask(analysis.axes[lin.node.outputs[0]][cut.channel_axis])
    stream.replace(cut.weight, sliced(kept, axes, lin.weights_from(matrix, analysis.graph)))
    blocks, channels, _ = cut.size(graph)
    slot = BiasSlot.find(stream, cut, find_tail(graph, cut.node, blocks * channels, cut.channel_axis), [cut])
    if slot is not None:
        moved = lost @ (mean[:, gone, None] - share @ mean[:, left, None])
        slot.move(moved.reshape(-1)[outputs])


def _axes_of(analysis: Analysis, lin: Linear) -> Axes:
    """Return the axes of a layer's weights as this layer reads them, by itself or through nodes that turn them."""
    graph = analysis.graph
    uses = [(node, axes) for (name, node, _), axes in analysis.uses.items() if name == lin.weight]
    if len(uses) > 1:
        own = [axes for node, axes in uses if node in (-1, lin.node.index)]
        turned = (
            axes
            for node, axes in uses
            if any(graph.depends(name, graph.nodes[node].outputs[0]) for name in lin.node.inputs if name)
        )
        return own[0] if own else next(turned)
    return uses[0][1]


def corrected(curves: Mapping[str, Curve], measured: Mapping[str, Measured]) -> dict[str, Curve]:
    """Scale loss curves by what was measured of them.

    The loss at the measured point becomes a weighted geometric mean of the estimate and the measurement; the scale of
    all curves together stays. Curves that were not measured, and those whose loss there is zero, stay as they are.

    Args:
        curves: by group name.
        measured: the point of each group that was measured.
    """
    ratios = {
        name: point.change / curves[name].loss[point.removed]
        for name, point in measured.items()
        if name in curves and curves[name].loss[point.removed] > 0
    }
    if not ratios:
        return dict(curves)
    middle = float(np.median(list(ratios.values()))) or 1.0
    factors = {n: float(np.clip(r / middle, 1 / FARTHEST, FARTHEST)) ** TRUST for n, r in ratios.items()}
    return {n: Curve(c.order, c.loss * factors.get(n, 1.0)) for n, c in curves.items()}
