"""Operators that select or mark elements by computed values."""

from spa.algebra.op import Op
from spa.rules import rule


@rule("OneHot")
def one_hot(op: Op) -> None:
    """Mark each index on a new axis of `depth` places; the indices' axes pass.

    Spec: https://onnx.ai/onnx/operators/onnx__OneHot.html.
    """
    indices = list(op.axes(0))
    shape = op.out_shapes[0] or ()
    axis = op.positive(op.attr("axis", -1), len(indices) + 1)
    indices.insert(axis, op.opaque(shape[axis], "marks places along it"))
    op.set(0, indices)


@rule("Compress")
def compress(op: Op) -> None:
    """Keep the indices of `axis` that a condition marks; without `axis`, those of all elements in a row.

    Spec: https://onnx.ai/onnx/operators/onnx__Compress.html.
    """
    axes = op.axes(0)
    shape = op.out_shapes[0] or ()
    if (given := op.attr("axis")) is None:
        for e in axes:
            op.freeze(e, "selects from it")
        op.set_opaque(0)
        return
    axis = op.positive(given, len(axes))
    op.freeze(axes[axis], "selects from it")
    op.set(0, [*axes[:axis], op.opaque(shape[axis], "selects it"), *axes[axis + 1 :]])
