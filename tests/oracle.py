"""The oracle: a pruned model must compute what the original computes with its readers' slices set to zero.

    pruned(x) == original(x) with the *readers'* slices of the removed indices set to zero

run by onnxruntime on both sides, not by our own rules. :func:`check` is the oracle; :class:`Net` builds small models by
hand, and :func:`wrap` puts one operator between weights so that every axis of it can be pruned:

    model = wrap("Conv", Data(2, 10, 7, 7), weight(6, 10, 3, 3))
    check(model)
    assert freedom(model) == {"X0": "2 10 7! 7!", "Y0": "2 6 5! 5!"}

How to read :func:`freedom`: a number is a free dimension of that size, ``7!`` a frozen one, ``7~`` one that crosses a
normalisation, ``1`` an axis of one index, ``(2 5)`` a product, ``2+3`` a concatenation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from spa.algebra.axes import leaves
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.plan import Plan, make_plan
from spa.model.graph import Graph
from spa.running.feeds import make_feeds
from spa.running.runtime import load_session, output_specs
from spa.surgery.apply import apply
from spa.surgery.masking import masked

Feeds = Mapping[str, np.ndarray]
CHECKED_OPSET = 21
IR = 10


class OracleError(AssertionError):
    """The pruned model is not what the masked original says."""


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found.

    Attributes:
        analysis: of the original model.
        groups: the groups that were pruned.
        plan: the random plan.
        pruned: the model after surgery.
        masked: the original with its readers masked; None where only shapes were checked.
        error: the largest max|pruned - masked| / max|masked| over outputs and feeds.
    """

    analysis: Analysis
    groups: tuple[Group, ...]
    plan: Plan
    pruned: ModelProto
    masked: ModelProto | None
    error: float


def check(
    model: ModelProto,
    *,
    fraction: float = 0.3,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    cross: bool = False,
    tolerance: float = 1e-5,
    feeds: Feeds | Sequence[Feeds] | None = None,
    surgeon: Callable[[Analysis, Plan], ModelProto] = apply,
    mask: Callable[[Analysis, Plan], ModelProto] = masked,
    sensitive: bool = True,
    drop: Sequence[str] = (),
) -> Checked:
    """Prune a random, asymmetric part of every group and compare with the masked original.

    Args:
        model: the original.
        fraction: of each group to remove; at least one index goes and one stays in every group of two or more.
        seed: of plan and feeds.
        groups: names of the groups to prune; all free ones by default.
        cross: prune the groups that cross a normalisation, too, and check shapes and loading only.
        tolerance: for max|pruned - masked| / max|masked| of each output.
        feeds: inputs to run on; by default seeded ones, at two batch sizes where the batch is dynamic.
        surgeon: what prunes (replaced by sabotage tests).
        mask: what masks (replaced by sabotage tests).
        sensitive: whether masking must change an output, so that equality says something.
        drop: names of residual branches that go as a whole, too.

    Raises:
        OracleError: an output differs, or nothing was pruned, or pruning was not visible.
    """
    before = model.SerializeToString(deterministic=True)
    analysis = couple(Graph(model))
    pool = analysis.prunable if cross else analysis.free
    chosen = tuple(g for g in (pool if groups is None else _named(analysis, groups)) if g.size > 1)
    if not chosen and not drop:
        reasons = {g.name: g.frozen or f"crosses {g.crossings}" for g in analysis.groups}
        raise OracleError(f"no group to prune: {reasons}")
    none = np.zeros(0, int)
    plan = make_plan(analysis, random_keeps(chosen, fraction, seed) | dict.fromkeys(drop, none))
    pruned = surgeon(analysis, plan)
    if model.SerializeToString(deterministic=True) != before:
        raise OracleError("the input model was changed")
    _check_like(model, pruned)
    expected = None if cross else mask(analysis, plan)
    error = _compare(model, pruned, expected, _all_feeds(model, feeds, seed), tolerance, sensitive, seed)
    return Checked(analysis, chosen, plan, pruned, expected, error)


