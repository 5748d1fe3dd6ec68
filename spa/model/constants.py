"""Folding of what is computed from constants alone into constants, so that weights can be scored, sliced and refitted.

Weight and spectral normalisation that an exporter left in the graph, weights that are stored as halves or transposed,
zero points behind a Cast: an operator computes each of them from initializers at every run. Removing channels before it
would change what it computes for the others (a norm is taken over fewer), so it is computed once, here.

Left as they are:
1. What quantises: the integers are the weights.
2. Results of more than twice the bytes of the constants that they come from: the file stores the small ones on purpose.
3. Large constants of several uses, of which only some lie behind operators (a table of tokens that is an output layer's
   matrix, too): each use would get a copy of its own.
4. What only moves elements, at the end: rules see through it, and weights keep their names and axes.
5. Operators whose result onnx's reference implementation is not known to agree on with onnxruntime.
"""

from __future__ import annotations

import math
from pathlib import Path

from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.errors import ModelError
from spa.model.graph import Graph, Node, constant_sources, names_read, outer_uses, replace_nodes, subgraphs_of
from spa.model.shapes import Walk, Walker
from spa.model.versions import FREE_INITIALIZERS

GROWTH = 2  # bytes of a result by those of the constants behind it: halves become singles
LARGE = 1024  # elements of a constant, of two axes or more, of which there should be one copy
MOST_FOLDED = 2**30  # bytes of all results together, those between included

