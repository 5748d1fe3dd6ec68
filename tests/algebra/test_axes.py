"""The algebra against brute force: enumerate every subset of indices on small sizes."""

from __future__ import annotations

from itertools import product as every
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.algebra.axes import UNIT, Dim, Expr, Kept, Prod, Space, Sum, concat, leaves, product
from spa.errors import InvariantError

quick = settings(max_examples=60, deadline=None)


# -- brute force ----------------------------------------------------------------------------------------------------


def mask_of(expr: Expr, masks: dict[Dim, np.ndarray]) -> np.ndarray:
    """What an expression means, from its definition alone: index by index."""
    if isinstance(expr, Dim):
        return masks[expr]
    if isinstance(expr, Sum):
        return np.asarray([bit for term in expr.terms for bit in mask_of(term, masks)], dtype=bool)
    parts = [mask_of(f, masks) for f in expr.factors]
    return np.asarray([all(bits) for bits in every(*parts)], dtype=bool)


def explain(expr: Expr, mask: np.ndarray, found: dict[Dim, np.ndarray]) -> bool:
    """Whether an axis's mask can be had by choosing masks for its Dims, none empty; ``found`` collects them."""
    if isinstance(expr, Dim):
        known = found.setdefault(expr, mask)
        return bool(mask.any()) and np.array_equal(known, mask)
    if isinstance(expr, Sum):
        ends = np.cumsum([t.size for t in expr.terms])[:-1]
        return all(explain(t, m, found) for t, m in zip(expr.terms, np.split(mask, ends), strict=True))
    table = mask.reshape([f.size for f in expr.factors])
    rank = table.ndim
    parts = [table.any(axis=tuple(j for j in range(rank) if j != i)) for i in range(rank)]
    outer = np.ones((), bool)
    for part in parts:
        outer = np.logical_and.outer(outer, part)
    return np.array_equal(outer, table) and all(explain(f, m, found) for f, m in zip(expr.factors, parts, strict=True))


def every_mask(size: int) -> list[np.ndarray]:
    return [np.asarray(bits, dtype=bool) for bits in every((False, True), repeat=size) if any(bits)]


def allowed(axes: list[Expr]) -> set[bytes]:
    """All masks that every axis can have at once, by trying them all."""
    found = set()
    for mask in every_mask(axes[0].size):
        masks: dict[Dim, np.ndarray] = {}
        if all(explain(a, mask, masks) for a in axes):
            found.add(mask.tobytes())
    return found


def reachable(space: Space, axis: Expr, others: list[Expr] = ()) -> set[bytes]:
    """All masks that the unified space gives an axis; each other axis must have the same."""
    dims = list(dict.fromkeys(leaves(space.resolve(axis))))
    free = [d for d in dims if space.reason(d) is None]
    found = set()
    for choice in every(*(every_mask(d.size) for d in free)):
        kept = Kept(space, dict(zip(free, choice, strict=True)))
        mask = kept.mask(axis)
        assert kept.size(axis) == mask.sum()
        for other in others:
            assert np.array_equal(kept.mask(other), mask)
        found.add(mask.tobytes())
    return found


# -- expressions ----------------------------------------------------------------------------------------------------


