"""Keras' recurrent layers as ONNX's operators.

tf2onnx knows how Keras 2 wrote the step of a GRU or LSTM, and makes a Loop of what is written otherwise: Keras 3's GRU,
a SimpleRNN, an LSTM with recurrent dropout. Here a loop is told by what its step computes: TensorFlow runs it on random
numbers, and the operator's formula must give the same. How the step is written does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np

from spa.frameworks.keras import OPERATORS, ORDER
from spa.importers._batch_normalisation import source_of

Array = np.ndarray
Activation = Callable[[Array], Array]
Outcomes = Iterator[tuple[dict[str, Any], list[Array]]]
ACTIVATIONS: dict[str, Activation] = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
}
TOLERANCE = 1e-5  # of a state's largest element; float32 leaves some 1e-7
BATCH = 16


@dataclass(frozen=True)
class Cell:
    """The operands of a While loop that belong to its recurrent cell, by number.

    Attributes:
        x: the list of inputs, one for each step.
        y: the list of states that it writes.
        last: whether that list has the last state alone.
        states: h, and c of an LSTM.
        weights: kernel, recurrent kernel and bias; the bias may be missing.
        gates: how many.
        attributes: of the operator.
    """

    x: int
    y: int
    last: bool
    states: tuple[int, ...]
    weights: tuple[int, ...]
    gates: int
    attributes: Mapping[str, Any]


# -- finding ---------------------------------------------------------------------------------------------------------


def find_cells(graph: Any, weights: Mapping[str, tuple[int, ...]]) -> dict[str, Cell]:
    """Find the loops of a ``GraphDef`` that are recurrent cells over weights, by name.

    Args:
        graph: with functional control flow.
        weights: the shapes of weights by the names of the nodes that give them.
    """
    import tensorflow as tf
    from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

    loops = [node for node in graph.node if node.op in ("While", "StatelessWhile")]
    if not loops:
        return {}
    bodies = {f.signature.name: f for f in graph.library.function}
    cells = {}
    with tf.Graph().as_default():
        tf.import_graph_def(graph, name="")  # its functions may be called by the bodies
        for node in loops:
            operands = [name for name in node.input if not name.startswith("^")]
            shapes = {i: weights[name] for i, name in enumerate(operands) if name in weights}
            body = function_def_to_graph(bodies[node.attr["body"].func.name])
            cell = _cell(body, shapes)
            if cell is not None:
                cells[node.name] = cell
    return cells


def _cell(body: Any, shapes: Mapping[int, tuple[int, ...]]) -> Cell | None:
    """Find the cell whose step the body of a loop is, if it is one."""
    numbers = {id(t): i for i, t in enumerate(body.inputs)}
    reads = [op for op in body.get_operations() if op.type == "TensorListGetItem"]
    writes = [op for op in body.get_operations() if op.type == "TensorListSetItem"]
    if len(reads) != 1 or len(writes) != 1:
        return None
    x, time = (numbers.get(id(source_of(t))) for t in reads[0].inputs[:2])
    y, at = (numbers.get(id(source_of(t))) for t in writes[0].inputs[:2])
    new = source_of(writes[0].inputs[2])
    last = source_of(writes[0].inputs[1]).op.type == "Const"
    pairs = list(zip(body.inputs, body.outputs, strict=True))
    changing = [i for i, (a, b) in enumerate(pairs) if source_of(b) is not a and a.dtype.name == "float32"]
    states = tuple(sorted(changing, key=lambda i: source_of(body.outputs[i]) is not new))  # h, and then c
    if x is None or y is None or time is None or not (at == time or last) or not states:
        return None
    if source_of(body.outputs[states[0]]) is not new:
        return None
    constant = {i: s for i, s in shapes.items() if i not in changing}
    step = _Step(body, reads[0].outputs[0], states)
    fitting = (law for order, gates in _roles(constant) for law in _laws(step, order, gates, constant))
    return next((Cell(x, y, last, states, *law) for law in fitting), None)


@dataclass(frozen=True)
class _Step:
    """A loop's body: what it makes of an element of the list of inputs, of states and of weights."""

    body: Any
    item: Any
    states: tuple[int, ...]

    @property
    def batch(self) -> int:
        """A number of samples that it takes."""
        known = (t.shape[0] for t in (self.item, *(self.body.inputs[i] for i in self.states)) if t.shape.rank)
        return next((n for n in known if n), BATCH)

    def run(self, x: Array, states: Sequence[Array], weights: Mapping[int, Array]) -> list[Array] | None:
        """Compute the next states; None where it takes more than these, or does not take these."""
        import tensorflow as tf

        own = zip(self.states, states, strict=True)
        feeds = {self.body.inputs[i].name: value for i, value in (*weights.items(), *own)}
        fetched = [self.body.outputs[i] for i in self.states]
        try:
            with tf.compat.v1.Session(graph=self.body) as session:
                return [np.asarray(new) for new in session.run(fetched, feeds | {self.item.name: x})]
        except (tf.errors.OpError, ValueError):
            return None


