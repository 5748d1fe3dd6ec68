"""Operators that treat every element alike: all unary and all broadcasting operators, and selection among them."""

from spa.algebra.op import Op
from spa.rules import rule

UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh
Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu com.microsoft::Gelu com.microsoft::QuickGelu
""".split()

BROADCASTING = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Clip Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
Mod Mul Or PRelu Pow Sub Sum Where Xor com.microsoft::BiasAdd com.microsoft::BiasGelu com.microsoft::FastGelu
""".split()


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
