"""Operators that select or mark elements by computed values."""

from spa.algebra.op import Op
from spa.rules import rule


@rule("OneHot")
def one_hot(op: Op) -> None:
    """A new axis of `depth` places marks each index; the indices' axes pass. Spec: onnx__OneHot.html."""
    indices = list(op.axes(0))
    shape = op.out_shapes[0] or ()
    axis = op.positive(op.attr("axis", -1), len(indices) + 1)
    indices.insert(axis, op.opaque(shape[axis], "places marked by"))
    op.set(0, indices)


@rule("Compress")
def compress(op: Op) -> None:
    """Keeps the indices of `axis` that a condition marks; without `axis`, those of all elements in a row."""
    axes = op.axes(0)
    shape = op.out_shapes[0] or ()
    if (given := op.attr("axis")) is None:
        for e in axes:
            op.freeze(e, "selected from by")
        op.set_opaque(0)
        return
    axis = op.positive(given, len(axes))
    op.freeze(axes[axis], "selected from by")
    op.set(0, [*axes[:axis], op.opaque(shape[axis], "selected by"), *axes[axis + 1 :]])
