"""Lines of notation on nodes that leave optional operands and outputs out in the middle."""

from __future__ import annotations

from onnx import helper

from spa.algebra.axes import Space
from spa.algebra.notation import apply
from spa.algebra.op import Op
from spa.model.graph import Node


def node_without(inputs: list[str], outputs: list[str], shapes: dict[str, tuple[int, ...]]) -> Op:
    """A node whose operands are named by their letters; an empty name is an absent operand."""
    space = Space()
    node = Node(helper.make_node("MyOp", inputs, outputs, domain="test", name="mine"), 0, 1)
    axes = [tuple(space.dim(n) for n in shapes[name]) if name else None for name in inputs]
    return Op(node, space, axes, [shapes.get(name) for name in outputs])


def test_what_is_summed_over_is_found_behind_an_absent_operand() -> None:
    op = node_without(["a", "", "b"], ["y"], {"a": (5, 7), "b": (7, 3), "y": (5, 3)})
    apply(op, "A[m k], S?[m], B[k n] -> Y[m n]")
    (read,) = op.reads
    assert (read.operand, read.axis, read.others) == (0, 1, ((2, 0),))
    assert op.space.resolve(op.axes(0)[1]) is op.space.resolve(op.axes(2)[0])
    assert op.space.resolve((op.outputs[0] or ())[1]) is op.space.resolve(op.axes(2)[1])


def test_an_absent_output_gets_no_axes_and_those_behind_it_do() -> None:
    op = node_without(["a"], ["y", "", "z"], {"a": (5, 7), "y": (7, 5), "z": (7,)})
    apply(op, "A[m k] -> Y[k m], U[m], Z[k]")
    sizes = [None if axes is None else tuple(e.size for e in axes) for axes in op.outputs]
    assert sizes == [(7, 5), None, (7,)]


def test_a_line_may_tell_of_outputs_that_the_node_has_not() -> None:
    op = node_without(["a"], ["y"], {"a": (5, 7), "y": (7, 5)})
    apply(op, "A[m k] -> Y[k m], U[m]")
    assert len(op.outputs) == 1
