"""Operators that treat every element alike."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onnx import helper

from spa.exporters.jax_operators import Array, Call, is_known, number_type, operator

MS = "com.microsoft::"

# ONNX's name: numpy's and jax.numpy's.
SAME = {
    "Abs": "abs",
    "Acos": "arccos",
    "Acosh": "arccosh",
    "And": "logical_and",
    "Asin": "arcsin",
    "Asinh": "arcsinh",
    "Atan": "arctan",
    "Atanh": "arctanh",
    "BitwiseAnd": "bitwise_and",
    "BitwiseNot": "invert",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Equal": "equal",
    "Exp": "exp",
    "Floor": "floor",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "IsNaN": "isnan",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Log": "log",
    "Neg": "negative",
    "Not": "logical_not",
    "Or": "logical_or",
    "Round": "round",
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
    "Xor": "logical_xor",
}


@operator(*SAME)
def same(call: Call, *operands: Array) -> Array:
    """Call the function that numpy has under another name."""
    return getattr(call.xp, SAME[call.node.op])(*operands)


@operator("Add")
def add(call: Call, a: Array, b: Array) -> Array:
    """Add element by element."""
    return a + b


@operator("Sub")
def subtract(call: Call, a: Array, b: Array) -> Array:
    """Subtract element by element."""
    return a - b


@operator("Mul")
def multiply(call: Call, a: Array, b: Array) -> Array:
    """Multiply element by element."""
    return a * b


@operator("Div")
def divide(call: Call, a: Array, b: Array) -> Array:
    """Divide element by element; integers are truncated towards zero."""
    if np.issubdtype(a.dtype, np.integer):
        return call.xp.sign(a) * call.xp.sign(b) * (call.xp.abs(a) // call.xp.abs(b))
    return a / b


@operator("Mod")
def modulo(call: Call, a: Array, b: Array) -> Array:
    """Return the remainder with the divisor's sign, or with the dividend's (fmod)."""
    return (call.xp.fmod if call.attr("fmod", 0) else call.xp.mod)(a, b)


@operator("Pow")
def power(call: Call, x: Array, y: Array) -> Array:
    """Raise to a power, in the base's type. A known whole exponent multiplies: its derivative is finite at zero."""
    if is_known(y) and y.size == 1 and float(y.ravel()[0]).is_integer() and not is_known(x):
        raised = x ** int(y.ravel()[0])
        return jnp.broadcast_to(raised, np.broadcast_shapes(x.shape, y.shape))
    return call.xp.power(x, y).astype(x.dtype)


@operator("BitShift")
def bit_shift(call: Call, x: Array, by: Array) -> Array:
    """Move bits left or right."""
    return call.xp.left_shift(x, by) if call.attr("direction") == "LEFT" else call.xp.right_shift(x, by)


@operator("Max", "Min", "Sum", "Mean")
def variadic(call: Call, *operands: Array) -> Array:
    """Combine any number of operands."""
    if call.node.op in ("Sum", "Mean"):
        total = reduce(lambda a, b: a + b, operands)
        return total if call.node.op == "Sum" else total / len(operands)
    return reduce(call.xp.maximum if call.node.op == "Max" else call.xp.minimum, operands)


@operator("Where")
def where(call: Call, condition: Array, x: Array, y: Array) -> Array:
    """Select element by element."""
    return call.xp.where(condition, x, y)


