"""Flax linen modules that take their layers' sizes from the variables they are applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn


class Resized(nn.Module):
    """A module whose layers are as wide as their variables, with the same variables as the module itself.

    Linen layers compare their parameters with the sizes that the code gives them. While this module runs, each layer
    gets its sizes from its parameters instead, and a bias if there is one among them.

    Attributes:
        inner: the module.
    """

    inner: nn.Module

    def setup(self) -> None:
        """Use the inner module's variables as one's own."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module."""
        with nn.intercept_methods(_fitted):
            return self.inner(*args, **kwargs)


def resized(module: nn.Module) -> Resized:
    """Wrap a linen module so that it runs on pruned variables.

    Args:
        module: the module, unbound.

    Returns:
        A module with the same variables: ``resized(module).apply(variables, x)``.
    """
    return Resized(module)


def attention_paths(run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """Return the paths of attention layers that a run passes, but for those that normalise queries.

    Args:
        run: applies a module.
    """
    paths: dict[tuple[str, ...], None] = {}

    def note(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        if isinstance(context.module, nn.MultiHeadDotProductAttention) and not context.module.normalize_qk:
            paths[context.module.path] = None
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        run()
    return list(paths)


def _fitted(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Run a layer's method with its size attributes as its parameters have them."""
    module = context.module
    rule = next((_SIZES[c] for c in type(module).__mro__ if c in _SIZES), None)
    params = module.variables.get("params", {}) if rule is not None and module.scope is not None else {}
    if rule is None or not params:
        return call(*args, **kwargs)
    sizes = rule(module, params, args[0].shape if args else ())
    former = {name: getattr(module, name) for name in sizes}
    for name, value in sizes.items():
        object.__setattr__(module, name, value)  # modules are frozen to their users
    try:
        return call(*args, **kwargs)
    finally:
        for name, value in former.items():
            object.__setattr__(module, name, value)


Shape = tuple[int, ...]
Params = Mapping[str, Any]


def _dense(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    return {"features": params["kernel"].shape[-1], "use_bias": "bias" in params}


def _dense_general(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    count = 1 if isinstance(module.features, int) else len(module.features)
    features = params["kernel"].shape[-count:]
    return {"features": features[0] if isinstance(module.features, int) else features}


def _conv(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    """Restate sizes from a kernel [*k i/groups o]."""
    shape = params["kernel"].shape
    return {"features": shape[-1], "feature_group_count": x[-1] // shape[-2], "use_bias": "bias" in params}


def _conv_transpose(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    features = params["kernel"].shape[-2 if module.transpose_kernel else -1]
    return {"features": features, "use_bias": "bias" in params}


def _embed(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    rows, features = params["embedding"].shape
    return {"num_embeddings": rows, "features": features}


def _attention(module: Any, params: Params, x: Shape) -> dict[str, Any]:
    """Restate sizes from the query's kernel [i h d] and the output's [h e o]."""
    _, heads, size = params["query"]["kernel"].shape
    return {"num_heads": heads, "qkv_features": heads * size, "out_features": params["out"]["kernel"].shape[-1]}


_SIZES: dict[type, Callable[[Any, Params, Shape], dict[str, Any]]] = {
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Embed: _embed,
    nn.MultiHeadDotProductAttention: _attention,
}