def _check_like(model: ModelProto, pruned: ModelProto) -> None:
    """The pruned model passes onnx.checker if the original does (it refuses GroupNormalization of opset 18)."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return
    onnx.checker.check_model(pruned)


def random_keeps(groups: Sequence[Group], fraction: float = 0.3, seed: int = 0) -> dict[str, np.ndarray]:
    """Kept indices by group name: seeded, never mirror-symmetric, never all, never none."""
    rng = np.random.default_rng(seed)
    keeps = {}
    for group in groups:
        count = min(max(round(fraction * group.size), 1), group.size - 1)
        for _ in range(100):
            keep = np.ones(group.size, dtype=bool)
            keep[rng.permutation(group.size)[:count]] = False
            if not np.array_equal(keep, keep[::-1]):
                break
        keeps[group.name] = np.flatnonzero(keep)
    return keeps


def _named(analysis: Analysis, names: Sequence[str]) -> list[Group]:
    by_name = {g.name: g for g in analysis.groups}
    missing = [n for n in names if n not in by_name]
    if missing:
        raise OracleError(f"no groups {missing}; there are {sorted(by_name)}")
    return [by_name[n] for n in names]


def _all_feeds(model: ModelProto, feeds: Feeds | Sequence[Feeds] | None, seed: int) -> list[Feeds]:
    if isinstance(feeds, Mapping):
        return [feeds]
    if feeds is not None:
        return list(feeds)
    weights = {t.name for t in model.graph.initializer}
    open_batch = any(
        i.type.tensor_type.shape.dim and not i.type.tensor_type.shape.dim[0].HasField("dim_value")
        for i in model.graph.input
        if i.name not in weights
    )
    return [make_feeds(model, seed=seed + b, batch=b) for b in ((2, 3) if open_batch else (2,))]


def _compare(
    model: ModelProto,
    pruned: ModelProto,
    expected: ModelProto | None,
    all_feeds: Sequence[Feeds],
    tolerance: float,
    sensitive: bool,
    seed: int,
) -> float:
    session, reference = load_session(pruned), load_session(model)
    goal = load_session(expected) if expected is not None else None
    worst, visible = 0.0, False
    for feeds in all_feeds:
        got, original = session.run(None, dict(feeds)), reference.run(None, dict(feeds))
        for name, a, o in zip([i.name for i in reference.get_outputs()], got, original, strict=True):
            if np.shape(a) != np.shape(o) or np.asarray(a).dtype != np.asarray(o).dtype:
                raise OracleError(f"output {name!r} became {np.shape(a)} where it was {np.shape(o)} (seed {seed})")
        if goal is None:
            continue
        for name, a, b, o in zip(
            [i.name for i in reference.get_outputs()], got, goal.run(None, dict(feeds)), original, strict=True
        ):
            error = distance(a, b)
            visible = visible or distance(b, o) > max(10 * tolerance, 1e-3)
            worst = max(worst, error)
            if not error <= tolerance:
                raise OracleError(f"output {name!r} is {error:.2g} off the masked original (seed {seed})")
    if goal is not None and sensitive and not visible:
        raise OracleError(f"masking changed no output, so equality says nothing (seed {seed})")
    return worst


def distance(a: Any, b: Any) -> float:
    """max|a - b| / max|b|; infinite where numbers are not finite, or non-numbers differ."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(a, b) else np.inf
    if not a.size:
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b) else np.inf
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


# -- building small models ------------------------------------------------------------------------------------------


