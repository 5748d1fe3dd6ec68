"""An ONNX graph as a trainable PyTorch module: the graph is compiled to steps once, then run step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from torch import Tensor, nn

from spa.errors import UnsupportedError
from spa.exporters.pytorch.operators import Operator, dtype_of, find, tensor, unknown_dtype
from spa.model.graph import Graph, Node
from spa.model.normalise import normalise
from spa.model.shape_values import FOLDERS
from spa.model.traits import Trait, traits

HOST_ELEMENTS = 64  # constants of at most one axis and this many elements may be sizes: they stay on the host
MASK = 0.5  # of the largest float: masks hold the lowest one or infinity, weights do not
SYMBOLIC = frozenset(  # computed on the host even where sizes are symbols
    "Gather Concat Slice Squeeze Unsqueeze Identity Add Sub Mul Mod Neg Reshape Equal Where ReduceProd".split()
)
STORED = frozenset(  # types of quantised constants, which become floats before anything is computed with them
    getattr(TensorProto, t)
    for t in ("INT4", "UINT4", "INT2", "UINT2", "UINT16", "UINT32", "UINT64")
    if hasattr(TensorProto, t)
)
STATISTICS = (3, 4)  # the operands of BatchNormalization that follow the batches


@dataclass
class Step:
    """One node, ready to run.

    Attributes:
        node: what to run.
        bodies: compiled subgraphs by attribute.
        done: values that nobody reads after it.
    """

    node: Node
    bodies: dict[str, Program] = field(default_factory=dict)
    done: tuple[str, ...] = ()

    @property
    def operator(self) -> Operator:
        """The function that runs it, looked up each time, since functions of users cannot be pickled."""
        entry = find(self.node.key)
        if entry is None:
            raise UnsupportedError(
                f"{self.node.label}: operator {self.node.key} is not registered any more. Register it again."
            )
        return entry


@dataclass
class Program:
    """A graph, ready to run.

    Attributes:
        inputs: the names of its inputs.
        outputs: the names of its outputs.
        steps: its nodes, in order.
        host: its constants on the host.
        keys: the state_dict keys of its other constants.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: list[Step]
    host: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


