"""The change that pruning makes to a network's outputs, measured where it matters.

Probabilities move little where they are saturated: an error that decides nothing and one that decides everything may
differ by a millionth. Outputs of a last softmax or sigmoid are therefore compared before it, and the decisions that
are read from them are compared, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from onnx import ModelProto

from spa.model.graph import Graph
from spa.model.traits import FLOAT_NAMES, Trait, traits
from spa.running.live import Live
from spa.running.padding import only_real
from spa.running.runtime import output_specs
from spa.running.stream import Feeds, Stream

Array = np.ndarray
T = TypeVar("T")
MOST_VALUES = 2**22  # that are compared at a time: 32 MB in float64
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


@dataclass(frozen=True)
class Start:
    """The tensors of a dense network at one point, from which on a pruned one differs from it.

    Attributes:
        output: a tensor that the next node makes.
        live: the tensors that it and later nodes read, by batch.
    """

    output: str
    live: list[Live]


class Yardstick:
    """A dense network's outputs on some inputs, which pruned networks are compared with.

    Large outputs of both lie in temporary files, and are compared some samples at a time.

    Args:
        graph: the dense network.
        batches: the inputs.
        threads: of onnxruntime.
    """

    def __init__(self, graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> None:
        self.batches, self.threads, self.base = batches, threads, graph.base
        self.compared = compared_tensors(graph)
        self._graph = graph

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors that are compared."""
        return [c.tensor for c in self.compared]

    @cached_property
    def dense(self) -> list[Live]:
        """The dense network's tensors, by batch; run when they are first asked for."""
        return self._run(self._graph.model, self._graph.base)

    @cached_property
    def _spreads(self) -> dict[str, tuple[float, float]]:
        """Of each compared tensor the sum of squares, and that of its differences from the mean over the samples."""
        return {c.tensor: _spread(_Again(partial(_values, self.dense, c))) for c in self.compared}

    def change(self, pruned: ModelProto, start: Start | None = None) -> Change:
        """Measure what pruning has changed.

        Args:
            pruned: a network with the same outputs, and the tensors that stand for them.
            start: where it begins to differ from the dense one, to save the run up to there.
        """
        found = self._run(pruned, self.base, start)
        errors: list[float] = []
        agreement: dict[str, float] = {}
        for c in self.compared:
            if any(a.shape(c.tensor) != b.shape(c.tensor) for a, b in zip(self.dense, found, strict=True)):
                continue
            pairs = _Again(partial(_pairs, self.dense, found, c))
            errors.append(relative_error(pairs, self._spreads[c.tensor][1]))
            decided = _agreement(pairs, c)
            if decided is not None:
                agreement[c.output] = decided
        return Change(float(np.mean(errors)) if errors else None, agreement)

    @property
    def unvarying(self) -> tuple[str, ...]:
        """The outputs that hardly differ between the inputs, so that their change says little."""
        return tuple(c.output for c in self.compared if _hardly_varies(*self._spreads[c.tensor]))

    def _run(self, model: ModelProto, base: Path | None, start: Start | None = None) -> list[Live]:
        stream, names = Stream(model, base, self.batches if start is None else start.live, self.threads), self.tensors
        stream.keep(names)
        if start is not None and not stream.begin_at(start.output):
            stream = Stream(model, base, self.batches, self.threads)
        return stream.end(names)


