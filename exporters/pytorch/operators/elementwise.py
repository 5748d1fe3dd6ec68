"""Element-wise functions and broadcasting ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spa.exporters.pytorch.operators import MS, dtype_of, number, operator, tensor, unknown_dtype
from spa.model.graph import Graph, Node

PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    MS + "BiasAdd": lambda x, bias, skip: x + bias + skip,
    MS + "BiasGelu": lambda x, bias: F.gelu(x + bias),
    MS + "Gelu": F.gelu,
}
_COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not")


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda node, *operands: function(*operands)


for _key, _function in PLAIN.items():
    operator(_key, fixed=(0, 1) if _key in _COMPARING else ())(_plain(_function))


# Activations with attributes, with the defaults of the specification.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Celu": lambda x, alpha=1.0: F.celu(x, alpha),
    "Elu": lambda x, alpha=1.0: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0))),
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Selu": lambda x, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: (
        gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))
    ),
    "Shrink": lambda x, lambd=0.5, bias=0.0: torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0)).to(
        x.dtype
    ),
    "Swish": lambda x, alpha=1.0: x * torch.sigmoid(alpha * x),
    "ThresholdedRelu": lambda x, alpha=1.0: torch.where(x > alpha, x, 0),
    MS + "QuickGelu": lambda x, alpha=1.702: x * torch.sigmoid(alpha * x),
}


def _activation(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(x, **node.attributes)


for _key, _function in ACTIVATIONS.items():
    operator(_key)(_activation(_function))


@operator(MS + "FastGelu")
def fast_gelu(node: Node, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the tanh approximation of Gelu, of a sum."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("IsInf")
def is_inf(node: Node, x: Tensor) -> Tensor:
    """Tell which elements are infinite, of either sign or of one."""
    positive = torch.isposinf(x) & bool(node.attributes.get("detect_positive", 1))
    return positive | (torch.isneginf(x) & bool(node.attributes.get("detect_negative", 1)))


@operator("Div")
def div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


@operator("Mod", fixed=(1,))
def mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Return the remainder with the sign of the divisor, or of the dividend (``fmod``)."""
    return torch.fmod(a, b) if node.attributes.get("fmod") else torch.remainder(a, b)


@operator("Pow", fixed=(1,))
def power(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Raise to a power, in the type of the base."""
    return torch.pow(a, b).to(a.dtype)


@operator("BitShift")
def bit_shift(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Shift bits; wide enough that those above the type's width vanish as they should."""
    wide, by = a.to(torch.int64), b.to(torch.int64)
    shifted = wide << by if node.attributes["direction"] == "LEFT" else wide >> by
    return shifted.to(a.dtype)


VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *operands: reduce(function, operands)


for _key, _function in VARIADIC.items():
    operator(_key)(_variadic(_function))


@operator("Mean")
def mean(node: Node, *operands: Tensor) -> Tensor:
    """Return the mean of all operands."""
    return reduce(torch.add, operands) / len(operands)


@operator("Clip", fixed=(1, 2))
def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Limit to bounds, which are attributes before opset 11."""
    if node.version < 11:
        return x.clamp(node.attributes.get("min", -math.inf), node.attributes.get("max", math.inf))
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@operator("PRelu")
def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """Return x where it is positive, else x times the slope, which broadcasts."""
    return torch.where(x < 0, slope * x, x)


def _no_such_type(node: Node, graph: Graph) -> str | None:
    return unknown_dtype(node.attributes["to"])


@operator("Cast", limit=_no_such_type)
def cast(node: Node, x: Tensor) -> Tensor:
    """Convert to another element type."""
    return x.to(dtype_of(node.attributes["to"]))


@operator("CastLike", host=(1,))
def cast_like(node: Node, x: Tensor, like: Any) -> Tensor:
    """Convert to the element type of another value."""
    return x.to(tensor(like).dtype)


@operator("Dropout", host=(1, 2), modal=True)
def dropout(
    node: Node, x: Tensor, ratio: Any = None, mode: Any = None, *, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Drop elements while the module trains, whatever mode the model was exported in."""
    share = node.attributes.get("ratio", 0.5) if ratio is None else number(ratio)
    if not training:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand_like(x) >= share
    return x * mask / (1 - share), mask


@operator(MS + "BiasDropout", host=(3, 4), modal=True)
def bias_dropout(
    node: Node,
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    ratio: Any = None,
    mode: Any = None,
    *,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """Drop elements of a sum, and add a residual."""
    y, mask = dropout(node, x + bias, ratio, mode, training=training)
    return (y if residual is None else y + residual), mask


@operator(MS + "BiasSplitGelu")
def bias_split_gelu(node: Node, x: Tensor, bias: Tensor) -> Tensor:
    """Return the first half of the channels times Gelu of the second."""
    value, gate = (x + bias).chunk(2, -1)
    return value * F.gelu(gate)
