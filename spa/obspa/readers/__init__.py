"""The kinds of readers that can be scored and refitted, one file each; see docs/guides/add-a-reader-kind.md."""

from __future__ import annotations

from spa.model.graph import Graph, Node
from spa.obspa.readers.base import ReaderKind
from spa.obspa.readers.linear import LinearLayer
from spa.obspa.readers.products import ActivationProduct
from spa.obspa.readers.recurrent import RecurrentCell
from spa.obspa.readers.tied import TiedLayer

KINDS: tuple[ReaderKind, ...] = (TiedLayer(), LinearLayer(), RecurrentCell(), ActivationProduct())
"""All kinds. The first that matches a node serves it, so a special case stands before the general one."""


def kind_of(graph: Graph, node: Node) -> ReaderKind | None:
    """Return the kind of reader that a node is; None if it is of none of them."""
    return next((kind for kind in KINDS if kind.matches(graph, node)), None)