class OnnxModule(nn.Module):
    """A network as ONNX describes it, made of one parameter per float weight; see :func:`graph_module`.

    Attributes:
        keys: for each of the graph's constants that is a parameter or a buffer here, its name here.
        input_names: what :meth:`forward` takes, in order.
        output_names: what it returns, in order.
    """

    def __init__(
        self, model: ModelProto, base: Path | None, names: Mapping[str, str], buffers: Collection[str]
    ) -> None:
        super().__init__()
        model = unshared(normalise(model, own=False))
        graph = Graph(model, base)
        _refuse(graph)
        self._program = _Compiler(self, names, buffers).compile(graph)
        self._types = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
        self.keys = {n: k for n, k in self._program.keys.items() if n in graph.constants}
        self.input_names = self._program.inputs
        self.output_names = self._program.outputs

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the graph.

        Args:
            *args: the graph's inputs, in order.
            **kwargs: inputs by name.

        Returns:
            The graph's output, or a tuple of them.

        Raises:
            TypeError: an input is missing, or unknown.
        """
        feeds = dict(zip(self.input_names, args, strict=False)) | kwargs
        if len(args) > len(self.input_names) or feeds.keys() != set(self.input_names):
            wanted = ", ".join(self.input_names)
            raise TypeError(f"forward takes {wanted}; got {len(args)} by place and {sorted(kwargs)} by name.")
        state = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        device = next((v.device for v in {**state, **feeds}.values() if isinstance(v, Tensor)), torch.device("cpu"))
        with torch.device(device) if device.type != "cpu" else nullcontext():
            results = run(self._program, feeds, state, self.training)
        outputs = tuple(self._declared(n, v) for n, v in zip(self.output_names, results, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    def _declared(self, name: str, value: Any) -> Any:
        """Return quantised integers, which travel as floats, in the type that the graph declares."""
        value = tensor(value)
        code = self._types[name]
        if isinstance(value, Tensor) and not unknown_dtype(code):
            return value.to(dtype_of(code))
        return value


def graph_module(
    model: ModelProto,
    base: Path | None = None,
    names: Mapping[str, str] | None = None,
    buffers: Collection[str] = (),
) -> OnnxModule:
    """Make a trainable PyTorch module of an ONNX network.

    Float initializers that are weights become parameters; statistics of BatchNormalizations, tables of integers,
    quantised weights and constants become buffers; small integers, which say sizes and axes, stay on the host.
    Initializers that several nodes share stay shared. While the module trains, BatchNormalizations use and follow the
    statistics of the batch, and Dropout drops.

    Args:
        model: the network; not changed.
        base: the folder of its external data.
        names: state_dict keys by initializer where they are not the initializers' own names; dots lead to submodules.
        buffers: initializers that are no parameters though they are floats: masks, tables.

    Returns:
        A module in training mode, as PyTorch's are. ``forward`` takes the graph's inputs by place or by name and
        returns its output, or a tuple of its outputs in order.

    Raises:
        UnsupportedError: an operator is not covered.
        ModelError: an initializer's data is missing or malformed.
    """
    return OnnxModule(model, base, names or {}, buffers)


# -- before anything is loaded -----------------------------------------------------------------------------------


def _refuse(graph: Graph) -> None:
    """Raise for the first node that is not covered."""
    if graph.model.graph.sparse_initializer:
        name = graph.model.graph.sparse_initializer[0].values.name
        raise UnsupportedError(f"initializer {name!r} is sparse. Export the model with dense weights.")
    types = {f"input {i.name!r}": i.type.tensor_type.elem_type for i in graph.model.graph.input}
    types |= {f"constant {n!r}": t.data_type for n, t in graph.constants.items() if t.data_type not in STORED}
    for what, code in types.items():
        if code in STORED or (code and unknown_dtype(code)):
            kind = TensorProto.DataType.Name(code)
            raise UnsupportedError(
                f"{what} has elements of type {kind}, with which PyTorch does not compute. Export to ONNX instead."
            )
    for node in graph.nodes:
        if node.outputs and node.outputs[0] in graph.constants:
            continue
        entry = find(node.key)
        reason = "" if entry is None else entry.limit(node, graph)
        if reason is not None:
            what = f"{reason} of {node.key}" if reason else f"operator {node.key}"
            raise UnsupportedError(
                f"{node.label}: {what} has no counterpart in PyTorch here. Export to ONNX instead, or register a "
                f"function: @spa.exporters.pytorch.operator({node.key!r})."
            )
        for sub in node.subgraphs:
            _refuse(_inner(sub, graph))


def _inner(sub: GraphProto, outer: Graph) -> Graph:
    """Return the view of a subgraph."""
    model = ModelProto()
    model.opset_import.extend(outer.model.opset_import)
    model.graph.CopyFrom(sub)
    return Graph(model, outer.base)


def unshared(model: ModelProto) -> ModelProto:
    """Take vectors apart that an exporter merged because they were equal.

    Cases:
    1. PyTorch's TorchScript exporter writes two equal parameters as one initializer and ``Identity`` of it, whose
       output has the other one's name. Weights of more axes are equal where they are tied, and stay so.
    2. A running statistic is also something else, or belongs to several BatchNormalizations: training would write to
       it in several ways. Layers that share all of their vectors are one layer applied twice, and stay so.

    Returns:
        The same message where nothing had to be done.
    """
    aliases, owners = _aliases(model), _statistics(model)
    if not aliases and not owners:
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    vectors = {t.name: t for t in model.graph.initializer}
    for (name, place, others), alias in owners.items():  # Case 2
        _add(copy, vectors[name], alias)
        for node, old in zip(copy.graph.node, model.graph.node, strict=True):
            if old.op_type == "BatchNormalization" and tuple(old.input[1:]) == others:
                node.input[place] = alias
    kept = [_copied(n) for n in copy.graph.node if n.output[0] not in aliases]  # Case 1
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    for alias, name in aliases.items():
        _add(copy, vectors[name], alias)
    return copy


def _aliases(model: ModelProto) -> dict[str, str]:
    """Return outputs of Identity that are vectors of their own, with the initializer's name."""
    vectors = {t.name for t in model.graph.initializer if len(t.dims) <= 1}
    taken = {o.name for o in model.graph.output}
    nodes = [n for n in model.graph.node if n.op_type == "Identity" and n.input[0] in vectors]
    return {n.output[0]: n.input[0] for n in nodes if n.output[0] not in taken}


