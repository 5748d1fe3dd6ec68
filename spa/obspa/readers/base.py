"""What a kind of reader has to do, and what it is given to do it with."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.obspa.curves import Seen
from spa.obspa.linear import Linear
from spa.running.stream import Feeds, Stream, sliced

Array = np.ndarray


@dataclass(frozen=True)
class FitSettings:
    """How layers are refitted.

    Attributes:
        damping: λ of the fits, a fraction of the mean input variance; pulls towards the dense weights.
        pruned_input_share: the share of the pruned network's own inputs in what a fit sees; the rest are the dense
            network's. Errors of earlier layers are learnt on few inputs, so mending them in full does not carry over to
            others.
        refit_producers: whether layers before a cut are refitted for the sake of those behind it, too.
        seed: of the places that the fits see.
    """

    damping: float = 1e-3
    pruned_input_share: float = 1.0
    refit_producers: bool = False
    seed: int = 0


DEFAULT_SETTINGS = FitSettings()


@dataclass(frozen=True)
class Reconstruction:
    """The dense and the pruned network at the same place of their node order, and how fits are made.

    Attributes:
        analysis: the dense network.
        kept: what pruning has kept.
        dense: the dense network's stream.
        small: the pruned network's stream; fits replace its constants.
        rng: chooses the places that fits see; every kind draws from it in node order.
        settings: how fits are made.
    """

    analysis: Analysis
    kept: Kept
    dense: Stream
    small: Stream
    rng: np.random.Generator
    settings: FitSettings

    def wanted(self, name: str, big: Feeds) -> Array:
        """Return the part of a dense tensor that the pruned network has."""
        return sliced(self.kept, self.analysis.axes.get(name), big[name])

    def between(self, name: str, own: str, big: Feeds, little: Feeds) -> Array:
        """Return inputs between the dense and the pruned network's by the share of the latter, where shapes agree.

        Args:
            name: of the tensor in the dense network.
            own: of the tensor in the pruned network.
            big: a batch of the dense network.
            little: the same batch of the pruned network.
        """
        small = little[own]
        if self.settings.pruned_input_share == 1:
            return small
        dense = self.wanted(name, big)
        if dense.shape != small.shape:
            return small
        return np.asarray(dense + self.settings.pruned_input_share * (small - dense), small.dtype)

    def samples(self, target: Linear) -> int:
        """Return the number of samples of all batches, as a layer of the dense network counts them."""
        return sum(target.samples(b[target.node.outputs[0]].shape) for b in self.dense.live)


class ReaderKind(Protocol):
    """A kind of node that reads channels: how to measure what their loss does to it, and how to refit it."""

    @abstractmethod
    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is of this kind."""

    @abstractmethod
    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Seen]:
        """Gather the statistics of a node's inputs in the dense network, for the curves of the groups that it reads.

        Losses are to be relative: to the energy of the node's output, or of the residual sum that it goes into.

        Args:
            analysis: the dense network.
            stream: its stream, with the node's inputs and outputs held.
            node: a node that matches.
            rng: chooses rows, where there are more than needed.

        Returns:
            One entry for each axis that the node sums over; none where it cannot be understood after all.
        """

    def may_refit(self, at: Reconstruction, node: Node, twin: Node) -> bool:
        """Return whether a node that matches in the pruned network can be refitted; asked before anything has run.

        Args:
            at: both networks.
            node: the dense network's node; pruning has changed what it reads.
            twin: the pruned network's node.
        """
        return True

    def prepare(self, at: Reconstruction, node: Node, twin: Node) -> None:
        """Hold tensors that :meth:`refit` needs beyond the node's own inputs; called before anything has run."""
        return

    @abstractmethod
    def refit(self, at: Reconstruction, node: Node, twin: Node) -> None:
        """Replace the pruned node's weights so that it gives what the dense one gives.

        The dense network has run up to the node and holds its inputs and outputs; the pruned one stands before it, and
        holds its inputs. Outputs that depend on the weights and have been computed already must be put right.
        """