def _roles(shapes: Mapping[int, tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield what may be kernel [i (g h)], recurrent kernel [h (g h)] and bias [(g h)] or [2 (g h)], if any; and g."""
    for order in permutations(shapes) if len(shapes) in (2, 3) else ():
        kernel, recurrent, *bias = (shapes[i] for i in order)
        if len(kernel) == len(recurrent) == 2 and kernel[1] == recurrent[1]:
            gates, rest = divmod(recurrent[1], recurrent[0])
            if not rest and gates in FORMULAS and (not bias or bias[0] in (kernel[1:], (2, *kernel[1:]))):
                yield order, gates


def _laws(
    step: _Step, order: tuple[int, ...], gates: int, shapes: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], int, dict[str, Any]]]:
    """Yield the cells over these weights, as the last fields of :class:`Cell`, that compute what the step computes."""
    if len(step.states) != (2 if gates == 4 else 1):
        return
    rng = np.random.default_rng(0)
    weights = {i: rng.standard_normal(s).astype(np.float32) / np.float32(np.sqrt(s[0])) for i, s in shapes.items()}
    inputs, units = (shapes[i][0] for i in order[:2])
    x, *states = (
        rng.standard_normal((step.batch, n)).astype(np.float32) for n in (inputs, *[units] * len(step.states))
    )
    expected = step.run(x, states, weights)
    if expected is None:
        return
    kernel, recurrent, *bias = (weights[i].astype(np.float64) for i in order)
    both = biases(bias, gates * units)
    for attributes, own in FORMULAS[gates](x @ kernel + both[0], states, recurrent, both[1]):
        if all(_same(a, b) for a, b in zip(own, expected, strict=True)):
            yield order, gates, attributes


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= TOLERANCE * np.abs(b).max())


def _rnn(inputs: Array, states: Sequence[Array], recurrent: Array, bias: Array) -> Outcomes:
    for name, f in ACTIVATIONS.items():
        yield {"activations": [name]}, [f(inputs + states[0] @ recurrent + bias)]


def _gru(inputs: Array, states: Sequence[Array], recurrent: Array, bias: Array) -> Outcomes:
    h, columns = states[0], np.split(np.arange(bias.size), 3)
    for (first, f), (second, g) in product(ACTIVATIONS.items(), ACTIVATIONS.items()):
        z, r = (f(inputs[:, c] + h @ recurrent[:, c] + bias[c]) for c in columns[:2])
        c = columns[2]
        for after in (True, False):
            reset = r * (h @ recurrent[:, c] + bias[c]) if after else (r * h) @ recurrent[:, c] + bias[c]
            names = {"activations": [first, second], "linear_before_reset": int(after)}
            yield names, [z * h + (1 - z) * g(inputs[:, c] + reset)]


def _lstm(inputs: Array, states: Sequence[Array], recurrent: Array, bias: Array) -> Outcomes:
    i, f, c, o = np.split(inputs + states[0] @ recurrent + bias, 4, axis=1)
    for (first, gate), (second, g) in product(ACTIVATIONS.items(), ACTIVATIONS.items()):
        new = gate(f) * states[1] + gate(i) * g(c)
        yield {"activations": [first, second, second]}, [gate(o) * g(new), new]


# A step's next states with each choice of attributes, from W x + b, the states, R and R's bias, in Keras' layout.
FORMULAS: dict[int, Callable[[Array, Sequence[Array], Array, Array], Outcomes]] = {1: _rnn, 3: _gru, 4: _lstm}


def biases(weights: Sequence[Array], columns: int) -> Array:
    """Return the biases [2 (g h)] of inputs and of states; zeros where there are none."""
    both = np.zeros((2, columns), np.float32)
    if weights:
        both[: 1 if weights[0].ndim == 1 else 2] = weights[0]
    return both


# -- replacing -------------------------------------------------------------------------------------------------------


def replace_loops(cells: Mapping[str, Cell], graph: Any, ops: Sequence[Any]) -> list[Any]:
    """Replace loops that were found by nodes of their operators; a rewriter for tf2onnx.

    Args:
        cells: what was found, by the loop's name.
        graph: tf2onnx' graph, changed in place.
        ops: its nodes.

    Returns:
        The nodes that it has then.
    """
    for op in list(ops):
        cell = cells.get(op.name)
        if cell is not None and op.inputs[cell.x].type == "TensorListFromTensor":
            _replace(cell, graph, op)
    return list(graph.get_nodes())


def _replace(cell: Cell, graph: Any, loop: Any) -> None:
    from tf2onnx.graph_builder import GraphBuilder
    from tf2onnx.utils import make_name

    build, x = GraphBuilder(graph), loop.inputs[cell.x].input[0]
    tensors = _operands(cell, [graph.get_tensor_value(loop.input[i], as_list=False) for i in cell.weights])
    units = tensors["R"].shape[-1]
    operands = [graph.make_const(make_name(n), np.ascontiguousarray(v)).output[0] for n, v in tensors.items()]
    initial = [build.make_unsqueeze({"data": loop.input[i], "axes": [0]}) for i in cell.states]
    steps, batch = (graph.get_shape(x) or [-1, -1])[:2]
    shapes = [[steps, 1, batch, units], *[[1, batch, units]] * len(cell.states)]
    node = graph.make_node(
        OPERATORS[cell.gates],
        [x, *operands, "", *initial],
        attr={"direction": "forward", "hidden_size": units, **cell.attributes},
        output_count=len(shapes),
        shapes=shapes,
        dtypes=[graph.get_dtype(x)] * len(shapes),
    )
    states = node.output[1] if cell.last else build.make_squeeze({"data": node.output[0], "axes": [1]})
    for reader in graph.find_output_consumers(loop.output[cell.y]):
        if reader.type == "TensorListStack":
            graph.replace_all_inputs(reader.output[0], states)
            graph.remove_node(reader.name)
    for i, state in zip(cell.states, node.output[1:], strict=True):
        graph.replace_all_inputs(loop.output[i], build.make_squeeze({"data": state, "axes": [0]}))
    if not any(graph.find_output_consumers(output) for output in loop.output):
        graph.remove_node(loop.name)


def _operands(cell: Cell, weights: Sequence[Array]) -> dict[str, Array]:
    """Return W [1 (g h) i], R [1 (g h) h] and B [1 (2 g h)] of Keras' weights."""
    kernel, recurrent, *bias = weights
    units, gates = len(recurrent), cell.gates
    w, r = (k.T.reshape(gates, units, -1)[ORDER[gates]].reshape(1, gates * units, -1) for k in (kernel, recurrent))
    b = biases(bias, gates * units).reshape(2, gates, units)[:, ORDER[gates]]
    return {"W": w, "R": r, "B": b.reshape(1, -1)}
