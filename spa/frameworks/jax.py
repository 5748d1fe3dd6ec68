"""JAX: a module of any library as one function of its parameters, and the layout in which ONNX stores a parameter.

The exporter runs the user's own code on pruned weights exactly as the importer ran it (:func:`bind`), and takes back
each step by which the importer rearranged a parameter (:func:`record_layout`, :func:`laid_out`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from spa.errors import ModelError

LARGEST_ERROR = 1e-3
"""How far a converted or rebuilt model's outputs may be from the original's, over their largest magnitude."""
LAYOUT = "spa.layout"
"""The key of an initializer's metadata that says how its value was made from the parameter's.

Its value is a JSON list of steps, ``["transpose", permutation]`` or ``["reshape", shape]``.
"""
Step = tuple[str, list[int]]


def record_layout(tensor: TensorProto, steps: Sequence[Step]) -> None:
    """Record in an initializer how its value was made from the parameter's; in place."""
    tensor.metadata_props.add(key=LAYOUT, value=json.dumps(steps))


def laid_out(array: np.ndarray, tensor: TensorProto) -> np.ndarray:
    """Take the steps that are recorded in an initializer with an array of the parameter's shape."""
    steps: list[Step] = json.loads(next((p.value for p in tensor.metadata_props if p.key == LAYOUT), "[]"))
    for step in steps:
        array = take(step, array)
    return array


def take(step: Step, array: np.ndarray) -> np.ndarray:
    """Take one step of a layout.

    >>> take(("transpose", [1, 0]), np.zeros((2, 3))).shape
    (3, 2)
    """
    operation, operand = step
    return array.transpose(operand) if operation == "transpose" else array.reshape(operand)


@dataclass(frozen=True)
class Bound:
    """Anything callable with parameters in a pytree, as one function.

    Attributes:
        call: the function of that tree and the inputs.
        tree: the tree; only its arrays of numbers are parameters.
        kind: ``nnx``, ``linen``, ``equinox`` or ``function``.
        first: the position of the inputs among the source's own arguments, behind itself or its parameters.
    """

    call: Callable[..., Any]
    tree: Any
    kind: str
    first: int

    def parameters(self) -> list[tuple[str, Any]]:
        """Return each array of the tree under its path (:func:`jax.tree_util.keystr`), in the tree's order."""
        import jax

        leaves = jax.tree_util.tree_leaves_with_path(self.tree)
        return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if is_parameter(leaf)]

    def with_parameters(self, arrays: Sequence[Any]) -> Any:
        """Return the tree with other arrays, in the order of `parameters`."""
        import jax

        leaves, structure = jax.tree_util.tree_flatten(self.tree)
        new = iter(arrays)
        return jax.tree_util.tree_unflatten(structure, [next(new) if is_parameter(a) else a for a in leaves])

    def run(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """Return the outputs' arrays, compiled: quicker than one operation at a time, though it runs only once."""
        import jax

        def call(arrays: Sequence[Any], inputs: Sequence[Any]) -> Any:
            return self.call(self.with_parameters(arrays), *inputs)

        outputs = jax.jit(call)([array for _, array in self.parameters()], list(inputs))
        return [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(outputs)]


def is_parameter(leaf: Any) -> bool:
    """Tell whether a leaf of a pytree is an array of numbers; keys of random generators are none."""
    import jax

    numbers = isinstance(leaf, jax.Array | np.ndarray)
    return numbers and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def bind(source: Any, params: Any = None, kwargs: Mapping[str, Any] | None = None, vmap: bool = False) -> Bound:
    """Make one function, of a pytree and inputs, of a module or function in inference mode; the source is not changed.

    Args:
        source: a flax nnx module, a flax linen module, an equinox module, or a function ``fn(params, *inputs)``.
        params: the variables of a linen module, or the parameters of a function.
        kwargs: further arguments, the same in each call.
        vmap: whether the source takes one example, and is to be mapped over a batch.

    Raises:
        ModelError: parameters are missing or superfluous.
    """
    import jax

    further = dict(kwargs or {})
    kind = module_kind(source)
    first = 0 if kind == "function" and params is None else 1
    if kind in ("nnx", "equinox") and params is not None:
        raise ModelError(f"{title(source)} holds its parameters itself. Leave out params=.")
    if kind == "nnx":
        from flax import nnx

        copy = nnx.clone(source)
        copy.eval()
        definition, tree, rest = nnx.split(copy, nnx.Not(nnx.RngState), ...)

        def call(tree: Any, *inputs: Any) -> Any:
            return nnx.merge(definition, tree, rest)(*inputs, **further)
    elif kind == "linen":
        if params is None:
            raise ModelError(f"{title(source)} is a flax linen module. Give its variables: params=variables.")
        tree = params

        def call(tree: Any, *inputs: Any) -> Any:
            return source.apply(tree, *inputs, **further)
    elif kind == "equinox":
        import equinox

        tree = equinox.nn.inference_mode(source)

        def call(tree: Any, *inputs: Any) -> Any:
            return tree(*inputs, **further)
    else:
        tree = () if params is None else params

        def call(tree: Any, *inputs: Any) -> Any:
            return source(*inputs, **further) if params is None else source(tree, *inputs, **further)

    if vmap:
        return Bound(lambda tree, *inputs: jax.vmap(lambda *one: call(tree, *one))(*inputs), tree, kind, first)
    return Bound(call, tree, kind, first)


def module_kind(source: Any) -> str:
    """Return the library that an object is of; an object of one that is not imported cannot exist."""
    for kind, home in (("nnx", "flax.nnx"), ("linen", "flax.linen"), ("equinox", "equinox")):
        if home in sys.modules and isinstance(source, sys.modules[home].Module):
            return kind
    if not callable(source):
        remedy = "Give a flax or equinox module, or a function and its params="
        raise ModelError(f"an object of type {type(source).__name__} is no JAX model. {remedy}.")
    return "function"


def title(source: Any) -> str:
    """Return what messages call a module or function."""
    return getattr(source, "__name__", type(source).__name__)