@operator("Clip")
def clip(call: Call, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    """Limit to bounds, which are attributes before opset 11."""
    low, high = call.attr("min", low), call.attr("max", high)
    x = x if low is None else call.xp.maximum(x, call.xp.asarray(low, x.dtype))
    return x if high is None else call.xp.minimum(x, call.xp.asarray(high, x.dtype))


@operator("Identity")
def identity(call: Call, x: Array) -> Array:
    """Return the operand."""
    return x


@operator("Dropout")
def dropout(call: Call, x: Array, *rest: Array) -> tuple[Array, Array]:
    """Return the operand: networks are computed as in inference."""
    return x, np.ones(x.shape, np.bool_)


@operator("Cast")
def cast(call: Call, x: Array) -> Array:
    """Convert to another type. Floats become integers by truncation."""
    return as_type(x, helper.tensor_dtype_to_np_dtype(call.attr("to")))


@operator("CastLike")
def cast_like(call: Call, x: Array, like: Array) -> Array:
    """Convert to the second operand's type."""
    return as_type(x, like.dtype)


def as_type(x: Array, dtype: Any) -> Array:
    """Convert to a type: in numpy as it is, in JAX as far as JAX has it."""
    return x.astype(dtype) if is_known(x) else x.astype(number_type(dtype))


@operator("Reciprocal")
def reciprocal(call: Call, x: Array) -> Array:
    """Return one over the operand."""
    return 1 / x


@operator("IsInf")
def is_inf(call: Call, x: Array) -> Array:
    """Tell which elements are infinite, of the signs asked for."""
    above = (x == np.inf) & bool(call.attr("detect_positive", 1))
    return above | ((x == -np.inf) & bool(call.attr("detect_negative", 1)))


# -- activations -----------------------------------------------------------------------------------------------------


@operator("Relu", "Sigmoid", "Softplus", "Softsign", "Mish", "Erf")
def activation(call: Call, x: Array) -> Array:
    """Call the function that JAX has and that takes no attributes."""
    if call.node.op == "Relu" and np.issubdtype(x.dtype, np.integer):
        return call.xp.maximum(x, np.asarray(0, x.dtype))
    if call.node.op == "Softsign":
        return jax.nn.soft_sign(x)
    return jax.scipy.special.erf(x) if call.node.op == "Erf" else getattr(jax.nn, call.node.op.lower())(x)


@operator("Elu", "Celu")
def elu(call: Call, x: Array) -> Array:
    """Return an exponential below zero, x above."""
    return (jax.nn.elu if call.node.op == "Elu" else jax.nn.celu)(x, call.attr("alpha", 1.0))


@operator("Selu")
def selu(call: Call, x: Array) -> Array:
    """Compute a scaled Elu."""
    return call.attr("gamma", 1.0507009873554805) * jax.nn.elu(x, call.attr("alpha", 1.6732632423543772))


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Array) -> Array:
    """Multiply by a slope below zero."""
    return jax.nn.leaky_relu(x, call.attr("alpha", 0.01))


@operator("PRelu")
def prelu(call: Call, x: Array, slope: Array) -> Array:
    """Multiply by a learned slope below zero."""
    return jnp.where(x < 0, slope * x, x)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: Array) -> Array:
    """Return zero up to a threshold, x above."""
    return jnp.where(x > call.attr("alpha", 1.0), x, jnp.zeros_like(x))


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Array) -> Array:
    """Return a piecewise linear sigmoid."""
    return jnp.clip(call.attr("alpha", 0.2) * x + call.attr("beta", 0.5), 0, 1)


@operator("HardSwish")
def hard_swish(call: Call, x: Array) -> Array:
    """Return x times a hard sigmoid."""
    return x * jnp.clip(x / 6 + 0.5, 0, 1)


@operator("Swish", MS + "QuickGelu")
def swish(call: Call, x: Array) -> Array:
    """Return x times the sigmoid of alpha x."""
    return x * jax.nn.sigmoid(call.attr("alpha", 1.0 if call.node.op == "Swish" else 1.702) * x)


@operator("Shrink")
def shrink(call: Call, x: Array) -> Array:
    """Return zero between two thresholds, and x moved by a bias beyond."""
    bias, threshold = call.attr("bias", 0.0), call.attr("lambd", 0.5)
    inner = jnp.where(x > threshold, x - bias, jnp.zeros_like(x))
    return jnp.where(x < -threshold, x + bias, inner).astype(x.dtype)


@operator("Gelu", MS + "Gelu")
def gelu(call: Call, x: Array) -> Array:
    """Compute Gelu, exact or by tanh."""
    return jax.nn.gelu(x, approximate=call.attr("approximate", "none") == "tanh")


@operator(MS + "BiasGelu", MS + "FastGelu")
def bias_gelu(call: Call, x: Array, bias: Array | None = None) -> Array:
    """Compute Gelu of a sum; the fast one by tanh."""
    return jax.nn.gelu(x if bias is None else x + bias, approximate=call.node.op == "FastGelu")


@operator(MS + "BiasAdd")
def bias_add(call: Call, x: Array, bias: Array, skip: Array) -> Array:
    """Return the sum of three."""
    return x + bias + skip
