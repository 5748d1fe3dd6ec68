"""Traits of operators and of element types: what several parts of the library ask of an operator, answered once.

An operator that a table misses has no trait, and whoever asks treats it as unknown. To add one, write its line; the
tests hold each trait against the operator itself, run on small inputs.
"""

from __future__ import annotations

from enum import Enum

from onnx import TensorProto


class Trait(Enum):
    """A property of an operator, at every version and for all values of its attributes.

    Attributes:
        UNARY: each output element is one function of the element of the first operand at the same place.
        BROADCASTING: each output element is one function of the operands' elements at the same place, the operands
            being stretched to one shape.
        SMOOTH: besides, the function maps floats to floats, and differences to either side of a point give its slope.
        ZERO_AT_ZERO: a unary function f with f(0) = 0.
        VIEW: the elements of the first operand in the same row-major order, under another shape.
        PERMUTATION: the elements of the first operand, each once, in another order.
        SELECTION: indices of one or more axes of the first operand, chosen by the other operands or attributes.
        CARRIER: each output element is an element of a data operand, moved, rounded, clipped or taken modulo another,
            or a fill value: indices that are below a bound stay below it.
        SUM: a reduction to which a zero adds nothing.
        STATISTIC: a reduction that an additional zero changes.
        POOLING: places (the axes from the third on) become other places; samples and channels stay.
        MEAN: a reduction or pooling that makes of equal values the same value.
        PRODUCT: a sum of products of the elements of the first two operands, linear in each.
        BIASED: a product that adds its third operand, if it has one, to each output channel.
        MEASURE: only the shape of the operand matters.
        RANDOM: equal inputs give other outputs in another run.
        QUANTISING: floats become integers with a scale, or the other way round.
        SEQUENCE: an operand or an output is a sequence of tensors, or an optional one.
    """

    UNARY = "unary"
    BROADCASTING = "broadcasting"
    SMOOTH = "smooth"
    ZERO_AT_ZERO = "zero-at-zero"
    VIEW = "view"
    PERMUTATION = "permutation"
    SELECTION = "selection"
    CARRIER = "carrier"
    SUM = "sum"
    STATISTIC = "statistic"
    POOLING = "pooling"
    MEAN = "mean"
    PRODUCT = "product"
    BIASED = "biased"
    MEASURE = "measure"
    RANDOM = "random"
    QUANTISING = "quantising"
    SEQUENCE = "sequence"


