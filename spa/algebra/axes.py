"""The axis algebra: sums and products of independent dimensions, and their unification.

Every tensor axis carries an expression over :class:`Dim`:

    Dim(n)       n indices that can be removed one by one
    a + b        concatenation: the axis is a's indices, then b's
    (a b)        product: the axis is a two-dimensional table, read row by row

Operators state which axes are the same; :meth:`Space.unify` makes two expressions equal by
refining their Dims. When all operators have spoken, each Dim that remains is one group of coupled channels.

>>> s = Space()
>>> qkv, h, d = s.dim(24), s.dim(2), s.dim(4)
>>> s.unify(qkv, product(s.dim(3), h, d))
>>> s.show(qkv, {h: "h", d: "d"})
'(3 h d)'
>>> q, k, v = s.split(qkv, [8, 8, 8])
>>> s.show(k, {h: "h", d: "d"})
'(h d)'
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod

import numpy as np

from spa.errors import InvariantError


class Dim:
    """A dimension: ``size`` indices that can be removed one by one. Compared by identity."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"Dim({self.size})"


@dataclass(frozen=True, slots=True)
class Sum:
    """Concatenation of expressions."""

    terms: tuple[Expr, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(t.size for t in self.terms))


@dataclass(frozen=True, slots=True)
class Prod:
    """Row-major product of expressions; ``Prod(())`` is the unit, an axis of one index."""

    factors: tuple[Expr, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", prod(f.size for f in self.factors))


Expr = Dim | Sum | Prod
Axes = tuple[Expr, ...]
UNIT = Prod(())
_DEEP = 100  # levels of Dims bound to Dims that are resolved by plain recursion


def concat(*terms: Expr) -> Expr:
    """Return the sum of expressions, flattened; terms without an index are dropped.

    >>> concat(Dim(2), Sum(()), concat(Dim(3), Dim(5)))
    Sum(terms=(Dim(2), Dim(3), Dim(5)), size=10)
    """
    flat: list[Expr] = []
    for term in terms:
        if isinstance(term, Sum):
            flat.extend(term.terms)
        elif term.size:
            flat.append(term)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def product(*factors: Expr) -> Expr:
    """Return the product of expressions in normal form: flat, without units, sums distributed over later factors.

    >>> a, b, c, d = Dim(2), Dim(3), Dim(5), Dim(7)
    >>> Space().show(product(a, concat(b, c), d))
    '(2 ((3 7)+(5 7)))'
    """
    flat: list[Expr] = []
    for factor in factors:
        if isinstance(factor, Prod):
            flat.extend(factor.factors)
        elif factor.size != 1:
            flat.append(factor)
    if len(flat) == 1:
        return flat[0]
    for at, factor in enumerate(flat):
        if isinstance(factor, Sum) and (at == 0 or at < len(flat) - 1):
            spread = concat(*(product(term, *flat[at + 1 :]) for term in factor.terms))
            return product(*flat[:at], spread) if at else spread
    return Prod(tuple(flat))


def leaves(expr: Expr) -> Iterator[Dim]:
    """Yield the Dims of an expression, in order, repetitions included."""
    if isinstance(expr, Dim):
        yield expr
    else:
        for part in expr.terms if isinstance(expr, Sum) else expr.factors:
            yield from leaves(part)


class Space:
    """The Dims of one model, the facts known of them, and the unifier.

    A Dim is *bound* when a finer expression has replaced it, *frozen* (with a reason) when none of its indices may
    be removed, and *crossing* (with the labels of nodes) when statistics are taken over it. Both facts survive every
    later unification: binding a Dim hands them to the Dims that replace it.

    >>> space = Space()
    >>> channels, fixed = space.dim(6), space.dim(2, frozen="graph output 'y'")
    >>> space.unify(channels, concat(fixed, space.dim(4)))
    >>> [(dim, space.reason(dim)) for dim in leaves(space.resolve(channels))]
    [(Dim(2), "graph output 'y'"), (Dim(4), None)]
    """

    def __init__(self) -> None:
        self._bound: dict[Dim, Expr] = {}
        self._frozen: dict[Dim, str] = {}
        self._crossings: dict[Dim, dict[str, None]] = {}  # a dictionary serves as an ordered set

    # -- making and reading ------------------------------------------------------------------------------------

    def dim(self, size: int, frozen: str | None = None) -> Expr:
        """Return a new dimension, frozen if a reason is given.

        A size of one gives the unit, which cannot be removed and needs no reason.
        """
        if size == 1:
            return UNIT
        new = Dim(size)
        if frozen is not None:
            self._frozen[new] = frozen
        return new

    def resolve(self, expr: Expr, depth: int = 0) -> Expr:
        """Return the normal form of an expression under all that has been unified so far.

        Args:
            expr: any expression of this space.
            depth: levels of recursion so far; only for calls from here.
        """
        if isinstance(expr, Dim):
            bound = self._bound.get(expr)
            if bound is None:
                return expr
            if depth > _DEEP:
                self._settle(bound)
                bound = self._bound[expr]
            resolved = self.resolve(bound, depth + 1)
            if resolved is not bound:
                self._bound[expr] = resolved
            return resolved
        if isinstance(expr, Sum):
            terms = [self.resolve(t, depth + 1) for t in expr.terms]
            unchanged = all(a is b for a, b in zip(terms, expr.terms, strict=True))
            return expr if unchanged else concat(*terms)
        factors = [self.resolve(f, depth + 1) for f in expr.factors]
        unchanged = all(a is b for a, b in zip(factors, expr.factors, strict=True))
        return expr if unchanged else product(*factors)

    def _settle(self, expr: Expr) -> None:
        """Resolve the bound Dims below an expression, last ones first: chains can be longer than Python's stack."""
        order: list[Dim] = []
        stack = [d for d in leaves(expr) if d in self._bound]
        seen = set(stack)
        while stack:
            dim = stack.pop()
            order.append(dim)
            for below in leaves(self._bound[dim]):
                if below in self._bound and below not in seen:
                    seen.add(below)
                    stack.append(below)
        for dim in reversed(order):
            self.resolve(dim)

    def is_frozen(self, expr: Expr) -> bool:
        """Tell whether no index of the expression may be removed."""
        return all(d in self._frozen for d in leaves(self.resolve(expr)))

    def reason(self, dim: Dim) -> str | None:
        """Return the reason for which a resolved Dim is frozen, or None."""
        return self._frozen.get(dim)

    def crossings(self, dim: Dim) -> tuple[str, ...]:
        """Return the labels of the nodes that take statistics over a resolved Dim."""
        return tuple(self._crossings.get(dim, ()))

    # -- frozen and crossing Dims --------------------------------------------------------------------------------

    def freeze(self, expr: Expr, reason: str) -> None:
        """Forbid the removal of any index of an expression; the first reason given stays."""
        for dim in leaves(self.resolve(expr)):
            self._frozen.setdefault(dim, reason)

    def cross(self, expr: Expr, label: str) -> None:
        """Note that the node of that label takes statistics over an expression, so that removal changes them."""
        for dim in leaves(self.resolve(expr)):
            self._crossings.setdefault(dim, {})[label] = None

    def _bind(self, dim: Dim, expr: Expr) -> None:
        self._bound[dim] = expr
        if (reason := self._frozen.get(dim)) is not None:
            self.freeze(expr, reason)
        for label in self._crossings.get(dim, ()):
            self.cross(expr, label)

    # -- unification ---------------------------------------------------------------------------------------------

    def unify(self, left: Expr, right: Expr) -> None:
        """Make two expressions equal by refining their Dims.

        No more freedom is lost than equality demands: where the two have no common refinement, the part that has
        none is frozen, never its neighbours.

        Raises:
            InvariantError: the sizes differ (an operator's rule is wrong).

        >>> space = Space()
        >>> a, b, c, d = (space.dim(n) for n in (2, 6, 3, 5))
        >>> space.unify(concat(a, b), concat(c, d))  # boundaries at 2 and at 3: both sums are cut at each
        >>> space.show(concat(a, b)), space.show(concat(c, d))
        ('2+1+5', '2+1+5')
        """
        if left is right:
            return
        if left.size != right.size:
            raise InvariantError(f"cannot unify axes of {left.size} and {right.size} indices.")
        pairs: list[tuple[Expr, Expr]] = [(left, right)]
        while pairs:
            a, b = pairs.pop()
            a, b = self.resolve(a), self.resolve(b)
            if a is b or a == b:
                continue
            if self.is_frozen(a):
                self.freeze(b, self._any_reason(a))
            elif self.is_frozen(b):
                self.freeze(a, self._any_reason(b))
            elif isinstance(a, Dim):
                self._bind(a, b)
            elif isinstance(b, Dim):
                self._bind(b, a)
            elif isinstance(a, Sum) or isinstance(b, Sum):
                pairs.extend(self._align_sums(a, b))
            else:
                pairs.extend(self._align_products(list(a.factors), list(b.factors)))

    def _any_reason(self, expr: Expr) -> str:
        return next((self._frozen[d] for d in leaves(expr)), "it consists of single indices")

    def _align_sums(self, a: Expr, b: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Cut two sums at each other's boundaries and yield the pieces that must be equal."""
        left = deque(a.terms if isinstance(a, Sum) else (a,))
        right = deque(b.terms if isinstance(b, Sum) else (b,))
        while left:
            x, y = self.resolve(left.popleft()), self.resolve(right.popleft())
            if isinstance(x, Sum) or isinstance(y, Sum):
                # An earlier cut refined a repeated Dim: open the term and look again.
                left.extendleft(reversed(x.terms if isinstance(x, Sum) else (x,)))
                right.extendleft(reversed(y.terms if isinstance(y, Sum) else (y,)))
            elif x.size == y.size:
                yield x, y
            elif x.size > y.size:
                first, rest = self.cut(x, y.size)
                left.extendleft((rest, first))
                right.appendleft(y)
            else:
                first, rest = self.cut(y, x.size)
                right.extendleft((rest, first))
                left.appendleft(x)

    def _align_products(self, a: list[Expr], b: list[Expr]) -> Iterator[tuple[Expr, Expr]]:
        """Match the factors of two equal products from both ends; what matches at neither end is frozen."""
        for end in (0, -1):
            while a and b:
                x, y = self.resolve(a[end]), self.resolve(b[end])
                common = gcd(x.size, y.size)
                if common == 1:
                    break
                # x = (common rest) from the left, (rest common) from the right; and y likewise.
                shared = x if x.size == common else y if y.size == common else self.dim(common)
                for factors, whole in ((a, x), (b, y)):
                    del factors[end]
                    rest = self.dim(whole.size // common)
                    if whole is not shared:
                        yield whole, product(shared, rest) if end == 0 else product(rest, shared)
                    if rest.size != 1:
                        factors.insert(0 if end == 0 else len(factors), rest)
        if a or b:
            sizes = [f.size for f in a], [f.size for f in b]
            for factor in a + b:
                self.freeze(factor, f"it is read as {sizes[0]} and as {sizes[1]}, which share no factors")

    # -- cutting -------------------------------------------------------------------------------------------------

    def cut(self, expr: Expr, at: int) -> tuple[Expr, Expr]:
        """Return the first ``at`` indices of an expression and the rest; refine a Dim that the cut falls inside.

        >>> space = Space()
        >>> first, rest = space.cut(product(Dim(2), Dim(3)), 4)  # inside the second row: all rows are cut there
        >>> space.show(first), space.show(rest)
        ('1+2+1', '2')
        """
        expr = self.resolve(expr)
        if at == 0 or at == expr.size:
            return (Sum(()), expr) if at == 0 else (expr, Sum(()))
        if self.is_frozen(expr):  # frozen Dims need no refinement
            reason = self._any_reason(expr)
            return self.dim(at, reason), self.dim(expr.size - at, reason)
        if isinstance(expr, Dim):
            first, rest = self.dim(at), self.dim(expr.size - at)
            self._bind(expr, concat(first, rest))
            return first, rest
        if isinstance(expr, Sum):
            return self._cut_sum(expr, at)
        head, inner = expr.factors[0], product(*expr.factors[1:])
        rows, rest_of_row = divmod(at, inner.size)
        above, below = self.cut(head, rows)
        if rest_of_row == 0:
            return product(above, inner), product(below, inner)
        _, below = self.cut(below, 1)
        begin, end = self.cut(inner, rest_of_row)
        inner = self.resolve(inner)
        return concat(product(above, inner), begin), concat(end, product(below, inner))

    def _cut_sum(self, expr: Sum, at: int) -> tuple[Expr, Expr]:
        first: list[Expr] = []
        terms = list(expr.terms)
        while terms and terms[0].size <= at:
            at -= terms[0].size
            first.append(terms.pop(0))
        if at:
            begin, end = self.cut(terms.pop(0), at)
            first.append(begin)
            terms.insert(0, end)
        return concat(*first), concat(*terms)

    def split(self, expr: Expr, sizes: Sequence[int]) -> list[Expr]:
        """Return consecutive pieces of an expression, of the given sizes."""
        pieces = []
        for size in sizes:
            piece, expr = self.cut(expr, size)
            pieces.append(piece)
        return [self.resolve(p) for p in pieces]

    # -- showing -------------------------------------------------------------------------------------------------

    def show(self, expr: Expr, names: Mapping[Dim, str] | Callable[[Dim], str | None] | None = None) -> str:
        """Return the expression as text; a Dim without a name is shown as its size."""
        name_of = names.get if isinstance(names, Mapping) else names

        def text(e: Expr) -> str:
            if isinstance(e, Dim):
                return (name_of(e) if name_of else None) or str(e.size)
            if isinstance(e, Sum):
                return "+".join(text(t) for t in e.terms) or "0"
            if e == UNIT:
                return "1"
            return "(" + " ".join(text(f) if not isinstance(f, Sum) else f"({text(f)})" for f in e.factors) + ")"

        return text(self.resolve(expr))


class Kept:
    """The kept indices of each Dim, and the evaluation of any expression under them.

    Args:
        space: the space that the expressions belong to, fully unified.
        masks: for each pruned Dim a boolean array of its size, True where the index is kept; Dims that are
            not named keep everything.

    Attributes:
        empties: whether some Dim keeps nothing.

    >>> space = Space()
    >>> h, d = space.dim(2), space.dim(3)
    >>> kept = Kept(space, {h: np.array([False, True]), d: np.array([True, False, True])})
    >>> kept.mask(concat(h, product(h, d))).astype(int)
    array([0, 1, 0, 0, 0, 1, 0, 1])
    >>> kept.size(product(h, d))
    2
    """

    def __init__(self, space: Space, masks: Mapping[Dim, np.ndarray]) -> None:
        self._space = space
        self._masks = masks
        self._counts = {d: int(m.sum()) for d, m in masks.items()}
        self.empties = not all(self._counts.values())

    def mask(self, expr: Expr) -> np.ndarray:
        """Return a boolean array of shape (expr.size,): concatenated for a sum, the outer AND for a product."""
        return self._mask(self._space.resolve(expr))

    def _mask(self, expr: Expr) -> np.ndarray:
        if isinstance(expr, Dim):
            mask = self._masks.get(expr)
            return np.ones(expr.size, dtype=bool) if mask is None else mask
        if isinstance(expr, Sum):
            return np.concatenate([self._mask(t) for t in expr.terms]) if expr.terms else np.ones(0, dtype=bool)
        mask = np.ones(1, dtype=bool)
        for factor in expr.factors:
            mask = np.logical_and.outer(mask, self._mask(factor)).reshape(-1)
        return mask

    def stretched(self, expr: Expr, size: int) -> np.ndarray | None:
        """Return the mask for an axis whose first factor follows the input's size; None for an impossible size.

        Args:
            expr: the axis at the sizes of the analysis.
            size: how many indices the axis has.

        >>> space = Space()
        >>> batch, c = space.dim(2), space.dim(3)
        >>> kept = Kept(space, {c: np.array([True, False, True])})
        >>> kept.stretched(product(batch, c), 9).astype(int)
        array([1, 0, 1, 1, 0, 1, 1, 0, 1])
        """
        expr = self._space.resolve(expr)
        first = expr.factors[0] if isinstance(expr, Prod) and expr.factors else None
        if first is None or self._size(first) != first.size or size % (expr.size // first.size):
            return None
        row = self._mask(expr).reshape(first.size, -1)[0]
        return np.tile(row, size // row.size)

    def size(self, expr: Expr) -> int:
        """Return the number of indices of the expression that are kept."""
        return self._size(self._space.resolve(expr))

    def _size(self, expr: Expr) -> int:
        if isinstance(expr, Dim):
            return self._counts.get(expr, expr.size)
        if isinstance(expr, Sum):
            return sum(self._size(t) for t in expr.terms)
        return prod(self._size(f) for f in expr.factors)

    def touches(self, exprs: Iterable[Expr]) -> bool:
        """Tell whether any index of any of the expressions is removed."""
        return any(self.size(e) != e.size for e in exprs)
