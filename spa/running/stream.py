"""A network run in steps, batch by batch: only the tensors that later nodes read are held between two steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime import InferenceSession

from spa.algebra.axes import Axes, Kept
from spa.errors import InvariantError, UnsupportedError
from spa.model.graph import Graph, Node
from spa.model.marks import marks_around
from spa.model.traits import Trait, traits
from spa.running.live import Live, PaddedBatch, Shelf
from spa.running.runtime import load_session, run
from spa.running.windows import windows

WINDOW = 1 << 26  # bytes of weights that are run together; onnxruntime takes about four times as much
MEMORY = 1 << 26  # bytes of live tensors that may stay in memory; reading others back takes less time than making them
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bias:
    """A bias to give to a node.

    Attributes:
        shape: its shape.
        like: the constant whose type it has.
        operand: which of the node's operands it becomes.
    """

    shape: tuple[int, ...]
    like: str
    operand: int = 2


def samples_in(batches: Sequence[Feeds]) -> int:
    """Return the number of samples of all batches: of a batch the longest first axis of its inputs.

    Some inputs are scalars that all samples share, and states have their samples along the second axis.
    """
    return sum(max((len(v) for v in b.values() if v.ndim), default=1) for b in batches)


def first_samples(batches: Sequence[Feeds], count: int) -> list[Feeds]:
    """Return the first batches that together have so many samples.

    A batch that has more is cut where all of its inputs have their samples along the first axis.
    """
    found: list[Feeds] = []
    for batch in batches:
        missing, size = count - samples_in(found) if found else count, samples_in([batch])
        if missing <= 0:
            break
        cut = size > missing and all(v.ndim and len(v) == size for v in batch.values())
        found.append(_cut(batch, slice(missing)) if cut else batch)
    return found


def parted(batches: Sequence[Feeds], samples: int) -> list[Feeds]:
    """Cut batches into parts of so many samples at most; those stay whole that have samples along other axes."""
    found: list[Feeds] = []
    for batch in batches:
        size = samples_in([batch])
        whole = size <= samples or not all(v.ndim and len(v) == size for v in batch.values())
        parts = [slice(None)] if whole else [slice(i, i + samples) for i in range(0, size, samples)]
        found += [batch if whole else _cut(batch, part) for part in parts]
    return found


def _cut(batch: Feeds, part: slice) -> Feeds:
    cut = {n: v[part] for n, v in batch.items()}
    return PaddedBatch(cut, batch.real[part]) if isinstance(batch, PaddedBatch) else cut


class Stream:
    """A network and the live tensors of all calibration batches at one point of its node order.

    Args:
        model: the network; its message is edited where weights are replaced.
        base: the folder of its external data.
        batches: the inputs, one mapping per batch.
        threads: of onnxruntime.
        memory: bytes of live tensors that may stay in memory; what exceeds it lies in temporary files without a name.

    Attributes:
        graph: the network's view.
        at: the index of the next node to run.
        live: for each batch the tensors that nodes from ``at`` on may read.
        edits: what was added to constants so far, by name.
        biases: those that nodes were given, by the node's first output.
        changed: the names of constants that were replaced, for those who want to know, and who clear it.
    """

    def __init__(
        self,
        model: ModelProto,
        base: Path | None,
        batches: Sequence[Feeds],
        threads: int = 2,
        memory: int = MEMORY,
    ) -> None:
        self.graph = Graph(model, base)
        self.threads, self.memory = threads, memory
        self.edits: dict[str, np.ndarray] = {}
        self.biases: dict[str, Bias] = {}
        self.changed: set[str] = set()
        self.at = 0
        self.live: list[Live] = [Live(b) for b in batches]
        self._last: dict[str, int] = {}
        for node in self.graph.nodes:
            for name in self.graph.reads(node):
                self._last[name] = node.index
        self._last.update(dict.fromkeys(self.graph.outputs, len(self.graph.nodes)))
        self._around = marks_around(self.graph)
        # A body runs as a whole, and only tensors can be held between two parts.
        self._splits = not self._around and not any(Trait.SEQUENCE in traits(n.key) for n in self.graph.nodes)

    def sees(self, node: Node) -> bool:
        """Return whether the inputs of a node can be held: in a body, those of all steps that the body makes itself."""
        return self.why_unseen(node) is None

    def why_unseen(self, node: Node) -> str | None:
        """Return why the inputs of a node in a body cannot be held, a clause with it as subject; None if they can.

        A product of two tensors of a body is none of all their steps.
        """
        marks = self._around.get(node.index, ())
        if any(mark.op == "IfThen" for mark in marks):
            return "lies in a branch, which does not always run"
        read = [self.graph.producer.get(n) for n in node.inputs if n and n not in self.graph.constants]
        if marks and len(read) > 1 and Trait.PRODUCT in traits(node.key):
            return "multiplies two tensors of one step"
        if marks and not all(p is not None and (p is marks[-1] or self._around.get(p.index) == marks) for p in read):
            return "reads inside a loop what is computed outside of it"
        return None

    def before(self, node: Node) -> None:
        """Run every node before this one."""
        if node.index in self._around:
            self._look_inside(node, node.index, node.inputs)
        else:
            self._run(node.index)

    def after(self, node: Node) -> None:
        """Run every node up to this one; its inputs and outputs are held until the next step."""
        if node.index in self._around:
            self._look_inside(node, node.index + 1, (*node.inputs, *node.outputs))
            return
        self._run(node.index)
        self._run(node.index + 1, (*node.inputs, *node.outputs))

    def _look_inside(self, node: Node, end: int, wanted: Iterable[str]) -> None:
        """Run a body as a whole, and hold what its nodes up to ``end`` have made at all steps, as so many samples."""
        marks, wanted = self._around[node.index], set(wanted)
        first = marks[0].index
        self._run(first)
        nodes = list(takewhile(lambda n: n.index == first or n.index in self._around, self.graph.nodes[first:]))
        nodes.append(self.graph.nodes[nodes[-1].index + 1])  # the mark that the body ends with
        nodes = self._computing(nodes)
        made = {o for n in nodes for o in n.outputs if o}
        beside = [n for n in nodes if n.index < end and (n is marks[-1] or self._around.get(n.index) == marks)]
        names = [
            o
            for n in beside
            for o in (n.outputs[:-1] if n is marks[-1] else n.outputs)
            if o and (self._last.get(o, -1) >= node.index or o in wanted)
        ]
        inputs = self._inputs(nodes, made)
        session = load_session(self._part(nodes, inputs, names, self.live[0]), threads=self.threads)
        shelf = self.shelf()
        for batch in self.live:
            for name in made & batch.keys():
                del batch[name]
            for name, value in zip(names, run(session, {n: batch[n] for n in inputs}), strict=True):
                batch.store(name, _as_array(value), shelf)

    def again(self, names: Sequence[str], held: Collection[str]) -> None:
        """Compute tensors anew that were computed before their constants were replaced.

        Args:
            names: the tensors.
            held: tensors that all batches hold, from which on they are computed.
        """
        found: dict[int, Node] = {}
        todo = [n for n in names if n not in held]  # not by networkx: the search stops at tensors
        while todo:
            maker = self.graph.producer.get(name := todo.pop())
            if maker is not None and name not in self.graph.constants and maker.index not in found:
                found[maker.index] = maker
                todo += [n for n in self.graph.reads(maker) if n not in held]
        nodes = self._computing([found[i] for i in sorted(found)])
        inputs = self._inputs(nodes, {o for n in nodes for o in n.outputs if o})
        session = load_session(self._part(nodes, inputs, names, self.live[0]), threads=self.threads)
        shelf = self.shelf()
        for batch in self.live:
            for name, value in zip(names, run(session, {n: batch[n] for n in inputs}), strict=True):
                batch.store(name, _as_array(value), shelf)

    def finish(self, names: Sequence[str] | None = None) -> list[dict[str, np.ndarray]]:
        """Run the rest and return tensors of each batch.

        Args:
            names: tensors that no step has passed yet; the network's outputs by default.
        """
        names = self.graph.outputs if names is None else names
        return [{n: b[n] for n in names} for b in self.end(names)]

    def end(self, names: Sequence[str]) -> list[Live]:
        """Run the rest and return what batches hold then: these tensors, which no step has passed yet."""
        self.keep(names)
        self._run(len(self.graph.nodes))
        for batch in self.live:
            for name in batch.keys() - set(names):
                del batch[name]
        return self.live

    def keep(self, names: Iterable[str]) -> None:
        """Hold tensors that no step has passed yet until the end."""
        self._last.update(dict.fromkeys(names, len(self.graph.nodes)))

    def begin_at(self, output: str) -> bool:
        """Go on from the node that makes a tensor, where batches hold what is read from there on; tell whether they do.

        Args:
            output: the tensor.
        """
        node = self.graph.producer.get(output)
        if node is None or self._around:
            return False
        nodes = self._computing(self.graph.nodes[node.index :])
        made = {o for n in nodes for o in n.outputs if o}
        kept = [n for n, last in self._last.items() if last == len(self.graph.nodes) and n not in made]
        needed = {*self._inputs(nodes, made), *kept} - self.graph.constants.keys()
        if not all(needed <= batch.keys() for batch in self.live):
            return False
        self._move_to(node.index, set())
        return True

    def fork(self) -> Stream:
        """Return a stream of the same network that goes on from here by itself."""
        ahead = copy(self)
        ahead.live = [Live(b) for b in self.live]
        return ahead

    def value(self, name: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a constant, or a tensor that a batch holds."""
        return self.graph.array(name) if name in self.graph.constants else batch[name]

    def probe(self, node: Node, output: int) -> list[np.ndarray]:
        """Compute an output of a node whose inputs are held, for each batch, even if the network lacks that output."""
        proto = NodeProto()
        proto.CopyFrom(node.proto)
        proto.output[output] = name = proto.output[output] or "spa_probe"
        alone = [Node(proto, node.index, node.version)]
        inputs = self._inputs(alone, set())
        session = load_session(self._part(alone, inputs, [name], self.live[0]), threads=self.threads)
        return [run(session, {n: batch[n] for n in inputs})[0] for batch in self.live]

    def _run(self, end: int, wanted: Iterable[str] = ()) -> None:
        """Run every node before one, by windows of layers where their weights are large, and hold some tensors."""
        nodes, wanted = self._computing(self.graph.nodes[self.at : end]), set(wanted)
        parts = list(windows(self.graph, nodes, WINDOW)) if self._splits else [nodes]
        ends = [*(following[0].index for following in parts[1:]), end]
        for part, stop in zip(parts, ends, strict=False):  # no part where there is nothing to run
            self._run_part(part, stop, wanted)
        self._move_to(end, wanted)

    def _run_part(self, nodes: Sequence[Node], end: int, wanted: set[str]) -> None:
        """Run some nodes on all batches; hold what nodes from ``end`` on read, and what is wanted."""
        made = {o for n in nodes for o in n.outputs if o}
        outputs = [o for n in nodes for o in n.outputs if o and (self._last.get(o, -1) >= end or o in wanted)]
        inputs = self._inputs(nodes, made)
        if outputs:
            session = load_session(self._part(nodes, inputs, outputs, self.live[0]), threads=self.threads)
            shelf = self.shelf()
            for batch in self.live:
                values = run(session, {n: batch[n] for n in inputs})
                for name, value in zip(outputs, values, strict=True):
                    batch.store(name, _as_array(value), shelf)
        self._move_to(end, wanted)

    def _move_to(self, end: int, wanted: set[str]) -> None:
        """Let go of what no node from ``end`` on reads and is not wanted."""
        self.at = max(self.at, end)
        for batch in self.live:
            for name in [n for n in batch if self._last.get(n, -1) < self.at and n not in wanted]:
                del batch[name]

    def _computing(self, nodes: Iterable[Node]) -> list[Node]:
        """Return nodes but for Constants, whose values parts of the network have as initializers."""
        return [n for n in nodes if n.outputs and n.outputs[0] not in self.graph.constants]

    def shelf(self) -> Shelf:
        """Return where new tensors of all batches go."""
        return Shelf(self.memory - sum(b.nbytes for b in self.live))

    def _inputs(self, nodes: Sequence[Node], made: set[str]) -> list[str]:
        used = dict.fromkeys(x for n in nodes for x in self.graph.reads(n))
        return [n for n in used if n not in made and n not in self.graph.constants]

    def hold(self, name: str, node: Node) -> None:
        """Keep a tensor until the step after a node has run."""
        self._last[name] = max(self._last.get(name, -1), node.index + 1)

    def session(self, nodes: Sequence[Node], source: str, output: str, like: np.ndarray) -> InferenceSession:
        """Open some nodes by themselves, from one tensor to another.

        Args:
            nodes: what else they read must be made of constants (a transposed matrix, say).
            source: the tensor to feed.
            output: the tensor to compute.
            like: an array of the type and rank of ``source``.
        """
        graph, found = self.graph, {n.index: n for n in nodes}
        todo = list(nodes)  # not by networkx: the search stops at tensors, of which a node may make several
        while todo:
            for name in todo.pop().inputs:
                maker = graph.producer.get(name) if name and name != source and name not in graph.constants else None
                if maker is not None and maker.index not in found:
                    found[maker.index] = maker
                    todo.append(maker)
        part = self._part([found[i] for i in sorted(found)], [source], [output], Live({source: like}))
        return load_session(part, threads=self.threads)

    def _part(self, nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], like: Live) -> ModelProto:
        graph = self.graph
        used = dict.fromkeys(x for n in nodes for x in graph.reads(n))
        weights = [graph.inlined(name) for name in used if name in graph.constants]
        infos = [
            helper.make_tensor_value_info(
                n, helper.np_dtype_to_tensor_dtype(like.dtype(n)), [None] * len(like.shape(n))
            )
            for n in inputs
        ]
        return graph.part(nodes, infos, outputs, weights)

    def replace(self, name: str, value: np.ndarray) -> None:
        """Give a constant another value, here and in the message."""
        tensor = self.graph.constants[name]
        old = self.graph.array(name)
        change = value - old.astype(np.promote_types(old.dtype, np.float32), copy=False)
        self.edits[name] = self.edits.get(name, 0.0) + change
        self.changed.add(name)
        new = numpy_helper.from_array(np.ascontiguousarray(value), tensor.name)
        tensor.CopyFrom(new)
        self.graph.forget(name)

    def add_bias(self, node: Node, bias: Bias) -> str:
        """Give a node that has no bias one of zeros, and return its name."""
        output = next(o for o in node.outputs if o)
        name = f"{output}_bias"
        while name in self.graph.users or name in self.graph.constants or name in self.graph.producer:
            name += "_"
        zeros = np.zeros(bias.shape, self.graph.array(bias.like).dtype)
        self.graph.model.graph.initializer.append(numpy_helper.from_array(zeros, name))
        operands = [*node.inputs, *[""] * (bias.operand + 1 - len(node.inputs))]
        operands[bias.operand] = name
        del node.proto.input[:]
        node.proto.input.extend(operands)
        self.biases[output] = bias
        self.graph.adopt(node, self.graph.model.graph.initializer[-1], bias.operand)
        return name

    def repeat(self, other: Stream) -> None:
        """Make the same edits to this network as were made to another, which differs from it in constants alone."""
        producer = self.graph.producer
        for output, bias in other.biases.items():
            name = other.graph.producer[output].inputs[bias.operand]
            if self.add_bias(producer[output], bias) != name:
                raise InvariantError(
                    f"{producer[output].label} was given biases of two names in two copies of the network."
                )
        for name, change in other.edits.items():
            old = self.graph.array(name)
            self.replace(name, (old + change).astype(old.dtype))


def _as_array(value: object) -> np.ndarray:
    """Return what onnxruntime gave, if it is an array."""
    if not isinstance(value, np.ndarray):
        raise UnsupportedError(
            "a sequence or an optional passes through the network, which calibration cannot hold. "
            "Use a criterion of weights alone, such as --criterion l2."
        )
    return value


def sliced(kept: Kept, axes: Axes | None, value: np.ndarray) -> np.ndarray:
    """Cut out of a dense tensor what the pruned network has of it; axes may hold the batch beside channels."""
    for axis, expr in enumerate(axes or ()):
        if kept.size(expr) == expr.size:
            continue
        size = value.shape[axis]
        mask = kept.mask(expr) if size == expr.size else kept.stretched(expr, size)
        if mask is not None:
            value = np.compress(mask, value, axis=axis)
    return value
