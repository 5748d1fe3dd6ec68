"""Groups that shall keep the same share of their channels: named by the user, or the head sizes of each attention.

The engine prunes the dimensions that queries and keys share and those that values have as groups of their own, which
loses least. Classes of frameworks know one size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod

from spa.algebra.axes import Dim, Expr, Prod, leaves
from spa.coupling.analysis import Analysis, Group, Law
from spa.errors import PlanError

HEADS = "heads"  # the word that stands for the head sizes of each attention


def equal_sets(analysis: Analysis, groups: Sequence[Group], equal: Sequence[str]) -> tuple[frozenset[str], ...]:
    """Which groups keep the same share of their channels, as :attr:`spa.widths.budget.Budget.equal` takes it.

    Args:
        analysis: the model.
        groups: those that may be pruned.
        equal: the word ``heads``, which makes a set of the head sizes of each attention; and shell patterns, each of
            which makes a set of the groups of which it matches a place, written ``tensor[axis]``.

    Returns:
        Sets of two groups or more; none of them share a group.

    Raises:
        PlanError: a pattern matches less than two groups.
    """
    sets: list[frozenset[str]] = []
    for pattern in equal:
        if pattern == HEADS:
            sets += head_sizes(analysis)
            continue
        names = frozenset(g.name for g in groups if any(_matches(place, pattern) for place in _places(g)))
        if len(names) < 2:
            what = f"the group {next(iter(names))!r} alone" if names else "none of the groups that may be pruned"
            raise PlanError(f"equal: {pattern!r} matches {what}. Give a pattern of places, such as '*.fc1.weight*'.")
        sets.append(names)
    return _merged(sets)


def _places(group: Group) -> list[str]:
    return [group.name, *(f"{p.tensor}[{p.axis}]" for p in group.places)]


def _matches(place: str, pattern: str) -> bool:
    return place == pattern or fnmatchcase(place, pattern)


def _merged(sets: Sequence[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Sets with a common member become one."""
    merged: list[frozenset[str]] = []
    for names in sets:
        apart = [m for m in merged if not m & names]
        merged = [*apart, names.union(*(m for m in merged if m & names))]
    return tuple(m for m in merged if len(m) > 1)


# -- the head sizes of an attention ----------------------------------------------------------------------------------


def head_sizes(analysis: Analysis) -> list[frozenset[str]]:
    """For each attention the groups that make up the size of a head: of queries and keys, and of values.

    Found in the graph alone: a product of two activations sums over the first (queries and keys), and its result goes
    on, through operators without weights, to a product with further activations, which have the second (values). One
    operator may do both. Sizes that differ before pruning need not be equal afterwards.
    """
    names = {g.dim: g.name for g in analysis.groups}
    found, seconds = [], set[int]()
    for index in sorted(analysis.laws):
        law = analysis.laws[index]
        operand = _product(analysis, law)
        first = None if operand is None or index in seconds else _summed(analysis, law)
        if first is None:
            continue
        behind = list(_products_behind(analysis, law))
        for end, place in behind or [(law, operand or 0)]:
            second = _passed(analysis, end, place)
            dims = first[1] | (second[1] if second else first[1])
            if second and second[0] == first[0] and _can_shrink(analysis, dims if behind else first[1]):
                found.append(frozenset(names[d] for d in dims if d in names))
                seconds.add(end.node.index)
    return found


def _can_shrink(analysis: Analysis, dims: frozenset[Dim]) -> bool:
    return any(analysis.space.reason(d) is None for d in dims)


def _product(analysis: Analysis, law: Law) -> int | None:
    """Where a node multiplies activations: the operand of one of them."""
    return next((r.operand for r in law.reads if not analysis.is_constant(law.node.inputs[r.operand])), None)


def _products_behind(analysis: Analysis, law: Law) -> Iterator[tuple[Law, int]]:
    """The products of activations that a node's results reach through nodes without weights, and as which operand."""
    names, seen = list(law.node.outputs), {law.node.index}
    while names:
        name = names.pop()
        for node, operand in analysis.graph.users.get(name, ()):
            behind = analysis.laws.get(node.index)
            if behind is None or node.index in seen:
                continue
            seen.add(node.index)
            if _product(analysis, behind) is not None:
                yield behind, operand
            elif not behind.reads:
                names += node.outputs


Size = tuple[int, frozenset[Dim]]  # of an axis without some dimensions: how many indices, and its dimensions


def _summed(analysis: Analysis, law: Law) -> Size | None:
    """What a product sums over that its result lacks."""
    left = _dims(analysis, law.outputs[0] or ())
    exprs = [analysis.space.resolve(read.expr) for read in law.reads]
    return next((s for s in (_size(analysis, e, left) for e in exprs) if s[1]), None)


def _passed(analysis: Analysis, law: Law, operand: int) -> Size | None:
    """What a product's result has that one operand lacks."""
    without = _dims(analysis, law.inputs[operand] or ())
    sizes = [_size(analysis, analysis.space.resolve(e), without) for e in law.outputs[0] or ()]
    return next((s for s in reversed(sizes) if s[1]), None)


def _dims(analysis: Analysis, axes: Sequence[Expr]) -> set[Dim]:
    return {d for expr in axes for d in leaves(analysis.space.resolve(expr))}


def _size(analysis: Analysis, expr: Expr, without: set[Dim]) -> Size:
    """Frozen factors beside free ones do not count as dimensions: the product shrinks with the others."""
    if isinstance(expr, Dim):
        return (1, frozenset()) if expr in without else (expr.size, frozenset((expr,)))
    parts = [_size(analysis, e, without) for e in (expr.factors if isinstance(expr, Prod) else expr.terms)]
    dims = frozenset[Dim]().union(*(d for _, d in parts))
    if not isinstance(expr, Prod):
        return sum(n for n, _ in parts), dims
    free = frozenset(d for d in dims if analysis.space.reason(d) is None)
    return prod(n for n, _ in parts), free or dims
