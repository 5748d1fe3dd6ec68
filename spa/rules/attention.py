"""Attention: heads are coupled through all projections, head dimensions of queries and keys with each other."""

from __future__ import annotations

from spa.axes import Axes, Expr, concat, product
from spa.op import Barrier, Op, Read
from spa.rules import rule


def _heads(op: Op, axes: Axes, heads: Expr, size: int) -> Expr:
    """The head dimension of a tensor [b s (heads d)] or [b heads s d]."""
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


@rule("Attention")
def attention(op: Op) -> None:
    """softmax(Q Kᵀ scale + mask) V; query heads (k r) share k key–value heads; d is contracted, e passes.

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
    op.reads.append(Read(q[-1], 0, len(q) - 1))
    steps = _length(k)
    if op.has(4) and op.has(5):
        past_k, past_v = op.axes(4), op.axes(5)
        for axes, size in ((past_k, d), (past_v, e)):
            op.unify(axes[1], kv)
            op.unify(axes[3], size)
        steps = concat(past_k[2], steps)
    op.cross(steps)
    _mask(op, 3, heads, _length(q), steps)
    op.set(0, _joined(heads, e, q))
    op.set(1, (k[0], kv, steps, d))
    op.set(2, (k[0], kv, steps, e))
    op.set(3, (q[0], heads, _length(q), steps))
    if flat:
        op.tie_attribute("q_num_heads", heads)
        op.tie_attribute("kv_num_heads", kv)
    op.tie_scale(d)
    _count(op, q[0], heads, _length(q), steps, d, e)


def _mask(op: Op, operand: int, heads: Expr, rows: Expr, columns: Expr) -> None:
    """A mask or bias [.. heads rows columns] that broadcasts."""
    if op.has(operand):
        for have, want in zip(op.axes(operand)[::-1], (columns, rows, heads), strict=False):
            if have.size == want.size != 1:
                op.unify(have, want)


def _count(op: Op, batch: Expr, heads: Expr, rows: Expr, columns: Expr, d: Expr, e: Expr) -> None:
    op.count_macs(batch, heads, rows, columns, d)
    op.count_macs(batch, heads, rows, columns, e)


def _rotated(op: Op, d: Expr, half: Expr, interleaved: bool) -> None:
    """D is a run of pairs, or two halves, that rotate together; what lies behind them passes."""
    pairs = product(half, op.opaque(2, "a pair of")) if interleaved else concat(half, half)
    op.unify(d, concat(pairs, op.dim(d.size - pairs.size)) if pairs.size < d.size else pairs)


@rule("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
def rotary(op: Op) -> None:
    """Rotates pairs of a head's dimensions by angles from two caches [.. half].

    Spec: https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; the contrib operator has the positions second.
    """
    cos, sin = (2, 3) if op.node.domain else (1, 2)
    x, half = op.axes(0), op.axes(cos)[-1]
    op.unify(half, op.axes(sin)[-1])
    if len(op.axes(cos)) == 2:
        op.freeze(op.axes(cos)[0], "looked up by")
        op.freeze(op.axes(sin)[0], "looked up by")
    size = x[-1].size
    if len(x) == 3:
        count = op.attr("num_heads", 0) or size // (2 * half.size)
        heads = op.dim(count)
        d = _heads(op, x, heads, size // count)
        op.tie(lambda kept, old: kept.size(heads) if old else old, attribute="num_heads")
    else:
        d = x[3]
    _rotated(op, d, half, bool(op.attr("interleaved", 0)))
    op.tie(lambda kept, old: 2 * kept.size(half) if old else old, attribute="rotary_embedding_dim")
    op.set(0, x)


@rule("com.microsoft::MultiHeadAttention")
def multi_head(op: Op) -> None:
    """Attention of separate projections with one packed bias. Spec: ContribOperators.md."""
    if not (op.has(1) and op.has(2)) or any(len(op.axes(i)) != 3 for i in (0, 1, 2)):
        raise Barrier("its projections are packed or carry heads as an axis")
    q, k, v = op.axes(0), op.axes(1), op.axes(2)
    count = op.attr("num_heads")
    heads = op.dim(count)
    d = _heads(op, q, heads, q[2].size // count)
    op.unify(d, _heads(op, k, heads, d.size))
    e = _heads(op, v, heads, v[2].size // count)
    op.unify(k[1], v[1])
    op.reads.append(Read(q[2], 0, 2))
    if op.has(3):
        op.unify(op.axes(3)[0], concat(q[2], k[2], v[2]))
        op.reads.append(Read(_only_first(op, q[2], k[2].size + v[2].size), 3, 0))
    steps = k[1]
    if op.has(6) and op.has(7):
        for operand, size in ((6, d), (7, e)):
            op.unify(op.axes(operand)[1], heads)
            op.unify(op.axes(operand)[3], size)
        steps = concat(op.axes(6)[2], steps)
    op.cross(steps)
    _mask(op, 5, heads, q[1], steps)
    op.set(0, (q[0], q[1], product(heads, e)))
    op.set(1, (q[0], heads, steps, d))
    op.set(2, (q[0], heads, steps, e))
    op.tie_attribute("num_heads", heads)
    op.tie_scale(d)
    _count(op, q[0], heads, q[1], steps, d, e)


def _only_first(op: Op, expr: Expr, others: int) -> Expr:
    """An axis of which only the first piece can be masked; the rest stands for what is not read here."""
    return concat(expr, op.opaque(others, "not read by"))


@rule("com.microsoft::Attention")
def packed_attention(op: Op) -> None:
    """Projection to queries, keys and values by one weight [i (h d)+(h d)+(h e)], then attention.

    Spec: ContribOperators.md#com.microsoft.Attention. Masking a head dimension means masking the query's columns of
    weight and bias.
    """
    if op.has(4):
        raise Barrier("it carries a cache of past keys")
    x, weights = op.axes(0), op.axes(1)
    sizes = op.attr("qkv_hidden_sizes") or [weights[1].size // 3] * 3
    count = op.attr("num_heads")
    heads, d, e = op.dim(count), op.dim(sizes[0] // count), op.dim(sizes[2] // count)
    if "qkv_hidden_sizes" not in op.node.attributes:
        op.unify(d, e)
    queries, values = product(heads, d), product(heads, e)
    op.unify(weights[1], concat(queries, queries, values))
    op.contract((1, 0), (0, 2))
    op.reads.append(Read(_only_first(op, queries, sizes[1] + sizes[2]), 1, 1))
    if op.has(2):
        op.unify(op.axes(2)[0], weights[1])
        op.reads.append(Read(_only_first(op, queries, sizes[1] + sizes[2]), 2, 0))
    op.cross(x[1])
    op.set(0, (x[0], x[1], values))
    op.tie_attribute("num_heads", heads)
    op.tie(lambda kept, old: [kept.size(queries)] * 2 + [kept.size(values)], attribute="qkv_hidden_sizes")
    op.tie_scale(d)
    op.count_macs(x[0], x[1], x[2], weights[1])
    _count(op, x[0], heads, x[1], x[1], d, e)


@rule("com.microsoft::GroupQueryAttention")
def group_query(op: Op) -> None:
    """Query heads (k r) share k key–value heads; a removed one takes its r query heads along.

    Spec: ContribOperators.md#com.microsoft.GroupQueryAttention. The head size must stay a multiple of 8, so it stays.
    """
    if not (op.has(1) and op.has(2)):
        raise Barrier("its projections are packed")
    q, k, v = op.axes(0), op.axes(1), op.axes(2)
    q_heads, kv_heads = op.attr("num_heads"), op.attr("kv_num_heads")
    kv, r = op.dim(kv_heads), op.dim(q_heads // kv_heads)
    heads = product(kv, r)
    d = _heads(op, q, heads, q[2].size // q_heads)
    for axes in (k, v):
        op.unify(d, _heads(op, axes, kv, d.size))
    op.freeze(d, "the head size of")
    for operand in (3, 4):
        if op.has(operand):
            op.unify(op.axes(operand)[1], kv)
    for output in (1, 2):
        shape = op.out_shapes[output] if output < len(op.out_shapes) else None
        if shape is not None:
            op.set(output, (q[0], kv, op.opaque(shape[2]), d))
    op.set(0, q)
    op.tie_attribute("num_heads", heads)
    op.tie_attribute("kv_num_heads", kv)
    _count(op, q[0], heads, q[1], k[1], d, d)