# Where traits that look alike differ, and why:
# - SMOOTH leaves out functions that do not map floats to floats (Cast, Not), steps (Floor, Round, Sign) and functions
#   with poles (Log, Reciprocal, Tan) on purpose. Of those that would qualify it has what stood between two layers of
#   some network; Cos, Max, Min, Shrink, Sin and Where, for example, did not. BatchNormalization is smooth without being
#   broadcasting: its vectors lie along the second axis.
# - CARRIER asks for values, not places, and so it has ReduceMax and Clip. Of the operators that move elements it misses
#   those that no network applies to indices (DepthToSpace, Compress, ReverseSequence).
# - MEAN has three of five STATISTICs and four of six POOLINGs on purpose: a product, an Lp norm and the logarithm
#   of a sum of exponentials depend on how many equal values there are.
# - RANDOM leaves out Dropout, which draws in training alone; who folds constants has to ask for it besides.
# - SEQUENCE leaves out what passes any type (Identity, If, Loop).
_OPERATORS = """
Abs                          unary smooth zero-at-zero
Acos                         unary
Acosh                        unary
Asin                         unary zero-at-zero
Asinh                        unary zero-at-zero
Atan                         unary zero-at-zero
Atanh                        unary zero-at-zero
BitCast                      unary zero-at-zero
BitwiseNot                   unary
Cast                         unary zero-at-zero carrier
Ceil                         unary zero-at-zero
Celu                         unary smooth zero-at-zero
Cos                          unary
Cosh                         unary
Elu                          unary smooth zero-at-zero
Erf                          unary smooth zero-at-zero
Exp                          unary smooth
Floor                        unary zero-at-zero
Gelu                         unary smooth zero-at-zero
HardSigmoid                  unary smooth
HardSwish                    unary smooth zero-at-zero
Identity                     unary smooth zero-at-zero carrier
IsInf                        unary zero-at-zero
IsNaN                        unary zero-at-zero
LeakyRelu                    unary smooth zero-at-zero
Log                          unary
Mish                         unary smooth zero-at-zero
Neg                          unary smooth zero-at-zero
Not                          unary
Reciprocal                   unary
Relu                         unary smooth zero-at-zero
Round                        unary zero-at-zero
Selu                         unary smooth zero-at-zero
Shrink                       unary zero-at-zero
Sigmoid                      unary smooth
Sign                         unary zero-at-zero
Sin                          unary zero-at-zero
Sinh                         unary zero-at-zero
Softplus                     unary smooth
Softsign                     unary smooth zero-at-zero
Sqrt                         unary smooth zero-at-zero
Swish                        unary smooth zero-at-zero
Tan                          unary zero-at-zero
Tanh                         unary smooth zero-at-zero
ThresholdedRelu              unary smooth zero-at-zero
com.microsoft::Gelu          unary zero-at-zero
com.microsoft::QuickGelu     unary zero-at-zero

Add                          broadcasting smooth
And                          broadcasting
BitShift                     broadcasting
BitwiseAnd                   broadcasting
BitwiseOr                    broadcasting
BitwiseXor                   broadcasting
Clip                         broadcasting smooth carrier
Div                          broadcasting smooth
Equal                        broadcasting
Greater                      broadcasting
GreaterOrEqual               broadcasting
Less                         broadcasting
LessOrEqual                  broadcasting
Max                          broadcasting carrier
Mean                         broadcasting
Min                          broadcasting carrier
Mod                          broadcasting carrier
Mul                          broadcasting smooth
Or                           broadcasting
PRelu                        broadcasting smooth
Pow                          broadcasting smooth
Sub                          broadcasting smooth
Sum                          broadcasting
Where                        broadcasting carrier
Xor                          broadcasting
com.microsoft::BiasAdd       broadcasting
com.microsoft::BiasGelu      broadcasting
com.microsoft::FastGelu      broadcasting
BatchNormalization           smooth

Flatten                      view carrier
Reshape                      view carrier
Squeeze                      view carrier
Unsqueeze                    view carrier
DepthToSpace                 permutation
SpaceToDepth                 permutation
Transpose                    permutation carrier
Gather                       selection carrier
Slice                        selection carrier
Split                        selection carrier
Concat                       carrier
Expand                       carrier
GatherElements               carrier
GatherND                     carrier
Pad                          carrier
Tile                         carrier

ReduceL1                     sum
ReduceL2                     sum
ReduceLogSum                 sum
ReduceSum                    sum
ReduceSumSquare              sum
ReduceLogSumExp              statistic
ReduceMax                    statistic mean carrier
ReduceMean                   statistic mean
ReduceMin                    statistic mean carrier
ReduceProd                   statistic
AveragePool                  pooling mean
GlobalAveragePool            pooling mean
GlobalLpPool                 pooling
GlobalMaxPool                pooling mean
LpPool                       pooling
MaxPool                      pooling mean

Conv                         product biased
ConvTranspose                product biased
Einsum                       product
Gemm                         product biased
MatMul                       product

Shape                        measure
Size                         measure
Bernoulli                    random
Multinomial                  random
RandomNormal                 random
RandomNormalLike             random
RandomUniform                random
RandomUniformLike            random
DequantizeLinear             quantising
DynamicQuantizeLinear        quantising
QuantizeLinear               quantising
ConcatFromSequence           sequence
Optional                     sequence
OptionalGetElement           sequence
OptionalHasElement           sequence
SequenceAt                   sequence
SequenceConstruct            sequence
SequenceEmpty                sequence
SequenceErase                sequence
SequenceInsert               sequence
SequenceLength               sequence
SequenceMap                  sequence
SplitToSequence              sequence
"""

OPERATORS: dict[str, frozenset[Trait]] = {
    key: frozenset(map(Trait, words)) for key, *words in (line.split() for line in _OPERATORS.splitlines() if line)
}


def traits(key: str) -> frozenset[Trait]:
    """Return the traits of an operator (``domain::Op``, or the bare name of a standard one), none if it is not listed.

    >>> sorted(t.value for t in traits("Clip"))
    ['broadcasting', 'carrier', 'smooth']
    """
    return OPERATORS.get(key, frozenset())


def operators(*wanted: Trait) -> tuple[str, ...]:
    """Return the operators that have all of some traits, in the order of the table.

    >>> operators(Trait.STATISTIC, Trait.MEAN)
    ('ReduceMax', 'ReduceMean', 'ReduceMin')
    """
    return tuple(key for key, found in OPERATORS.items() if found.issuperset(wanted))


FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
"""Element types of weights and activations."""

FLOAT_NAMES = frozenset(TensorProto.DataType.Name(t).lower() for t in FLOATS)
"""The same, as :class:`spa.running.runtime.TensorSpec` names them."""

NUMPY_FLOATS = FLOATS - {TensorProto.BFLOAT16}
"""Those that numpy itself knows: arithmetic on small floats tells these from integers by their kind."""

SIZES = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL})
"""Element types of shape arithmetic, and of the conditions in it."""

INDICES = frozenset({TensorProto.INT64, TensorProto.STRING})
"""Element types of constants that are indices, sizes or keys, and never weights (quantised weights have fewer bits)."""

NOT_PARAMETERS = INDICES | {TensorProto.BOOL}
"""Element types of constants that do not count as parameters: indices, and masks."""
