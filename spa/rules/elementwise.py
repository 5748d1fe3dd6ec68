"""Operators that treat every element alike: all unary and all broadcasting operators, and selection among them."""

from spa.algebra.op import Op
from spa.model.traits import Trait, operators
from spa.rules import rule

UNARY = operators(Trait.UNARY)
BROADCASTING = operators(Trait.BROADCASTING)


rule(
    *UNARY,
    "_[*s] -> _[*s]",
    doc="An element-wise function passes all axes. Spec: https://onnx.ai/onnx/operators/onnx__Relu.html.",
)
rule(
    *BROADCASTING,
    "_*[...] -> _[...]",
    doc="All operands broadcast, scalars and bounds, too. Spec: https://onnx.ai/onnx/operators/onnx__Add.html.",
)
rule(
    "Dropout",
    "data[*s], ratio?, training_mode? -> output[*s], mask[*s]",
    doc="Dropout passes its input; the mask has the same axes. Spec: https://onnx.ai/onnx/operators/onnx__Dropout.html.",
)


@rule("CastLike")
def cast_like(op: Op) -> None:
    """Pass the first operand, in the type of the second, whose axes do not matter.

    Spec: https://onnx.ai/onnx/operators/onnx__CastLike.html.
    """
    op.axes(1)
    op.set(0, op.axes(0))