@st.composite
def compositions(draw: st.DrawFn, total: int, step: int = 1) -> list[int]:
    parts = []
    while total:
        part = step * draw(st.integers(1, total // step))
        parts.append(part)
        total -= part
    return parts


@st.composite
def sums(draw: st.DrawFn, space: Space, total: int, step: int = 1) -> Expr:
    """A concatenation, some of its terms the same Dim."""
    terms: list[Expr] = []
    for part in draw(compositions(total, step)):
        same = [t for t in terms if t.size == part]
        terms.append(draw(st.sampled_from(same)) if same and draw(st.booleans()) else space.dim(part))
    return concat(*terms)


def grouped(space: Space, factors: list[int], cuts: list[bool]) -> Expr:
    """A product of runs of factors: [2 3 2] with a cut after the second is (6 2)."""
    runs, current = [], factors[0]
    for factor, cut in zip(factors[1:], cuts, strict=True):
        if cut:
            runs.append(current)
            current = factor
        else:
            current *= factor
    return product(*(space.dim(n) for n in (*runs, current)))


@st.composite
def products(draw: st.DrawFn, space: Space, factors: list[int]) -> Expr:
    return grouped(space, factors, draw(st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1)))


@st.composite
def anything(draw: st.DrawFn, space: Space, total: int, depth: int = 2) -> Expr:
    """Any expression of a size."""
    kind = draw(st.sampled_from(["dim", "sum", "product"])) if depth and total > 1 else "dim"
    if kind == "dim":
        return space.dim(total)
    if kind == "sum":
        return concat(*[draw(anything(space, n, depth - 1)) for n in draw(compositions(total))])
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    first = draw(st.sampled_from(divisors))
    return product(draw(anything(space, first, depth - 1)), draw(anything(space, total // first, depth - 1)))


# -- masks ----------------------------------------------------------------------------------------------------------


@quick
@given(st.data(), st.integers(1, 12))
def test_the_mask_of_an_expression_is_what_its_definition_says(data: st.DataObject, total: int) -> None:
    space = Space()
    expr = data.draw(anything(space, total, 3))
    masks = {d: np.asarray(data.draw(st.lists(st.booleans(), min_size=d.size, max_size=d.size))) for d in leaves(expr)}
    kept = Kept(space, masks)
    assert expr.size == total
    assert np.array_equal(kept.mask(expr), mask_of(expr, masks))
    assert kept.size(expr) == mask_of(expr, masks).sum()
    assert kept.touches([expr]) == (not mask_of(expr, masks).all())


def test_what_has_no_mask_is_kept() -> None:
    space = Space()
    a = space.dim(3)
    assert Kept(space, {}).mask(product(a, space.dim(2))).all()
    assert Kept(space, {}).mask(UNIT).tolist() == [True]
    assert Kept(space, {}).mask(Sum(())).tolist() == []


# -- normal form ----------------------------------------------------------------------------------------------------


@quick
@given(st.data(), st.integers(1, 12))
def test_sums_and_products_are_flat_and_without_units(data: st.DataObject, total: int) -> None:
    expr = data.draw(anything(Space(), total, 3))

    def flat(e: Expr) -> bool:
        if isinstance(e, Sum):
            return len(e.terms) > 1 and all(not isinstance(t, Sum) and flat(t) for t in e.terms)
        if isinstance(e, Prod):
            return e == UNIT or (
                len(e.factors) > 1
                and not isinstance(e.factors[0], Sum)
                and all(not isinstance(f, Prod) and f.size != 1 and flat(f) for f in e.factors)
            )
        return e.size > 1

    assert flat(expr)


def test_a_leading_sum_is_distributed() -> None:
    space = Space()
    a, b, c = space.dim(2), space.dim(3), space.dim(5)
    assert product(concat(a, b), c) == concat(product(a, c), product(b, c))
    assert isinstance(product(c, concat(a, b)), Prod)


# -- unification ----------------------------------------------------------------------------------------------------


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 9, 10]))
def test_whatever_is_unified_is_equal_and_possible(data: st.DataObject, total: int) -> None:
    """Soundness: every mask that the algebra allows is one that each axis can have."""
    space = Space()
    axes = [data.draw(anything(space, total)) for _ in range(data.draw(st.integers(2, 3)))]
    before = allowed(axes)
    for other in axes[1:]:
        space.unify(axes[0], other)
    assert reachable(space, axes[0], axes[1:]) <= before


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 10]))
def test_unifying_sums_loses_nothing(data: st.DataObject, total: int) -> None:
    """Boundaries at even places, since an axis of one index cannot be removed."""
    space = Space()
    axes = [data.draw(sums(space, total, 2)) for _ in range(3)]
    before = allowed(axes)
    space.unify(axes[0], axes[1])
    space.unify(axes[2], axes[1])
    found = reachable(space, axes[0], axes[1:])
    assert found == {m for m in before if nonempty_pieces(m, space, axes[0])}


def nonempty_pieces(mask: bytes, space: Space, axis: Expr) -> bool:
    """Unification may cut a Dim; each piece then keeps one index or more, where the whole needed only one."""
    return explain(space.resolve(axis), np.frombuffer(mask, dtype=bool), {})


@quick
@given(st.data(), st.sampled_from([[2, 2, 2], [2, 3, 2], [3, 2], [2, 2, 3], [2, 5]]))
def test_unifying_products_of_one_chain_loses_nothing(data: st.DataObject, factors: list[int]) -> None:
    space = Space()
    axes = [data.draw(products(space, factors)) for _ in range(3)]
    before = allowed(axes)
    space.unify(axes[0], axes[1])
    space.unify(axes[1], axes[2])
    assert reachable(space, axes[0], axes[1:]) == before


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 9, 12]))
def test_unification_is_symmetric(data: st.DataObject, total: int) -> None:
    left, right = Space(), Space()
    seed = data.draw(st.integers(0, 10**6))

    def both(space: Space) -> list[Expr]:
        rng = np.random.default_rng(seed)
        return [random_expr(space, total, rng) for _ in range(2)]

    a, b = both(left)
    left.unify(a, b)
    c, d = both(right)
    right.unify(d, c)
    assert left.show(a) == right.show(c)
    if total < 12:
        assert reachable(left, a, [b]) == reachable(right, c, [d])


