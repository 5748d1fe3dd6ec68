"""Inlining a model's local functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator

from onnx import ModelProto, NodeProto, defs, helper, inliner

from spa.errors import ModelError

MOST_NODES = 1_000_000  # once all functions are inlined

Key = tuple[str, str, str]  # domain, name, overload


def inlined(model: ModelProto) -> ModelProto:
    """Return a model without local functions: the same message where it has none.

    onnx's inliner (1.21) ends the process on functions that call each other in a circle, and expands whatever
    it is given; both are refused before it is called.

    Raises:
        ModelError: a function calls itself, through others or not; or the model would get too large.
    """
    if not model.functions:
        return model
    import networkx as nx  # here, since few files have functions and the import takes a tenth of a second

    keys = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {key: Counter(_called(function.node, keys)) for key, function in keys.items()}
    graph = nx.DiGraph()
    graph.add_nodes_from(keys)
    graph.add_edges_from((key, other) for key, others in calls.items() for other in others)
    if not nx.is_directed_acyclic_graph(graph):
        names = " -> ".join(repr(key[1]) for key, _ in nx.find_cycle(graph))
        raise ModelError(f"local functions call each other in a circle: {names}. ONNX forbids that; export it again.")
    sizes: dict[Key, int] = {}
    for key in reversed(list(nx.topological_sort(graph))):
        own = sum(1 for _ in _all_nodes(keys[key].node)) - calls[key].total()
        sizes[key] = own + sum(count * sizes[other] for other, count in calls[key].items())
    total = sum(sizes[key] for key in _called(model.graph.node, keys))
    if total > MOST_NODES:
        raise ModelError(
            f"its local functions expand to {total:.3g} nodes (at most {MOST_NODES:,} are read). Simplify the model."
        )
    return inliner.inline_local_functions(_of_one_version(model))


def _of_one_version(model: ModelProto) -> ModelProto:
    """Return a model whose functions import the versions that it imports itself, where that changes no operator.

    onnx's inliner leaves the others alone; onnxruntime reads all of them in the model's versions.
    """
    versions = {_domain(o.domain): o.version for o in model.opset_import}
    copy = ModelProto()
    copy.CopyFrom(model)
    for function in copy.functions:
        for opset in function.opset_import:
            domain = _domain(opset.domain)
            version = versions.setdefault(domain, opset.version)
            operators = {node.op_type for node in _all_nodes(function.node) if _domain(node.domain) == domain}
            if all(_signature(op, opset.version, domain) == _signature(op, version, domain) for op in operators):
                opset.version = version
    known = {_domain(o.domain) for o in model.opset_import}
    copy.opset_import.extend(helper.make_opsetid(d, v) for d, v in versions.items() if d not in known)
    return copy


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _signature(op: str, version: int, domain: str) -> object:
    """Return what tells whether two versions of an operator differ in more than the types that they take.

    Operators whose meaning changed have other operands, attributes or defaults. Where there is no schema, it is the
    version.
    """
    try:
        schema = defs.get_schema(op, version, domain)
    except defs.SchemaError:
        return version
    attributes = {
        n: (str(a.type), a.required, a.default_value.SerializeToString()) for n, a in schema.attributes.items()
    }
    return [i.name for i in schema.inputs], [o.name for o in schema.outputs], attributes


def _called(nodes: Iterable[NodeProto], keys: Container[Key]) -> Iterator[Key]:
    for node in _all_nodes(nodes):
        key = (node.domain, node.op_type, node.overload)
        if key in keys:
            yield key


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Iterate over nodes and those of their sub-graphs."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting.extend(attribute.g.node)
            for inner in attribute.graphs:
                waiting.extend(inner.node)
