"""The numbers by which forward code cuts an axis into parts, after the parts have shrunk.

Code keeps them under names of its own (``dim_conv3``, ``split_indexes``, ``in_channels``), so they are found by value:
the graph says how large each part was and is, and between which layers it is cut. What is guessed is compared with the
pruned network afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from spa.exporters.pytorch.sizes import KINDS
from spa.widths.equal import cuts

if TYPE_CHECKING:
    from spa.algebra.axes import Kept
    from spa.coupling.analysis import Analysis
    from spa.model.graph import Graph, Node


SIDES = ("either", "behind", "before")  # of a cut, on which a module's own layers lie; tried one after the other


@dataclass(frozen=True)
class Parts:
    """An axis that the graph cuts into parts.

    Attributes:
        before: the sizes of the parts in the dense network.
        after: in the pruned one.
        keys: state_dict keys of the weights that are nearest, ``before`` and ``behind`` the cut.
    """

    before: Sequence[int]
    after: Sequence[int]
    keys: Mapping[str, frozenset[str]]

    def is_in(self, path: str, side: str) -> bool:
        """Tell whether one of a module's layers is nearest on a side."""
        found = frozenset[str]().union(*self.keys.values()) if side == "either" else self.keys[side]
        return any(key.startswith(f"{path}." if path else "") for key in found)

    def of(self, value: Any) -> set[Any]:
        """Return what a number, or a list of them, has become; nothing if it is no size here.

        1. A list of all sizes.
        2. A number that is one part's size, or the sum of all.
        """
        if isinstance(value, list | tuple):
            return {tuple(self.after)} if list(value) == list(self.before) else set()  # Case 1
        sizes = zip((*self.before, sum(self.before)), (*self.after, sum(self.after)), strict=True)
        return {after for before, after in sizes if before == value}  # Case 2


def parts_of(analysis: Analysis, kept: Kept, names: Mapping[str, str]) -> list[Parts]:
    """Return the axes that are cut into parts.

    Args:
        analysis: of the dense model.
        kept: the indices that stay.
        names: state_dict keys by initializer.
    """
    found = []
    for (tensor, _), parts in cuts(analysis).items():
        masks = [kept.mask(part) for part in parts]
        found.append(Parts([m.size for m in masks], [int(m.sum()) for m in masks], _near(analysis, tensor, names)))
    return found


def _near(analysis: Analysis, tensor: str, names: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Return the state_dict keys of the weights of the nearest nodes that have some, before and behind a tensor."""
    graph = analysis.graph

    def before(node: Node) -> Iterable[Node]:
        return (graph.producer[name] for name in node.inputs if name in graph.producer)

    def behind(node: Node) -> Iterable[Node]:
        return (user for name in node.outputs for user, _ in graph.users.get(name, ()))

    def reached(nodes: list[Node], next_to: Callable[[Node], Iterable[Node]]) -> frozenset[str]:
        seen, found = set[int](), set[str]()
        while nodes:
            node = nodes.pop()
            if node.index not in seen and node.index in analysis.laws:
                seen.add(node.index)
                held = {names[weight] for name in node.inputs if (weight := weight_of(graph, name)) in names}
                found |= held
                nodes += [] if held else next_to(node)
        return frozenset(found)

    made = [graph.producer[tensor]] if tensor in graph.producer else []
    users = [user for user, _ in graph.users.get(tensor, ())]
    return {"before": reached(made, before), "behind": reached(users, behind)}


def weight_of(graph: Graph, name: str) -> str:
    """Return the initializer that a weight operand comes from, through the nodes that turn it."""
    while name not in graph.constants and name in graph.producer:
        node = graph.producer[name]
        if node.op not in ("Transpose", "Identity", "Cast"):
            return name
        name = node.inputs[0]
    return name


def restate_parts(module: nn.Module, classes: Mapping[type, str], parts: Sequence[Parts]) -> None:
    """Set the numbers of modules that are sizes of parts cut among their layers.

    A number that has become several is left as it is.

    Args:
        module: the network.
        classes: of the modules whose numbers are set, with the side of the cuts on which their layers lie; what
            torch.nn keeps is left alone.
        parts: of each axis that is cut.
    """
    kinds = tuple(k for kind, _ in KINDS for k in (kind if isinstance(kind, tuple) else (kind,)))
    for path, each in module.named_modules():
        if type(each) not in classes or isinstance(each, kinds):
            continue
        mine = [p for p in parts if p.is_in(path, classes[type(each)])]
        for name, value in list(vars(each).items()):
            if _is_size(value) or (isinstance(value, list | tuple) and len(value) > 1 and all(map(_is_size, value))):
                news = set().union(*(p.of(value) for p in mine))
                if len(news) == 1:
                    new = news.pop()
                    setattr(each, name, new if _is_size(value) else type(value)(new))


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 1
