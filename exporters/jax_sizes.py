"""The size attributes of layers of flax nnx and equinox, restated for pruned arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spa.exporters.jax_modules import Leaf

Find = Callable[[str], "Leaf | None"]
"""A layer's pruned array by the name that the layer has for it."""


def sizes_of(module: Any, find: Find) -> dict[str, Any]:
    """Return the size attributes of a flax or equinox layer, as its pruned arrays have them; none of other modules."""
    kinds = [c for c in type(module).__mro__ if c.__module__.startswith(("flax.nnx.", "equinox.nn."))]
    rule = next((_RULES[c.__name__] for c in kinds if c.__name__ in _RULES), None)
    if rule is None:
        return {}
    return {
        k: v for k, v in rule(module, find).items() if hasattr(module, k) and not isinstance(getattr(module, k), str)
    }


def _linear(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes: nnx has a kernel [i o], equinox a weight [o i]."""
    kernel, weight = find("kernel"), find("weight")
    shape: tuple[int, ...] = kernel.shape if kernel else weight.shape[::-1] if weight else ()
    return {"in_features": shape[0], "out_features": shape[1]} if len(shape) == 2 else {}


def _linear_general(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes from a kernel [*b *i *o]."""
    kernel = find("kernel")
    if kernel is None:
        return {}
    end = len(kernel.shape) - len(module.out_features)
    return {
        "in_features": kernel.shape[end - len(module.in_features) : end],
        "out_features": kernel.shape[end:],
    }


def _convolution(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes: nnx has a kernel [*k i/groups o], equinox a weight [o i/groups *k]."""
    kernel, weight = find("kernel"), find("weight")
    if kernel is not None:
        groups = kernel.groups(-1, module.feature_group_count)
        into = kernel.shape[-2] * groups
        sizes = {"feature_group_count": groups, "kernel_shape": kernel.shape}
        return {"in_features": into, "out_features": kernel.shape[-1], **sizes}
    if weight is None:
        return {}
    groups = weight.groups(0, module.groups)
    return {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}


def _transposed(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes: nnx has a kernel [*k i o] ([*k o i] with transpose_kernel), equinox a weight [o i/groups *k]."""
    kernel = find("kernel")
    if kernel is None:
        return _convolution(module, find)
    into, out = kernel.shape[-2:][::-1] if module.transpose_kernel else kernel.shape[-2:]
    return {"in_features": into, "out_features": out, "kernel_shape": kernel.shape}


def _norm(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes: nnx has scale and bias, equinox weight and bias."""
    parameter = next((leaf for leaf in map(find, ("scale", "weight", "bias")) if leaf is not None), None)
    if parameter is None:
        return {}
    sizes = {"num_features": parameter.shape[0], "channels": parameter.shape[0], "shape": parameter.shape}
    count = getattr(module, "num_groups", None) or getattr(module, "groups", None)
    if count:
        groups = parameter.groups(0, count)
        sizes |= {"num_groups": groups, "groups": groups, "group_size": parameter.shape[0] // groups}
    return sizes | {"input_size": parameter.shape[0]}


def _embedding(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes: nnx has an embedding [v c], equinox a weight [v c]."""
    table = find("embedding") or find("weight")
    return (
        {}
        if table is None
        else {
            "num_embeddings": table.shape[0],
            "features": table.shape[1],
            "embedding_size": table.shape[1],
        }
    )


def _nnx_attention(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes from the kernels of queries and keys [i h d] and of the output [h e o]."""
    query, key, out = find("query.kernel"), find("key.kernel"), find("out.kernel")
    if query is None or key is None or out is None:
        return {}
    return {
        "num_heads": query.shape[1],
        "num_kv_heads": key.shape[1],
        "head_dim": query.shape[2],
        "qkv_features": query.shape[1] * query.shape[2],
        "in_features": query.shape[0],
        "in_kv_features": key.shape[0],
        "out_features": out.shape[-1],
    }


def _equinox_attention(module: Any, find: Find) -> dict[str, Any]:
    """Restate sizes from the weights of projections [(h d) i] and of the output [o (h e)]."""
    query, key, value, out = (find(f"{n}_proj.weight") for n in ("query", "key", "value", "output"))
    if query is None or key is None or value is None or out is None:
        return {}
    heads = query.groups(0, module.num_heads)
    return {
        "num_heads": heads,
        "query_size": query.shape[1],
        "key_size": key.shape[1],
        "value_size": value.shape[1],
        "qk_size": query.shape[0] // heads,
        "vo_size": value.shape[0] // heads,
        "output_size": out.shape[0],
    }


def _mlp(module: Any, find: Find) -> dict[str, Any]:
    """Restate the width, which is that of the first layer; the layers know their own sizes."""
    first, last = find("layers[0].weight"), find(f"layers[{len(module.layers) - 1}].weight")
    if first is None or last is None:
        return {}
    return {"in_size": first.shape[1], "width_size": first.shape[0], "out_size": last.shape[0]}


_RULES: dict[str, Callable[[Any, Find], dict[str, Any]]] = {
    "BatchNorm": _norm,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Embed": _embedding,
    "Embedding": _embedding,
    "GroupNorm": _norm,
    "InstanceNorm": _norm,
    "LayerNorm": _norm,
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "MLP": _mlp,
    "MultiHeadAttention": _nnx_attention,
    "MultiheadAttention": _equinox_attention,
    "RMSNorm": _norm,
}
