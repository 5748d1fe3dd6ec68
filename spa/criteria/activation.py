"""Criteria that look at the weights and at what is multiplied with them.

Of a node that sums weights W_ij times inputs x_j, over all places and samples:

    wanda          |W_ij| ‖x_j‖₂ for each weight               Sun et al., arXiv 2306.11695, section 3
    activation_l2  W_ij² E[x_j²] for each weight
    flap           Var(x_j) ‖W_:j‖₂² for each input            An et al., arXiv 2312.11983, section 4

The scores of weights are summed over each channel of every axis of W that a group lies on, as the scores of
:mod:`spa.criteria.magnitude` are, so that a group hears its writers and its readers. Inputs have scores in readers
alone; they are standardised within the reader.

Where two activations are multiplied (queries and keys, say) the root mean square of one stands for the weights and
that of the other for the input, by their mean square: no bias makes up for a mean there. Such readers are asked only
about groups that meet no weights. The state of a recurrent cell is seen at the cell's output. Integers have a zero
that is not known here, so that their variance stands for their mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np

from spa.algebra.axes import Axes, leaves
from spa.algebra.op import Read
from spa.coupling.analysis import Analysis, Group, Law
from spa.coupling.places import channel_of
from spa.criteria.context import Context
from spa.criteria.magnitude import l2
from spa.criteria.parameter import parameters, weights
from spa.criteria.registry import Criterion, criterion
from spa.criteria.scores import combine
from spa.errors import ModelError
from spa.progress import Progress, silent

if TYPE_CHECKING:
    from spa.running.stream import Stream

Array = np.ndarray
Operand = tuple[str, int]  # (tensor, axis)


@dataclass(frozen=True)
class Signal:
    """Statistics of a tensor along one axis.

    Attributes:
        count: how many values each index has had.
        mean: of each index, (indices,), float64.
        square: the mean square of each index, (indices,), float64.
    """

    count: int
    mean: Array
    square: Array

    @property
    def variance(self) -> Array:
        """The variance of each index, (indices,)."""
        return np.maximum(self.square - self.mean**2, 0)


def signal(values: Iterable[Array], axis: int) -> Signal:
    """Take statistics of a tensor along one axis, over all its other axes, batch by batch in float64."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for value in values:
        axis %= value.ndim
        x = value.reshape(int(np.prod(value.shape[:axis])), value.shape[axis], -1)
        total = total + x.sum(axis=(0, 2), dtype=np.float64)
        squares = squares + np.einsum("acb,acb->c", x, x, dtype=np.float64)
        count += x.shape[0] * x.shape[2]
    mean, square = total / count, squares / count
    if value.dtype.kind in "iu":
        square = square - mean**2
    return Signal(count, mean, square)


@dataclass(frozen=True)
class Formula:
    """A score from weights and inputs.

    Attributes:
        of_weight: the part of a weight, element by element.
        of_input: the part of an input, (indices,).
        summary: for help texts.
        source: the paper.
        reconstruct: how the pruned network is repaired by default.
        readers_only: whether inputs are scored, not weights.
    """

    of_weight: Callable[[Array], Array]
    of_input: Callable[[Signal], Array]
    summary: str
    source: str
    reconstruct: str = "none"
    readers_only: bool = False


FORMULAS: Mapping[str, Formula] = {
    "wanda": Formula(
        of_weight=np.abs,
        of_input=lambda s: np.sqrt(s.square * s.count),
        summary="The absolute weight times the norm of its input.",
        source="Sun et al., ICLR 2024 (arXiv 2306.11695), section 3",
    ),
    "activation_l2": Formula(
        of_weight=np.square,
        of_input=lambda s: s.square,
        summary="The squared weight times the mean square of its input.",
        source="Wanda's score, squared and per sample",
    ),
    "flap": Formula(
        of_weight=np.square,
        of_input=lambda s: s.variance,
        summary="The variance of an input times the squared weights that read it.",
        source="An et al., AAAI 2024 (arXiv 2312.11983), section 4",
        reconstruct="bias",
        readers_only=True,
    ),
}


@dataclass(frozen=True)
class Product:
    """A sum over products with activations.

    Attributes:
        law: of the node.
        read: what it sums over.
        data: the activations, each with the axis that is summed over.
        weighted: whether the operand of ``read`` holds weights.
    """

    law: Law
    read: Read
    data: tuple[Operand, ...]
    weighted: bool

    @property
    def axes(self) -> Axes:
        """The axes of the operand of ``read``."""
        return self.law.inputs[self.read.operand] or ()


