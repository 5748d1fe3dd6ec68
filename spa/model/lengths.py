"""Inputs of one number that say how many steps there are: the graph counts up to them, or cuts a sequence there."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, TensorProto, TypeProto

__all__ = ["length_inputs", "steps_of"]

_CARRIERS = ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape")
_LENGTH_OPERAND = {"Range": 1, "Slice": 2}  # where Range ends, and where pieces end
_INTEGERS = (TensorProto.INT64, TensorProto.INT32)


def length_inputs(graph: GraphProto) -> tuple[str, ...]:
    """Return the inputs of one integer at which a Range or a Slice ends, by way of operators that keep their value.

    Models with a cache have none: there such a number may count the steps with those of the cache, or without.

    Args:
        graph: the main graph.
    """
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    if any("past" in i.name.lower() or "cache" in i.name.lower() for i in inputs):
        return ()
    carried = {i.name: i.name for i in inputs if _is_one_integer(i.type.tensor_type)}
    found: dict[str, None] = {}
    for node in graph.node if carried else ():
        operand = _LENGTH_OPERAND.get(node.op_type, len(node.input))
        if operand < len(node.input) and node.input[operand] in carried:
            found[carried[node.input[operand]]] = None
        if node.op_type in _CARRIERS and node.input[0] in carried:
            carried[node.output[0]] = carried[node.input[0]]
    return tuple(found)


def _is_one_integer(tensor: TypeProto.Tensor) -> bool:
    return (
        tensor.elem_type in _INTEGERS and tensor.HasField("shape") and all(d.dim_value == 1 for d in tensor.shape.dim)
    )


def steps_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of steps: the second axis of the first input that has two, and is no mask.

    >>> steps_of({"n": (), "mask": (2, 9), "ids": (2, 7)})
    7
    """
    return next((s[1] for name, s in shapes.items() if len(s) > 1 and "mask" not in name.lower()), None)