def _statistics(model: ModelProto) -> dict[tuple[str, int, tuple[str, ...]], str]:
    """Name running statistics that need a tensor of their own, by (initializer, operand, the layer's vectors)."""
    stored = {t.name for t in model.graph.initializer}
    readers: dict[str, set[tuple[int, tuple[str, ...]] | None]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            mine = node.op_type == "BatchNormalization" and place in STATISTICS
            readers.setdefault(name, set()).add((place, tuple(node.input[1:])) if mine else None)
    names = {}
    for name, users in readers.items():
        owners = sorted(u for u in users if u is not None)
        first = 0 if None in users else 1  # one layer may keep it where nothing else reads it
        for number, (place, others) in enumerate(owners[first:] if name in stored else [], start=2):
            names[name, place, others] = f"{name}_{number}"
    return names


def _add(model: ModelProto, like: TensorProto, name: str) -> None:
    model.graph.initializer.append(like)
    model.graph.initializer[-1].name = name


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


# -- compiling ---------------------------------------------------------------------------------------------------


class _Compiler:
    """Sorts a graph's constants, folds what depends on no input, and registers the rest with the module."""

    def __init__(self, module: OnnxModule, names: Mapping[str, str], buffers: Collection[str]) -> None:
        self.module, self.names, self.buffers = module, names, frozenset(buffers)
        self.taken: set[str] = set()

    def compile(self, graph: Graph) -> Program:
        """Make a program of a graph, with its subgraphs."""
        uses = dict(_uses(graph))
        program = Program(tuple(graph.inputs), tuple(graph.outputs), [])
        weights = {n for n in uses if n in graph.constants and self._is_weight(graph, n, uses[n])}
        known: dict[str, Any] = {n: graph.array(n) for n in graph.constants if n in uses and n not in weights}
        for node in graph.nodes:
            if not node.outputs or node.outputs[0] in graph.constants:
                continue
            step = self._step(graph, node)
            if not step.bodies and all(n in known or not n for n in node.inputs):
                known.update(_outputs(node, _call(step, [known.get(n) for n in node.inputs], {}, {}, False)))
            else:
                program.steps.append(step)
        needed = {n for s in program.steps for n in _reads(s)} | set(program.outputs)
        for name in (n for n in graph.constants if n in weights):
            program.keys[name] = self._parameter(name, graph)
        for name in (n for n in known if n in needed):
            self._constant(program, graph, name, known[name])
        _mark_last_uses(program)
        return program

    def _step(self, graph: Graph, node: Node) -> Step:
        inner = {a.name: self.compile(_inner(a.g, graph)) for a in node.proto.attribute if a.HasField("g")}
        return Step(node, inner)

    def _is_weight(self, graph: Graph, name: str, uses: Sequence[tuple[Operator, int]]) -> bool:
        tensor_proto = graph.constants[name]
        if unknown_dtype(tensor_proto.data_type) or not dtype_of(tensor_proto.data_type).is_floating_point:
            return False
        axes = len(tensor_proto.dims)
        stored = name in graph.initializers
        if name in self.buffers or (name not in self.names and axes < (1 if stored else 2)):
            return False
        if all(place in entry.host or place in entry.fixed for entry, place in uses):
            return False
        value = graph.array(name)
        return bool(np.abs(value).max(initial=0) < MASK * ml_dtypes.finfo(value.dtype).max)

    def _parameter(self, name: str, graph: Graph) -> str:
        return self._register(name, nn.Parameter(tensor(graph.array(name)).contiguous()))

    def _constant(self, program: Program, graph: Graph, name: str, value: Any) -> None:
        """Put a constant on the host if it is small, else into a buffer, which is kept if it is an initializer."""
        small = isinstance(value, np.ndarray) and value.ndim <= 1 and value.size <= HOST_ELEMENTS
        statistic = any(n.op == "BatchNormalization" and o in STATISTICS for n, o in graph.users.get(name, ()))
        if isinstance(value, list) or (small and not statistic and name not in self.names):
            program.host[name] = value
        else:
            program.keys[name] = self._register(name, tensor(value), kept=name in graph.initializers)

    def _register(self, name: str, value: Tensor, kept: bool = True) -> str:
        """Put a tensor where its name says; a name that is taken gets an underscore."""
        *path, leaf = self.names.get(name, name).split(".")
        owner: nn.Module = self.module
        for part in path:
            part = part or "_"
            while hasattr(owner, part) and part not in owner._modules:
                part += "_"
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        leaf = leaf or "_"
        while hasattr(owner, leaf):
            leaf += "_"
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value, persistent=kept)
        prefix = next(n for n, m in self.module.named_modules() if m is owner)
        return f"{prefix}.{leaf}" if prefix else leaf


