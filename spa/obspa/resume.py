"""Refits that are kept: what one has changed, so that an interrupted reconstruction repeats it without fitting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spa.coupling.plan import Plan
from spa.model.graph import Node
from spa.obspa.readers.base import ReaderKind, Reconstruction
from spa.running.journal import Journal
from spa.running.stream import Bias

Array = np.ndarray


@dataclass(frozen=True)
class Refit:
    """The changes that a refit has made.

    Attributes:
        biases: that nodes were given, by the node's first output.
        constants: the new values.
        edits: what was added to constants so far, for :meth:`spa.running.stream.Stream.repeat`.
        tensors: of each batch those that had been computed with the old weights, as the refit computed them anew.
        random: the state of the random numbers after it.
    """

    biases: dict[str, Bias]
    constants: dict[str, Array]
    edits: dict[str, Array]
    tensors: list[dict[str, Array]]
    random: Any


def refit(journal: Journal, kind: ReaderKind, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> None:
    """Refit a node, or repeat what the journal has of it.

    Args:
        journal: of this network's repair.
        kind: the reader's.
        reconstruction: both networks, each run up to the node.
        node: the dense network's.
        pruned_node: the pruned network's.
    """
    if journal.folder is None:
        kind.refit(reconstruction, node, pruned_node)
    elif (kept := journal.get(node.index)) is not None:
        _repeat(reconstruction, kept)
    else:
        journal.keep(_recorded(kind, reconstruction, node, pruned_node), node.index)


def key_of(plan: Plan, extent: str) -> str:
    """Return what tells the repair of a network from that of others of the same calibration."""
    return f"{extent} {plan.to_json()}"


def _recorded(kind: ReaderKind, reconstruction: Reconstruction, node: Node, pruned_node: Node) -> Refit:
    stream, before = reconstruction.pruned, set(reconstruction.pruned.biases)
    stream.changed.clear()
    for batch in stream.live:
        batch.stored.clear()
    kind.refit(reconstruction, node, pruned_node)
    return Refit(
        biases={output: bias for output, bias in stream.biases.items() if output not in before},
        constants={name: stream.graph.array(name) for name in sorted(stream.changed)},
        edits={name: stream.edits[name] for name in sorted(stream.changed)},
        tensors=[{name: batch[name] for name in sorted(batch.stored) if name in batch} for batch in stream.live],
        random=reconstruction.rng.bit_generator.state,
    )


def _repeat(reconstruction: Reconstruction, kept: Refit) -> None:
    stream = reconstruction.pruned
    for output, bias in kept.biases.items():
        stream.add_bias(stream.graph.producer[output], bias)
    for name, value in kept.constants.items():
        stream.replace(name, value)
        stream.edits[name] = kept.edits[name]
    shelf = stream.shelf()
    for batch, tensors in zip(stream.live, kept.tensors, strict=True):
        for name, value in tensors.items():
            batch.store(name, np.array(value), shelf)
    reconstruction.rng.bit_generator.state = kept.random
