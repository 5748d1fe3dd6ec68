"""Networks in the branches of an ``If`` that data decides, taken apart for the analysis and put together again.

A model that holds two networks (one for each sampling rate, a decoder with and without its cache) decides between them
by an ``If``. Each of the two, with what stands before and after the ``If``, is a model of its own, of which nothing is
undecided. They are analysed, pruned and repaired side by side, as one model with twice the inputs and outputs::

    y = If(c) {then: f(x)} {else: g(x)}     becomes     y@then = f(x@then),  y@else = g(x@else)

Initializers of the main graph that both read stay one. :func:`reunited` makes one ``If`` of two such halves, whatever
happened to their weights; what it needs for that lies in the model's metadata.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from spa.model.bodies import nested
from spa.model.branches import definitions, is_if, rename
from spa.model.graph import dead_nodes, names_read, outer_uses, replace_nodes, subgraphs_of, tensors_of
from spa.model.halves import ELSE, SKELETON, THEN, is_separated
from spa.model.marks import is_flat
from spa.model.versions import FREE_INITIALIZERS

TAGS = {True: THEN, False: ELSE}
MOST_DECIDING = 1024  # elements of all constants that decide; a condition that weights compute is left alone


@dataclass(frozen=True)
class _Decision:
    """A condition that data decides, between branches that hold weights.

    Attributes:
        name: the condition.
        nodes: what computes it, in order; none for an input.
    """

    name: str
    nodes: list[NodeProto]


def separated(model: ModelProto, simplify: Callable[[ModelProto], object]) -> ModelProto | None:
    """Return two networks side by side for a model that decides between them; None for any other model.

    Args:
        model: simplified, which is not changed.
        simplify: folds constants and inlines branches that are known to run, in place.
    """
    decision = _decision(model)
    if decision is None:
        return None
    halves = {value: _half(model, decision.name, value) for value in TAGS}
    for half in halves.values():
        simplify(half)
        _drop_unread(half.graph)
    if not all(_is_whole(half, decision.name) for half in halves.values()):
        return None
    skeleton = _skeleton(model, decision)
    both = ModelProto()
    both.CopyFrom(skeleton)
    both.metadata_props.add(key=SKELETON, value=base64.b64encode(skeleton.SerializeToString()).decode())
    for part in ("node", "input", "output", "initializer"):
        del getattr(both.graph, part)[:]
    _fill(both.graph, model.graph, halves, set(definitions(skeleton.graph)))
    return both


def _decision(model: ModelProto) -> _Decision | None:
    """Find the first condition of an If with weights in its branches, where it is computed from little."""
    graph = model.graph
    if model.ir_version < FREE_INITIALIZERS or any(tag in name for tag in TAGS.values() for name in definitions(graph)):
        return None
    stored = {tensor.name: tensor for tensor in graph.initializer}
    matrices = {name for name, tensor in stored.items() if _is_matrix(tensor)}
    for node in graph.node:
        if not is_if(node) or not any(_holds_weights(inner, matrices) for inner in subgraphs_of(node)):
            continue
        name = node.input[0]
        dead = dead_nodes(graph.node, [name])
        nodes = [other for i, other in enumerate(graph.node) if i not in dead]
        read = {operand for other in nodes for operand in other.input} & stored.keys()
        constants = [stored[n] for n in sorted(read)] + [t for other in nodes for t in _stored_in(other)]
        alone = all(len(other.output) == 1 for other in nodes)
        if alone and name not in stored and sum(int(np.prod(t.dims)) for t in constants) <= MOST_DECIDING:
            return _Decision(name, nodes)
    return None


def _is_matrix(tensor: TensorProto) -> bool:
    return tensor.data_type not in (TensorProto.INT64, TensorProto.INT32) and sum(n > 1 for n in tensor.dims) >= 2


def _stored_in(node: NodeProto) -> Iterator[TensorProto]:
    return tensors_of(helper.make_graph([node], "one", [], []))


def _holds_weights(branch: GraphProto, matrices: set[str]) -> bool:
    return any(_is_matrix(t) for t in tensors_of(branch)) or not matrices.isdisjoint(outer_uses(branch))


def _half(model: ModelProto, condition: str, value: bool) -> ModelProto:
    """Return a copy of a model in which the condition is a constant."""
    half = ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    replace_nodes(graph, [node for node in graph.node if condition not in node.output])
    dims = [1 for info in graph.input if info.name == condition for _ in info.type.tensor_type.shape.dim]
    for part in (graph.input, graph.value_info):
        for info in [info for info in part if info.name == condition]:
            part.remove(info)
    graph.initializer.append(numpy_helper.from_array(np.full(dims, value), condition))
    return half


def _drop_unread(graph: GraphProto) -> None:
    """Remove nodes, inputs and initializers that no output depends on."""
    dead = dead_nodes(graph.node, [o.name for o in graph.output])
    replace_nodes(graph, [node for i, node in enumerate(graph.node) if i not in dead])
    read = names_read(graph)
    for part in (graph.input, graph.initializer):
        for item in [item for item in part if item.name not in read]:
            part.remove(item)


def _is_whole(half: ModelProto, condition: str) -> bool:
    """Return whether a half is decided, and nodes compute each of its outputs."""
    graph = half.graph
    computed = {name for node in graph.node for name in node.output}
    return not any(is_if(n) and n.input[0] == condition for n in graph.node) and all(
        o.name in computed for o in graph.output
    )


def _skeleton(model: ModelProto, decision: _Decision) -> ModelProto:
    """Return a model without its network: interface, versions, and what computes the condition as ``If``'s operand."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    graph = skeleton.graph
    del graph.value_info[:]
    read = {name for node in decision.nodes for name in node.input}
    own = {tensor.name: f"{tensor.name}@condition" for tensor in graph.initializer if tensor.name in read}
    constants = [_renamed(tensor, own[tensor.name]) for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    replace_nodes(graph, decision.nodes)
    for node in graph.node:
        rename(node, partial(_looked_up, own))
    graph.node.append(helper.make_node("If", [decision.name], [o.name for o in graph.output], name="alternatives"))
    return skeleton


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _fill(target: GraphProto, source: GraphProto, halves: dict[bool, ModelProto], taken: set[str]) -> None:
    """Put two halves into one graph, under different names."""
    original = {tensor.name: tensor.SerializeToString() for tensor in source.initializer}
    shared = set(original)
    for half in halves.values():
        stored = {tensor.name: tensor.SerializeToString() for tensor in half.graph.initializer}
        shared = {name for name in shared if stored.get(name, original[name]) == original[name]}
    known = {value: set(definitions(half.graph)) for value, half in halves.items()}
    both = known[True] & known[False]
    added: set[str] = set()
    for value, half in halves.items():
        ends = {info.name for info in (*half.graph.input, *half.graph.output)}
        clashing = ((both | taken) & known[value] - shared) | ends
        names = {name: f"{name}{TAGS[value]}" for name in clashing}
        new = partial(_looked_up, names)
        for node in half.graph.node:
            copy = target.node.add()
            copy.CopyFrom(node)
            rename(copy, new)
        for part in ("input", "output", "value_info"):
            _extend(getattr(target, part), getattr(half.graph, part), new)
        for tensor in half.graph.initializer:
            if new(tensor.name) not in added:
                target.initializer.append(_renamed(tensor, new(tensor.name)))
                added.add(new(tensor.name))


def _extend(target: object, infos: Iterable[ValueInfoProto], new: Callable[[str], str]) -> None:
    for info in infos:
        copy = target.add()  # type: ignore[attr-defined]
        copy.CopyFrom(info)
        copy.name = new(info.name)


def condition_of(model: ModelProto) -> str | None:
    """Return what a model of two networks decides by; None for any other."""
    skeleton = _stored_skeleton(model)
    return None if skeleton is None else skeleton.graph.node[-1].input[0]


def is_rewritten(model: ModelProto) -> bool:
    """Return whether :func:`reunited` would return another model."""
    return is_separated(model) or is_flat(model)


def _stored_skeleton(model: ModelProto) -> ModelProto | None:
    for entry in model.metadata_props:
        if entry.key == SKELETON:
            return ModelProto.FromString(base64.b64decode(entry.value))
    return None


def _looked_up(names: Mapping[str, str], name: str) -> str:
    return names.get(name, name)


def reunited(model: ModelProto) -> ModelProto:
    """Return one network with an ``If`` for two side by side, and bodies as graphs; others are returned as they are.

    Args:
        model: what :func:`spa.model.simplify.simplified` returned, pruned or not; it is not changed.
    """
    model = nested(model)
    whole = _stored_skeleton(model)
    if whole is None:
        return model
    whole.graph.initializer.extend(model.graph.initializer)
    branches = {}
    for value, tag in TAGS.items():
        outputs = [info for info in model.graph.output if info.name.endswith(tag)]
        dead = dead_nodes(model.graph.node, [info.name for info in outputs])
        inputs = {f"{info.name}{tag}": info.name for info in whole.graph.input}
        graph = helper.make_graph([], tag[1:], [], outputs)
        graph.node.extend(node for i, node in enumerate(model.graph.node) if i not in dead)
        for node in graph.node:
            rename(node, partial(_looked_up, inputs))
        branches[value] = graph
    decides = whole.graph.node[-1]
    decides.attribute.append(helper.make_attribute("then_branch", branches[True]))
    decides.attribute.append(helper.make_attribute("else_branch", branches[False]))
    return whole
