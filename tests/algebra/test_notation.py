"""The notation: parsing, binding sizes, and what a line means for a node."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from spa.algebra.axes import UNIT, Dim, Kept, Space, Sum, leaves
from spa.algebra.notation import apply, output_shapes, parse, rule_of
from spa.algebra.op import Barrier, Op
from spa.model.graph import Node

CONV = "X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]"


def make(
    inputs: Sequence[tuple[int, ...] | None],
    outputs: Sequence[tuple[int, ...] | None],
    constant: Sequence[bool] | None = None,
    **attributes: Any,
) -> Op:
    space = Space()
    ends = [f"i{i}" for i in range(len(inputs))], [f"o{i}" for i in range(len(outputs))]
    node = Node(helper.make_node("MyOp", *ends, name="mine", **attributes), 0, 1)
    axes = [None if s is None else tuple(space.dim(n) for n in s) for s in inputs]
    return Op(node, space, axes, outputs, constant=constant)


def show(op: Op, output: int = 0) -> str:
    names: dict[Dim, str] = {}
    shown = []
    for expr in op.outputs[output] or ():
        for dim in leaves(op.space.resolve(expr)):
            names.setdefault(dim, "abcdefgh"[len(names)])
        shown.append(op.space.show(expr, names))
    return " ".join(shown)


# -- parsing --------------------------------------------------------------------------------------------------------


def test_operands_are_read_in_order_with_their_marks() -> None:
    pattern = parse(CONV)
    assert [(o.name, o.optional) for o in pattern.inputs] == [("X", False), ("W", False), ("B", True)]
    assert [o.name for o in pattern.outputs] == ["Y"]


def test_a_letter_on_the_left_only_in_two_operands_is_contracted() -> None:
    assert parse(CONV).contracted == ("i",)
    assert parse("A[m k], B[k n] -> Y[m n]").contracted == ("k",)
    assert parse("A[m], B[m] -> Y[m]").contracted == ()
    assert parse("A[m *k], B[*k n] -> Y[m n]").contracted == ("*k",)
    assert parse("A[m k!], B[n k!] -> Y[m n]").contracted == ()


def test_a_letter_that_only_one_operand_or_outputs_know_is_opaque() -> None:
    assert parse(CONV).opaque == {"*s", "*k", "*t"}
    assert parse("A[m k] -> Y[m]").opaque == {"k"}
    assert parse("A[k m k] -> Y[m]").opaque == {"k"}
    assert parse("A[m] -> Y[m k], Z[k]").opaque == {"k"}
    assert parse("A[m ~k r!] -> Y[m]").opaque == set()


def test_numbers_sums_stars_and_marks_are_read() -> None:
    (axis, star) = parse("A[(3 h)+d ~*s] -> Y[h d]").inputs[0].axes or ()
    assert axis.terms == ((3, "h"), ("d",))
    assert (star.star, star.crosses) == ("s", True)
    (dots, last) = parse("A[~... (h ~d)] -> Y[... h d]").inputs[0].axes or ()
    assert (dots.star, dots.crosses) == ("...", True)
    assert (last.crosses, last.crossing) == (False, {"d"})
    (product,) = parse("A[(2 ~h d)] -> Y[h d]").inputs[0].axes or ()
    assert product.crossing == {"h"}
    (crossing, read) = parse("A[~c r!] -> Y[c r]").inputs[0].axes or ()
    assert (crossing.crosses, crossing.reads) == (True, False)
    assert (read.crosses, read.reads) == (False, True)


def test_a_bare_operand_carries_no_axes_and_empty_brackets_are_a_scalar() -> None:
    bare, scalar = parse("X[n], shape, s[] -> Y[n]").inputs[1:]
    assert bare.axes is None
    assert scalar.axes == ()


def test_clauses_are_read() -> None:
    pattern = parse(
        "X[n (g i) *s] -> Y[n g *s]; group = g else 1; kinds = (2 i); macs = n g *s + 3 i; frozen n *s: ties it"
    )
    assert [(a.name, a.axis.terms, a.default) for a in pattern.attributes] == [
        ("group", (("g",),), 1),
        ("kinds", ((2, "i"),), None),
    ]
    assert pattern.macs == (("n", "g", "*s"), (3, "i"))
    assert pattern.frozen == ((("n", "*s"), "ties it"),)


# The piece that the caret points at is the text from it on; "" is the line's end.
MALFORMED = [
    ("A[m] Y[m]", "there is no '->'", ""),
    ("A[m -> Y[m]", "has no meaning|is missing", "-> Y[m]"),
    ("A[m) -> Y[m]", "is missing", ") -> Y[m]"),
    ("A[m, k] -> Y[m]", "is missing", ", k] -> Y[m]"),
    ("A[-] -> Y[m]", "'-' has no meaning", "-] -> Y[m]"),
    ("A[m] -> Y[m]; group = -", "'-' has no meaning", "-"),
    ("[m] -> Y[m]", "an operand is missing", "[m] -> Y[m]"),
    ("A[m], , B[m] -> Y[m]", "an operand is missing", ", B[m] -> Y[m]"),
    ("A[m], -> Y[m]", "an operand is missing", "-> Y[m]"),
    ("A[m] ->", "an operand is missing", ""),
    ("A[m] -> B[m] -> Y[m]", "'->' has no meaning here", "-> Y[m]"),
    ("A[m] B[m] -> Y[m]", "'->' is missing", "B[m] -> Y[m]"),
    ("A[m], A[m] -> Y[m]", "two operands 'A'", "A[m] -> Y[m]"),
    ("A[m] -> Y[m], Y[m]", "two operands 'Y'", "Y[m]"),
    ("A[m] -> Y?[m]", "every output may be missing", "?[m]"),
    ("A[m] -> Y*[m]", "every output may be missing", "*[m]"),
    ("A*[m], B[m] -> Y[m]", "never reached", "B[m] -> Y[m]"),
    ("A?*[m] -> Y[m]", "may be missing anyway", "?*[m] -> Y[m]"),
    ("A[m] -> Y[~m]", "a mark has no meaning in an output", "~m]"),
    ("A[m] -> Y[m!]", "a mark has no meaning in an output", "m!]"),
    ("A[(m n)] -> Y[(m ~n)]", "a mark has no meaning in an output", "(m ~n)]"),
    ("A[*s!] -> Y[*s]", "'!' reads one axis", "!] -> Y[*s]"),
    ("A[...!] -> Y[...]", "'!' reads one axis", "!] -> Y[...]"),
    ("A[~3 m] -> Y[m]", "a mark has no meaning on a number", "~3 m] -> Y[m]"),
    ("A[3! m] -> Y[m]", "a mark has no meaning on a number", "3! m] -> Y[m]"),
    ("A[(~3 m)] -> Y[m]", "a mark has no meaning on a number", "3 m)] -> Y[m]"),
    ("A[(m ~3)] -> Y[m]", "a mark has no meaning on a number", "3)] -> Y[m]"),
    ("A[*s *t] -> Y[*s *t]", "one '\\*' or '...' at most", "*t] -> Y[*s *t]"),
    ("A[*s *s] -> Y[*s]", "one '\\*' or '...' at most", "*s] -> Y[*s]"),
    ("A[... *s] -> Y[...]", "one '\\*' or '...' at most", "*s] -> Y[...]"),
    ("A[*] -> Y[m]", "the name of a star is missing", "] -> Y[m]"),
    ("A[s *s] -> Y[s *s]", "'s' is a letter and a star", "*s] -> Y[s *s]"),
    ("A[... k], B[... k] -> Y[]", "passes axes from operands to outputs", "... k], B[... k] -> Y[]"),
    ("A[m] -> Y[... m]", "passes axes from operands to outputs", "... m]"),
    ("A[(m] -> Y[m]", "'\\)' is missing", "(m] -> Y[m]"),
    ("A[m)] -> Y[m]", "is missing", ")] -> Y[m]"),
    ("A[((m k) n)] -> Y[m]", "'\\)' is missing", "((m k) n)] -> Y[m]"),
    ("A[()] -> Y[m]", "one factor at least", "()] -> Y[m]"),
    ("A[m+] -> Y[m]", "a letter or a number is missing", "] -> Y[m]"),
    ("A[+m] -> Y[m]", "a letter or a number is missing", "+m] -> Y[m]"),
    ("A[m n] -> Y[m]]", "'\\]' has no meaning here", "]"),
    ("A[0 m] -> Y[m]", "one index at least", "0 m] -> Y[m]"),
    ("A[3x m] -> Y[m]", "begins with a letter", "3x m] -> Y[m]"),
    ("A[_ m] -> Y[m]", "'_' names operands", "_ m] -> Y[m]"),
    ("A[m] -> Y[m]; group = g", "'g' stands in no operand", "g"),
    ("A[m] -> Y[m]; group = ~m", "without marks", "~m"),
    ("A[m] -> Y[m]; group = m else m", "a number is missing after 'else'", "m"),
    ("A[m] -> Y[m]; group m", "'=' is missing after 'group'", "m"),
    ("A[m] -> Y[m]; group = m; group = m", "two clauses 'group'", "group = m"),
    ("A[m] -> Y[m]; group = m; sets = m; group = m", "two clauses 'group'", "group = m"),
    ("A[m] -> Y[m]; macs = m; macs = m", "two clauses 'macs'", "macs = m"),
    ("A[m] -> Y[m]; macs = m k", "'k' stands in no operand", "k"),
    ("A[m] -> Y[m]; macs = m +", "a letter, a star or a number is missing", ""),
    ("A[m] -> Y[m]; frozen m", "a reason are missing", ""),
    ("A[m] -> Y[m]; frozen: looks it up", "a letter, a star or a number is missing", ": looks it up"),
    ("A[m] -> Y[m]; frozen *s: looks it up", "'\\*s' stands in no operand", "*s: looks it up"),
    ("A[m] -> Y[m]; group = m: one", "a reason belongs to 'frozen'", ": one"),
    ("A[m] -> Y[m];", "a clause", ""),
]


@pytest.mark.parametrize(("line", "what", "piece"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_what_has_no_meaning_is_refused_where_it_is_registered(line: str, what: str, piece: str) -> None:
    with pytest.raises(ValueError, match=f"cannot read the notation: .*{what}") as refusal:
        rule_of(line)
    _, quoted, caret = str(refusal.value).split("\n")
    assert quoted == f"  {line}"
    assert line[len(caret) - 3 :] == piece


@pytest.mark.parametrize("line", ["X[n (a b)] -> Y[n (a b)]", "X[(a a)] -> Y[(a b)]"])
def test_a_line_that_leaves_sizes_open_is_refused_where_it_is_registered(line: str) -> None:
    with pytest.raises(ValueError, match="nothing tells the sizes of 'a', 'b'"):
        rule_of(line)
    parse(line)  # a rule that computes the sizes may still apply it


@given(st.text(alphabet="AB[]()+*~!?,;:=_.mk 3->", max_size=20))
def test_any_text_is_parsed_or_refused_with_a_reason(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert str(error).startswith("cannot read the notation: ")


# -- applying -------------------------------------------------------------------------------------------------------


def test_the_same_letter_is_the_same_dimension() -> None:
    op = make([(5, 7), (7, 3)], [(5, 3)])
    letters = apply(op, "A[m k], B[k n] -> Y[m n]")
    assert show(op) == "a b"
    assert {k: e.size for k, e in letters.items()} == {"m": 5, "k": 7, "n": 3}
    assert op.space.resolve(op.axes(0)[1]) is op.space.resolve(op.axes(1)[0])


def test_the_reader_is_the_operand_of_weights() -> None:
    for constant, operand in (((False, True), 1), ((True, False), 0), ((False, False), 0)):
        op = make([(5, 7), (7, 3)], [(5, 3)], constant)
        apply(op, "A[m k], B[k n] -> Y[m n]")
        (read,) = op.reads
        assert (read.operand, read.axis) == (operand, 1 - operand)
        assert read.others == ((1 - operand, operand),)


def test_an_attribute_fixes_the_size_of_a_letter() -> None:
    op = make([(2, 6, 5, 5), (9, 2, 3, 3), (9,)], [(2, 9, 3, 3)])
    letters = apply(op, CONV, {"g": 3})
    assert {k: letters[k].size for k in "ngio"} == {"n": 2, "g": 3, "i": 2, "o": 3}
    assert show(op) == "a (b c) d e"


def test_an_optional_operand_may_be_missing() -> None:
    for inputs in ([(2, 6, 5), (9, 6, 3)], [(2, 6, 5), (9, 6, 3), None]):
        op = make(inputs, [(2, 9, 3)])
        apply(op, CONV, {"g": 1})
        assert show(op) == "a b c"


def test_a_required_operand_may_not_be_missing() -> None:
    with pytest.raises(Barrier):
        apply(make([(2, 6, 5), None], [(2, 9, 3)]), CONV, {"g": 1})


def test_stars_take_any_number_of_axes() -> None:
    for rank in range(4):
        op = make([(2, 3, *(5,) * rank)], [(3, 2, *(5,) * rank)])
        apply(op, "X[a b *s] -> Y[b a *s]")
        assert len(op.outputs[0] or ()) == rank + 2
        assert show(op) == " ".join("abcdef"[: rank + 2])


def test_dots_pass_all_leading_axes_through() -> None:
    op = make([(2, 3, 5, 6)], [(2, 3, 5, 12)])
    apply(op, "X[... h] -> Y[... (2 h)]")
    assert show(op) == "a b c (d e)"
    fixed = op.space.resolve((op.outputs[0] or ())[3])
    assert [op.space.reason(d) for d in leaves(fixed)] == ["MyOp 'mine' fixes its size", None]


def test_a_sum_of_equal_parts_is_one_dimension_twice() -> None:
    op = make([(6,)], [(3,)])
    apply(op, "X[h+h] -> Y[h]")
    assert op.space.show(op.axes(0)[0], dict.fromkeys(leaves(op.space.resolve(op.axes(0)[0])), "h")) == "h+h"


def test_an_opaque_letter_is_frozen_with_the_operator_as_reason() -> None:
    op = make([(5, 7)], [(5,)])
    apply(op, "X[m k] -> Y[m]")
    (dim,) = leaves(op.space.resolve(op.axes(0)[1]))
    assert op.space.reason(dim) == "MyOp 'mine' does not pass it on"


def test_a_crossing_letter_is_marked() -> None:
    op = make([(5, 7)], [(5, 7)])
    apply(op, "X[m ~k] -> Y[m k]")
    assert crossings(op) == [False, True]


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        ("X[n c ~*s] -> Y[n c *s]", [False, False, True, True]),
        ("X[~... c] -> Y[... c]", [True, True, True, False]),
        ("X[n ~*s c] -> Y[n *s c]", [False, True, True, False]),
        ("X[n ~*s] -> Y[n]", [False, True, True, True]),
    ],
)
def test_every_axis_of_a_crossing_star_is_marked(line: str, marked: list[bool]) -> None:
    op = make([(2, 3, 5, 7)], [(2, 3, 5, 7) if "*s]" in line.split("->")[1] or "c]" in line else (2,)])
    apply(op, line)
    assert crossings(op) == marked
    assert [op.space.reason(d) for e in op.axes(0) for d in leaves(e)] == [None] * 4


def test_one_factor_of_a_product_can_cross() -> None:
    op = make([(5, 6)], [(5, 6)], groups=2)
    apply(op, "X[n (g ~c)] -> Y[n (g c)]; groups = g")
    assert [bool(op.space.crossings(d)) for d in leaves(op.space.resolve(op.axes(0)[1]))] == [False, True]


def crossings(op: Op) -> list[bool]:
    return [bool(op.space.crossings(d)) for e in op.axes(0) for d in leaves(op.space.resolve(e))]


def test_a_recurrent_operand_reads_its_own_dimension() -> None:
    op = make([(5, 7), (7, 7)], [(5, 7)], [False, True])
    apply(op, "X[n h], R[h h!] -> Y[n h]")
    (read,) = op.reads
    assert (read.operand, read.axis) == (1, 1)


@pytest.mark.parametrize(
    ("shapes", "sizes", "reason"),
    [
        ([(2, 6), (9, 2, 3)], {"g": 3}, "W has 3 axes|X has 2 axes|do not fit"),
        ([(2, 7, 5), (9, 2, 3)], {"g": 3}, "do not fit"),
        ([(2, 6, 5), (8, 2, 3)], {"g": 3}, "do not fit"),
        ([(2,), (9, 2, 3)], {"g": 3}, "X has 1 axes, expected at least 2"),
    ],
)
def test_shapes_that_do_not_fit_are_a_barrier(
    shapes: list[tuple[int, ...]], sizes: dict[str, int], reason: str
) -> None:
    if shapes[0] == (2, 6):  # an empty star is an axis pattern, too, and fits
        apply(make(shapes, [(2, 9)]), CONV, sizes)
        return
    with pytest.raises(Barrier, match=reason):
        apply(make(shapes, [(2, 9, 3)]), CONV, sizes)


def test_sizes_that_nothing_tells_are_a_barrier() -> None:
    with pytest.raises(Barrier, match="leave sizes open"):
        apply(make([(2, 6)], [(2, 6)]), "X[n (a b)] -> Y[n (a b)]")


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_place_after_a_star_counts_the_axes_of_the_star() -> None:
    for rank in range(4):
        op = make([(2, *(5,) * rank, 7), (7, 3)], [(2, *(5,) * rank, 3)], [False, True])
        apply(op, "X[n *s c], W[c o] -> Y[n *s o]")
        (read,) = op.reads
        assert (read.operand, read.axis, read.others) == (1, 0, ((0, rank + 1),))
        op = make([(2, *(5,) * rank, 7), (7, 3)], [(2, *(5,) * rank, 3)], [True, False])
        apply(op, "X[n *s c], W[c o] -> Y[n *s o]")
        (read,) = op.reads
        assert (read.operand, read.axis, read.others) == (0, rank + 1, ((1, 0),))
        assert read.expr is op.axes(0)[rank + 1]


def test_a_read_and_a_crossing_after_a_star_are_at_the_last_axis() -> None:
    op = make([(2, 5, 3, 7)], [(2, 5, 3, 7)])
    apply(op, "X[n *s ~c!] -> Y[n *s c]")
    assert [(r.operand, r.axis) for r in op.reads] == [(0, 3)]
    assert crossings(op) == [False, False, False, True]


def test_every_axis_of_a_contracted_star_is_read() -> None:
    op = make([(2, 5, 7), (5, 7, 3)], [(2, 3)], [False, True])
    apply(op, "X[n *k], W[*k o] -> Y[n o]")
    assert [(r.operand, r.axis, r.others) for r in op.reads] == [(1, 0, ((0, 1),)), (1, 1, ((0, 2),))]


def test_operands_that_read_a_letter_by_themselves_do_not_contract_it_together() -> None:
    op = make([(5, 7), (3, 7)], [(5, 3)])
    apply(op, "A[m k!], B[n k!] -> C[m n]")
    assert [(r.operand, r.axis, r.others) for r in op.reads] == [(0, 1, ()), (1, 1, ())]


def test_an_optional_operand_in_the_middle_may_be_missing() -> None:
    line = "X[n i], S?[i], W[o i] -> Y[n o]"
    for middle, others in (((7,), ((0, 1), (1, 0))), (None, ((0, 1),))):
        op = make([(2, 7), middle, (3, 7)], [(2, 3)], [False, False, True])
        apply(op, line)
        assert [(r.operand, r.axis, r.others) for r in op.reads] == [(2, 1, others)]
        assert op.space.resolve(op.axes(0)[1]) is op.space.resolve(op.axes(2)[1])


def test_what_is_contracted_with_an_operand_that_is_missing_is_frozen() -> None:
    op = make([(5, 7), None], [(5,)])
    apply(op, "A[m k], B?[k] -> Y[m]")
    assert op.reads == []
    assert op.space.is_frozen(op.axes(0)[1])
    assert not op.space.is_frozen(op.axes(0)[0])


def test_what_passes_only_to_an_output_that_is_not_produced_is_frozen() -> None:
    op = make([(5, 7)], [(5,), None])
    op.node.proto.output[1] = ""
    apply(op, "A[m k] -> Y[m], Z[m k]")
    assert op.space.is_frozen(op.axes(0)[1])
    assert not op.space.is_frozen(op.axes(0)[0])


def test_an_axis_that_only_outputs_have_is_computed_by_the_operator() -> None:
    op = make([(5,)], [(5, 7), (7,)])
    apply(op, "A[m] -> Y[m k], Z[k]")
    ((dim,),) = ([*leaves(e)] for e in op.outputs[1] or ())
    assert op.space.reason(dim) == "MyOp 'mine' computes it"


# -- dots, repetition, clauses ----------------------------------------------------------------------------------------


def test_leading_axes_broadcast() -> None:
    op = make([(2, 1, 5, 7), (3, 7, 4)], [(2, 3, 5, 4)])
    apply(op, "A[... m k], B[... k n] -> Y[... m n]")
    assert show(op) == "a b c d"
    assert (op.outputs[0] or ())[0] is op.axes(0)[0]
    assert (op.outputs[0] or ())[1] is op.axes(1)[0]
    assert [(r.operand, r.axis, r.others) for r in op.reads] == [(0, 3, ((1, 1),))]


def test_an_operand_that_repeats_stands_for_all_further_ones() -> None:
    op = make([(2, 5), (5,), None, (2, 1)], [(2, 5)])
    apply(op, "_*[...] -> _[...]")
    assert op.seen == {0, 1, 3}
    assert op.space.resolve(op.axes(1)[0]) is op.space.resolve(op.axes(0)[1])
    assert op.space.resolve(op.axes(3)[0]) is op.space.resolve(op.axes(0)[0])


@pytest.mark.parametrize(("line", "missing"), [("A[m], B[m] -> Y[m]", "B"), ("_[m], _[m] -> _[m]", "1")])
def test_an_operand_that_a_node_lacks_is_named_or_numbered(line: str, missing: str) -> None:
    with pytest.raises(Barrier, match=f"operand {missing} is missing"):
        apply(make([(5,), None], [(5,)]), line)


@pytest.mark.parametrize(("attributes", "size", "ties"), [({"group": 3}, 3, ["group"]), ({}, 1, [])])
def test_an_attribute_is_the_size_of_a_letter_and_follows_it(
    attributes: dict[str, int], size: int, ties: list[str]
) -> None:
    op = make([(2, 6, 5), (9, 6 // size, 3)], [(2, 9, 3)], **attributes)
    letters = apply(op, "X[n (g i) *s], W[(g o) i *k] -> Y[n (g o) *t]; group = g else 1")
    assert letters["g"].size == size
    assert [t.attribute for t in op.ties] == ties
    if ties:
        (g,) = leaves(op.space.resolve(letters["g"]))
        assert op.ties[0].restate(Kept(op.space, {g: np.asarray([True, False, True])}), 3) == 2


def test_an_attribute_that_contradicts_the_shapes_is_a_barrier() -> None:
    with pytest.raises(Barrier, match="do not fit"):
        apply(make([(2, 7)], [(2, 7)], groups=3), "X[n (g c)] -> Y[n (g c)]; groups = g")


def test_multiply_accumulates_are_counted_as_the_line_says() -> None:
    op = make([(2, 6, 11), (10, 3, 5)], [(2, 10, 7)], group=2)
    apply(op, "X[n (g i) *s], W[(g o) i *k] -> Y[n (g o) *t]; group = g else 1; macs = n g o i *t *k + 4 n")
    assert [prod(e.size for e in axes) for axes in op.macs] == [2 * 10 * 3 * 7 * 5, 4 * 2]


def test_a_frozen_clause_gives_its_reason() -> None:
    op = make([(5, 7, 3)], [(5, 7, 3)])
    apply(op, "X[a b *s] -> Y[a b *s]; frozen b *s: looks it up")
    reasons = [op.space.reason(d) for e in op.axes(0) for d in leaves(op.space.resolve(e))]
    assert reasons == [None, "MyOp 'mine' looks it up", "MyOp 'mine' looks it up"]


def test_stars_of_different_shapes_are_a_barrier() -> None:
    with pytest.raises(Barrier, match="do not fit"):
        apply(make([(2, 5), (2, 5, 3)], [(2, 5)]), "A[n *s], B[n *s] -> Y[n *s]")


def test_shapes_follow_from_operands_and_attributes() -> None:
    assert output_shapes("X[n (g c)] -> Y[n g], Z[c]; groups = g", [(2, 6)], {"groups": 2}) == [(2, 2), (3,)]
    assert output_shapes("X[n (g c)] -> Y[n g], Z[n]; groups = g", [(2, 6)], {}) == [None, (2,)]
    assert output_shapes("X[n c] -> Y[n c]", [(2,)]) == [None]
    assert output_shapes("X[n *s] -> Y[*s n], Z[*t]", [(2, 5, 7)]) == [(5, 7, 2), None]


def test_a_rule_can_compute_its_sizes_from_the_node() -> None:
    op = make([(2, 6)], [(2, 6)])
    rule_of("X[n (a b)] -> Y[n (b a)]", lambda op: {"a": 2})(op)
    assert show(op) == "a (b c)"
    assert [d.size for d in leaves(op.space.resolve((op.outputs[0] or ())[1]))] == [3, 2]


# -- found by mutation ------------------------------------------------------------------------------------------------


def test_an_operand_that_reads_by_itself_is_no_place_of_the_others_contraction() -> None:
    op = make([(5, 7), (7, 3), (2, 7)], [(5, 3, 2)])
    apply(op, "A[m k], B[k n], C[q k!] -> Y[m n q]")
    assert [(r.operand, r.axis, r.others) for r in op.reads] == [(2, 1, ()), (0, 1, ((1, 0),))]


def test_a_letter_whose_size_the_rule_gives_is_left_to_the_rule() -> None:
    op = make([(6,), None], [(5,)])
    letters = apply(op, "A[(u a)], B?[(u b)] -> Y[n]", {"u": 2})
    assert not op.space.is_frozen(letters["u"])
    assert op.space.is_frozen(letters["a"])


def test_a_star_in_two_operands_is_the_same_dimensions() -> None:
    op = make([(2, 5, 7), (5, 7)], [(2, 5, 7)])
    apply(op, "A[n *s], B[*s] -> Y[n *s]")
    for axis in (0, 1):
        assert op.space.resolve(op.axes(0)[axis + 1]) is op.space.resolve(op.axes(1)[axis])


def test_the_value_of_an_attribute_that_is_missing_is_what_the_line_says() -> None:
    assert apply(make([(6,)], [(6,)]), "X[(g c)] -> Y[(g c)]; groups = g else 2")["c"].size == 3
    assert apply(make([(6,)], [(6,)], groups=3), "X[(g c)] -> Y[(g c)]; groups = g else 2")["c"].size == 2


def test_an_axis_of_single_indices_gives_its_letter_a_dimension_that_says_so() -> None:
    op = make([(2,)], [(2,)])
    op.inputs[0] = (Sum((UNIT, UNIT)),)
    (dim,) = leaves(apply(op, "X[n] -> Y[n]")["n"])
    assert op.space.reason(dim) == "it consists of single indices"


def test_opaque_letters_and_stars_say_why() -> None:
    op = make([(5, 6, 3), (2,)], [(5, 2, 7)])
    letters = apply(op, "X[m (k j) *s], W[k] -> Y[m k *t]")
    assert op.space.reason(*leaves(letters["j"])) == "MyOp 'mine' does not pass it on"
    assert op.space.reason(*leaves(op.axes(0)[2])) == "MyOp 'mine' uses it as a spatial axis"
    assert op.space.reason(*leaves((op.outputs[0] or ())[2])) == "MyOp 'mine' computes it"


def test_a_letter_of_two_sizes_is_a_barrier() -> None:
    with pytest.raises(Barrier, match="do not fit"):
        apply(make([(5, 7)], [(5,)]), "A[m m] -> Y[m]")
