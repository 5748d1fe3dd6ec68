"""Reductions and pooling: axes that disappear into a statistic."""

from __future__ import annotations

from spa.algebra.axes import UNIT
from spa.algebra.op import Op, Read
from spa.model.traits import Trait, operators
from spa.rules import rule

# A zero adds nothing to these, so removing an index is the same as masking it; for the others it is not.
SUMS = operators(Trait.SUM)
STATISTICS = operators(Trait.STATISTIC)


@rule(*SUMS, *STATISTICS)
def reduce(op: Op) -> None:
    """Reduced axes become one index or vanish. A sum reads them (a removed index is a zero); a statistic crosses."""
    axes = op.axes(0)
    given = op.ints("axes", 1)
    if not given and op.attr("noop_with_empty_axes"):
        op.set(0, axes)
        return
    gone = {op.positive(a, len(axes)) for a in given} if given else set(range(len(axes)))
    for i in gone:
        if op.node.op in SUMS:
            op.reads.append(Read(axes[i], 0, i))
        else:
            op.cross(axes[i])
    keep = op.attr("keepdims", 1)
    op.set(0, [UNIT if i in gone else e for i, e in enumerate(axes) if keep or i not in gone])


@rule("ArgMax", "ArgMin")
def arg(op: Op) -> None:
    """The position of an extreme: the axis must keep its indices."""
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", 0), len(axes))
    op.freeze(axes[axis], "positions found by")
    keep = op.attr("keepdims", 1)
    op.set(0, [UNIT if i == axis else e for i, e in enumerate(axes) if keep or i != axis])


@rule("TopK")
def top_k(op: Op) -> None:
    """Values and positions of extremes along `axis`."""
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    op.freeze(axes[axis], "positions found by")
    shape = op.out_shapes[0] or tuple(e.size for e in axes)
    out = [op.opaque(shape[i]) if i == axis else e for i, e in enumerate(axes)]
    op.set(0, out)
    op.set(1, out)


@rule("CumSum", "CumProd")
def cumulate(op: Op) -> None:
    """A running sum along `axis`: removing an index changes those after it."""
    axes = op.axes(0)
    value = op.values[1]
    for i, e in enumerate(axes):
        if value is None or op.positive(int(value.reshape(-1)[0]), len(axes)) == i:
            op.freeze(e, "accumulated over by")
    op.set(0, axes)


@rule(*operators(Trait.POOLING))
def pool(op: Op) -> None:
    """Batch and channels pass; positions are pooled. MaxPool's Indices count through all channels."""
    axes = op.axes(0)
    if len(op.outputs) > 1 and op.out_shapes[1] is not None:
        for e in axes[:2]:
            op.freeze(e, "counted through by Indices of")
    for e in axes[2:]:
        op.freeze(e, "spatial axis of")
    for output, shape in enumerate(op.out_shapes):
        if shape is not None:
            op.set(output, [*axes[:2], *(op.opaque(n) for n in shape[2:])])


@rule("MaxRoiPool", "RoiAlign")
def roi(op: Op) -> None:
    """Channels pass; regions replace the batch."""
    axes = op.axes(0)
    shape = op.out_shapes[0]
    for i, e in enumerate(axes):
        if i != 1:
            op.freeze(e, "sampled by")
    if shape is not None:
        op.set(0, [op.opaque(shape[0]), axes[1], *(op.opaque(n) for n in shape[2:])])


@rule("GridSample")
def grid_sample(op: Op) -> None:
    """Channels pass; positions are sampled at a grid."""
    axes = op.axes(0)
    batch, *grid = op.axes(1)
    for e in (*axes[2:], *grid):
        op.freeze(e, "sampled by")
    op.unify(axes[0], batch)
    op.set(0, [*axes[:2], *grid[:-1]])
