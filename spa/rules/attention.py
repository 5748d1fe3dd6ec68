"""Attention: heads are coupled through all projections, head dimensions of queries and keys with each other.

All forms state softmax(Q Kᵀ scale + mask) V: d is contracted between queries and keys, e passes from the values, and
statistics are taken over the keys. Masking a head dimension means masking the queries.
"""

from __future__ import annotations

from dataclasses import replace

from spa.algebra.axes import Axes, Expr, concat, product
from spa.algebra.op import Barrier, Op, Read
from spa.rules import rule

_PLACES = "tells its indices apart by their places"


def _heads(op: Op, axes: Axes, heads: Expr, size: int) -> Expr:
    """Return the head dimension of a tensor [b s (heads d)] or [b heads s d]."""
    d = op.dim(size)
    if len(axes) == 3:
        op.unify(axes[2], product(heads, d))
    else:
        op.unify(axes[1], heads)
        op.unify(axes[3], d)
    return d


def _length(axes: Axes) -> Expr:
    return axes[1] if len(axes) == 3 else axes[2]


def _joined(heads: Expr, e: Expr, like: Axes) -> Axes:
    return (like[0], like[1], product(heads, e)) if len(like) == 3 else (like[0], heads, like[2], e)


def _same_batch(op: Op, batch: Expr, *operands: int) -> None:
    for operand in operands:
        if op.has(operand):
            op.unify(op.axes(operand)[0], batch)


def _bias(op: Op, operand: int, *wanted: Expr) -> None:
    """Tie a mask or bias [.. batch heads rows columns], which broadcasts; one of other sizes, padded, fixes both."""
    if op.has(operand):
        for have, want in zip(op.axes(operand)[::-1], wanted[::-1], strict=False):
            if have.size == want.size:
                op.unify(have, want)
            elif have.size != 1:
                op.freeze(have, _PLACES)
                op.freeze(want, _PLACES)


def _key_mask(op: Op, operand: int, batch: Expr, rows: Expr, steps: Expr) -> None:
    """Tie a mask of keys: lengths [b] or positions in a row; or zeros and ones [b steps], [b rows steps]."""
    if not op.has(operand):
        return
    axes = op.axes(operand)
    if 1 < len(axes) < 4:
        _bias(op, operand, *((batch, rows, steps) if len(axes) == 3 else (batch, steps)))
        return
    op.freeze(steps, _PLACES)
    op.freeze(rows, _PLACES)
    if axes[0].size == batch.size:
        op.unify(axes[0], batch)
    else:
        for e in (*axes, batch):
            op.freeze(e, "takes lengths along it")


def _cached(op: Op, past: tuple[int, int], batch: Expr, heads: Expr, d: Expr, e: Expr, steps: Expr) -> Expr:
    """Return all keys: those of the cache [b heads past d], [b heads past e], then the new ones."""
    if not (op.has(past[0]) and op.has(past[1])):
        return steps
    past_k, past_v = op.axes(past[0]), op.axes(past[1])
    for axes, size in ((past_k, d), (past_v, e)):
        op.unify(axes[0], batch)
        op.unify(axes[1], heads)
        op.unify(axes[3], size)
    op.unify(past_k[2], past_v[2])
    return concat(past_k[2], steps)


def _places_matter(op: Op, *exprs: Expr) -> None:
    for expr in exprs:
        op.freeze(expr, _PLACES)


def _count(op: Op, batch: Expr, heads: Expr, rows: Expr, columns: Expr, d: Expr, e: Expr) -> None:
    op.count_macs(batch, heads, rows, columns, d)
    op.count_macs(batch, heads, rows, columns, e)


