"""Operators that move elements without changing them: reshaping, permuting, joining, cutting, padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from spa.algebra.axes import UNIT, Expr, Kept, concat, product
from spa.algebra.op import Barrier, Op
from spa.rules import rule


def view(op: Op, source: Sequence[Expr], shape: Sequence[int]) -> list[Expr]:
    """Return the axes of a row-major view: whichever runs of axes have equal products are equal as products."""
    if prod(e.size for e in source) != prod(shape):
        raise Barrier("its output shape depends on data")
    result: list[Expr] = []
    left, i, j = list(source), 0, 0
    while i < len(left) or j < len(shape):
        start_i, start_j = i, j
        a = b = 1
        while True:
            if a == b and (i > start_i or j > start_j):
                break
            if (a <= b and i < len(left)) or j == len(shape):
                a, i = a * left[i].size, i + 1
            else:
                b, j = b * shape[j], j + 1
        if i - start_i == 1 and j - start_j == 1:
            result.append(left[start_i])
            continue
        new = [op.dim(n) for n in shape[start_j:j]]
        if a == 0:
            result += [op.opaque(n) for n in shape[start_j:j]]
            continue
        op.unify(product(*left[start_i:i]), product(*new))
        result += new
    return result


def sizes_of(axes: Sequence[Expr], keep: Sequence[int] = (0, -1)) -> Any:
    """Return how to restate a list of sizes: each entry is scaled as its axis shrinks; special entries stay."""

    def restate(kept: Kept, old: Any) -> np.ndarray:
        new = [
            v if v in keep or kept.size(e) == e.size else v * kept.size(e) // e.size
            for v, e in zip(np.ravel(old).tolist(), axes, strict=True)
        ]
        return np.asarray(new, dtype=np.int64)

    return restate


@rule("Reshape")
def reshape(op: Op) -> None:
    """Keep the elements in row-major order. Spec: https://onnx.ai/onnx/operators/onnx__Reshape.html."""
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    axes = view(op, op.axes(0), shape)
    op.set(0, axes)
    op.tie(sizes_of(axes, (-1,) if op.attr("allowzero") else (0, -1)), operand=1, attribute="shape")


@rule("Flatten")
def flatten(op: Op) -> None:
    """Make two axes: the product of the axes before `axis`, and of those from it on.

    Spec: https://onnx.ai/onnx/operators/onnx__Flatten.html.
    """
    axes = op.axes(0)
    at = op.positive(op.attr("axis", 1), len(axes))
    op.set(0, (product(*axes[:at]), product(*axes[at:])))


@rule("Transpose")
def transpose(op: Op) -> None:
    """Permute the axes by `perm`, reversed by default. Spec: https://onnx.ai/onnx/operators/onnx__Transpose.html."""
    axes = op.axes(0)
    perm = op.attr("perm") or list(range(len(axes)))[::-1]
    op.set(0, [axes[p] for p in perm])


@rule("Squeeze")
def squeeze(op: Op) -> None:
    """Drop axes of one index: those named, or all; then they are named where pruning leaves one more.

    Spec: https://onnx.ai/onnx/operators/onnx__Squeeze.html.
    """
    axes = op.axes(0)
    drop = op.ints("axes", 1)
    gone = {op.positive(a, len(axes)) for a in drop} if drop else {i for i, e in enumerate(axes) if e.size == 1}
    left = [e for i, e in enumerate(axes) if i not in gone]
    op.set(0, left)
    if not drop and left:

        def name(kept: Kept, old: Any) -> Any:
            return np.asarray(sorted(gone), np.int64) if any(kept.size(e) == 1 for e in left) else old

        op.tie_new(name, *((1, None) if op.node.version >= 13 else (None, "axes")))


@rule("Unsqueeze")
def unsqueeze(op: Op) -> None:
    """Insert axes of one index at `axes` of the output. Spec: https://onnx.ai/onnx/operators/onnx__Unsqueeze.html."""
    axes = list(op.axes(0))
    where = op.ints("axes", 1) or []
    for position in sorted(op.positive(a, len(axes) + len(where)) for a in where):
        axes.insert(position, UNIT)
    op.set(0, axes)