def random_expr(space: Space, total: int, rng: np.random.Generator, depth: int = 2) -> Expr:
    kind = rng.integers(3) if depth and total > 1 else 0
    if kind == 0:
        return space.dim(total)
    if kind == 1:
        at = int(rng.integers(1, total))
        return concat(random_expr(space, at, rng, depth - 1), random_expr(space, total - at, rng, depth - 1))
    first = int(rng.choice([n for n in range(1, total + 1) if total % n == 0]))
    return product(random_expr(space, first, rng, depth - 1), random_expr(space, total // first, rng, depth - 1))


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 9, 12]))
def test_unification_is_idempotent(data: st.DataObject, total: int) -> None:
    space = Space()
    a, b = data.draw(anything(space, total)), data.draw(anything(space, total))
    space.unify(a, b)
    first = space.resolve(a), space.resolve(b), {d: space.reason(d) for d in leaves(space.resolve(a))}
    space.unify(a, b)
    space.unify(b, a)
    space.unify(a, a)
    assert (space.resolve(a), space.resolve(b)) == first[:2]
    assert {d: space.reason(d) for d in leaves(space.resolve(a))} == first[2]


def test_a_sum_within_a_product_has_one_form() -> None:
    space = Space()
    a, b = concat(space.dim(2), space.dim(10)), product(space.dim(3), space.dim(2), space.dim(2))
    space.unify(a, b)
    found = space.resolve(a)
    assert found == space.resolve(b)
    space.unify(a, b)
    assert space.resolve(a) == found


def test_only_the_part_without_a_common_refinement_is_frozen() -> None:
    space = Space()
    a = concat(product(space.dim(2), space.dim(3)), space.dim(5))
    b = concat(product(space.dim(3), space.dim(2)), space.dim(5))
    space.unify(a, b)
    tail = list(leaves(space.resolve(a)))[-1]
    assert tail.size == 5
    assert space.reason(tail) is None
    reasons = {space.reason(d) for d in list(leaves(space.resolve(a)))[:-1]}
    assert reasons == {"it is read as [2, 3] and as [3, 2], which share no factors"}


def test_a_shared_factor_stays_free_beside_factors_that_do_not_match() -> None:
    space = Space()
    a, b = product(space.dim(6), space.dim(2)), product(space.dim(4), space.dim(3))
    space.unify(a, b)
    assert [(d.size, space.reason(d) is None) for d in leaves(space.resolve(a))] == [(2, True), (3, False), (2, False)]


def test_different_sizes_are_a_wrong_rule() -> None:
    space = Space()
    with pytest.raises(InvariantError, match="cannot unify axes of 2 and 3 indices"):
        space.unify(space.dim(2), space.dim(3))


# -- cutting --------------------------------------------------------------------------------------------------------


@quick
@given(st.data(), st.integers(1, 12))
def test_the_pieces_of_a_cut_are_the_whole(data: st.DataObject, total: int) -> None:
    space = Space()
    expr = data.draw(anything(space, total, 3))
    at = data.draw(st.integers(0, total))
    first, rest = space.cut(expr, at)
    assert (first.size, rest.size) == (at, total - at)
    rng = np.random.default_rng(0)
    masks = {d: rng.integers(0, 2, d.size).astype(bool) for d in leaves(space.resolve(expr))}
    kept = Kept(space, masks)
    assert np.array_equal(np.concatenate([kept.mask(first), kept.mask(rest)]), kept.mask(expr))


@quick
@given(st.data(), st.integers(1, 12))
def test_the_pieces_of_a_split_are_the_whole(data: st.DataObject, total: int) -> None:
    space = Space()
    expr = data.draw(anything(space, total, 3))
    sizes = data.draw(compositions(total))
    pieces = space.split(expr, sizes)
    assert [p.size for p in pieces] == sizes
    rng = np.random.default_rng(0)
    kept = Kept(space, {d: rng.integers(0, 2, d.size).astype(bool) for d in leaves(space.resolve(expr))})
    assert np.array_equal(np.concatenate([kept.mask(p) for p in pieces]), kept.mask(expr))


def test_a_cut_between_rows_loses_nothing() -> None:
    space = Space()
    a, b = space.dim(6), space.dim(4)
    table = product(a, b)
    top, bottom = space.cut(table, 8)
    assert space.show(top) == "(2 4)"
    assert space.show(bottom) == "(4 4)"
    assert all(space.reason(d) is None for d in leaves(space.resolve(table)))


def test_a_frozen_dimension_is_not_refined_by_a_cut() -> None:
    space = Space()
    a = space.dim(6, "a graph output")
    first, rest = space.cut(a, 2)
    assert space.resolve(a) is a
    assert {space.reason(d) for e in (first, rest) for d in leaves(e)} == {"a graph output"}


