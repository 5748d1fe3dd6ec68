"""Sets of groups that keep the same fraction of their channels: named by the user, or what classes have one size for.

The engine prunes the dimensions that queries and keys have in common and those of values as separate groups, which
loses least, and so it does with the parts that a layer's outputs are cut into. The attention classes of frameworks,
however, know one head size only, and ``chunk(2)`` makes halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod

from spa.algebra.axes import Dim, Expr, Prod, leaves
from spa.coupling.analysis import Analysis, Group, Law
from spa.errors import PlanError

HEADS = "heads"  # the word that stands for the head sizes of each attention
PARTS = "parts"  # the word that stands for the equal parts that an axis is cut into
LAYERS = "layers"  # the word that stands for what is called the same in all layers, but for numbers


def equal_sets(analysis: Analysis, groups: Sequence[Group], equal: Sequence[str]) -> tuple[frozenset[str], ...]:
    """Return the sets of groups that keep the same fraction of their channels.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        equal: the word ``heads``, which makes a set of the head sizes of each attention; the word ``parts``, which
            makes a set of the equal parts of each axis that is cut into such; the word ``layers``, which makes sets of
            the groups of one size whose names differ in numbers alone; and shell patterns, each of which makes a set
            of the groups that lie on a matching place, written ``tensor[axis]``.

    Returns:
        Disjoint sets of two names or more, as :attr:`spa.widths.budget.Budget.equal` takes them.

    Raises:
        PlanError: a pattern matches fewer than two groups.
    """
    sets: list[frozenset[str]] = []
    for pattern in equal:
        if pattern == HEADS:
            sets += head_sizes(analysis)
            continue
        if pattern == PARTS:
            sets += equal_parts(analysis, groups)
            continue
        if pattern == LAYERS:
            sets += equal_layers(groups)
            continue
        names = frozenset(g.name for g in groups if any(_matches(place, pattern) for place in _places(g)))
        if len(names) < 2:
            matched = f"the group {next(iter(names))!r} alone" if names else "none of the groups that may be pruned"
            raise PlanError(f"equal: {pattern!r} matches {matched}. Give a pattern of places, such as '*.fc1.weight*'.")
        sets.append(names)
    return _merged(sets)


def _places(group: Group) -> list[str]:
    return [group.name, *(f"{p.tensor}[{p.axis}]" for p in group.places)]


def _matches(place: str, pattern: str) -> bool:
    return place == pattern or fnmatchcase(place, pattern)


def _merged(sets: Sequence[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Merge sets with a common member; drop sets of one.

    >>> [sorted(names) for names in _merged([frozenset("ab"), frozenset("c"), frozenset("de"), frozenset("bf")])]
    [['d', 'e'], ['a', 'b', 'f']]
    """
    merged: list[frozenset[str]] = []
    for names in sets:
        disjoint = [m for m in merged if not m & names]
        merged = [*disjoint, names.union(*(m for m in merged if m & names))]
    return tuple(m for m in merged if len(m) > 1)


def equal_layers(groups: Sequence[Group]) -> list[frozenset[str]]:
    """Find the groups of one size whose names differ in numbers alone (``layers.0.fc1.weight[0]``).

    A configuration has one number for all of them.
    """
    sets: dict[tuple[str, int], set[str]] = {}
    for group in groups:
        tensor, bracket, axis = group.name.rpartition("[")
        sets.setdefault((re.sub(r"\d+", "#", tensor) + bracket + axis, group.size), set()).add(group.name)
    return [frozenset(names) for names in sets.values() if len(names) > 1]


# -- the equal parts of an axis --------------------------------------------------------------------------------------


def equal_parts(analysis: Analysis, groups: Sequence[Group]) -> list[frozenset[str]]:
    """Find the groups that make up the equal parts that an axis is cut into (``chunk``, ``split``, slices).

    What all the parts have in common (the heads of queries, keys and values) makes them equal anyway. Parts of which
    one must not be pruned make no set.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.

    Returns:
        A set of group names for each size of the parts of each axis.
    """
    names = {g.dim: g.name for g in groups}
    sets = []
    for cut in cuts(analysis).values():
        for size in {part.size for part in cut}:
            dims = [frozenset(leaves(part)) for part in cut if part.size == size]
            others = frozenset[Dim]().union(*dims) - dims[0].intersection(*dims)
            if len(others) > 1 and others <= names.keys():
                sets.append(frozenset(names[d] for d in others))
    return sets


def cuts(analysis: Analysis) -> dict[tuple[str, int], tuple[Expr, ...]]:
    """Return by tensor and axis the parts that Split and Slice cut it into, in the order of the graph's nodes."""
    found: dict[tuple[str, int], dict[Expr, None]] = {}
    for index in sorted(analysis.laws):
        law = analysis.laws[index]
        source = law.inputs[0] if law.node.op in ("Split", "Slice") and law.inputs else None
        for part in law.outputs if source is not None else ():
            for axis, (whole, piece) in enumerate(zip(source or (), part or (), strict=False)):
                whole, piece = analysis.space.resolve(whole), analysis.space.resolve(piece)
                if piece != whole:
                    found.setdefault((law.node.inputs[0], axis), {})[piece] = None
    return {place: tuple(parts) for place, parts in found.items()}


