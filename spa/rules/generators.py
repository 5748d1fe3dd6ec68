"""Operators that make a tensor of their own: constants, sizes, ranges, windows."""

from spa.algebra.op import Op
from spa.rules import rule


@rule("Constant")
def constant(op: Op) -> None:
    """A value that is no plain tensor (sparse, or strings): its axes stay whole."""
    op.set_opaque(0)


@rule("Shape", "Size")
def sizes(op: Op) -> None:
    """Sizes as data. Known ones are folded before any rule is asked; the input's axes may shrink only there."""
    for e in op.axes(0):
        op.freeze(e, "measured by")
    op.set_opaque(0)


@rule(*["BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", "Range"])
def filled(op: Op) -> None:
    """Values computed from a few scalars: the axes stay whole."""
    op.set_opaque(0)
