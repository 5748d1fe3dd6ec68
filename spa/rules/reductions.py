"""Reductions and pooling: axes that disappear into a statistic."""

from __future__ import annotations

import numpy as np

from spa.algebra.axes import UNIT
from spa.algebra.notation import apply
from spa.algebra.op import Barrier, Op, Read
from spa.model.traits import Trait, operators
from spa.rules import rule

# A zero adds nothing to these, so removing an index is the same as masking it; for the others it is not.
SUMS = operators(Trait.SUM)
STATISTICS = operators(Trait.STATISTIC)
NORMS = frozenset({"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"})

POOL = "X[n c *s] -> Y[n c *t]"


@rule(*SUMS, *STATISTICS)
def reduce(op: Op) -> None:
    """Reduce axes to one index or to none: a sum reads them (a removed index is a zero), a statistic crosses.

    So does the norm of a weight, by which what is kept of it is divided.

    Spec: https://onnx.ai/onnx/operators/onnx__ReduceSum.html.
    """
    axes = op.axes(0)
    given = op.ints("axes", 1)
    if not given and op.attr("noop_with_empty_axes"):
        op.set(0, axes)
        return
    gone = {op.positive(a, len(axes)) for a in given} if given else set(range(len(axes)))
    for i in gone:
        if op.node.op in SUMS and not (op.constant[0] and op.node.op in NORMS):
            op.reads.append(Read(axes[i], 0, i))
        else:
            op.cross(axes[i])
    keep = op.attr("keepdims", 1)
    op.set(0, [UNIT if i in gone else e for i, e in enumerate(axes) if keep or i not in gone])


@rule("ArgMax", "ArgMin")
def arg(op: Op) -> None:
    """Find the position of an extreme: the axis must keep its indices.

    Spec: https://onnx.ai/onnx/operators/onnx__ArgMax.html.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", 0), len(axes))
    op.freeze(axes[axis], "finds positions along it")
    keep = op.attr("keepdims", 1)
    op.set(0, [UNIT if i == axis else e for i, e in enumerate(axes) if keep or i != axis])


@rule("TopK")
def top_k(op: Op) -> None:
    """Find values and positions of extremes along `axis`. Spec: https://onnx.ai/onnx/operators/onnx__TopK.html."""
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", -1), len(axes))
    op.freeze(axes[axis], "finds positions along it")
    shape = op.out_shapes[0] or tuple(e.size for e in axes)
    out = [op.opaque(shape[i]) if i == axis else e for i, e in enumerate(axes)]
    op.set(0, out)
    op.set(1, out)


@rule("CumSum", "CumProd")
def cumulate(op: Op) -> None:
    """Sum up along `axis`: removing an index changes those after it.

    Spec: https://onnx.ai/onnx/operators/onnx__CumSum.html.
    """
    axes = op.axes(0)
    value = op.values[1]
    for i, e in enumerate(axes):
        if value is None or op.positive(int(value.reshape(-1)[0]), len(axes)) == i:
            op.freeze(e, "accumulates over it")
    op.set(0, axes)


rule(
    *["AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"],
    POOL,
    doc="Positions are pooled; batch and channels pass. Spec: https://onnx.ai/onnx/operators/onnx__AveragePool.html.",
)


@rule("MaxPool")
def max_pool(op: Op) -> None:
    """Pool positions; batch and channels pass.

    They stay whole where Indices, which count through them, go elsewhere than into a MaxUnpool to the shape that was
    pooled: there, the indices of fewer channels are right as well.

    Spec: https://onnx.ai/onnx/operators/onnx__MaxPool.html.
    """
    given = len(op.outputs) > 1 and op.out_shapes[1] is not None
    readers = [("", 0, None)] if op.consumers is None else op.consumers[1] if given else ()
    back = ("MaxUnpool", 1, op.shapes[0])
    counts = given and any(reader != back for reader in readers)
    apply(op, "X[n c *s] -> Y[n c *t], Indices[n c *t]" + ("; frozen n c: counts through it" if counts else ""))


@rule("MaxUnpool")
def max_unpool(op: Op) -> None:
    """Put values where they were before a MaxPool; batch and channels pass.

    Spec: https://onnx.ai/onnx/operators/onnx__MaxUnpool.html.
    """
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    apply(op, "X[n c *t], I[n c *t], output_shape? -> output[n c *s]")
    n, c = op.axes(0)[:2]
    if op.has(2):
        op.axes(2)
        op.tie(lambda kept, old: [kept.size(n), kept.size(c), *np.ravel(old)[2:]], operand=2)


rule(
    "MaxRoiPool",
    "X[b c *s], rois -> Y[r c *t]; frozen b *s: samples it",
    doc="Channels pass; regions replace the batch. Spec: https://onnx.ai/onnx/operators/onnx__MaxRoiPool.html.",
)
rule(
    "RoiAlign",
    "X[b c *s], rois, batch_indices -> Y[r c *t]; frozen b *s: samples it",
    doc="Channels pass; regions replace the batch. Spec: https://onnx.ai/onnx/operators/onnx__RoiAlign.html.",
)
rule(
    "GridSample",
    "X[n c *s], grid[n *t d] -> Y[n c *t]; frozen *s *t d: samples it",
    doc="Channels pass; positions are sampled at a grid. Spec: https://onnx.ai/onnx/operators/onnx__GridSample.html.",
)