@rule("Concat")
def concatenate(op: Op) -> None:
    """Join the operands along `axis`; their other axes are the same.

    Spec: https://onnx.ai/onnx/operators/onnx__Concat.html.
    """
    given = [op.axes(i) for i in range(len(op.inputs)) if op.has(i)]
    axis = op.positive(op.attr("axis", 1), len(given[0]))
    for other in given[1:]:
        for i, (a, b) in enumerate(zip(given[0], other, strict=True)):
            if i != axis:
                op.unify(a, b)
    result = list(given[0])
    result[axis] = concat(*(a[axis] for a in given))
    op.set(0, result)


@rule("Split")
def split(op: Op) -> None:
    """Cut `axis` into consecutive pieces; sizes from `split`, or equal ones.

    Spec: https://onnx.ai/onnx/operators/onnx__Split.html.
    """
    axes = op.axes(0)
    axis = op.positive(op.attr("axis", 0), len(axes))
    sizes = [s[axis] for s in op.out_shapes if s is not None]
    if len(sizes) != len(op.outputs):
        raise Barrier("an output is unused and the sizes of the pieces are not known")
    pieces = op.space.split(axes[axis], sizes)
    if op.has(1) and (op.ints_elsewhere("split", 1) or sizes) != sizes:
        op.freeze(axes[axis], "cuts it at places that follow the input")  # at another size the pieces are others
    for i, piece in enumerate(pieces):
        op.set(i, [*axes[:axis], piece, *axes[axis + 1 :]])
    if op.has(1) or "split" in op.node.attributes:
        op.tie(
            lambda kept, old: np.asarray([kept.size(p) for p in pieces], np.int64),
            operand=1,
            attribute="split",
        )
    else:  # equal pieces by count: they stay equal
        for piece in pieces[1:]:
            if piece.size == pieces[0].size:
                op.unify(pieces[0], piece)
            else:
                op.freeze(piece, "cuts it into unequal pieces")
                op.freeze(pieces[0], "cuts it into unequal pieces")


@rule("Slice")
def slice_(op: Op) -> None:
    """Take a run of indices of some axes, every `step`-th of them; ends are clipped.

    Spec: https://onnx.ai/onnx/operators/onnx__Slice.html.
    """
    axes = list(op.axes(0))
    starts, ends = op.ints("starts", 1), op.ints("ends", 2)
    if starts is None or ends is None:
        raise Barrier("starts or ends are missing")
    where = op.ints("axes", 3) or list(range(len(starts)))
    steps = op.ints("steps", 4) or [1] * len(starts)
    bounds = list(zip(starts, ends, strict=True))
    elsewhere = zip(op.ints_elsewhere("starts", 1) or starts, op.ints_elsewhere("ends", 2) or ends, strict=True)
    cuts = []
    for axis, (start, end), other, step in zip(where, bounds, elsewhere, steps, strict=True):
        axis = op.positive(axis, len(axes))
        before = axes[axis]
        axes[axis], head, body, phase = _slice_axis(op, before, start, end, step)
        if body.size < before.size and (start, end) != other:
            op.freeze(before, "takes a part of it that follows the input")  # at another size, another part
        cuts.append((before, head, body, phase))
    op.set(0, axes)
    op.tie(_restate_bounds(cuts, 0), operand=1, attribute="starts")
    op.tie(_restate_bounds(cuts, 1), operand=2, attribute="ends")


def _slice_axis(op: Op, expr: Expr, start: int, end: int, step: int) -> tuple[Expr, Expr, Expr, int]:
    """Return (the piece taken, what lies before it, what it is taken from, the first place taken in there)."""
    n = expr.size
    chosen = range(n)[slice(start, None if step < 0 and end < -n else end, step)]
    count, first = len(chosen), chosen[0] if chosen else 0
    if step == 1 and count:
        head, rest = op.space.cut(expr, first)
        body, _ = op.space.cut(rest, count)
        return body, head, body, 0
    # Rows of `step` indices, one place of each taken; [1::2] starts within its first row.
    base = next((b for b in (first - first % step, first) if b + count * step <= n), None) if step > 1 else None
    if base is not None and count > 1:
        head, rest = op.space.cut(expr, base)
        body, _ = op.space.cut(rest, count * step)
        taken = op.dim(count)
        op.unify(body, product(taken, op.opaque(step, "steps over it")))
        return taken, head, body, first - base
    op.freeze(expr, "reverses it, or steps over it unevenly" if step != 1 else "empties it")
    return op.opaque(count), expr, expr, 0


