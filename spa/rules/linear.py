"""Operators with weights that contract a dimension: convolutions, matrix products, Einsum."""

from __future__ import annotations

from spa.algebra.axes import UNIT, Expr
from spa.algebra.op import Barrier, Op
from spa.rules import rule

CONV = "X[n (g i) *s], W[(g o) i *k], B?[(g o)] -> Y[n (g o) *t]; group = g else 1; macs = n g o i *t *k"

rule(
    "Conv",
    CONV,
    doc="Convolve: whole groups go (g), or one place in each (i, o). Spec: https://onnx.ai/onnx/operators/onnx__Conv.html.",
)
rule(
    "ConvTranspose",
    "X[n (g i) *s], W[(g i) o *k], B?[(g o)] -> Y[n (g o) *t]; group = g else 1; macs = n g i o *s *k",
    doc="Transposed convolution: the weight's axes are swapped. Spec: https://onnx.ai/onnx/operators/onnx__ConvTranspose.html.",
)
rule(
    "com.microsoft::FusedConv",
    "X[n (g i) *s], W[(g o) i *k], B?[(g o)], Z?[n (g o) *t] -> Y[n (g o) *t]; group = g else 1; "
    "macs = n g o i *t *k; frozen *t: uses it as a spatial axis",
    doc="Convolve as Conv does, with an activation and an optional sum. "
    "Spec: ContribOperators.md#com.microsoft.FusedConv.",
)


def gemm_axes(op: Op, left: int, right: int) -> tuple[Expr, Expr, Expr]:
    """Contract two matrices, which transA and transB transpose; return rows, columns and the inner axis."""
    a, b = op.axes(left), op.axes(right)
    at_a, at_b = (0 if op.attr("transA", 0) else 1), (1 if op.attr("transB", 0) else 0)
    op.contract((left, at_a), (right, at_b))
    rows, columns, inner = a[1 - at_a], b[1 - at_b], a[at_a]
    op.count_macs(rows, columns, inner)
    return rows, columns, inner


@rule("Gemm")
def gemm(op: Op) -> None:
    """Contract two matrices and add a bias, which broadcasts.

    Spec: https://onnx.ai/onnx/operators/onnx__Gemm.html.
    """
    rows, columns, _ = gemm_axes(op, 0, 1)
    if op.has(2):
        for have, want in zip(op.axes(2)[::-1], (columns, rows), strict=False):
            if have.size != 1:
                op.unify(have, want)
    op.set(0, (rows, columns))


def matmul_axes(op: Op, left: int, right: int, trans: tuple[bool, bool] = (False, False)) -> list[Expr]:
    """Contract two operands as numpy.matmul does: batch axes broadcast; return the output's axes."""
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
    """Contract two operands as numpy.matmul does. Spec: https://onnx.ai/onnx/operators/onnx__MatMul.html."""
    op.set(0, matmul_axes(op, 0, 1))


@rule("Einsum")
def einsum(op: Op) -> None:
    """Take the equation as the law; ellipses broadcast. Spec: https://onnx.ai/onnx/operators/onnx__Einsum.html."""
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


rule(
    "Det",
    "X[... m n] -> Y[...]; frozen m n: consumes it whole",
    doc="The last two axes are consumed whole. Spec: https://onnx.ai/onnx/operators/onnx__Det.html.",
)


@rule("com.microsoft::FusedMatMul", "com.microsoft::TransposeMatMul")
def fused_matmul(op: Op) -> None:
    """Contract operands as MatMul does, transposed or not. Spec: ContribOperators.md#com.microsoft.FusedMatMul."""
    if op.attr("transBatchA", 0) or op.attr("transBatchB", 0):
        raise Barrier("its batch axes are transposed")
    op.set(0, matmul_axes(op, 0, 1, (bool(op.attr("transA", 0)), bool(op.attr("transB", 0)))))


@rule("com.microsoft::FusedGemm", "com.microsoft::GemmFastGelu")
def fused_gemm(op: Op) -> None:
    """Contract matrices as Gemm does, with an activation; GemmFastGelu is X·W + bias.

    Spec: ContribOperators.md#com.microsoft.FusedGemm.
    """
    if op.node.op == "FusedGemm":
        gemm(op)
        return
    result = matmul_axes(op, 0, 1)
    if op.has(2):
        op.unify(op.axes(2)[0], result[-1])
    op.set(0, result)
