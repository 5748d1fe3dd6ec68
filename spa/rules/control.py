"""Control flow, sequences and optionals.

Bodies of Loop, Scan and If are traced where they lie flat (:mod:`spa.model.bodies`), between the marks that this file
has laws for. Bodies that cannot, sequences and optionals are barriers: what flows into them, or is read inside them,
stays whole.
"""

from spa.algebra.axes import Axes
from spa.algebra.op import Barrier, Op
from spa.model.marks import FLAT
from spa.rules import rule, unsupported

unsupported("If", "channels are not traced through subgraphs of other results, or that fail at the sizes looked at")
for key in ["Loop", "Scan"]:
    unsupported(key, "channels are not traced through subgraphs whose states change their shapes, or are no tensors")
unsupported("SequenceMap", "channels are not traced through its subgraphs")

for key in [
    *["ConcatFromSequence", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert"],
    *["SequenceLength", "SplitToSequence", "SequenceAt", "Optional", "OptionalGetElement", "OptionalHasElement"],
]:
    unsupported(key, "channels are not traced through sequences and optionals")


@rule(f"{FLAT}::LoopEnter")
def loop_enter(op: Op) -> None:
    """Give each step the states, of the axes with which they begin.

    Spec: https://onnx.ai/onnx/operators/onnx__Loop.html.
    """
    op.set_opaque(0)
    op.set_opaque(1)
    for i in range(2, len(op.inputs)):
        op.set(i, op.axes(i))
    op.set_opaque(len(op.outputs) - 1)


@rule(f"{FLAT}::ScanEnter")
def scan_enter(op: Op) -> None:
    """Give each step the states, of the axes with which they begin, and a slice of each other operand.

    Spec: https://onnx.ai/onnx/operators/onnx__Scan.html.
    """
    states = len(op.inputs) - op.attr("num_scan_inputs")
    for i in range(states):
        op.set(i, op.axes(i))
    for i, axis in enumerate(op.attr("scan_input_axes") or [0] * (len(op.inputs) - states), states):
        axes = list(op.axes(i))
        op.freeze(axes.pop(axis), "goes along it step by step")
        op.set(i, axes)
    op.set_opaque(len(op.outputs) - 1)


@rule(f"{FLAT}::LoopLeave", f"{FLAT}::ScanLeave")
def leave(op: Op) -> None:
    """Make each state what it was, axis by axis, and lay what the steps give along an axis of their own.

    Spec: https://onnx.ai/onnx/operators/onnx__Loop.html, https://onnx.ai/onnx/operators/onnx__Scan.html.
    """
    first, states, count = int(op.node.op == "LoopLeave"), op.attr("states"), len(op.outputs)
    for i in range(states):
        op.set(i, _same(op, op.axes(first + count + i), op.axes(first + i)))
    (steps,) = op.axes(len(op.inputs) - 1)
    for i, axis in enumerate(op.attr("scan_output_axes") or [0] * (count - states), states):
        axes = list(op.axes(first + i))
        axes.insert(op.positive(axis, len(axes) + 1), steps)
        op.set(i, axes)


@rule(f"{FLAT}::IfThen", f"{FLAT}::IfElse")
def branch(op: Op) -> None:
    """Begin a branch."""
    op.set(0, ())


@rule(f"{FLAT}::IfLeave")
def if_leave(op: Op) -> None:
    """Give what either branch gives.

    Spec: https://onnx.ai/onnx/operators/onnx__If.html.
    """
    count = len(op.outputs)
    for i in range(count):
        op.set(i, _same(op, op.axes(1 + i), op.axes(1 + count + i)))


def _same(op: Op, axes: Axes, others: Axes) -> Axes:
    """State that two tensors have the same axes, and return them."""
    if [e.size for e in axes] != [e.size for e in others]:
        raise Barrier("what is carried has another shape than before")
    for a, b in zip(axes, others, strict=True):
        op.unify(a, b)
    return axes