def random_array(*shape: int, seed: int = 0, fan_in: int | None = None, dtype: Any = np.float32) -> np.ndarray:
    """Normal numbers without repeated rows, scaled so that sums over ``fan_in`` stay near one."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) / np.sqrt(fan_in or 1)).astype(dtype)


class Net:
    """A small ONNX model, written node by node.

    >>> net = Net()
    >>> x = net.input("x", ["n", 3])
    >>> h = net.node("Relu", net.gemm(x, 3, 7))
    >>> model = net.model(net.gemm(h, 7, 2))
    """

    def __init__(self, opset: int = CHECKED_OPSET, *, seed: int = 0, dtype: int = TensorProto.FLOAT, **domains: int):
        self.opset, self.seed, self.dtype, self.domains = opset, seed, dtype, domains
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def fresh(self, stem: str) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, shape: Sequence[int | str], dtype: int | None = None) -> str:
        """A graph input; strings are symbolic sizes."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, list(shape)))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """An initializer with a given value; Python floats take the net's element type."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.dtype))
        name = name or self.fresh("const")
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, *shape: int, fan_in: int | None = None, name: str | None = None, positive: bool = False) -> str:
        """A random initializer."""
        name = name or self.fresh("weight")
        value = random_array(*shape, seed=self.seed + len(self.weights), fan_in=fan_in)
        value = np.abs(value) + 0.1 if positive else value
        self.weights[name] = numpy_helper.from_array(value.astype(helper.tensor_dtype_to_np_dtype(self.dtype)), name)
        return name

    def node(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **attributes: Any) -> Any:
        """A node; returns its output's name, or the list of names where there are several."""
        names = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def gemm(self, x: str, inputs: int, outputs: int, *, bias: bool = True, name: str | None = None) -> str:
        """A fully connected layer [n inputs] → [n outputs]."""
        operands = [x, self.weight(outputs, inputs, fan_in=inputs, name=name)]
        if bias:
            operands.append(self.weight(outputs, name=name and f"{name}.bias"))
        return self.node("Gemm", *operands, transB=1)

    def matmul(self, x: str, inputs: int, outputs: int, *, bias: bool = True, name: str | None = None) -> str:
        """A linear layer over the last axis of any rank."""
        y = self.node("MatMul", x, self.weight(inputs, outputs, fan_in=inputs, name=name))
        return self.node("Add", y, self.weight(outputs, name=name and f"{name}.bias")) if bias else y

    def conv(
        self,
        x: str,
        inputs: int,
        outputs: int,
        kernel: Sequence[int] = (3, 3),
        *,
        group: int = 1,
        bias: bool = True,
        name: str | None = None,
        **attributes: Any,
    ) -> str:
        """A convolution, "same" padded for odd kernels unless `pads` says otherwise."""
        each = inputs // group
        operands = [x, self.weight(outputs, each, *kernel, fan_in=each * int(np.prod(kernel)), name=name)]
        if bias:
            operands.append(self.weight(outputs, name=name and f"{name}.bias"))
        attributes.setdefault("pads", [k // 2 for k in kernel] * 2)
        return self.node("Conv", *operands, group=group, kernel_shape=list(kernel), **attributes)

    def batch_norm(self, x: str, channels: int) -> str:
        """BatchNormalization with random statistics."""
        stats = [self.weight(channels), self.weight(channels), self.weight(channels)]
        return self.node("BatchNormalization", x, *stats, self.weight(channels, positive=True))

    def project(self, x: str, axis: int, rank: int, inputs: int, outputs: int) -> str:
        """Contract one axis of a tensor with weights: [.. inputs ..] → [.. outputs ..]."""
        letters = "abcdefghijklm"[:rank]
        equation = f"{letters},{letters[axis]}z->{letters[:axis]}z{letters[axis + 1 :]}"
        return self.node("Einsum", x, self.weight(inputs, outputs, fan_in=inputs), equation=equation)

    def model(self, *outputs: str, **metadata: str) -> ModelProto:
        """The model, its outputs declared as ONNX's inference finds them, or else as onnxruntime does."""
        untyped = [helper.make_empty_tensor_value_info(o) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, untyped, list(self.weights.values()))
        opsets = [helper.make_opsetid("", self.opset)] + [
            helper.make_opsetid(d.replace("_", "."), v) for d, v in self.domains.items()
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="oracle")
        if metadata:
            helper.set_model_props(model, metadata)
        declared = _declared(model)
        del model.graph.output[:]
        model.graph.output.extend(declared)
        return model


def _declared(model: ModelProto) -> list[onnx.ValueInfoProto]:
    found = list(onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output)
    if all(i.type.tensor_type.elem_type and i.type.tensor_type.HasField("shape") for i in found):
        return found
    specs = {s.name: s for s in output_specs(load_session(model))}
    return [
        i
        if i.type.tensor_type.HasField("shape")
        else helper.make_tensor_value_info(i.name, _ELEMENTS[specs[i.name].element], specs[i.name].shape)
        for i in found
    ]


_ELEMENTS = {
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "double": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def verify(model: ModelProto, expected: str, **options: Any) -> None:
    """Soundness and freedom of one wrapped operator.

    Args:
        model: from :func:`wrap`.
        expected: :func:`freedom` of the operator's activations, joined by `` | ``.
        options: for :func:`check`.
    """
    analysis = couple(Graph(model))
    assert ungrammatical(analysis) == []
    assert " | ".join(freedom(analysis).values()) == expected
    if any(g.size > 1 for g in analysis.free):
        check(model, **options)
    if "~" in expected:
        check(model, cross=True)


# -- one operator between weights -----------------------------------------------------------------------------------


class Data:
    """An activation: each axis is written by weights of its own, so that the operator alone decides what is free.

    Args:
        shape: the sizes.
        plain: axes that no weights write; they are a graph input's, and dynamic where `dynamic` says so.
        dynamic: the plain axes whose size the model leaves open.
        positive: make all values positive (logarithms, roots).
    """

    def __init__(self, *shape: int, plain: Sequence[int] = (), dynamic: Sequence[int] = (), positive: bool = False):
        self.shape = shape
        self.plain, self.dynamic, self.positive = {*plain, *dynamic}, set(dynamic), positive


@dataclass(frozen=True)
class Indices:
    """An integer operand that is computed from data: values in [0, limit)."""

    shape: tuple[int, ...]
    limit: int


def weight(*shape: int, positive: bool = False, seed: int = 0) -> np.ndarray:
    """A random constant operand of :func:`wrap`."""
    value = random_array(*shape, seed=seed, fan_in=int(np.prod(shape[1:])) or 1)
    return np.abs(value) + np.float32(0.1) if positive else value


def wrap(
    op: str,
    *operands: Data | Indices | np.ndarray | Sequence[int] | None,
    outputs: int = 1,
    opset: int = CHECKED_OPSET,
    domain: str = "",
    ranks: Sequence[int] | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    read: Sequence[int] | None = None,
    seed: int = 0,
    dtype: int = TensorProto.FLOAT,
    cast: bool = False,
    **attributes: Any,
) -> ModelProto:
    """One operator between weights: graph input → weights on every axis → operator → weights on every axis → output.

    The operator's activations are named X0, X1 ... by operand position, its outputs Y0, Y1 ...

    Args:
        op: the operator.
        operands: an activation, computed indices, a constant (arrays as they are, lists become int64) or None.
        outputs: how many outputs the node has.
        opset: of the default domain.
        domain: the operator's domain.
        ranks: the outputs' ranks, where inference does not find them; their axes are then not read by weights.
        shapes: the outputs' shapes, where inference does not find them.
        read: the outputs that weights read; all by default. The others are unused.
        seed: of the weights.
        dtype: of the activations.
        cast: cast the outputs to float before reading them (comparisons, integer results).
        attributes: the node's.
    """
    # version 12 brought Einsum; older operators are wrapped by transposes and MatMul.
    net = _OldNet(opset, seed=seed, dtype=dtype) if opset < 12 else Net(opset, seed=seed, dtype=dtype)
    if domain:
        net.domains[domain] = 1
    names = []
    for position, operand in enumerate(operands):
        if operand is None:
            names.append("")
        elif isinstance(operand, Data):
            names.append(_produced(net, operand, position))
        elif isinstance(operand, Indices):
            names.append(_indexed(net, operand, position))
        else:
            value = operand if isinstance(operand, np.ndarray) else np.asarray(operand, np.int64)
            names.append(net.constant(value, f"C{position}"))
    results = [f"Y{i}" for i in range(outputs)]
    net.nodes.append(helper.make_node(op, names, results, name="tested", domain=domain, **attributes))
    found = [list(s) for s in shapes] if shapes is not None else _inferred_shapes(net, results, ranks)
    ends = []
    for i, shape in enumerate(found):
        if read is not None and i not in read:
            continue
        y = net.node("Cast", results[i], to=dtype) if cast else results[i]
        for axis, size in enumerate(shape):
            if size != 1 and size is not None:
                y = net.project(y, axis, len(shape), size, 2)
        ends.append(y if y != results[i] else net.node("Identity", y))
    return net.model(*ends)


class _OldNet(Net):
    def project(self, x: str, axis: int, rank: int, inputs: int, outputs: int) -> str:
        perm = list(range(rank))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        swapped = self.node("Transpose", x, perm=perm) if axis != rank - 1 else x
        y = self.node("MatMul", swapped, self.weight(inputs, outputs, fan_in=inputs))
        return self.node("Transpose", y, perm=perm) if axis != rank - 1 else y


def _produced(net: Net, data: Data, position: int) -> str:
    sizes = [n if i in data.plain or n == 1 else 3 for i, n in enumerate(data.shape)]
    declared = [f"open{i}" if i in data.dynamic else n for i, n in enumerate(sizes)]
    y = net.input(f"input{position}", declared)
    for axis, (given, size) in enumerate(zip(sizes, data.shape, strict=True)):
        if axis not in data.plain and size != 1:
            y = net.project(y, axis, len(sizes), given, size)
    bias = [1 if i in data.plain else n for i, n in enumerate(data.shape)]
    y = net.node("Add", y, net.weight(*bias))  # of full rank, so that no two places are alike
    if data.positive:
        y = net.node("Add", net.node("Abs", y), net.constant(0.1))
    net.nodes[-1].output[0] = f"X{position}"
    return f"X{position}"


def _indexed(net: Net, indices: Indices, position: int) -> str:
    x = net.input(f"input{position}", indices.shape)
    scaled = net.node("Mul", net.node("Abs", x), net.constant(1000.0))
    whole = net.node("Cast", scaled, to=TensorProto.INT64)
    return str(net.node("Mod", whole, net.constant(np.int64(indices.limit))))


def _inferred_shapes(net: Net, names: Sequence[str], ranks: Sequence[int] | None) -> list[list[int | None]]:
    if ranks is not None:
        return [[None] * r for r in ranks]
    return [
        [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
        for info in net.model(*names).graph.output
    ]


# A frozen reason has a subject (an operator, a graph input or output, "it": the group) and a verb; a barrier's reason is
# a clause that stands behind "and", too.
_LABEL = r"""(?:\w+ (?:'[^']*'|"[^"]*"))"""
_REASON = re.compile(rf"(?:it|{_LABEL}|graph (?:input|output) '[^']*') [a-z]+s (?!by\b)[^\n]*[^.\n]")
_CLAUSE = re.compile(
    r"[^\n.]*\b(?:is|are|has|have|does|do|depend|carry|ties|count|picks|draws|reads|works|trains|belongs|fit|leave|stretch"
    r"|depends)\b[^\n]*[^.\n]"
)


def ungrammatical(analysis: Analysis) -> list[str]:
    """The reasons of an analysis that are no clauses, and so make no sentence where a message embeds them."""
    space = analysis.space
    tensors = [*analysis.axes.values(), *analysis.uses.values()]
    dims = dict.fromkeys(d for axes in tensors for e in axes for d in leaves(space.resolve(e)))
    reasons = {r for d in dims if (r := space.reason(d)) is not None}
    return sorted(r for r in reasons if not is_reason(r)) + [b for b in analysis.barriers.values() if not is_clause(b)]


def is_reason(text: str) -> bool:
    """Whether a text has the form of a frozen reason."""
    return _REASON.fullmatch(text) is not None


def is_clause(text: str) -> bool:
    """Whether a text has the form of a barrier's reason."""
    return _CLAUSE.fullmatch(text) is not None


def freedom(model: ModelProto | Analysis, *tensors: str) -> dict[str, str]:
    """What may be removed from the tested operator's activations (see the module's docstring for how to read it)."""
    analysis = model if isinstance(model, Analysis) else couple(Graph(model))
    space = analysis.space

    def label(dim: Any) -> str:
        mark = "!" if space.reason(dim) is not None else "~" if space.crossings(dim) else ""
        return f"{dim.size}{mark}"

    names = tensors or [n for n in analysis.axes if len(n) == 2 and n[0] in "XY"]
    return {n: " ".join(space.show(e, label) for e in analysis.axes[n]) for n in names}
