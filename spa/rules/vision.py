"""Operators on images whose channels pass or are blocks of something."""

from spa.algebra.axes import product
from spa.algebra.op import Barrier, Op
from spa.rules import rule
from spa.rules.layout import sizes_of
from spa.rules.linear import convolution


@rule("Col2Im")
def col2im(op: Op) -> None:
    """Columns of blocks become an image: [n (c k..) l] → [n c *s]. Spec: onnx__Col2Im.html."""
    n, columns, places = op.axes(0)
    block = op.ints("block_shape", 2) or []
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    kernel = product(*(op.opaque(k, "block of") for k in block))
    channels = op.dim(columns.size // kernel.size)
    op.unify(columns, product(channels, kernel))
    op.freeze(places, "spatial axis of")
    op.set(0, [n, channels, *(op.opaque(s) for s in shape[2:])])


@rule("CenterCropPad")
def center_crop_pad(op: Op) -> None:
    """Axes whose size stays pass; cropped or padded ones freeze. Spec: onnx__CenterCropPad.html."""
    axes = op.axes(0)
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    result = []
    for e, size in zip(axes, shape, strict=True):
        if e.size != size:
            op.freeze(e, "cropped or padded by")
        result.append(e if e.size == size else op.opaque(size))
    op.set(0, result)
    given = op.attr("axes")
    op.tie(sizes_of([result[op.positive(a, len(axes))] for a in given] if given else result, ()), operand=1)


@rule("DeformConv")
def deform_conv(op: Op) -> None:
    """A convolution at learnt offsets, of which each of `offset_group` runs of channels has its own.

    Spec: onnx__DeformConv.html.
    """
    groups = op.attr("offset_group", 1)
    letters = convolution(
        op,
        "X[n (g i) *s], W[(g o) i *k], offset[n (u a) *t], B?[(g o)], mask?[n (u b) *t] -> Y[n (g o) *t]",
        sizes={"u": groups},
    )
    for e in op.axes(2)[2:]:
        op.freeze(e, "spatial axis of")
    channels = op.axes(0)[1]
    op.unify(channels, product(letters["u"], op.dim(channels.size // groups)))
    if "offset_group" in op.node.attributes:
        op.tie_attribute("offset_group", letters["u"])


@rule("AffineGrid")
def affine_grid(op: Op) -> None:
    """A grid of positions for each transform: theta[n 2 3] → [n *s 2]. Spec: onnx__AffineGrid.html."""
    n, *rest = op.axes(0)
    for e in rest:
        op.freeze(e, "a transform of")
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    grid = [op.opaque(s) for s in shape[1:]]
    op.set(0, [n, *grid])
    op.tie(sizes_of([n, op.opaque(2), *grid[:-1]], range(-1, 0)), operand=1)
