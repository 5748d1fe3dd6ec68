"""Operators that treat every element alike: all unary and all broadcasting operators, and selection among them."""

from spa.algebra.op import Op
from spa.model.traits import Trait, operators
from spa.rules import rule

UNARY = operators(Trait.UNARY)
BROADCASTING = operators(Trait.BROADCASTING)


@rule(*UNARY)
def unary(op: Op) -> None:
    """An element-wise function: the output's axes are the input's. Spec: the operators' pages, "element-wise"."""
    op.set(0, op.axes(0))


@rule(*BROADCASTING)
def broadcasting(op: Op) -> None:
    """Broadcasting: trailing axes are the same. Spec: onnx/docs/Broadcasting.md; scalars and bounds broadcast, too."""
    given = [i for i in range(len(op.inputs)) if op.has(i)]
    op.broadcast(given)


@rule("Dropout")
def dropout(op: Op) -> None:
    """Dropout passes its input; the mask has the same axes; ratio and training_mode are scalars."""
    op.set(0, op.axes(0))
    op.set(1, op.axes(0))


@rule("CastLike")
def cast_like(op: Op) -> None:
    """The first operand, in the type of the second, whose axes do not matter."""
    op.axes(1)
    op.set(0, op.axes(0))
