"""The analysis of a model: the rules applied to its graph, and the groups of coupled channels that follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from spa.algebra.axes import Axes, Dim, Expr, Kept, Space, leaves
from spa.algebra.op import Barrier, Consumer, Op, Read, Tie
from spa.coupling.branches import regions
from spa.coupling.detours import Stretch, stretches
from spa.errors import InvariantError
from spa.model.graph import Graph, Node
from spa.model.marks import is_mark, marks_around
from spa.model.traits import FLOATS, INDICES, Trait, traits
from spa.model.two_points import TwoPoints, two_points
from spa.rules import find, load, unreviewed

if TYPE_CHECKING:
    import networkx as nx

# Weights of at least two real axes and this many elements that several nodes read are really tied (embeddings,
# siamese encoders). Smaller ones are often constants that an exporter merged because they were equal: each use
# is coupled by itself, and equal copies are merged again on saving.
TIED_ELEMENTS = 1024
TIED = "spa.tied"  # the key of a tensor's metadata by which an importer says so of any tensor

Use = tuple[str, int, int]  # of a constant: (its name, node index, operand); node index -1 where all uses are tied


MOST_CHANNELS = 2**22  # of which a score each is still cheap; axes that are longer hold data, such as a table of words
TOO_MANY = f"it has more than {MOST_CHANNELS} channels"


@dataclass(frozen=True)
class Place:
    """An axis of a constant on which a group lies.

    Attributes:
        use: the use of the constant that is coupled.
        axis: the axis of the constant.
    """

    use: Use
    axis: int

    @property
    def tensor(self) -> str:
        """The constant's name."""
        return self.use[0]


@dataclass(frozen=True)
class Group:
    """Coupled channels: channel c is removed from every place, or from none.

    Attributes:
        name: the first place, as ``tensor[axis]``; stable for one model.
        dim: the dimension in the algebra.
        size: the number of channels.
        places: the axes of parameters that carry it; none for weights that the graph fills by itself.
        operators: indices of the nodes that its channels pass through.
        readers: indices of the nodes that sum over it.
        writers: indices of the nodes that compute its channels by contracting others with weights.
        crossings: labels of the nodes that take statistics over it.
        frozen: why none of its channels can be removed, or None; a clause with a verb, in which "it" is the group.
    """

    name: str
    dim: Dim
    size: int
    places: tuple[Place, ...]
    operators: tuple[int, ...]
    readers: tuple[int, ...]
    writers: tuple[int, ...]
    crossings: tuple[str, ...]
    frozen: str | None

    @property
    def least(self) -> int:
        """The fewest channels that it may keep."""
        return 1


@dataclass(frozen=True)
class Part(Group):
    """Nodes that may go as a whole, as a group of one channel of which none may be kept.

    Its operators are the nodes that go with it, its reader is the node behind which all is as before.

    Attributes:
        axes: the axes of what is left in its place along which that varies.
    """

    axes: tuple[int, ...]

    @property
    def least(self) -> int:
        """The fewest channels that it may keep: none."""
        return 0

    @property
    def end(self) -> int:
        """The index of the node whose output is made in another way without it."""
        return self.readers[0]

    def holds(self, group: Group) -> bool:
        """Return whether all operators of another group go with this part."""
        return set(group.operators) <= set(self.operators)


@dataclass(frozen=True)
class Branch(Part):
    """A residual branch: without it nothing is left of its operators but a constant.

    Its operators are the nodes that are computed for it alone, its reader is the sum, its writers are the layers.

    Attributes:
        operand: which of the sum's operands it is.
    """

    operand: int

    @property
    def sum(self) -> int:
        """The index of the node that adds it."""
        return self.end


@dataclass(frozen=True)
class Detour(Part):
    """A detour from one tensor to another of the same axes: without it a scale and a shift per channel are left.

    Attributes:
        source: the tensor that it leads from.
    """

    source: str


