"""The change that pruning makes to a network's outputs, measured where it matters.

Probabilities move little where they are saturated: an error that decides nothing and one that decides everything may
differ by a millionth. Outputs of a last softmax or sigmoid are therefore compared before it, and the decisions that
are read from them are compared, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto

from spa.model.graph import Graph
from spa.model.traits import FLOAT_NAMES, Trait, traits
from spa.running.padding import only_real
from spa.running.runtime import output_specs
from spa.running.stream import Feeds, Stream

Array = np.ndarray
Tensors = Sequence[Mapping[str, Array]]  # by batch and name
UNVARYING = 1e-6  # outputs whose variance is a smaller fraction of their mean square do not differ between inputs
SOFTMAX, SIGMOID = ("Softmax", "LogSoftmax"), ("Sigmoid",)


@dataclass(frozen=True)
class Compared:
    """A float output, and the tensor that stands for it in comparisons.

    Attributes:
        output: the output's name.
        tensor: the name of the tensor to compare: what its last softmax or sigmoid reads, or the output itself.
        kind: ``softmax``, ``sigmoid`` or ``values``.
        axis: the axis of the classes of a softmax.
    """

    output: str
    tensor: str
    kind: str = "values"
    axis: int = -1


@dataclass(frozen=True)
class Change:
    """The change of a network's outputs on some inputs.

    Attributes:
        error: E|y − y'|² / Var[y], the mean over the float outputs; None if there are none of equal shapes.
        agreement: by output that ends in a softmax, the fraction of equal top classes; by output that ends in a
            sigmoid, the overlap (Dice) of the entries above one half, if the dense network has any.
    """

    error: float | None
    agreement: Mapping[str, float] = field(default_factory=dict)


class Yardstick:
    """A dense network's outputs on some inputs, which pruned networks are compared with.

    Args:
        graph: the dense network.
        batches: the inputs.
        threads: of onnxruntime.
    """

    def __init__(self, graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> None:
        self.batches, self.threads, self.base = batches, threads, graph.base
        self.compared = compared_tensors(graph)
        self._graph = graph
        self._dense: Tensors | None = None

    @property
    def dense(self) -> Tensors:
        """The dense network's tensors, by batch; run when they are first asked for."""
        if self._dense is None:
            self._dense = self._run(self._graph.model, self._graph.base)
        return self._dense

    def change(self, pruned: ModelProto) -> Change:
        """Measure what pruning has changed.

        Args:
            pruned: a network with the same outputs, and the tensors that stand for them.
        """
        found = self._run(pruned, self.base)
        errors: list[float] = []
        agreement: dict[str, float] = {}
        for compared in self.compared:
            name = compared.tensor
            pairs = [
                (_centred(a[name], compared), _centred(b[name], compared))
                for a, b in zip(self.dense, found, strict=True)
            ]
            if any(a.shape != b.shape for a, b in pairs):
                continue
            errors.append(relative_error(pairs))
            decided = _agreement(pairs, compared)
            if decided is not None:
                agreement[compared.output] = decided
        return Change(float(np.mean(errors)) if errors else None, agreement)

    @property
    def unvarying(self) -> tuple[str, ...]:
        """The outputs that hardly differ between the inputs, so that their change says little."""
        return tuple(c.output for c in self.compared if _hardly_varies([b[c.tensor] for b in self.dense]))

    def _run(self, model: ModelProto, base: Path | None) -> Tensors:
        stream = Stream(model, base, self.batches, self.threads)
        reals = [live.real for live in stream.live]
        found = stream.finish([c.tensor for c in self.compared])
        return [{n: only_real(v, real) for n, v in b.items()} for b, real in zip(found, reals, strict=True)]