class _Again(Iterable[T]):
    """A series that is made anew whenever it is gone through."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return self._make()


def _values(batches: Sequence[Live], compared: Compared) -> Iterator[Array]:
    """Yield a tensor of all batches but for padded positions, in float64, some samples at a time."""
    for batch in batches:
        value = only_real(batch[compared.tensor], batch.real)
        if not value.ndim:
            yield _centred(value, compared)
            continue
        step = max(1, MOST_VALUES * len(value) // max(value.size, 1))
        for start in range(0, len(value), step):
            yield _centred(value[start : start + step], compared)


def _pairs(dense: Sequence[Live], found: Sequence[Live], compared: Compared) -> Iterator[tuple[Array, Array]]:
    """Yield a tensor in the dense and in the pruned network, some samples at a time."""
    return zip(_values(dense, compared), _values(found, compared), strict=True)


def classes_seen(graph: Graph, batches: Sequence[Feeds], threads: int = 2) -> dict[str, tuple[Array, int]]:
    """Find the top classes of each output that ends in a softmax, and how many classes it has.

    Args:
        graph: the network.
        batches: the inputs.
        threads: of onnxruntime.
    """
    found: dict[str, tuple[Array, int]] = {}
    compared = [c for c in compared_tensors(graph) if c.kind == "softmax"]
    tensors = Stream(graph.model, graph.base, batches, threads).end([c.tensor for c in compared]) if compared else []
    for c in compared:
        seen = [np.unique(b[c.tensor].argmax(axis=c.axis)) for b in tensors]
        found[c.output] = np.unique(np.concatenate(seen)), tensors[0].shape(c.tensor)[c.axis]
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


def relative_error(pairs: Iterable[tuple[Array, Array]], energy: float | None = None) -> float:
    """Return the squared error of a tensor over its variance; the squared error alone if it does not vary.

    Values that are not finite count as equal where they are the same in both, else the error is infinite.

    Args:
        pairs: the tensor in the dense and in the pruned network, by batch, (samples, ...).
        energy: the squared differences of the dense one's values from their mean over the samples, summed; computed
            by default.
    """
    error = 0.0
    for a, b in pairs:
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
                return float("inf")
            a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        difference = (a - b).reshape(-1)
        error += float(difference @ difference)
    energy = _spread(_Again(lambda: (a for a, _ in pairs)))[1] if energy is None else energy
    return error / energy if energy > 0 else error


def _spread(values: Iterable[Array]) -> tuple[float, float]:
    """Return the sum of squares of a tensor, and that of its differences from the mean over the samples.

    Values that are not finite count as 0.
    """
    shapes, totals, count, elements = set(), dict[tuple[int, ...], Array](), 0, 0
    for value in map(_where_finite, values):
        shape = value.shape[1:]
        shapes.add(shape if value.ndim else None)
        totals[shape] = totals.get(shape, 0.0) + (value.sum(axis=0, dtype=np.float64) if value.ndim else value)
        count, elements = count + (len(value) if value.ndim else 1), elements + value.size
    if len(shapes) > 1 or None in shapes:
        mean = np.asarray(sum(float(total.sum()) for total in totals.values()) / max(elements, 1))
    else:
        mean = np.asarray(sum(totals.values()) / max(count, 1))
    squares = spread = 0.0
    for value in map(_where_finite, values):
        squares += float(np.square(value, dtype=np.float64).sum())
        spread += float(np.square(value - mean).sum())
    return squares, spread


def _where_finite(value: Array) -> Array:
    return value if np.isfinite(value).all() else np.where(np.isfinite(value), value, 0)


def _hardly_varies(total: float, spread: float) -> bool:
    return spread <= UNVARYING * total


def _agreement(pairs: Iterable[tuple[Array, Array]], compared: Compared) -> float | None:
    """Return the fraction of decisions that agree; None for outputs that decide nothing."""
    if compared.kind == "softmax":
        count = equal = 0
        for a, b in pairs:
            same = a.argmax(axis=compared.axis) == b.argmax(axis=compared.axis)
            count, equal = count + same.size, equal + int(same.sum())
        return equal / count if count else None
    if compared.kind == "sigmoid":
        both = dense = pruned = 0
        for a, b in pairs:
            both += int(((a > 0) & (b > 0)).sum())
            dense, pruned = dense + int((a > 0).sum()), pruned + int((b > 0).sum())
        return 2 * both / (dense + pruned) if dense else None
    return None