@dataclass
class Law:
    """The law of one node, by its operator's rule; expressions become final once the whole graph is unified.

    Attributes:
        node: the node.
        inputs: the axes of each operand; None for one left out.
        outputs: the axes of each result; None for one whose shape is not known.
        reads: the axes of operands that the node sums over.
        ties: attributes and operands that state sizes of axes.
        macs: products of axes, each of as many multiply–accumulates.
        barrier: the reason for which the node could not be traced, or None.
    """

    node: Node
    inputs: list[Axes | None]
    outputs: list[Axes | None]
    reads: list[Read] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    macs: list[Axes] = field(default_factory=list)
    barrier: str | None = None


class Analysis:
    """The coupled groups of a model, with the facts that scoring, budgets and surgery need.

    Attributes:
        graph: the model's view.
        points: shapes and small integer values, at two input sizes.
        space: the dimensions.
        axes: by tensor name its axes; those of constants are in ``uses``.
        uses: the axes of each constant, per use.
        laws: by node index what the node's rule says; nodes of shape arithmetic have none.
        barriers: by label of a node that could not be traced the reason.
    """

    def __init__(self, graph: Graph, points: TwoPoints) -> None:
        self.graph = graph
        self.points = points
        self.space = Space()
        self.axes: dict[str, Axes] = {}
        self.uses: dict[Use, Axes] = {}
        self.laws: dict[int, Law] = {}
        self.barriers: dict[str, str] = {}
        self._constant: set[str] = set(graph.constants)
        self._couple()
        self._repeat_macs()

    # -- coupling ------------------------------------------------------------------------------------------------

    def _couple(self) -> None:
        walk = self.points.first
        for name in self.graph.inputs:
            if name in walk.shape:
                self.axes[name] = tuple(self.space.dim(n, f"graph input {name!r} carries it") for n in walk.shape[name])
        for node in self.graph.nodes:
            if node.outputs and all(o in walk.computed or not o for o in node.outputs):
                # Shape arithmetic: its values are known, it carries no channels.
                for name in () if Trait.MEASURE in traits(node.key) else node.inputs:
                    for expr in self.axes.get(name, ()):
                        self.space.freeze(expr, f"{node.label} computes values from it")
                continue
            if node.index in self.laws or (node.op == "Constant" and node.outputs[0] in self.graph.constants):
                continue
            self._couple_node(node)
        for name in self.graph.outputs:
            for expr in self._tensor_axes(name, -1, 0) or ():
                self.space.freeze(expr, f"graph output {name!r} carries it")

    def _couple_node(self, node: Node) -> None:
        walk = self.points.first
        inputs = [self._tensor_axes(n, node.index, i) if n else None for i, n in enumerate(node.inputs)]
        shapes = [walk.shape.get(o) if o else None for o in node.outputs]
        values = [None if n in walk.given else walk.value.get(n) for n in node.inputs]
        constant = [n in self._constant for n in node.inputs]
        second = [None if n in walk.given else self.points.second.value.get(n) for n in node.inputs]
        consumers = [self._consumers(name) for name in node.outputs]
        op = Op(node, self.space, inputs, shapes, values, constant, second, consumers)
        law = Law(node, op.inputs, op.outputs)
        try:
            self._apply_rule(op, inputs)
            law.reads, law.ties, law.macs = op.reads, op.ties, op.macs
        except (Barrier, InvariantError, LookupError, TypeError, ValueError, AttributeError) as barrier:
            # A node that its rule did not foresee (an attribute that is missing, say) is a barrier, never a guess.
            law.barrier = (
                str(barrier) if isinstance(barrier, Barrier) else f"its rule does not fit it ({_fact(barrier)})"
            )
            self.barriers[node.label] = law.barrier
            for axes in inputs:
                for expr in axes or ():
                    self.space.freeze(expr, f"{node.label} reads it, and {law.barrier}")
        for name in self.graph.captured.get(node.index, ()):
            for expr in self._tensor_axes(name, -1, 0) or ():
                self.space.freeze(expr, f"{node.label} reads it inside its subgraphs")
        for i, name in enumerate(node.outputs):
            shape = shapes[i]
            if name and shape is not None:
                axes = op.outputs[i]
                if axes is None or law.barrier:
                    why = f", and {law.barrier}" if law.barrier else ""
                    axes = tuple(self.space.dim(n, f"{node.label} computes it{why}") for n in shape)
                    op.outputs[i] = axes
                self._check(node, name, axes, shape)
                self.axes[name] = axes
        if node.inputs and all(n in self._constant for n in node.inputs if n) and not node.subgraphs:
            self._constant.update(() if is_mark(node) else node.outputs)
        self.laws[node.index] = law

    def _consumers(self, name: str) -> list[Consumer]:
        found: list[Consumer] = [("", 0, None)] if name in self.graph.outputs else []
        captured = any(name in names for names in self.graph.captured.values())
        found += [("", 0, None)] if captured else []
        shape = self.points.first.shape
        users = self.graph.users.get(name, ())
        return found + [(n.key, operand, shape.get(n.outputs[0]) if n.outputs else None) for n, operand in users]

    def _repeat_macs(self) -> None:
        """Count what bodies compute as often as they run, where that is known."""
        unknown = self.points.first.open_axes
        for index, marks in marks_around(self.graph).items():
            names = [mark.outputs[-1] for mark in marks if (mark.outputs[-1], 0) not in unknown]
            steps = [expr for name in names for expr in self.axes.get(name, ())]
            if steps and index in self.laws:
                self.laws[index].macs = [(*axes, *steps) for axes in self.laws[index].macs]

    def _apply_rule(self, op: Op, inputs: Sequence[Axes | None]) -> None:
        node = op.node
        if any(name and inputs[i] is None for i, name in enumerate(node.inputs)):
            raise Barrier("the shape of an operand is not known")
        rule = unreviewed(node) or find(node.key)
        if isinstance(rule, str):
            raise Barrier(rule)
        rule(op)
        for name, shape in zip(node.outputs, op.out_shapes, strict=True):
            if shape is None and (name in self.graph.users or name in self.graph.outputs):
                raise Barrier(f"the shape of its output {name!r} is not known")
        for i, axes in enumerate(inputs):
            if i not in op.seen:
                for expr in axes or ():
                    op.freeze(expr, "takes it as a control value")
        for name, axes in zip(node.outputs, op.outputs, strict=True):
            for i, expr in enumerate(axes or ()):
                if (name, i) in self.points.first.open_axes or (name, i) in self.points.second.open_axes:
                    op.freeze(expr, "gives it a size that depends on data")

    def _check(self, node: Node, name: str, axes: Axes, shape: tuple[int, ...]) -> None:
        if tuple(e.size for e in axes) != shape:
            raise InvariantError(
                f"{node.label}: its rule says {tuple(e.size for e in axes)} for {name!r}, shape inference {shape}. "
                "Please report this with the model."
            )

    def _tensor_axes(self, name: str, node: int, operand: int) -> Axes | None:
        """Return the axes of a tensor as one operand reads it, or None where its shape is not known."""
        if name in self.axes:
            return self.axes[name]
        walk = self.points.first
        shape = walk.shape.get(name)
        if shape is None:
            return None
        if name in walk.computed:
            return tuple(self.space.dim(n, "it holds sizes or indices that are computed from shapes") for n in shape)
        tensor = self.graph.constants.get(name)
        if tensor is None:
            return None
        large = sum(n > 1 for n in shape) >= 2 and np.prod(shape) >= TIED_ELEMENTS
        tied = large or any(entry.key == TIED for entry in tensor.metadata_props)
        use = (name, -1, 0) if tied else (name, node, operand)
        if use not in self.uses:
            control = "it holds indices or sizes" if tensor.data_type in INDICES else None
            self.uses[use] = tuple(self.space.dim(n, control) for n in shape)
        return self.uses[use]

    # -- groups --------------------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups that parameters carry, in the order of their first use; frozen ones included."""
        places: dict[Dim, list[Place]] = {}
        for use, axes in sorted(self.uses.items(), key=lambda item: (item[0][1], item[0][2], item[0][0])):
            for axis, expr in enumerate(axes):
                for dim in dict.fromkeys(leaves(self.space.resolve(expr))):
                    places.setdefault(dim, []).append(Place(use, axis))
        operators, readers, writers = self._roles()
        titles = {d: (p[0].tensor, p[0].axis) for d, p in places.items()} | self._filled(places)
        order = sorted((d for d in titles if d in operators and d.size), key=lambda d: (min(operators[d]), titles[d]))
        groups, names = [], dict[str, int]()
        for dim in order:
            name = "{}[{}]".format(*titles[dim])
            names[name] = names.get(name, 0) + 1
            groups.append(
                Group(
                    name=name if names[name] == 1 else f"{name}#{names[name]}",
                    dim=dim,
                    size=dim.size,
                    places=tuple(places.get(dim, ())),
                    operators=tuple(sorted(operators[dim])),
                    readers=tuple(sorted(readers.get(dim, ()))),
                    writers=tuple(sorted(writers.get(dim, ()))),
                    crossings=self.space.crossings(dim),
                    frozen=self.space.reason(dim) or (TOO_MANY if dim.size > MOST_CHANNELS else None),
                )
            )
        return tuple(groups)

    def _filled(self, places: Mapping[Dim, object]) -> dict[Dim, tuple[str, int]]:
        """Find the Dims that only weights filled by the graph itself (ConstantOfShape) carry, with (tensor, axis)."""
        filled: dict[Dim, tuple[str, int]] = {}
        for name in self.axes:
            if name in self._constant:
                for axis, expr in enumerate(self.axes[name]):
                    for dim in leaves(self.space.resolve(expr)):
                        if dim not in places:
                            filled.setdefault(dim, (name, axis))
        return filled

    def _roles(self) -> tuple[dict[Dim, set[int]], dict[Dim, set[int]], dict[Dim, set[int]]]:
        """Return the indices of the nodes that each Dim passes through, is read by, and is written by."""
        operators: dict[Dim, set[int]] = {}
        readers: dict[Dim, set[int]] = {}
        writers: dict[Dim, set[int]] = {}
        for index, law in self.laws.items():
            produced = set(self._leaves_of(law.outputs))
            for dim in produced:
                operators.setdefault(dim, set()).add(index)
            for read in law.reads:
                for dim in leaves(self.space.resolve(read.expr)):
                    readers.setdefault(dim, set()).add(index)
                    operators.setdefault(dim, set()).add(index)
            weights = [
                self.space.resolve(e)
                for i, axes in enumerate(law.inputs)
                if law.node.inputs[i] in self._constant
                for e in axes or ()
            ]
            if law.reads:
                for dim in {d for e in weights for d in leaves(e)} & produced:
                    writers.setdefault(dim, set()).add(index)
        return operators, readers, writers

    def _leaves_of(self, tensors: Sequence[Axes | None]) -> Iterator[Dim]:
        for axes in tensors:
            for expr in axes or ():
                yield from leaves(self.space.resolve(expr))

    @cached_property
    def free(self) -> tuple[Group, ...]:
        """The groups whose removal is exact: not frozen, crossing no normalisation."""
        return tuple(g for g in self.groups if g.frozen is None and not g.crossings)

    @cached_property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that can be pruned at all, those that cross a normalisation included."""
        return tuple(g for g in self.groups if g.frozen is None)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches with weights, each a group of one channel."""
        written: dict[int, set[Dim]] = {}
        for group in self.groups:
            for index in group.writers:
                written.setdefault(index, set()).add(group.dim)
        walk, found = self.points.first, []
        for region in regions(self.graph, walk.shape, self._constant):
            layers = tuple(i for i in region.nodes if i in self.laws and self.laws[i].macs)
            if not layers or walk.dtype.get(region.addend) not in FLOATS:
                continue
            dims = {d for i in layers for d in written.get(i, ())}
            axes = self.axes.get(region.addend, ())
            found.append(
                Branch(
                    name=f"{region.sum.outputs[0]}[branch]",
                    dim=Dim(1),
                    size=1,
                    places=(),
                    operators=region.nodes,
                    readers=(region.sum.index,),
                    writers=layers,
                    crossings=(),
                    frozen=None,
                    operand=region.operand,
                    axes=tuple(i for i, e in enumerate(axes) if dims.intersection(leaves(self.space.resolve(e)))),
                )
            )
        return tuple(found)

    @cached_property
    def detours(self) -> tuple[Detour, ...]:
        """The activations, depthwise convolutions and gates that a scale and a shift may replace."""
        written = {g.dim for g in self.groups if g.writers}
        walk, found = self.points.first, []
        for stretch in stretches(self.graph, walk.shape, self._constant):
            source, target = (self._resolved(name) for name in (stretch.source, stretch.target))
            axes = tuple(i for i, e in enumerate(target) if written.intersection(leaves(e)))
            types = {walk.dtype.get(name) for name in (stretch.source, stretch.target)}
            if len(axes) != 1 or len(types) > 1 or not types <= FLOATS or not self._are_alike(stretch, source, target):
                continue
            found.append(
                Detour(
                    name=f"{stretch.target}[{stretch.kind}]",
                    dim=Dim(1),
                    size=1,
                    places=(),
                    operators=stretch.nodes,
                    readers=(stretch.end,),
                    writers=tuple(i for i in stretch.nodes if i in self.laws and self.laws[i].macs),
                    crossings=(),
                    frozen=None,
                    axes=axes,
                    source=stretch.source,
                )
            )
        return tuple(found)

    def _resolved(self, name: str) -> list[Expr]:
        return [self.space.resolve(e) for e in self.axes.get(name, ())]

    def _are_alike(self, stretch: Stretch, source: Sequence[Expr], target: Sequence[Expr]) -> bool:
        """Return whether both ends of a stretch have the same axes; of frozen ones the sizes tell."""
        sizes = [{walk.shape.get(n) for n in (stretch.source, stretch.target)} for walk in self.points.walks]
        pairs = zip(source, target, strict=False)
        equal = all(a == b or all(self.space.reason(d) for e in (a, b) for d in leaves(e)) for a, b in pairs)
        return equal and len(source) == len(target) and all(len(shapes) == 1 for shapes in sizes)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The nodes that may go as a whole: residual branches, then detours."""
        return (*self.branches, *self.detours)

    def by_name(self, names: Iterable[str]) -> dict[str, Group]:
        """Return all groups by name; parts that may go, which take a search, where one of some names is no group's."""
        groups = {g.name: g for g in self.groups}
        return groups if groups.keys() >= set(names) else groups | {p.name: p for p in self.parts}

    def expr(self, place: Place) -> Expr:
        """Return the full expression of the axis that a place names."""
        return self.space.resolve(self.uses[place.use][place.axis])

    def is_constant(self, name: str) -> bool:
        """Tell whether a tensor is computed from constants alone."""
        return name in self._constant

    def kept(self, masks: dict[Dim, np.ndarray]) -> Kept:
        """Return the evaluation of expressions under masks of kept indices, by dimension."""
        return Kept(self.space, masks)

    @cached_property
    def operator_graph(self) -> nx.DiGraph:
        """The operators as a networkx graph, an annotated copy of :attr:`spa.model.graph.Graph.operators`.

        Nodes are node indices with attributes ``op``, ``name`` and ``groups`` (names of the groups that pass
        through); edges carry the ``tensor``.
        """
        graph: nx.DiGraph = self.graph.operators.copy()
        passing: dict[int, list[str]] = {}
        for group in self.groups:
            for index in group.operators:
                passing.setdefault(index, []).append(group.name)
        for node in self.graph.nodes:
            graph.add_node(node.index, op=node.key, name=node.proto.name, groups=tuple(passing.get(node.index, ())))
        return graph


def _fact(error: Exception) -> str:
    """Return an unforeseen error in short, without the request to report it that our own ones carry."""
    return str(error).partition(". ")[0] if isinstance(error, InvariantError) else repr(error)


def couple(graph: Graph, sizes: Mapping[str, int] | None = None) -> Analysis:
    """Analyse a graph: walk its shapes, apply the rules, unify.

    Args:
        graph: the model.
        sizes: sizes of open axes for which costs are counted, by the axis' name or by ``input[axis]``; what follows
            them stays open.

    Raises:
        ModelError: the graph contradicts itself at every input size that is tried.
        SizeError: ``sizes`` names no open axis.
        InvariantError: a rule and shape inference disagree (a bug of ours).
    """
    load()  # shape functions come with the rules of their operators
    return Analysis(graph, two_points(graph, sizes))