def _uses(graph: Graph) -> Iterator[tuple[str, list[tuple[Operator, int]]]]:
    """Yield the places where each name is read, those in subgraphs included; outputs are read nowhere."""
    uses: dict[str, list[tuple[Operator, int]]] = {n: [] for n in graph.outputs}
    for node in graph.nodes:
        entry = find(node.key)
        for place, name in enumerate(node.inputs):
            if name and entry is not None:
                uses.setdefault(name, []).append((entry, place))
        for sub in node.subgraphs:
            for name, places in _uses(_inner(sub, graph)):
                uses.setdefault(name, []).extend(places)
    yield from uses.items()


def _reads(step: Step) -> Iterator[str]:
    """Yield the names that a step takes from around it, those of its subgraphs included."""
    yield from (n for n in step.node.inputs if n)
    for body in step.bodies.values():
        yield from (n for inner in body.steps for n in _reads(inner))
        yield from body.outputs


def _mark_last_uses(program: Program) -> None:
    """Say at each step which values may go: those that were made here and that no later step reads."""
    alive = set(program.outputs) | program.host.keys() | program.keys.keys()
    for step in reversed(program.steps):
        mine = [n for n in (*step.node.inputs, *step.node.outputs) if n and n not in alive]
        step.done = tuple(dict.fromkeys(mine))
        alive.update(_reads(step))


# -- running -----------------------------------------------------------------------------------------------------


def run(
    program: Program,
    feeds: Mapping[str, Any],
    state: Mapping[str, Tensor],
    training: bool,
    outer: Mapping[str, Any] = {},
) -> list[Any]:
    """Return the values of a program's outputs.

    Args:
        program: what to run.
        feeds: its inputs.
        state: parameters and buffers by key.
        training: whether BatchNormalizations and Dropout are to train.
        outer: values of the graphs around it.
    """
    values: dict[str, Any] = {**outer, **program.host, **{n: state[k] for n, k in program.keys.items()}, **feeds}
    for step in program.steps:
        operands = [values[n] if n else None for n in step.node.inputs]
        values.update(_outputs(step.node, _call(step, operands, values, state, training)))
        for name in step.done:
            values.pop(name, None)
    return [values[n] for n in program.outputs]


def _outputs(node: Node, results: Any) -> Iterable[tuple[str, Any]]:
    listed = results if isinstance(results, tuple) else (results,)
    return ((n, v) for n, v in zip(node.outputs, listed, strict=False) if n)


def _call(
    step: Step, operands: list[Any], values: Mapping[str, Any], state: Mapping[str, Tensor], training: bool
) -> Any:
    """Compute a node: on the host if all that flows into it is there, else in PyTorch."""
    node, entry = step.node, step.operator
    folded = _on_host(node, operands)
    if folded is not None:
        return folded
    operands = [v if i in entry.host else tensor(v) for i, v in enumerate(operands)]
    options: dict[str, Any] = {"training": training} if entry.modal else {}
    if entry.control:
        options["bodies"] = {a: _body(p, values, state, training) for a, p in step.bodies.items()}
    return entry.function(node, *operands, **options)


def _body(
    program: Program, values: Mapping[str, Any], state: Mapping[str, Tensor], training: bool
) -> Callable[..., list[Any]]:
    def body(*operands: Any) -> list[Any]:
        return run(program, dict(zip(program.inputs, operands, strict=True)), state, training, values)

    return body


def _on_host(node: Node, operands: Sequence[Any]) -> tuple[np.ndarray, ...] | None:
    if node.domain or node.op not in FOLDERS or Trait.MEASURE in traits(node.key):
        return None
    values = [v for v in operands if v is not None]
    if not values or not all(isinstance(v, np.ndarray) for v in values):
        return None
    if any(v.dtype == object for v in values):
        if node.op == "Cast" and node.attributes["to"] in (TensorProto.INT64, TensorProto.INT32):
            return (values[0],)
        if node.op == "Div":  # of sizes, which are positive
            return (np.asarray(values[0] // values[1], object),)
        if node.op not in SYMBOLIC:
            return None
    results = FOLDERS[node.op](node, operands)
    return None if results is None else tuple(np.asarray(r) for r in results)
