"""Residual branches: what is computed for one addend of a sum and for nothing else.

In ``y = x + f(x)`` the nodes of f die when the addend goes, and y = x + constant remains. f is found as what the
addend's maker post-dominates: every path from there to an output leads through the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spa.model.graph import Graph, Node


@dataclass(frozen=True)
class Region:
    """The nodes of one residual branch.

    Attributes:
        sum: the Add (of a gate: the Mul) that the branch ends in.
        operand: which of the sum's operands the branch is.
        nodes: indices of the nodes that are computed for it alone, in topological order.
    """

    sum: Node
    operand: int
    nodes: tuple[int, ...]

    @property
    def addend(self) -> str:
        """The tensor that the branch adds."""
        return self.sum.inputs[self.operand]

    @property
    def skip(self) -> str:
        """The tensor that it is added to, which the branch reads."""
        return self.sum.inputs[1 - self.operand]


def regions(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], constant: set[str], op: str = "Add"
) -> Iterator[Region]:
    """Find the branches that read what they are added to, in the order of their sums.

    Both addends have the sum's shape, so that either may stand for it. A branch that reads an input of the network
    other than the skip is none: without it nothing might read that input.

    Args:
        graph: the network.
        shapes: by tensor.
        constant: the tensors that are computed from constants alone.
        op: ``Mul`` for gates, whose factor may have a smaller shape.
    """
    sums = [n for n in graph.nodes if n.op == op and not n.domain and constant.isdisjoint(n.inputs)]
    if op == "Add":
        sums = [n for n in sums if len({shapes.get(t) for t in (*n.inputs, *n.outputs)} - {None}) == 1]
    if not sums:
        return
    behind = _post_dominated(graph)
    for node in sums:
        for operand, name in enumerate(node.inputs):
            maker = graph.producer.get(name)
            if maker is None or name in graph.outputs or len(graph.users[name]) != 1 or len(maker.outputs) != 1:
                continue
            found = _below(behind, maker.index)
            region = Region(node, operand, found)
            made = {o for i in found for o in graph.nodes[i].outputs}
            outside = {t for i in found for t in graph.reads(graph.nodes[i])} - made
            if region.skip in outside and outside.isdisjoint(set(graph.inputs) - {region.skip}):
                yield region


def _post_dominated(graph: Graph) -> dict[int, list[int]]:
    """Return by node the nodes whose next post-dominator it is: on every way from them to an output, it comes next."""
    import networkx as nx  # here, since most runs walk no graph and the import takes a tenth of a second

    backwards = graph.operators.reverse()
    end = -1
    backwards.add_edges_from((end, graph.producer[name].index) for name in graph.outputs if name in graph.producer)
    behind: dict[int, list[int]] = {}
    for index, after in nx.immediate_dominators(backwards, end).items():
        if index != end and after is not None:
            behind.setdefault(after, []).append(index)
    return behind


def _below(behind: Mapping[int, list[int]], index: int) -> tuple[int, ...]:
    """Return a node and all that it post-dominates."""
    found, todo = [], [index]
    while todo:  # not by networkx: the tree is given by its children
        found.append(todo.pop())
        todo += behind.get(found[-1], ())
    return tuple(sorted(found))