MOVERS = frozenset("Concat Expand Flatten Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split())
_FOLDED = frozenset(
    """
    Abs Add And Cast CastLike Ceil Clip Concat Div Equal Exp Expand Flatten Floor Gather Greater GreaterOrEqual Identity
    Less LessOrEqual Log MatMul Max Min Mul Neg Not Or Pow Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Sigmoid Sign Slice Split Sqrt Squeeze Sub Tanh Tile Transpose
    Unsqueeze Where Xor
    """.split()
)


def fold_constants(model: ModelProto, base: Path | None) -> int:
    """Replace in place what is computed from constants alone by its value.

    Args:
        model: the model, in topological order.
        base: the folder of its external data.

    Returns:
        How many operators were folded.
    """
    graph = Graph(model, base)
    sources = constant_sources(graph)
    nodes = _candidates(graph, sources)
    if not nodes:
        return 0
    walk = _walk(graph, nodes, sources)
    nodes = _without(nodes, {n.index for n in nodes if not _is_affordable(n, walk)})
    while nodes and (wrong := _unwanted(graph, nodes, sources, walk)):
        nodes = _without(nodes, wrong)
    if not nodes:
        return 0
    results = _frontier(graph, nodes)
    values = _computed(graph, nodes, results)
    if values is None:
        return 0
    _replace(model, {n.index for n in nodes}, values)
    _keep_names(model, {name: source for name in results if (source := _stored_as(graph, name)) is not None})
    return len(nodes)


def has_folds(model: ModelProto, base: Path | None) -> bool:
    """Return whether anything may be folded: a quick look that spares most models a copy."""
    graph = Graph(model, base)
    return bool(_candidates(graph, constant_sources(graph)))


def _candidates(graph: Graph, sources: set[str]) -> list[Node]:
    """Return the operators that read nothing but constants and each other, in order."""
    known, found = set(sources), []
    for node in graph.nodes:
        given = [name for name in node.inputs if name]
        foldable = node.op in _FOLDED and not node.domain and not any(o in graph.outputs for o in node.outputs)
        if foldable and given and known.issuperset(given):
            known.update(node.outputs)
            found.append(node)
    return found


def _part(graph: Graph, nodes: list[Node], outputs: list[str]) -> ModelProto:
    made = {name for node in nodes for name in node.outputs}
    needed = {name for node in nodes for name in node.inputs if name and name not in made}
    return graph.part(nodes, [], outputs, [graph.inlined(name) for name in sorted(needed)])


def _walk(graph: Graph, nodes: list[Node], sources: set[str]) -> Walk:
    """Find the shapes of results before any is computed; none where the operators contradict themselves."""
    read = {name for node in nodes for name in node.inputs} & sources
    view = Graph(graph.part(nodes, [], [], []), graph.base, {name: graph.constants[name] for name in sorted(read)})
    try:
        return Walker().walk(view, {})
    except ModelError:
        return Walk()  # said better by the analysis


def _is_affordable(node: Node, walk: Walk) -> bool:
    """Return whether the shapes of all outputs are known, and none is large."""
    outputs = [name for name in node.outputs if name]
    return all(name in walk.shape and _bytes(walk, name) <= MOST_FOLDED for name in outputs) and not any(
        (name, axis) in walk.open_axes for name in outputs for axis in range(len(walk.shape[name]))
    )


def _size(walk: Walk, name: str) -> int:
    return math.prod(walk.shape[name])


def _bytes(walk: Walk, name: str) -> int:
    try:
        return _size(walk, name) * helper.tensor_dtype_to_np_dtype(walk.dtype[name]).itemsize
    except KeyError:  # no type of ONNX's
        return _size(walk, name)


def _frontier(graph: Graph, nodes: list[Node]) -> list[str]:
    """Return the results that something reads which is not folded."""
    folded = {node.index for node in nodes}
    captured = {name for names in graph.captured.values() for name in names}
    return [
        name
        for node in nodes
        for name in node.outputs
        if name and (name in captured or any(user.index not in folded for user, _ in graph.users.get(name, ())))
    ]


def _unwanted(graph: Graph, nodes: list[Node], sources: set[str], walk: Walk) -> set[int]:
    """Return the nodes that must stay for cases 2 to 4, or none."""
    import networkx as nx  # here, since the import takes a tenth of a second

    flow = nx.DiGraph()
    flow.add_edges_from((name, out) for node in nodes for name in node.inputs if name for out in node.outputs if out)
    results = set(_frontier(graph, nodes))
    if sum(_bytes(walk, name) for node in nodes for name in node.outputs if name) > MOST_FOLDED:
        return {node.index for node in nodes}
    seen_through = {graph.producer[name].index for name in results if graph.producer[name].op in MOVERS}
    if seen_through:  # Case 4
        return seen_through
    for name in results:  # Case 2
        behind = nx.ancestors(flow, name) & sources
        if _size(walk, name) >= LARGE and _bytes(walk, name) > GROWTH * sum(_bytes(walk, s) for s in behind):
            return {graph.producer[name].index}
    folded = {node.index for node in nodes}
    captured = {name for names in graph.captured.values() for name in names}
    for name in flow:  # Case 3
        if not _is_large(walk, name):
            continue
        read = {user.index for user, _ in graph.users.get(name, ())}
        ends = {n for n in nx.descendants(flow, name) & results if _is_large(walk, n)}
        if len(ends) + (name in captured or not read <= folded) > 1:
            return read & folded
    return set()


def _is_large(walk: Walk, name: str) -> bool:
    return sum(n > 1 for n in walk.shape[name]) >= 2 and _size(walk, name) >= LARGE


def _without(nodes: list[Node], wrong: set[int]) -> list[Node]:
    """Return the nodes but for some, and for those that read what these compute."""
    lost: set[str] = set()
    kept = []
    for node in nodes:
        if node.index in wrong or not lost.isdisjoint(node.inputs):
            lost.update(node.outputs)
        else:
            kept.append(node)
    return kept


def _computed(graph: Graph, nodes: list[Node], results: list[str]) -> dict[str, TensorProto] | None:
    """Compute results by onnx's reference implementation; None where it cannot."""
    from onnx.reference import ReferenceEvaluator  # here, since few files need it

    try:
        arrays = ReferenceEvaluator(_part(graph, nodes, results)).run(None, {})
    except Exception:  # of any kernel: the operators stay
        return None
    return {name: numpy_helper.from_array(array, name) for name, array in zip(results, arrays, strict=True)}


def _replace(model: ModelProto, folded: set[int], values: dict[str, TensorProto]) -> None:
    """Take operators and the constants that only they read out of a model, and put in results."""
    graph = model.graph
    behind = {name for index in folded for name in graph.node[index].input}
    replace_nodes(graph, [node for index, node in enumerate(graph.node) if index not in folded])
    unread = behind - names_read(graph)
    replace_nodes(graph, [node for node in graph.node if node.op_type != "Constant" or unread.isdisjoint(node.output)])
    for items in (graph.initializer, graph.input):
        for position in reversed(range(len(items))):
            if items[position].name in unread:
                del items[position]
    graph.initializer.extend(values.values())
    if model.ir_version < FREE_INITIALIZERS:
        graph.input.extend(helper.make_tensor_value_info(n, t.data_type, t.dims) for n, t in values.items())


def _stored_as(graph: Graph, name: str) -> str | None:
    """Return the constant that a result is in another type, or None where it is more than that."""
    while (maker := graph.producer.get(name)) is not None and maker.op in ("Cast", "CastLike", "Identity"):
        name = maker.inputs[0]
    return name if name in graph.initializers else None


def _keep_names(model: ModelProto, sources: dict[str, str]) -> None:
    """Give results the names of constants that they are in another type, where those are gone."""
    graph = model.graph
    taken = {tensor.name for tensor in graph.initializer} | {info.name for info in graph.input}
    inside = {name for node in graph.node for sub in subgraphs_of(node) for name in outer_uses(sub)}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        source = sources.get(tensor.name)
        if source is not None and source not in taken and tensor.name not in inside:
            taken.add(source)
            renamed[tensor.name] = source
            tensor.name = source
    stale = [info for info in graph.value_info if info.name in renamed.values()]  # of another type
    for info in stale:
        graph.value_info.remove(info)
    for info in (*graph.value_info, *graph.input):
        info.name = renamed.get(info.name, info.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
