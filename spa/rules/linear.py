"""Operators with weights that contract a dimension: convolutions, matrix products, Einsum."""

from __future__ import annotations

from collections.abc import Mapping

from spa.algebra.axes import UNIT, Expr
from spa.algebra.notation import apply
from spa.algebra.op import Barrier, Op
from spa.rules import rule


def convolution(
    op: Op, line: str, weights: int = 1, swept: int | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, Expr]:
    """Any convolution by its line of notation, in the letters n, g, i, o.

    Args:
        op: the node.
        line: the law.
        weights: the operand with the kernels.
        swept: the operand whose positions each kernel is applied to; the output by default.
        sizes: of further letters that the shapes alone do not tell.

    Returns:
        Each letter's dimension.
    """
    letters = apply(op, line, {"g": op.attr("group", 1), **(sizes or {})})
    if "group" in op.node.attributes:
        op.tie_attribute("group", letters["g"])
    swept_axes = (op.outputs[0] or ()) if swept is None else op.axes(swept)
    op.count_macs(letters["n"], letters["g"], letters["i"], letters["o"], *swept_axes[2:], *op.axes(weights)[2:])
    return letters


CONV = "X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]"


@rule("Conv")
def conv(op: Op) -> None:
    """Convolution: drop whole groups (g), or one place in each (i, o). Spec: onnx__Conv.html."""
    convolution(op, CONV)


@rule("ConvTranspose")
def conv_transpose(op: Op) -> None:
    """Transposed convolution: the weight's axes are swapped. Spec: onnx__ConvTranspose.html."""
    convolution(op, "X[n (g i) *s], W[(g i) o *k], B?[(g o)] -> Y[n (g o) *t]", swept=0)


def gemm_axes(op: Op, left: int, right: int) -> tuple[Expr, Expr, Expr]:
    """A matrix product of two matrices; transA and transB swap letters. Returns rows, columns and the inner axis."""
    a, b = op.axes(left), op.axes(right)
    at_a, at_b = (0 if op.attr("transA", 0) else 1), (1 if op.attr("transB", 0) else 0)
    op.contract((left, at_a), (right, at_b))
    rows, columns, inner = a[1 - at_a], b[1 - at_b], a[at_a]
    op.count_macs(rows, columns, inner)
    return rows, columns, inner


@rule("Gemm")
def gemm(op: Op) -> None:
    """A matrix product with bias, which broadcasts. Spec: onnx__Gemm.html."""
    rows, columns, _ = gemm_axes(op, 0, 1)
    if op.has(2):
        for have, want in zip(op.axes(2)[::-1], (columns, rows), strict=False):
            if have.size != 1:
                op.unify(have, want)
    op.set(0, (rows, columns))


def matmul_axes(op: Op, left: int, right: int, trans: tuple[bool, bool] = (False, False)) -> list[Expr]:
    """numpy.matmul of two operands: batch axes broadcast, the inner axis is contracted. Returns the output's axes."""
    a, b = list(op.axes(left)), list(op.axes(right))
    place_a = (left, len(a) - (2 if trans[0] and len(a) > 1 else 1))
    place_b = (right, len(b) - (1 if trans[1] and len(b) > 1 else 2) if len(b) > 1 else 0)
    op.contract(place_b, place_a) if op.constant[right] else op.contract(place_a, place_b)
    inner = a[place_a[1]]
    rows = [] if len(a) == 1 else [a[-1] if trans[0] else a[-2]]
    columns = [] if len(b) == 1 else [b[-2] if trans[1] else b[-1]]
    batch: list[Expr] = []
    for position in range(-max(len(a), len(b), 2), -2):
        pair = [x[position] for x in (a, b) if len(x) >= -position and x[position].size != 1]
        if len(pair) == 2:
            op.unify(*pair)
        batch.append(pair[0] if pair else UNIT)
    result = batch + rows + columns
    op.count_macs(*result, inner)
    return result


@rule("MatMul")
def matmul(op: Op) -> None:
    """numpy.matmul. Spec: onnx__MatMul.html."""
    op.set(0, matmul_axes(op, 0, 1))


@rule("Einsum")
def einsum(op: Op) -> None:
    """The equation is the law. Spec: onnx__Einsum.html; ellipses broadcast."""
    equation = op.attr("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    letters: dict[str, Expr] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    dots: list[list[Expr]] = []
    for operand, term in enumerate(terms):
        axes = op.axes(operand)
        before, ellipsis, after = term.partition("...")
        named = [*enumerate(before), *((len(axes) - len(after) + i, c) for i, c in enumerate(after))]
        if ellipsis:
            dots.append(list(axes[len(before) : len(axes) - len(after)]))
        for axis, letter in named:
            if letter in letters and axes[axis].size != letters[letter].size:
                raise Barrier("its letters stretch axes of one index")
            if letter in letters:
                op.unify(letters[letter], axes[axis])
            letters.setdefault(letter, axes[axis])
            places.setdefault(letter, []).append((operand, axis))
    if not arrow:
        right = ("..." if dots else "") + "".join(sorted(c for c in letters if left.count(c) == 1))
    rank = max((len(d) for d in dots), default=0)
    shared: list[Expr] = []
    for position in range(-rank, 0):
        some = [d[position] for d in dots if len(d) >= -position and d[position].size != 1]
        for other in some[1:]:
            op.unify(some[0], other)
        shared.append(some[0] if some else UNIT)
    for letter, where in places.items():
        if letter not in right:
            op.contract(*where)
    before, ellipsis, after = right.partition("...")
    op.set(0, [*(letters[c] for c in before), *(shared if ellipsis else []), *(letters[c] for c in after)])
    if len(terms) > 1:
        op.count_macs(*letters.values(), *shared)


@rule("Det")
def determinant(op: Op) -> None:
    """The last two axes are consumed whole."""
    axes = op.axes(0)
    for e in axes[-2:]:
        op.freeze(e, "consumed whole by")
    op.set(0, axes[:-2])


@rule("com.microsoft::FusedConv")
def fused_conv(op: Op) -> None:
    """Conv with an activation and an optional sum: Z has the output's axes. Spec: ContribOperators.md."""
    convolution(op, "X[n (g i) *s], W[(g o) i *k], B?[(g o)], Z?[n (g o) *t] -> Y[n (g o) *t]")
    for e in (op.outputs[0] or ())[2:]:
        op.freeze(e, "spatial axis of")


@rule("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
def fused_matmul(op: Op) -> None:
    """MatMul with transposed operands. Spec: ContribOperators.md#com.microsoft.FusedMatMul."""
    if op.attr("transBatchA", 0) or op.attr("transBatchB", 0):
        raise Barrier("its batch axes are transposed")
    op.set(0, matmul_axes(op, 0, 1, (bool(op.attr("transA", 0)), bool(op.attr("transB", 0)))))


@rule("com.microsoft::FusedGemm", "com.microsoft::GemmFastGelu")
def fused_gemm(op: Op) -> None:
    """Gemm with an activation; GemmFastGelu is X·W + bias."""
    if op.node.op == "FusedGemm":
        gemm(op)
        return
    result = matmul_axes(op, 0, 1)
    if op.has(2):
        op.unify(op.axes(2)[0], result[-1])
    op.set(0, result)