def _restate_bounds(cuts: list[tuple[Expr, Expr, Expr, int]], end: int) -> Any:
    def restate(kept: Kept, old: Any) -> np.ndarray:
        new = []
        for value, (expr, head, body, phase) in zip(np.ravel(old).tolist(), cuts, strict=True):
            if kept.size(expr) == expr.size or value >= expr.size:
                new.append(value)  # untouched, or open-ended
                continue
            bound = kept.size(head) + (kept.size(body) if end else phase)
            new.append(bound - kept.size(expr) if value < 0 and bound < kept.size(expr) else bound)
        return np.asarray(new, dtype=np.int64)

    return restate


@rule("Pad")
def pad(op: Op) -> None:
    """Put new indices before and after each axis, which are removable, too; edges, mirrors and open amounts freeze.

    Spec: https://onnx.ai/onnx/operators/onnx__Pad.html.
    """
    axes = list(op.axes(0))
    pads = op.ints("pads", 1)
    if pads is None:
        raise Barrier("pads are missing")
    where = op.ints("axes", 3) or list(range(len(axes)))
    count = len(where)
    elsewhere = op.ints_elsewhere("pads", 1) or pads
    places: list[tuple[Expr | None, Expr | None]] = [(None, None)] * count
    mode = op.attr("mode", "constant")
    for i, axis in enumerate(where):
        axis = op.positive(axis, len(axes))
        before, after = pads[i], pads[i + count]
        if (before, after) != (elsewhere[i], elsewhere[i + count]):  # at another size other indices are padding
            op.freeze(axes[axis], "pads it by an amount that follows the input")
            axes[axis] = op.opaque(axes[axis].size + before + after)
            continue
        if before == after == 0:
            continue
        if mode != "constant" or before < 0 or after < 0:
            op.freeze(axes[axis], "pads it with its own values, or crops it")
            axes[axis] = op.opaque(axes[axis].size + before + after)
            continue
        head, tail = op.dim(before), op.dim(after)
        places[i] = (head, tail)
        axes[axis] = concat(head, axes[axis], tail)
    op.set(0, axes)
    widths = [p[0] for p in places] + [p[1] for p in places]
    sized = [w if n > 0 else None for n, w in zip(pads, widths, strict=True)]
    op.tie(
        lambda kept, old: np.asarray(
            [v if w is None else kept.size(w) for v, w in zip(np.ravel(old).tolist(), sized, strict=True)],
            np.int64,
        ),
        operand=1,
        attribute="pads",
    )


@rule("Expand")
def expand(op: Op) -> None:
    """Broadcast to a shape: stretched axes are new dimensions.

    Spec: https://onnx.ai/onnx/operators/onnx__Expand.html.
    """
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    axes = op.axes(0)
    padded = [UNIT] * (len(shape) - len(axes)) + list(axes)
    result = [e if e.size == n else op.dim(n) for e, n in zip(padded, shape, strict=True)]
    op.set(0, result)
    value = op.values[1] if op.has(1) else None
    rank = len(shape) if value is None else value.size
    op.tie(sizes_of(result[len(result) - rank :], (1,)), operand=1)


@rule("Tile")
def tile(op: Op) -> None:
    """Repeat each axis: a product of the repeats and the axis. Spec: https://onnx.ai/onnx/operators/onnx__Tile.html."""
    repeats = op.ints("repeats", 1)
    if repeats is None:
        raise Barrier("repeats are computed from data")
    axes = op.axes(0)
    dims = [op.dim(r) for r in repeats]
    op.set(0, [product(r, e) for r, e in zip(dims, axes, strict=True)])
    op.tie(sizes_of(dims, (1,)), operand=1)


