"""The notation: parsing, binding sizes, and what a line means for a node."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from spa.algebra.axes import Dim, Space, leaves
from spa.algebra.notation import apply, parse, rule_of
from spa.algebra.op import Barrier, Op
from spa.model.graph import Node

CONV = "X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]"


def make(
    inputs: Sequence[tuple[int, ...] | None],
    outputs: Sequence[tuple[int, ...] | None],
    constant: Sequence[bool] | None = None,
) -> Op:
    space = Space()
    node = Node(helper.make_node("MyOp", [f"i{i}" for i in range(len(inputs))], ["o"], name="mine"), 0, 1)
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


def test_a_letter_that_stands_once_is_opaque() -> None:
    assert parse(CONV).opaque == {"*s", "*k", "*t"}
    assert parse("A[m k] -> Y[m]").opaque == {"k"}


def test_numbers_sums_stars_dots_and_marks_are_read() -> None:
    (axis, star, dots) = parse("A[(3 h)+d *s ...] -> Y[h d]").inputs[0].axes or ()
    assert axis.terms == ((3, "h"), ("d",))
    assert (star.star, dots.star) == ("s", "...")
    (crossing, read) = parse("A[~c r!] -> Y[c r]").inputs[0].axes or ()
    assert (crossing.crosses, crossing.reads) == (True, False)
    assert (read.crosses, read.reads) == (False, True)


def test_a_bare_operand_carries_no_axes() -> None:
    assert parse("X[n], shape -> Y[n]").inputs[1].axes is None


@pytest.mark.parametrize("line", ["A[m] Y[m]", "A[m", "A[m) -> Y[m]", "A[m, k] -> Y[m]", "A[-] -> Y[m]", "[m] -> Y[m]"])
def test_a_malformed_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"no '->'|cannot read"):
        parse(line)
    with pytest.raises(ValueError, match=r"no '->'|cannot read"):
        rule_of(line)  # on registration, not on first use


@given(st.text(alphabet="AB[]()+*~!?,.mk 3->", max_size=20))
def test_any_text_is_parsed_or_refused_with_a_reason(text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        assert str(error).startswith(("no '->'", "cannot read"))


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
    assert [op.space.reason(d) for d in leaves(fixed)] == ["fixed by MyOp 'mine'", None]


def test_a_sum_of_equal_parts_is_one_dimension_twice() -> None:
    op = make([(6,)], [(3,)])
    apply(op, "X[h+h] -> Y[h]")
    assert op.space.show(op.axes(0)[0], dict.fromkeys(leaves(op.space.resolve(op.axes(0)[0])), "h")) == "h+h"


def test_an_opaque_letter_is_frozen_with_the_operator_as_reason() -> None:
    op = make([(5, 7)], [(5,)])
    apply(op, "X[m k] -> Y[m]")
    (dim,) = leaves(op.space.resolve(op.axes(0)[1]))
    assert op.space.reason(dim) == "not traced through MyOp 'mine'"


def test_a_crossing_letter_is_marked() -> None:
    op = make([(5, 7)], [(5, 7)])
    apply(op, "X[m ~k] -> Y[m k]")
    (dim,) = leaves(op.space.resolve(op.axes(0)[1]))
    assert op.space.crossings(dim) == ("MyOp 'mine'",)


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


def test_a_rule_can_compute_its_sizes_from_the_node() -> None:
    op = make([(2, 6)], [(2, 6)])
    rule_of("X[n (a b)] -> Y[n (b a)]", lambda op: {"a": 2})(op)
    assert show(op) == "a (b c)"
    assert [d.size for d in leaves(op.space.resolve((op.outputs[0] or ())[1]))] == [3, 2]
