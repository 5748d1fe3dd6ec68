"""Rewriting a model so that it can be analysed, without changing what it computes.

Cases:
1. Local functions are inlined.
2. Node names that occur twice are made unique (onnxruntime refuses them).
3. ``SplitToSequence`` by known sizes, or into single elements, whose pieces are all taken by ``SequenceAt`` with a
   constant position becomes one ``Slice`` or ``Gather`` for each of these (PyTorch's unoptimised export writes
   ``torch.split`` so).
4. Sparse initializers become dense ones, which can be scored, sliced and refitted.
5. Nodes are put in topological order.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from spa.errors import ModelError, UnsupportedError
from spa.model.functions import inlined
from spa.model.graph import Graph, replace_nodes, subgraphs_of, tensor_array
from spa.model.order import is_sorted, sort

MOST_DENSE = 2**28  # elements of a sparse initializer that is made dense


def normalise(model: ModelProto, own: bool) -> ModelProto:
    """Rewrite cases 1 to 5.

    Args:
        model: the model.
        own: whether the message may be changed in place.

    Returns:
        The rewritten model; the same message where nothing had to be done.

    Raises:
        ModelError: two initializers have one name, a sparse one contradicts itself, or nodes read each other in a
            circle.
        UnsupportedError: one would be too large as a dense one.
    """
    if model.functions:  # Case 1
        model, own = inlined(model), True
    _refuse_one_name_for_two(model.graph)
    if not is_sorted(model.graph):  # Case 5, before what relies on it
        model, own = model if own else copied(model), True
        sort(model)
    duplicates, sequences = _has_duplicates(model), _splits(model)
    if not duplicates and not sequences and not model.graph.sparse_initializer:
        return model
    if not own:
        model = copied(model)
    if sequences:
        _rewrite(model, sequences)
    model.graph.initializer.extend(_dense(tensor) for tensor in model.graph.sparse_initializer)
    del model.graph.sparse_initializer[:]
    unique_names(model)
    return model


def _refuse_one_name_for_two(graph: GraphProto) -> None:
    """Refuse initializers of one name, in sub-graphs, too; onnxruntime takes one of them."""
    for node in graph.node:
        for inner in subgraphs_of(node):
            _refuse_one_name_for_two(inner)
    names = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ModelError(f"initializer {twice!r} is listed more than once. Keep one of them.")


def _has_duplicates(model: ModelProto) -> bool:
    names = [n.name for n in model.graph.node if n.name]
    return len(set(names)) < len(names)


def unique_names(model: ModelProto) -> None:  # Case 2
    """Give nodes of one name different ones, in place."""
    taken = {n.name for n in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.name and node.name in seen:
            count = 2
            while f"{node.name}_{count}" in taken:
                count += 1
            node.name = f"{node.name}_{count}"
            taken.add(node.name)
        seen.add(node.name)


def _dense(sparse: SparseTensorProto) -> TensorProto:  # Case 4
    name, size = sparse.values.name, math.prod(sparse.dims)
    if size > MOST_DENSE:
        raise UnsupportedError(f"the sparse initializer {name!r} has {size} elements. Split it into smaller ones.")
    values, places = tensor_array(sparse.values), tensor_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    try:
        if places.ndim == 1:
            dense.reshape(-1)[places] = values
        else:
            dense[tuple(places.T)] = values
    except (ValueError, IndexError) as error:
        raise ModelError(f"the sparse initializer {name!r} is malformed: {error}. Export the model again.") from error
    return numpy_helper.from_array(dense, name)


def _splits(model: ModelProto) -> dict[int, dict[int, tuple[int, int] | int]]:
    """Find case 3: by index of a SplitToSequence, by index of a SequenceAt that reads it, what its piece is.

    A piece is the place of its only element where there are no sizes, else the bounds of its elements.
    """
    if not any(n.op_type == "SplitToSequence" for n in model.graph.node):
        return {}
    graph = Graph(model)
    captured = {name for names in graph.captured.values() for name in names} | set(graph.outputs)
    splits = {}
    for node in graph.nodes:
        if node.op != "SplitToSequence" or node.outputs[0] in captured:
            continue
        sizes = node.inputs[1] if len(node.inputs) > 1 else ""
        if sizes and sizes not in graph.constants:
            continue
        takers: dict[int, tuple[int, int] | int] = {}
        for user, operand in graph.users.get(node.outputs[0], ()):
            if user.op != "SequenceAt" or operand != 0 or user.inputs[1] not in graph.constants:
                break
            place = int(np.ravel(graph.array(user.inputs[1]))[0])
            piece = _bounds(graph.array(sizes), place) if sizes else place
            if piece is None:
                break
            takers[user.index] = piece
        else:
            splits[node.index] = takers
    return splits


def _bounds(sizes: np.ndarray, piece: int) -> tuple[int, int] | None:
    """Return where a piece begins and ends; None for one counted from the end of pieces of unknown number.

    Args:
        sizes: of all pieces, or the one size (a scalar) that all have.
        piece: the position of the piece; negative from the end.
    """
    if sizes.ndim == 0:
        return (piece * int(sizes), (piece + 1) * int(sizes)) if piece >= 0 else None
    ends = np.cumsum(sizes)
    return int(ends[piece] - sizes[piece]), int(ends[piece])


def _rewrite(model: ModelProto, sequences: dict[int, dict[int, tuple[int, int] | int]]) -> None:
    nodes = list(model.graph.node)
    replaced: dict[int, NodeProto | None] = {}
    for index, takers in sequences.items():
        node = nodes[index]
        replaced[index] = None
        given = {a.name: a.i for a in node.attribute}
        axis, keeps_axis = given.get("axis", 0), given.get("keepdims", 1)
        for taker, piece in takers.items():
            output, name = nodes[taker].output[0], nodes[taker].name
            if isinstance(piece, int):
                integers = {"indices": [piece] if keeps_axis else piece}
            else:
                integers = {"starts": [piece[0]], "ends": [piece[1]], "axes": [axis]}
            for key, value in integers.items():
                tensor = numpy_helper.from_array(np.asarray(value, np.int64), f"{output}/{key}")
                model.graph.initializer.append(tensor)
            operands = [node.input[0], *(f"{output}/{key}" for key in integers)]
            if isinstance(piece, int):
                replaced[taker] = helper.make_node("Gather", operands, [output], name=name, axis=axis)
            else:
                replaced[taker] = helper.make_node("Slice", operands, [output], name=name)
    kept = [replaced.get(i, node) for i, node in enumerate(nodes)]
    replace_nodes(model.graph, [n for n in kept if n is not None])


def copied(message: ModelProto) -> ModelProto:
    """Return a copy of a model."""
    copy = ModelProto()
    copy.CopyFrom(message)
    return copy