def rows(
    analysis: Analysis,
    groups: Sequence[Group],
    name: str,
    stream: Stream,
    progress: Progress = silent,
) -> dict[str, list[Array]]:
    """Score the channels of groups in every product, in one pass over the calibration inputs.

    Args:
        analysis: the model.
        groups: the groups to score.
        name: one of ``FORMULAS``.
        stream: the same model with its inputs, none of it run so far.
        progress: called with a stage and the fraction of it that is done.

    Returns:
        By group name the scores in each product that knows the group, each (channels,), float64.

    Raises:
        ModelError: a tensor holds values that are not finite.
    """
    formula = FORMULAS[name]
    group_of = {g.dim: g for g in groups}
    signal_of: dict[Operand, Signal] = {}
    weighted: dict[str, list[Array]] = {g.name: [] for g in groups}
    others: dict[str, list[Array]] = {g.name: [] for g in groups}
    for product in _products(analysis):
        axes = [analysis.space.resolve(e) for e in product.axes]
        scored_axes = [product.read.axis] if formula.readers_only or not product.weighted else range(len(axes))
        found = [(i, group_of[d]) for i in scored_axes for d in dict.fromkeys(leaves(axes[i])) if d in group_of]
        if not found:
            continue
        node = stream.graph.nodes[product.law.node.index]
        if not stream.sees(node):
            continue
        progress("score", node.index / len(stream.graph.nodes))
        if stream.at <= node.index:
            stream.after(node)
        for operand in product.data:
            if operand not in signal_of:
                signal_of[operand] = _finite(signal((b[operand[0]] for b in stream.live), operand[1]), node.label)
        signals = [signal_of[d] for d in product.data]
        scores = _of_weights(product, stream, formula, signals[0]) if product.weighted else None
        for axis, group in found:
            if scores is None:
                along = formula.of_weight(np.sqrt(reduce(np.multiply, (s.square for s in signals))))
            else:
                along = scores.sum(axis=tuple(i for i in range(scores.ndim) if i != axis), dtype=np.float64)
            channel = channel_of(axes[axis], group.dim)
            inside = channel >= 0
            score = np.bincount(channel[inside], weights=along[inside], minlength=group.size)
            (others if scores is None else weighted)[group.name].append(score)
    return {n: weighted[n] or others[n] for n in weighted}


def _products(analysis: Analysis) -> Iterable[Product]:
    """Yield the products with activations, in the order in which they run."""
    for _, law in sorted(analysis.laws.items()):
        names = law.node.inputs
        for read in law.reads:
            operands = ((read.operand, read.axis), *read.others)
            data = tuple((names[o], axis) for o, axis in operands if not analysis.is_constant(names[o]))
            weighted = analysis.is_constant(names[read.operand])
            data = data or _state(analysis, law, read)
            if data:
                yield Product(law, read, data, weighted)


def _state(analysis: Analysis, law: Law, read: Read) -> tuple[Operand, ...]:
    """Return the output and axis where a node gives out the state that its weights read."""
    state = analysis.space.resolve(read.expr)
    for name, axes in zip(law.node.outputs, law.outputs, strict=True):
        for axis, expr in enumerate(axes or ()):
            if name and analysis.space.resolve(expr) == state:
                return ((name, axis),)
    return ()


def _of_weights(product: Product, stream: Stream, formula: Formula, inputs: Signal) -> Array:
    """Return the score of every weight, in the weights' shape."""
    name = product.law.node.inputs[product.read.operand]
    weights = stream.graph.array(name) if name in stream.graph.constants else stream.live[0][name]
    weights = weights.astype(np.result_type(weights.dtype, np.float32), copy=False)
    factors = _spread(formula.of_input(inputs), weights.shape, product.read.axis)
    return formula.of_weight(weights) * factors.astype(weights.dtype)


def _spread(inputs: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Shape one number per input so that it can be multiplied with the weights.

    A grouped convolution has more inputs than its weights' axis: the first axis says which group's they are.
    """
    groups = inputs.size // shape[axis]
    spread = np.ones(len(shape), int)
    spread[axis] = shape[axis]
    if groups == 1:
        return inputs.reshape(spread)
    spread[0] = shape[0]
    return np.repeat(inputs.reshape(groups, -1), shape[0] // groups, axis=0).reshape(spread)


def _finite(found: Signal, label: str) -> Signal:
    """Return what was found; raise ModelError if it is not finite."""
    if not np.isfinite(found.square).all():
        raise ModelError(f"{label}: its input is not finite. Give other inputs with --data.")
    return found


def score(context: Context, name: str) -> dict[str, Array]:
    """Score groups by weights and inputs; those that meet no activations by the squares of their weights.

    Args:
        context: with inputs.
        name: one of ``FORMULAS``; ``flap`` is standardised whatever the context's NORM.

    Returns:
        By group name (channels,), float64.

    Raises:
        PlanError: there are no inputs.
        ModelError: onnxruntime cannot run the model, or a tensor holds values that are not finite.
    """
    inputs = context.required_inputs()
    groups = inputs.counterparts(context.groups)
    found = rows(inputs.analysis, groups, name, inputs.stream(), inputs.progress)
    for group in groups:
        found[group.name] = found[group.name] or [l2(p) for p in weights(parameters(inputs.analysis, group))]
    return combine(context, found, norm="standardise" if name == "flap" else None)


for _name, _formula in FORMULAS.items():
    criterion(
        Criterion(
            name=_name,
            score=partial(score, name=_name),
            summary=_formula.summary,
            source=_formula.source,
            needs=frozenset({"weights", "inputs"}),
            reconstruct=_formula.reconstruct,
        )
    )
