"""Mixtures of experts in one operator."""

from spa.algebra.axes import Expr, product
from spa.algebra.op import Barrier, Op
from spa.rules import rule

INTERLEAVED = 1  # the value of `swiglu_fusion` at which gates and values take turns


@rule("com.microsoft::MoE")
def mixture(op: Op) -> None:
    """Send each row X[*r h] by P[(*r) e] to a few experts, W1[e (f i) h], W2[e h i], of inner width i.

    Statistics are taken over the experts: which of them a row goes to, and with which weight. Never fewer than `k` are
    asked for than there are.

    Spec: ContribOperators.md#com.microsoft.MoE.
    """
    if len(op.inputs) > 8:
        raise Barrier("its rule does not know its last operands")
    *rows, h = op.axes(0)
    e, i = op.axes(4)[0], op.axes(4)[2]
    op.unify(op.axes(1)[0], product(*rows))
    op.unify(op.axes(1)[1], e)
    first = _fused(op, i)
    for operand, axes in (
        (2, (e, first, h)),
        (3, (e, first)),
        (4, (e, h, i)),
        (5, (e, h)),
        (6, (e, i, h)),
        (7, (e, i)),
    ):
        for have, want in zip(op.axes(operand), axes, strict=True) if op.has(operand) else ():
            op.unify(have, want)
    op.cross(e)
    last = len(rows)
    op.contract((2, 2), (0, last))
    if op.has(6):
        op.contract((6, 2), (0, last))
    op.contract((4, 2))
    op.tie(lambda kept, old: min(old, kept.size(e)), attribute="k")
    op.set(0, op.axes(0))
    picked = op.opaque(min(op.attr("k", 1), e.size), "picks as many")
    for width in (first, i):
        op.count_macs(*rows, picked, width, h)


def _fused(op: Op, i: Expr) -> Expr:
    """Return the first layer's axis: the inner width, twice where gates lie beside values."""
    fused = op.axes(2)[1].size // i.size
    if fused == 1:
        return i
    turns = op.attr("swiglu_fusion", 0) == INTERLEAVED
    pair = op.opaque(fused, "has gates beside values")
    return product(i, pair) if turns else product(pair, i)