# -- marks ----------------------------------------------------------------------------------------------------------


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 12]))
def test_marks_survive_every_later_unification(data: st.DataObject, total: int) -> None:
    space = Space()
    axes = [data.draw(anything(space, total)) for _ in range(3)]
    space.cross(axes[0], "Softmax 's'")
    space.freeze(axes[1], "a graph output")
    marked = list(leaves(axes[0]))
    space.unify(axes[0], axes[2])
    for dim in marked:
        assert all("Softmax 's'" in space.crossings(d) for d in leaves(space.resolve(dim)))
    space.unify(axes[2], axes[1])
    for axis in axes:
        assert space.is_frozen(axis)
        assert all(space.reason(d) for d in leaves(space.resolve(axis)))
    for dim in marked:
        resolved = space.resolve(dim)
        assert space.is_frozen(resolved)


@quick
@given(st.data(), st.sampled_from([4, 6, 8, 12]))
def test_a_crossing_reaches_what_is_unified_with_it(data: st.DataObject, total: int) -> None:
    space = Space()
    a, b = data.draw(anything(space, total)), data.draw(anything(space, total))
    space.cross(a, "norm")
    space.unify(b, a)
    for dim in leaves(space.resolve(b)):
        assert "norm" in space.crossings(dim) or space.reason(dim) is not None


def test_the_first_reason_stays() -> None:
    space = Space()
    a, b = space.dim(4), space.dim(4, "first")
    space.freeze(b, "second")
    space.unify(a, b)
    (dim,) = leaves(space.resolve(a))
    assert space.reason(dim) == "first"


def test_a_partly_frozen_sum_freezes_only_its_part() -> None:
    space = Space()
    a = concat(space.dim(2, "image"), space.dim(3))
    b = space.dim(5)
    space.unify(b, a)
    assert [(d.size, space.reason(d)) for d in leaves(space.resolve(b))] == [(2, "image"), (3, None)]


# -- size -----------------------------------------------------------------------------------------------------------


def test_a_long_chain_of_equalities_is_resolved() -> None:
    space = Space()
    first = current = space.dim(7)
    for _ in range(5000):
        new = space.dim(7)
        # Bind the end of the chain without looking at its beginning.
        space.unify(current, new)
        current = new
    assert space.resolve(first) is space.resolve(current)


def test_a_long_chain_of_cuts_is_resolved() -> None:
    space = Space()
    whole = rest = space.dim(9000)
    for _ in range(4000):
        _, rest = space.cut(rest, 2)
    assert len(list(leaves(space.resolve(whole)))) == 4001
    assert Kept(space, {}).size(whole) == 9000


def test_a_split_into_thousands_of_pieces_is_resolved() -> None:
    space = Space()
    whole = space.dim(6000)
    pieces = space.split(whole, [3] * 2000)
    assert len(set(pieces)) == 2000
    assert prod(e.size for e in pieces[:3]) == 27
    assert len(list(leaves(space.resolve(whole)))) == 2000


def test_two_long_sums_are_aligned() -> None:
    space = Space()
    left = concat(*(space.dim(2) for _ in range(1500)))
    right = concat(*(space.dim(3) for _ in range(1000)))
    space.unify(left, right)
    assert left.size == right.size == 3000


# -- showing --------------------------------------------------------------------------------------------------------


def test_expressions_are_shown_as_they_are_written() -> None:
    space = Space()
    h, d, e = space.dim(2), space.dim(3), space.dim(4)
    names = {h: "h", d: "d"}
    assert space.show(concat(product(h, d), e), names) == "(h d)+4"
    assert space.show(product(e, concat(h, d)), lambda dim: names.get(dim)) == "(4 (h+d))"
    assert space.show(UNIT) == "1"
    assert space.show(Sum(())) == "0"
    assert repr(h) == "Dim(2)"


def test_a_mask_stretches_with_the_whole_rows_of_a_first_factor_that_is_kept() -> None:
    space = Space()
    batch, c, d = space.dim(2), space.dim(3), space.dim(5)
    kept = Kept(space, {c: np.array([True, False, True]), d: np.array([False, True, True, True, False])})
    row = kept.mask(product(c, d))
    stretched = kept.stretched(product(batch, c, d), 60)
    assert stretched is not None
    np.testing.assert_array_equal(stretched, np.tile(row, 4))
    assert kept.stretched(product(batch, c, d), 61) is None  # no whole number of rows
    assert kept.stretched(product(c, d), 30) is None  # the rows themselves are cut
    assert kept.stretched(c, 6) is None
    assert kept.stretched(product(), 4) is None