@rule("Attention")
def attention(op: Op) -> None:
    """State softmax(Q Kᵀ scale + mask) V: query heads (k r) share k key–value heads; d is contracted, e passes.

    softcap, softmax_precision and qk_matmul_output_mode treat all scores alike.

    Spec: https://onnx.ai/onnx/operators/onnx__Attention.html.
    """
    q, k, v = op.axes(0), op.axes(1), op.axes(2)
    flat = len(q) == 3
    kv_heads = op.attr("kv_num_heads") if flat else k[1].size
    q_heads = op.attr("q_num_heads") if flat else q[1].size
    kv, r = op.dim(kv_heads), op.dim(q_heads // kv_heads)
    heads = product(kv, r)
    d = _heads(op, q, heads, q[-1].size // (q_heads if flat else 1))
    op.unify(d, _heads(op, k, kv, d.size))
    e = _heads(op, v, kv, v[-1].size // (kv_heads if flat else 1))
    op.unify(_length(k), _length(v))
    _same_batch(op, q[0], 1, 2, 6)
    op.reads.append(Read(q[-1], 0, len(q) - 1))
    rows, steps = _length(q), _cached(op, (4, 5), q[0], kv, d, e, _length(k))
    op.cross(steps)
    if op.attr("is_causal", 0) or op.has(6):
        _places_matter(op, rows, steps)
    _bias(op, 3, q[0], heads, rows, steps)
    op.set(0, _joined(heads, e, q))
    op.set(1, (q[0], kv, steps, d))
    op.set(2, (q[0], kv, steps, e))
    op.set(3, (q[0], heads, rows, steps))
    if flat:
        op.tie_attribute("q_num_heads", heads)
        op.tie_attribute("kv_num_heads", kv)
    op.tie_scale(d)
    _count(op, q[0], heads, rows, steps, d, e)


@rule("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
def rotary(op: Op) -> None:
    """Rotate pairs of a head's dimensions by angles from two caches [.. half]; pass what lies behind them.

    The contrib operator has the positions second.

    Spec: https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html.
    """
    cos, sin, ids = (2, 3, 1) if op.node.domain else (1, 2, 3)
    if op.attr("is_packed_batching", 0):
        raise Barrier("its batch is packed")
    x, half = op.axes(0), op.axes(cos)[-1]
    for a, b in zip(op.axes(cos), op.axes(sin), strict=True):
        op.unify(a, b)
    if len(op.axes(cos)) == 2:
        op.freeze(op.axes(cos)[0], "looks it up by index")
    else:
        op.unify(op.axes(cos)[0], x[0])
        op.unify(op.axes(cos)[1], _length(x))
    if op.has(ids) and len(op.axes(ids)) == 2:
        op.unify(op.axes(ids)[0], x[0])
        op.unify(op.axes(ids)[1], _length(x))
    elif op.has(ids):
        op.freeze(_length(x), _PLACES)
    size = x[-1].size
    if len(x) == 3:
        count = op.attr("num_heads", 0) or size // (2 * half.size)
        heads = op.dim(count)
        d = _heads(op, x, heads, size // count)
        op.tie(lambda kept, old: kept.size(heads) if old else old, attribute="num_heads")
    else:
        d = x[3]
    pairs = product(half, op.opaque(2, "rotates it in pairs")) if op.attr("interleaved", 0) else concat(half, half)
    op.unify(d, concat(pairs, op.dim(d.size - pairs.size)) if pairs.size < d.size else pairs)
    op.tie(lambda kept, old: 2 * kept.size(half) if old else old, attribute="rotary_embedding_dim")
    op.set(0, x)


@rule("com.microsoft::MultiHeadAttention")
def multi_head(op: Op) -> None:
    """Attend with projections that are separate, or packed as q[b s h 3 d] or k[b t h 2 d], with one bias for all.

    Spec: ContribOperators.md#com.microsoft.MultiHeadAttention.
    """
    if op.has(8) or op.has(9):
        raise Barrier("its cache is shared with its output")
    q, heads = op.axes(0), op.dim(op.attr("num_heads"))
    batch, rows = q[0], q[1]
    if len(q) == 5:
        op.unify(q[2], heads)
        op.freeze(q[3], "finds queries, keys and values along it")
        d = e = q[4]
        new = rows
        op.reads.append(Read(d, 0, 4))
    else:
        d = _heads(op, q, heads, q[2].size // heads.size)
        k = op.axes(1)
        op.unify(k[0], batch)
        op.reads.append(Read(q[2], 0, 2))
        if len(k) == 5:
            op.unify(k[2], heads)
            op.freeze(k[3], "finds keys and values along it")
            op.unify(k[4], d)
            e, new = d, k[1]
        else:
            v = op.axes(2)
            op.unify(v[0], batch)
            op.unify(d, _heads(op, k, heads, d.size))
            e = _heads(op, v, heads, v[-1].size // (heads.size if len(v) == 3 else 1))
            new = _length(k)
            op.unify(new, _length(v))
    queries, values = product(heads, d), product(heads, e)
    if op.has(3):
        op.unify(op.axes(3)[0], concat(queries, queries, values))
        op.reads.append(Read(_only_first(op, queries, queries.size + values.size), 3, 0))
    if op.has(6) or (op.has(1) and len(op.axes(1)) == 4):
        op.unify(d, e)  # onnxruntime wants keys and values of one size here
    steps = _cached(op, (6, 7), batch, heads, d, e, new)
    op.cross(steps)
    if op.attr("unidirectional", 0):
        _places_matter(op, rows, steps)
    _key_mask(op, 4, batch, rows, steps)
    _bias(op, 5, batch, heads, rows, steps)
    op.set(0, (batch, rows, values))
    op.set(1, (batch, heads, steps, d))
    op.set(2, (batch, heads, steps, e))
    op.set(3, (batch, heads, rows, steps))
    op.tie_attribute("num_heads", heads)
    op.tie_scale(d)
    _count(op, batch, heads, rows, steps, d, e)


def _only_first(op: Op, expr: Expr, others: int) -> Expr:
    """Return an axis of which only the first piece can be masked; the rest stands for what is not read here."""
    return concat(expr, op.opaque(others, "does not read it"))


@rule("com.microsoft::Attention", "com.microsoft::QAttention")
def packed_attention(op: Op) -> None:
    """Project to queries, keys and values by one weight [i (h d)+(h d)+(h e)], then attend.

    Masking a head dimension means masking the query's columns of weight and bias. The cache [2 b h t d] holds keys and
    values alike. QAttention's weights are integers, with scales (operand 4) and zero points (operand 7) of all or of
    each column.

    Spec: ContribOperators.md#com.microsoft.Attention.
    """
    quantised = op.node.op == "QAttention"
    marks, bias, cache, zero = (5, None, 8, 7) if quantised else (3, 5, 4, None)
    if op.attr("past_present_share_buffer", 0):
        raise Barrier("its cache is shared with its output")
    x, weights = op.axes(0), op.axes(1)
    sizes = op.attr("qkv_hidden_sizes") or [weights[1].size // 3] * 3
    count = op.attr("num_heads")
    heads, d, e = op.dim(count), op.dim(sizes[0] // count), op.dim(sizes[2] // count)
    queries, values = product(heads, d), product(heads, e)
    op.unify(weights[1], concat(queries, queries, values))
    for operand in (4, 7) if quantised else ():
        if op.has(operand) and op.axes(operand) and op.axes(operand)[0].size != 1:
            op.unify(op.axes(operand)[0], weights[1])
    op.contract((1, 0), (0, 2))
    only = _only_first(op, queries, sizes[1] + sizes[2])
    op.reads.append(Read(only, 1, 1))
    op.reads = [replace(r, zero=zero if r.operand == 1 else 6 if quantised else None, zero_axis=1) for r in op.reads]
    if op.has(2):
        op.unify(op.axes(2)[0], weights[1])
        op.reads.append(Read(only, 2, 0))
    rows = steps = x[1]
    two = op.opaque(2, "finds keys and values along it")
    if op.has(cache) or (len(op.out_shapes) > 1 and op.out_shapes[1] is not None) or not op.attr("qkv_hidden_sizes"):
        op.unify(d, e)
    if op.has(cache):
        past = op.axes(cache)
        for have, want in ((past[0], two), (past[1], x[0]), (past[2], heads), (past[4], d)):
            op.unify(have, want)
        steps = concat(past[3], steps)
    op.cross(steps)
    if op.attr("unidirectional", 0) or op.attr("do_rotary", 0):
        _places_matter(op, rows, steps)
    if op.attr("do_rotary", 0):
        op.freeze(d, "rotates it")
    _key_mask(op, marks, x[0], rows, steps)
    if bias is not None:
        _bias(op, bias, x[0], heads, rows, steps)
    op.set(0, (x[0], rows, values))
    op.set(1, (two, x[0], heads, steps, d))
    op.tie_attribute("num_heads", heads)
    op.tie(lambda kept, old: [kept.size(queries)] * 2 + [kept.size(values)], attribute="qkv_hidden_sizes")
    op.tie_scale(d)
    op.count_macs(x[0], rows, x[2], weights[1])
    _count(op, x[0], heads, rows, steps, d, e)


_LANES = 8  # onnxruntime takes heads of a multiple of this many channels, and as many angles


def _head_size(op: Op, size: int) -> Expr:
    """Return the head dimension of grouped queries, in blocks, so that every choice of them is a size that runs.

    With a rotation it is two halves, or pairs, that keep the angles of the same channels of its caches [steps half];
    what lies behind them is not rotated. Then the size is a multiple of 16.
    """
    if not op.attr("do_rotary", 0):
        return _blocks(op, size, _LANES)
    angles = op.axes(7)[1]
    for operand in (7, 8):
        op.freeze(op.axes(operand)[0], "looks it up by index")
        op.unify(op.axes(operand)[1], angles)
    half = _blocks(op, angles.size, _LANES)
    op.unify(angles, half)
    interleaved = op.attr("rotary_interleaved", 0)
    rotated = product(half, op.opaque(2, "rotates it in pairs")) if interleaved else concat(half, half)
    rest = size - rotated.size
    return concat(rotated, _blocks(op, rest, 2 * _LANES)) if rest else rotated


def _blocks(op: Op, size: int, width: int) -> Expr:
    if size % width:
        return op.opaque(size, "has it as head size")
    return product(op.dim(size // width), op.opaque(width, f"takes head sizes in steps of {width}"))


@rule("com.microsoft::GroupQueryAttention")
def group_query(op: Op) -> None:
    """Let query heads (k r) share k key–value heads, packed as [b s (k r d)+(k d)+(k d)] where keys are no operand.

    Queries, keys and values have one head size d, of which blocks can be removed.

    Spec: ContribOperators.md#com.microsoft.GroupQueryAttention.
    """
    if op.has(12) or op.has(13):
        raise Barrier("its cache is quantised")
    q, q_heads, kv_heads = op.axes(0), op.attr("num_heads"), op.attr("kv_num_heads")
    packed = not op.has(1)
    kv, r = op.dim(kv_heads), op.dim(q_heads // kv_heads)
    heads = product(kv, r)
    d = _head_size(op, q[2].size // (q_heads + 2 * kv_heads if packed else q_heads))
    queries, keys = product(heads, d), product(kv, d)
    op.unify(q[2], concat(queries, keys, keys) if packed else queries)
    op.reads.append(Read(_only_first(op, queries, 2 * keys.size) if packed else queries, 0, 2))
    for operand in (1, 2) if not packed else ():
        for have, want in zip(op.axes(operand), (q[0], q[1], keys), strict=True):
            op.unify(have, want)
    _places_matter(op, q[1])
    for operand in (3, 4):
        if op.has(operand):
            past = op.axes(operand)
            op.freeze(past[2], _PLACES)
            for have, want in ((past[0], q[0]), (past[1], kv), (past[3], d)):
                op.unify(have, want)
    _same_batch(op, q[0], 5)
    if op.has(9):
        _bias(op, 9, q[0], q[1])
    shape = next((s for s in op.out_shapes[1:3] if s is not None), None)
    if op.has(10):
        op.freeze(op.axes(10)[3], _PLACES)
        _bias(op, 10, q[0], heads, q[1], op.axes(10)[3])
    if op.has(11):
        op.unify(op.axes(11)[0], heads)
    for output in (1, 2):
        if shape is not None:
            op.set(output, (q[0], kv, op.opaque(shape[2]), d))
    op.set(0, (q[0], q[1], queries))
    op.tie_attribute("num_heads", heads)
    op.tie_attribute("kv_num_heads", kv)
    op.tie_scale(d)
    _count(op, q[0], heads, q[1], q[1], d, d)
