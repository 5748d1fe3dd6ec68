"""The ONNX operators in PyTorch: one function per operator, one file per family.

A function takes the node and the values of its operands (None for those left out) and returns the value of the node's
output, or a tuple of them. Values are of two kinds: tensors, and numpy arrays, which hold what is known on the host
without looking at data: sizes, axes, indices. Functions get tensors, but for the operands that are registered as
``host``; :func:`ints` reads those, whichever kind they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import TensorProto

from spa.model.graph import Graph, Node

Value = Any  # a tensor, a numpy array, a list (a sequence), or None
Function = Callable[..., Any]
Limit = Callable[[Node, Graph], "str | None"]
MS = "com.microsoft::"


@dataclass(frozen=True)
class Operator:
    """The computation of a node.

    Attributes:
        function: (node, operands ...) → output or outputs.
        host: operands that steer and carry no data; they are handed over as they are.
        fixed: operands that are data, but no weights: statistics, bounds, tables.
        modal: whether the function takes ``training=``.
        control: whether it takes ``bodies=``, its subgraphs by attribute as functions of their inputs.
        random: whether it is to be run at each call, though nothing flows into it.
        limit: says what a node asks for that is not covered, or None.
    """

    function: Function
    host: frozenset[int]
    fixed: frozenset[int]
    modal: bool
    control: bool
    limit: Limit


_OPERATORS: dict[str, Operator] = {}


def operator(
    *keys: str,
    host: Collection[int] = (),
    fixed: Collection[int] = (),
    modal: bool = False,
    control: bool = False,
    limit: Limit = lambda node, graph: None,
) -> Callable[[Function], Function]:
    """Register a function for operators, each named ``Op`` or ``domain::Op``; see :class:`Operator`.

    Raises:
        ValueError: an operator has a function already.
    """

    def register(function: Function) -> Function:
        entry = Operator(function, frozenset(host), frozenset(fixed), modal, control, limit)
        for key in keys:
            if key in _OPERATORS:
                raise ValueError(f"{key} has a function already")
            _OPERATORS[key] = entry
        return function

    return register


@cache
def _load() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def find(key: str) -> Operator | None:
    """Return how an operator is computed; None where it is not covered."""
    _load()
    return _OPERATORS.get(key)


def supported() -> list[str]:
    """Return the operators that are covered, sorted."""
    _load()
    return sorted(_OPERATORS)


def ints(value: Value) -> list[Any]:
    """Return integers of the host as a list; symbolic sizes stay symbolic."""
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return np.ravel(value).tolist()


def given(node: Node, value: Value, name: str) -> list[Any] | None:
    """Return integers that are an operand now and were an attribute in older versions; None where neither is there."""
    if value is not None:
        return ints(value)
    listed = node.attributes.get(name)
    return None if listed is None else list(listed)


def number(value: Value) -> Any:
    """Return the only element of a value."""
    return value.item() if isinstance(value, torch.Tensor) else np.ravel(value).tolist()[0]


def sizes(shape: Collection[Any]) -> np.ndarray:
    """Return a shape as a value of the host; symbolic sizes are objects."""
    plain = all(type(n) is int for n in shape)
    return np.asarray(list(shape), np.int64 if plain else object).reshape(len(shape))


def tensor(value: Value) -> Value:
    """Return a value of the host as a tensor; others as they are."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == object:
        return torch.tensor(value.tolist(), dtype=torch.int64)
    if value.dtype == ml_dtypes.bfloat16:
        return torch.as_tensor(value.view(np.int16).copy()).view(torch.bfloat16)
    if value.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return torch.as_tensor(value.astype(np.int8 if value.dtype.name[0] == "i" else np.uint8))
    return torch.as_tensor(np.array(value))


_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    **{getattr(TensorProto, f"INT{n}"): getattr(torch, f"int{n}") for n in (8, 16, 32, 64)},
    **{getattr(TensorProto, f"UINT{n}"): getattr(torch, f"uint{n}") for n in (8, 16, 32, 64)},
}


def dtype_of(code: int) -> torch.dtype:
    """Return PyTorch's word for an ONNX element type; :func:`unknown_dtype` says beforehand whether there is one."""
    return _DTYPES[code]


def unknown_dtype(code: int) -> str | None:
    """Say why an element type cannot be had, or return None."""
    return None if code in _DTYPES else f"elements of type {TensorProto.DataType.Name(code)}"


def along(vector: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """Return a vector [c] as [1 .. c .. 1], with c at an axis."""
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def wants(node: Node, output: int) -> bool:
    """Tell whether anybody asks for an output."""
    return len(node.outputs) > output and node.outputs[output] != ""
