"""ONNX operators in JAX: one small function for each, registered by name.

A function gets the call (:class:`Call`) and its operands, None where an optional one is missing, and returns its
output, or a tuple of them. What is known at trace time (shapes, integers computed from them, constants) comes as numpy
arrays, everything else as JAX arrays. A function that computes with ``call.xp`` folds known operands in numpy; one that
uses ``jax.numpy`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa.errors import UnsupportedError
from spa.model.graph import Node

Array = Any  # numpy's or JAX's
Operator = Callable[..., Any]
Refusal = Callable[[Node], "str | None"]


@dataclass(frozen=True)
class Law:
    """The law of one operator: how it is computed.

    Attributes:
        run: the function.
        static: the operands whose values must be known at trace time; a weight there is no parameter.
        refusal: why a node cannot be covered, or None.
    """

    run: Operator
    static: frozenset[int]
    refusal: Refusal


@dataclass(frozen=True)
class Call:
    """One node being computed.

    Attributes:
        node: the node.
        xp: numpy where all operands are known, else ``jax.numpy``.
        blocks: the node's subgraphs by attribute, as functions of lists of operands.
    """

    node: Node
    xp: Any
    blocks: dict[str, Callable[..., list[Any]]] = field(default_factory=dict)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value, or the default where it is not given."""
        return self.node.attributes.get(name, default)

    def known(self, value: Array, what: str) -> np.ndarray:
        """Return a value that must be known at trace time.

        Raises:
            UnsupportedError: it depends on data.
        """
        if not is_known(value):
            remedy = "Export the model with fixed sizes"
            raise UnsupportedError(f"{self.node.label}: {what} depends on data, JAX needs it beforehand. {remedy}.")
        return np.asarray(value)

    def ints(self, name: str, operand: Array | None, default: Any = None) -> Any:
        """Return integers from an attribute (older opsets) or else a known operand."""
        if name in self.node.attributes:
            return [int(v) for v in np.atleast_1d(self.node.attributes[name])]
        return default if operand is None else [int(v) for v in self.known(operand, name).ravel()]


_LAWS: dict[str, Law] = {}


@cache
def laws() -> Mapping[str, Law]:
    """Return all functions by operator, sorted."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(sorted(_LAWS.items()))


def operator(
    *keys: str, static: Sequence[int] = (), refusal: Refusal = lambda node: None
) -> Callable[[Operator], Operator]:
    """Register a function for operators, each named ``Op`` or ``domain::Op``.

    Args:
        keys: the operators.
        static: the operands that must be known at trace time.
        refusal: why a node of these operators is not covered after all, or None.

    Raises:
        ValueError: an operator has a function already.
    """

    def register(run: Operator) -> Operator:
        for key in keys:
            if key in _LAWS:
                raise ValueError(f"{key} has a function already, {_LAWS[key].run.__name__}.")
            _LAWS[key] = Law(run, frozenset(static), refusal)
        return run

    return register


def is_known(value: Any) -> bool:
    """Tell whether a value is known at trace time."""
    return isinstance(value, np.ndarray | np.generic)


def number_type(dtype: Any) -> Any:
    """Return the type that JAX has for a numpy type: 64 bits are 32 unless ``jax_enable_x64`` is set."""
    return jax.dtypes.canonicalize_dtype(dtype)


def positive(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis


def along(vector: Array, axis: int, rank: int) -> Array:
    """Return a vector shaped to broadcast along one axis of a tensor of that rank."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def widened(x: Array) -> Array:
    """Return half precision as float32, for sums; others as they are."""
    return x.astype(jnp.float32) if x.dtype in (jnp.float16, jnp.bfloat16) else x
