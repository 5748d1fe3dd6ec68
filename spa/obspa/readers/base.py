"""The interface of a kind of reader, and the networks and options that a refit works with."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spa.algebra.axes import Kept
from spa.coupling.analysis import Analysis
from spa.model.graph import Graph, Node
from spa.obspa.curves import Observation
from spa.obspa.linear import Linear
from spa.running.stream import Feeds, Stream, sliced

Array = np.ndarray


@dataclass(frozen=True)
class FitSettings:
    """Options of refits.

    Attributes:
        damping: λ of the fits, as a fraction of the mean input variance; it pulls towards the dense weights.
        pruned_input_fraction: the inputs that a fit learns from are a blend, this fraction of the pruned network's and
            the rest of the dense network's. Below 1, a fit repairs part of the errors of earlier layers: the full
            repair, learnt from few inputs, does not carry over to others.
        producer_rounds: how often at most the producers of removed channels are refitted, too, each time followed by
            their reader (:mod:`spa.obspa.producers`).
        quick: whether producers take fewer steps, on half of the rows.
        carriers: whether the layer before a residual branch that went learns what the branch has added
            (:mod:`spa.obspa.carriers`).
        seed: the seed of the positions that fits learn from.
    """

    damping: float = 1e-3
    pruned_input_fraction: float = 1.0
    producer_rounds: int = 0
    quick: bool = False
    carriers: bool = True
    seed: int = 0


DEFAULT_SETTINGS = FitSettings()


@dataclass(frozen=True)
class Reconstruction:
    """The dense and the pruned network, each run up to the same layer, and the options of the fits.

    Attributes:
        analysis: the dense network.
        kept: the channels that pruning has kept.
        dense: the dense network's stream.
        pruned: the pruned network's stream; fits replace its constants.
        rng: draws the positions that fits learn from; every kind draws from it, in node order.
        settings: the options of the fits.
    """

    analysis: Analysis
    kept: Kept
    dense: Stream
    pruned: Stream
    rng: np.random.Generator
    settings: FitSettings

    def kept_part(self, name: str, dense_batch: Feeds) -> Array:
        """Return the part of a dense tensor that the pruned network has."""
        return sliced(self.kept, self.analysis.axes.get(name), dense_batch[name])

    def blended(self, name: str, pruned_name: str, dense_batch: Feeds, pruned_batch: Feeds) -> Array:
        """Return the inputs that a fit learns from, dense + ``pruned_input_fraction`` · (pruned − dense).

        If the shapes differ, they are the pruned network's.

        Args:
            name: the name of the tensor in the dense network.
            pruned_name: its name in the pruned network.
            dense_batch: a batch of the dense network.
            pruned_batch: the same batch of the pruned network.
        """
        pruned = pruned_batch[pruned_name]
        if self.settings.pruned_input_fraction == 1:
            return pruned
        dense = self.kept_part(name, dense_batch)
        if dense.shape != pruned.shape:
            return pruned
        return np.asarray(dense + self.settings.pruned_input_fraction * (pruned - dense), pruned.dtype)

    def samples(self, target: Linear) -> int:
        """Return the number of samples of all batches, as a layer of the dense network counts them."""
        return sum(target.samples(b.shape(target.node.outputs[0])) for b in self.dense.live)


class ReaderKind(Protocol):
    """A kind of reader: it observes the inputs of its nodes, for scores, and refits the nodes after pruning."""

    @abstractmethod
    def matches(self, graph: Graph, node: Node) -> bool:
        """Return whether a node is of this kind."""

    @abstractmethod
    def observe(self, analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
        """Gather the statistics of a node's inputs in the dense network, for the curves of the groups that it reads.

        Losses must be relative to the energy of the node's output, or of the residual sum that it goes into.

        Args:
            analysis: the dense network.
            stream: its stream, with the node's inputs and outputs held.
            node: a node that matches.
            rng: draws rows, if there are more than needed.

        Returns:
            One entry for each axis that the node sums over; none if it cannot be observed after all.
        """

    def may_refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> bool:
        """Return whether a node that matches in the pruned network can be refitted; asked before anything has run.

        Args:
            reconstruction: both networks.
            node: the dense network's node; pruning has changed what it reads.
            pruned_node: the pruned network's node.
        """
        return True

    def prepare(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Hold tensors that :meth:`refit` needs beyond the node's own inputs; called before anything has run."""
        return

    @abstractmethod
    def refit(self, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
        """Replace the pruned node's weights so that it gives what the dense one gives.

        The dense network has run through the node and holds its inputs and outputs; the pruned one has run up to it and
        holds its inputs. Tensors that depend on the weights and have been computed already must be computed anew.

        Args:
            reconstruction: both networks.
            node: the dense network's node.
            pruned_node: the pruned network's node.
        """