def classes_seen(graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> dict[str, tuple[Array, int]]:
    """Find the top classes of each output that ends in a softmax, and how many classes it has.

    Args:
        graph: the network.
        batches: the inputs.
        threads: of onnxruntime.
    """
    found: dict[str, tuple[Array, int]] = {}
    compared = [c for c in compared_tensors(graph) if c.kind == "softmax"]
    tensors = Stream(graph.model, graph.base, batches, threads).finish([c.tensor for c in compared]) if compared else []
    for c in compared:
        seen = [np.unique(b[c.tensor].argmax(axis=c.axis)) for b in tensors]
        found[c.output] = np.unique(np.concatenate(seen)), tensors[0][c.tensor].shape[c.axis]
    return found


def compared_tensors(graph: Graph) -> tuple[Compared, ...]:
    """Return for each float output of a network which tensor stands for it."""
    floats = {s.name for s in output_specs(graph.model) if s.element in FLOAT_NAMES}
    return tuple(_compared(graph, name) for name in graph.outputs if name in floats and name not in graph.constants)


def _compared(graph: Graph, output: str) -> Compared:
    """Follow an output back to its softmax or sigmoid, through what only moves elements."""
    name = output
    while (node := graph.producer.get(name)) is not None and not node.domain:  # a chain, no search
        source = node.inputs[0] if node.inputs else ""
        if node.op in SOFTMAX and source not in graph.constants:
            default = -1 if node.version >= 13 else 1
            return Compared(output, source, "softmax", int(node.attributes.get("axis", default)))
        if node.op in SIGMOID and source not in graph.constants:
            return Compared(output, source, "sigmoid")
        if node.op != "Identity" and not traits(node.key) & {Trait.VIEW, Trait.PERMUTATION}:
            break
        name = source
    return Compared(output, output)


def _centred(value: Array, compared: Compared) -> Array:
    """Return logits less their mean over the classes, to which a softmax is blind; other tensors as they are."""
    value = value.astype(np.float64)
    if compared.kind != "softmax":
        return value
    finite = np.isfinite(value)  # a class that is ruled out has a logit of minus infinity
    return value - value.mean(
        axis=compared.axis, keepdims=True, where=finite | ~finite.any(compared.axis, keepdims=True)
    )


def relative_error(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Return the squared error of a tensor over its variance; the squared error alone if it does not vary.

    Values that are not finite count as equal where they are the same in both, else the error is infinite.

    Args:
        pairs: the tensor in the dense and in the pruned network, by batch, (samples, ...).
    """
    try:
        pairs = [_finite(a, b) for a, b in pairs]
    except ValueError:
        return float("inf")
    error = sum(float(np.square(a - b).sum()) for a, b in pairs)
    _, energy = _spread([a for a, _ in pairs])
    return error / energy if energy > 0 else error


def _finite(a: Array, b: Array) -> tuple[Array, Array]:
    """Return two arrays with 0 where neither is finite; raise ValueError where they are not so in the same way."""
    finite = np.isfinite(a) & np.isfinite(b)
    if finite.all():
        return a, b
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        raise ValueError
    return np.where(finite, a, 0), np.where(finite, b, 0)


def _spread(values: Sequence[Array]) -> tuple[float, float]:
    """Return the sum of squares of a tensor, and that of its differences from the mean over the samples.

    Values that are not finite count as 0.
    """
    values = [v if np.isfinite(v).all() else np.where(np.isfinite(v), v, 0) for v in values]
    if len({v.shape[1:] for v in values}) > 1 or not values[0].ndim:
        mean = np.asarray(sum(float(v.sum()) for v in values) / max(sum(v.size for v in values), 1))
    else:
        mean = np.asarray(sum(v.sum(axis=0, dtype=np.float64) for v in values) / max(sum(map(len, values)), 1))
    return (
        sum(float(np.square(v, dtype=np.float64).sum()) for v in values),
        sum(float(np.square(v - mean).sum()) for v in values),
    )


def _hardly_varies(values: Sequence[Array]) -> bool:
    total, spread = _spread(values)
    return spread <= UNVARYING * total


def _agreement(pairs: Sequence[tuple[Array, Array]], compared: Compared) -> float | None:
    """Return the fraction of decisions that agree; None for outputs that decide nothing."""
    if compared.kind == "softmax":
        equal = [a.argmax(axis=compared.axis) == b.argmax(axis=compared.axis) for a, b in pairs]
        count = sum(e.size for e in equal)
        return sum(int(e.sum()) for e in equal) / count if count else None
    if compared.kind == "sigmoid":
        above = [(a > 0, b > 0) for a, b in pairs]
        both = sum(int((a & b).sum()) for a, b in above)
        dense, pruned = (sum(int(part[i].sum()) for part in above) for i in (0, 1))
        return 2 * both / (dense + pruned) if dense else None
    return None