@rule("ConstantOfShape")
def constant_of_shape(op: Op) -> None:
    """Fill a tensor: all its axes are new dimensions.

    Spec: https://onnx.ai/onnx/operators/onnx__ConstantOfShape.html.
    """
    axes = [op.dim(n) for n in op.out_shapes[0] or ()]
    op.set(0, axes)
    if axes:
        op.tie(sizes_of(axes, ()), operand=0)


@rule("DepthToSpace")
def depth_to_space(op: Op) -> None:
    """Turn blocks of channels into pixels; `DCR`: (b b c), `CRD`: (c b b).

    Spec: https://onnx.ai/onnx/operators/onnx__DepthToSpace.html.
    """
    n, channels, height, width = op.axes(0)
    block = op.attr("blocksize")
    rows, columns = op.opaque(block, "places blocks of it"), op.opaque(block, "places blocks of it")
    depth = op.dim(channels.size // block**2)
    crd = op.attr("mode", "DCR") == "CRD"
    op.unify(channels, product(depth, rows, columns) if crd else product(rows, columns, depth))
    op.set(0, (n, depth, product(height, rows), product(width, columns)))


@rule("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """Turn the pixels of a block into channels; `DCR`: (b b c), `CRD` (since opset 28): (c b b).

    Spec: https://onnx.ai/onnx/operators/onnx__SpaceToDepth.html.
    """
    n, depth, height, width = op.axes(0)
    block = op.attr("blocksize")
    rows, columns = op.opaque(block, "places blocks of it"), op.opaque(block, "places blocks of it")
    small = [op.dim(e.size // block) for e in (height, width)]
    op.unify(height, product(small[0], rows))
    op.unify(width, product(small[1], columns))
    crd = op.attr("mode", "DCR") == "CRD"
    op.set(0, (n, product(depth, rows, columns) if crd else product(rows, columns, depth), *small))


@rule("Resize", "Upsample")
def resize(op: Op) -> None:
    """Resample axes, which freeze; those whose size and scale stay pass through.

    Spec: https://onnx.ai/onnx/operators/onnx__Resize.html.
    """
    axes = op.axes(0)
    shape = op.out_shapes[0]
    if shape is None:
        raise Barrier("its output shape is computed from data")
    moved = _resampled(op, [e.size for e in axes], shape)
    for i in moved:
        op.freeze(axes[i], "resamples it")
    result = [op.opaque(n) if i in moved else e for i, (e, n) in enumerate(zip(axes, shape, strict=True))]
    op.set(0, result)
    given = op.attr("axes")
    sized = [result[op.positive(a, len(axes))] for a in given] if given else result
    if len(op.inputs) > 3 and op.has(3):
        op.tie(sizes_of(sized, ()), operand=3)


def _resampled(op: Op, before: Sequence[int], after: Sequence[int]) -> set[int]:
    """Return the axes whose size changes, or whose positions do: a scale that is nearly one, a region, a kept ratio."""
    given = [op.positive(a, len(before)) for a in op.attr("axes") or range(len(before))]
    moved = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    if op.node.op == "Upsample" or op.node.version < 11:
        scales = op.values[1] if op.has(1) else op.attr("scales")
    else:
        scales = op.values[2] if op.has(2) else ()
    if scales is None:
        return set(range(len(before)))
    moved |= {i for i, scale in zip(given, np.ravel(scales).tolist(), strict=False) if scale != 1}
    region = op.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
    if region or (moved and op.attr("keep_aspect_ratio_policy", "stretch") != "stretch"):
        moved |= set(given)
    return moved


@rule("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """Reverse the time axis up to each row's length; the rest passes through.

    Spec: https://onnx.ai/onnx/operators/onnx__ReverseSequence.html.
    """
    axes = op.axes(0)
    time = op.attr("time_axis", 0)
    op.freeze(axes[time], "reverses it")
    op.unify(axes[op.attr("batch_axis", 1)], op.axes(1)[0])
    op.set(0, axes)


rule(
    "Trilu",
    "input[... m n], k? -> output[... m n]; frozen m n: cuts it to a triangle",
    doc="Keep a triangle of the last two axes, which must stay in their places. "
    "Spec: https://onnx.ai/onnx/operators/onnx__Trilu.html.",
)