# -- the head sizes of an attention ----------------------------------------------------------------------------------


def head_sizes(analysis: Analysis) -> list[frozenset[str]]:
    """Find for each attention the groups that make up the size of a head: of queries and keys, and of values.

    The graph alone tells: a product of two activations sums over the head size of queries and keys; its result goes,
    through operators without weights, to a product with other activations, whose head size is that of values. One
    operator may do both. Sizes that differ before pruning need not be equal afterwards, so they make no set.

    Returns:
        A set of group names for each attention.
    """
    names = {g.dim: g.name for g in analysis.groups}
    sets, value_products = [], set[int]()
    for index in sorted(analysis.laws):
        law = analysis.laws[index]
        operand = _activation_operand(analysis, law)
        query_size = None if operand is None or index in value_products else _summed(analysis, law)
        if query_size is None:
            continue
        later_products = list(_products_behind(analysis, law))
        for product, scores in later_products or [(law, operand or 0)]:
            value_size = _passed(analysis, product, scores)
            dims = query_size[1] | (value_size[1] if value_size else query_size[1])
            equal = value_size is not None and value_size[0] == query_size[0]
            if equal and _can_shrink(analysis, dims if later_products else query_size[1]):
                sets.append(frozenset(names[d] for d in dims if d in names))
                value_products.add(product.node.index)
    return sets


def head_counts(analysis: Analysis) -> frozenset[str]:
    """Find the groups that count the heads of attentions, by name.

    A product of two activations runs for each head by itself: both of them and the result have that dimension.
    """
    found: set[Dim] = set()
    for law in analysis.laws.values():
        if _activation_operand(analysis, law) is None or len(law.inputs) < 2 or not law.outputs:
            continue
        first, second, result = (_dims(analysis, axes or ()) for axes in (*law.inputs[:2], law.outputs[0]))
        found |= first & second & result
    return frozenset(g.name for g in analysis.groups if g.dim in found)


def _can_shrink(analysis: Analysis, dims: frozenset[Dim]) -> bool:
    return any(analysis.space.reason(d) is None for d in dims)


def _activation_operand(analysis: Analysis, law: Law) -> int | None:
    """Return an activation that a node contracts (its operand), or None for a node that multiplies no activations."""
    return next((r.operand for r in law.reads if not analysis.is_constant(law.node.inputs[r.operand])), None)


def _products_behind(analysis: Analysis, law: Law) -> Iterator[tuple[Law, int]]:
    """Yield the products of activations that a node's results reach through nodes without weights.

    Yields:
        (the product, the operand that the results reach it by).
    """
    names, seen = list(law.node.outputs), {law.node.index}
    while names:
        name = names.pop()
        for node, operand in analysis.graph.users.get(name, ()):
            user = analysis.laws.get(node.index)
            if user is None or node.index in seen:
                continue
            seen.add(node.index)
            if _activation_operand(analysis, user) is not None:
                yield user, operand
            elif not user.reads:
                names += node.outputs


Size = tuple[int, frozenset[Dim]]  # of an axis without some dimensions: (number of indices, the other dimensions)


def _summed(analysis: Analysis, law: Law) -> Size | None:
    """Return the size that a product sums over and that its result lacks, or None."""
    remaining = _dims(analysis, law.outputs[0] or ())
    exprs = [analysis.space.resolve(read.expr) for read in law.reads]
    return next((s for s in (_size(analysis, e, remaining) for e in exprs) if s[1]), None)


def _passed(analysis: Analysis, law: Law, operand: int) -> Size | None:
    """Return the size that a product's result has and one operand lacks, or None."""
    without = _dims(analysis, law.inputs[operand] or ())
    sizes = [_size(analysis, analysis.space.resolve(e), without) for e in law.outputs[0] or ()]
    return next((s for s in reversed(sizes) if s[1]), None)


def _dims(analysis: Analysis, axes: Sequence[Expr]) -> set[Dim]:
    return {d for expr in axes for d in leaves(analysis.space.resolve(expr))}


def _size(analysis: Analysis, expr: Expr, without: set[Dim]) -> Size:
    """Return the size of an axis without some dimensions.

    Frozen factors beside free ones do not count as dimensions: the product shrinks with the free ones.
    """
    if isinstance(expr, Dim):
        return (1, frozenset()) if expr in without else (expr.size, frozenset((expr,)))
    parts = [_size(analysis, e, without) for e in (expr.factors if isinstance(expr, Prod) else expr.terms)]
    dims = frozenset[Dim]().union(*(d for _, d in parts))
    if not isinstance(expr, Prod):
        return sum(n for n, _ in parts), dims
    free = frozenset(d for d in dims if analysis.space.reason(d) is None)
    return prod(n for n, _ in parts), free or dims
