"""Operators on images whose channels pass or are blocks of something."""

from spa.algebra.axes import product
from spa.algebra.notation import apply
from spa.algebra.op import Barrier, Op
from spa.rules import rule
from spa.rules.layout import sizes_of


@rule("Col2Im")
def col2im(op: Op) -> None:
    """Place columns of blocks in an image: [n (c k..) l] → [n c *s].

    Spec: https://onnx.ai/onnx/operators/onnx__Col2Im.html.
    """
    n, columns, places = op.axes(0)
    block = op.ints("block_shape", 2) or []
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    kernel = product(*(op.opaque(k, "places blocks of it") for k in block))
    channels = op.dim(columns.size // kernel.size)
    op.unify(columns, product(channels, kernel))
    op.freeze(places, "uses it as a spatial axis")
    op.set(0, [n, channels, *(op.opaque(s) for s in shape[2:])])


@rule("CenterCropPad")
def center_crop_pad(op: Op) -> None:
    """Crop or pad axes, which freeze; those whose size stays pass.

    Spec: https://onnx.ai/onnx/operators/onnx__CenterCropPad.html.
    """
    axes = op.axes(0)
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    result = []
    for e, size in zip(axes, shape, strict=True):
        if e.size != size:
            op.freeze(e, "crops or pads it")
        result.append(e if e.size == size else op.opaque(size))
    op.set(0, result)
    given = op.attr("axes")
    op.tie(sizes_of([result[op.positive(a, len(axes))] for a in given] if given else result, ()), operand=1)


@rule("DeformConv")
def deform_conv(op: Op) -> None:
    """Convolve at learnt offsets, of which each of `offset_group` runs of channels has its own.

    Spec: https://onnx.ai/onnx/operators/onnx__DeformConv.html.
    """
    groups = op.attr("offset_group", 1)
    letters = apply(
        op,
        "X[n (g i) *s], W[(g o) i *k], offset[n (u a) *t], B?[(g o)], mask?[n (u b) *t] -> Y[n (g o) *t]; "
        "group = g else 1; macs = n g o i *t *k; frozen *t: uses it as a spatial axis",
        {"u": groups},
    )
    channels = op.axes(0)[1]
    op.unify(channels, product(letters["u"], op.dim(channels.size // groups)))
    if "offset_group" in op.node.attributes:
        op.tie_attribute("offset_group", letters["u"])


@rule("AffineGrid")
def affine_grid(op: Op) -> None:
    """Make a grid of positions for each transform: theta[n 2 3] → [n *s 2].

    Spec: https://onnx.ai/onnx/operators/onnx__AffineGrid.html.
    """
    n, *rest = op.axes(0)
    for e in rest:
        op.freeze(e, "takes it as part of a transform")
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    grid = [op.opaque(s) for s in shape[1:]]
    op.set(0, [n, *grid])
    op.tie(sizes_of([n, op.opaque(2), *grid[:-1]], range(-1, 0)), operand=1)
