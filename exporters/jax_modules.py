"""Pruned weights back into what they came from: parameter trees, flax nnx and linen modules, equinox modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto

from spa.errors import ModelError, UnsupportedError
from spa.exporters.jax_narrowing import remember
from spa.exporters.jax_sizes import sizes_of
from spa.extras import extra
from spa.frameworks.jax import LARGEST_ERROR, Bound, bind, laid_out
from spa.frameworks.reasons import reason_of, refuse_lost_branches
from spa.model.graph import tensor_array
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session, run

if TYPE_CHECKING:
    from spa.api import Result


@dataclass(frozen=True)
class Leaf:
    """A pruned array.

    Attributes:
        array: its values.
        before: its shape before pruning.
        kept: for each axis the indices that it kept.
        bias: what reconstruction has added to the outputs of its layer, which had no bias.
    """

    array: np.ndarray
    before: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def groups(self, axis: int, count: int) -> int:
        """Count the equal runs, of `count` along an axis, that are left at least in part."""
        return len(np.unique(self.kept[axis] // (self.before[axis] // count)))


def write_back(
    source: Any,
    result: Result,
    names: Mapping[str, str],
    *,
    params: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    vmap: bool = False,
) -> Any:
    """Put pruned weights into what was converted, and compare it with the pruned ONNX model on made-up inputs.

    Args:
        source: what :func:`spa.importers.jax.convert` was given; not changed.
        result: of pruning the converted model.
        names: :attr:`spa.importers.Imported.names`.
        params: as given to ``convert``.
        kwargs: as given to ``convert``.
        vmap: as given to ``convert``.

    Returns:
        A module for a flax nnx or equinox module, with its layers' sizes (``out_features`` and the like) restated;
        for a linen module its variables, to be used with :func:`spa.exporters.flax_linen.resized`; for a function its
        parameters.

    Raises:
        UnsupportedError: a parameter is used in two ways that are pruned differently, or the code has sizes in it that
            the pruned weights do not fit. :func:`spa.exporters.jax.function` does without the code.
        ModelError: `result` is no pruning of the converted model.
    """
    with extra("jax"):
        import jax  # noqa: F401
    refuse_lost_branches(result.report.gone, type(source).__name__)
    bound = bind(source, params, kwargs, vmap)
    leaves = _leaves(bound, result, names)
    feeds = working_feeds(load_session(result.model), name="the pruned model")
    _scale_queries(leaves, _attentions(source, bound, list(feeds.values())))
    in_module = bound.kind in ("nnx", "equinox")
    pruned = narrowed_module(source, bound.kind, leaves) if in_module else _tree(bound, leaves)
    _verify(source, bound, pruned, leaves, result.model, feeds, kwargs, vmap)
    if in_module:
        remember(source, pruned, leaves)
    return pruned


# -- the leaves ------------------------------------------------------------------------------------------------------


def _leaves(bound: Bound, result: Result, names: Mapping[str, str]) -> dict[str, Leaf]:
    """Return each parameter by path, pruned; those that the model does not use are as they were."""
    import jax.numpy as jnp

    initializers = {path: name for name, path in names.items()}
    dense = {t.name: t for t in result.source.model.graph.initializer}
    pruned = {t.name: t for t in result.model.graph.initializer}
    biases = _new_biases(result.model, dense)
    leaves = {}
    for path, value in bound.parameters():
        name, value = initializers.get(path), np.asarray(value)
        if name is None:
            leaves[path] = Leaf(value, value.shape, tuple(np.arange(n) for n in value.shape))
            continue
        if name not in dense:
            raise ModelError(f"the model has no initializer {name!r} for {path}. Give the names of its own conversion.")
        if name not in pruned:
            raise UnsupportedError(f"{path} is used in ways that are pruned differently. {_remedy()}")
        leaf = _leaf(path, value.shape, dense[name], pruned[name], result.plan.parameters.get(name, {}))
        # The exporter saw what JAX made of the value; the leaf keeps its own type.
        array = np.asarray(jnp.asarray(leaf.array)).astype(value.dtype)
        leaves[path] = dataclasses.replace(leaf, array=array, bias=biases.get(name))
    return leaves


def _new_biases(pruned: ModelProto, dense: Mapping[str, TensorProto]) -> dict[str, np.ndarray]:
    """Return the biases, by weight, that reconstruction has given to layers."""
    tensors = {t.name: t for t in pruned.graph.initializer}
    layers = [n for n in pruned.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm") and len(n.input) == 3]
    return {
        n.input[1]: tensor_array(tensors[n.input[2]])
        for n in layers
        if n.input[2] in tensors and n.input[2] not in dense and n.input[1] in dense
    }


def _leaf(
    path: str, shape: tuple[int, ...], dense: TensorProto, pruned: TensorProto, kept: Mapping[int, tuple[int, ...]]
) -> Leaf:
    """Bring a pruned initializer into the layout of its parameter.

    Every element of the initializer knows its place in the parameter, by the layout steps that the importer took.
    """
    places = laid_out(np.arange(math.prod(shape)).reshape(shape), dense)
    if places.shape != tuple(dense.dims):
        raise ModelError(
            f"{path} has shape {list(shape)}, which is not the converted model's. Give what was converted."
        )
    picks = [np.asarray(kept.get(axis, range(dense.dims[axis])), np.intp) for axis in range(places.ndim)]
    places = places[np.ix_(*picks)]
    if places.shape != tuple(pruned.dims):
        raise UnsupportedError(f"{path} is used in ways that are pruned differently. {_remedy()}")
    order = np.argsort(places, axis=None)
    sorted_places = places.ravel()[order]
    sizes = _regular(sorted_places, shape)
    if sizes is None:
        raise UnsupportedError(f"{path} keeps different numbers of elements in different rows. {_remedy()}")
    coordinates = np.unravel_index(sorted_places, shape) if shape else ()
    values = tensor_array(pruned).ravel()[order].reshape(sizes)
    return Leaf(values, shape, tuple(np.unique(c) for c in coordinates))


def _regular(places: np.ndarray, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a block of elements, given by sorted flat indices; None if they are ragged."""
    sizes, rows = [], 1
    for axis in range(len(shape)):
        _, counts = np.unique(places // math.prod(shape[axis + 1 :]), return_counts=True)
        if len(counts) % rows or (counts != counts[0]).any():
            return None
        sizes.append(len(counts) // rows)
        rows = len(counts)
    return tuple(sizes)


@dataclass(frozen=True)
class _Attention:
    """The paths of an attention layer's parameters for queries; from the kernel, a query's size before and after."""

    kernel: str
    bias: str
    sizes: Callable[[Leaf], tuple[int, int]]


def _attentions(source: Any, bound: Bound, inputs: Sequence[np.ndarray]) -> Iterator[_Attention]:
    """Yield the frameworks' own attention layers, but for those that normalise queries: their size does not matter."""
    if bound.kind == "nnx":
        from flax import nnx

        for path, module in nnx.iter_modules(source):
            if isinstance(module, nnx.MultiHeadAttention) and not module.normalize_qk:
                prefix = "".join(f"[{key!r}]" for key in path)
                yield _three_axes(_nnx_path(prefix, "query.kernel"), _nnx_path(prefix, "query.bias"))
    elif bound.kind == "linen":
        import jax

        from spa.exporters.flax_linen import attention_paths

        for path in attention_paths(lambda: jax.eval_shape(lambda *x: bound.call(bound.tree, *x), *inputs)):
            prefix = "".join(f"[{key!r}]" for key in ("params", *path, "query"))
            yield _three_axes(f"{prefix}['kernel']", f"{prefix}['bias']")
    elif bound.kind == "equinox":
        import equinox

        for prefix, module in _walk(source, ""):
            if isinstance(module, equinox.nn.MultiheadAttention):
                at = f"{prefix}.query_proj"
                yield _Attention(f"{at}.weight", f"{at}.bias", partial(_query_sizes, module.num_heads))


def _three_axes(kernel: str, bias: str) -> _Attention:
    """Return the attention of a kernel [i h d]."""
    return _Attention(kernel, bias, lambda leaf: (leaf.before[2], leaf.shape[2]))


def _query_sizes(heads: int, leaf: Leaf) -> tuple[int, int]:
    """Return a query's size before and after, from a weight [(h d) i]."""
    return leaf.before[0] // heads, leaf.shape[0] // leaf.groups(0, heads)


def _scale_queries(leaves: dict[str, Leaf], attentions: Iterable[_Attention]) -> None:
    """Make up for scores that are divided by the root of the pruned size of a query: the model's keep the former."""
    for found in attentions:
        kernel = leaves.get(found.kernel)
        if kernel is None:
            continue
        before, after = found.sizes(kernel)
        factor = math.sqrt(after / before)
        for path in (found.kernel, found.bias):
            if path in leaves and factor != 1:
                leaf = leaves[path]
                leaves[path] = dataclasses.replace(leaf, array=(leaf.array * factor).astype(leaf.array.dtype))


def _remedy() -> str:
    return "Train the ONNX model instead: spa.exporters.jax.function(result.model)."


# -- the modules -----------------------------------------------------------------------------------------------------


def narrowed_module(source: Any, kind: str, leaves: Mapping[str, Leaf]) -> Any:
    """Copy a module of ``nnx`` or ``equinox`` with pruned arrays, given by path, and restated sizes."""
    return _nnx(source, leaves) if kind == "nnx" else _equinox(source, leaves)


def _tree(bound: Bound, leaves: Mapping[str, Leaf]) -> Any:
    """Return pruned parameters; the layers of linen variables get their new biases."""
    import jax

    tree = bound.with_parameters([leaves[path].array for path, _ in bound.parameters()])
    for path, _ in jax.tree_util.tree_leaves_with_path(tree) if bound.kind == "linen" else ():
        leaf = leaves.get(jax.tree_util.keystr(path))
        if leaf is not None and leaf.bias is not None:
            layer = tree
            for key in path[:-1]:
                layer = layer[key.key]
            layer["bias"] = leaf.bias
    return tree


def _nnx(source: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Copy an nnx module with pruned variables and restated sizes."""
    import jax.numpy as jnp
    from flax import nnx

    copy = nnx.clone(source)
    definition, state, rest = nnx.split(copy, nnx.Not(nnx.RngState), ...)
    bound = Bound(lambda tree: tree, state, "nnx", 1)
    arrays = [jnp.asarray(leaves[path].array) for path, _ in bound.parameters()]
    copy = nnx.merge(definition, bound.with_parameters(arrays), rest)
    for path, module in nnx.iter_modules(copy):
        prefix = "".join(f"[{key!r}]" for key in path)
        for name, value in sizes_of(module, partial(_nnx_leaf, leaves, prefix)).items():
            setattr(module, name, value)
        kernel = _nnx_leaf(leaves, prefix, "kernel")
        if kernel is not None and kernel.bias is not None:
            module.bias, module.use_bias = nnx.Param(jnp.asarray(kernel.bias)), True
    return copy


def _nnx_leaf(leaves: Mapping[str, Leaf], prefix: str, name: str) -> Leaf | None:
    return leaves.get(_nnx_path(prefix, name))


def _equinox_leaf(leaves: Mapping[str, Leaf], prefix: str, name: str) -> Leaf | None:
    return leaves.get(f"{prefix}.{name}")


def _nnx_path(prefix: str, name: str) -> str:
    """Return the pytree path of a variable: ``query.kernel`` is ``['query']['kernel'].value``."""
    return prefix + "".join(f"[{key!r}]" for key in name.split(".")) + ".value"


def _equinox(source: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Copy an equinox module with pruned arrays and restated static fields."""
    import jax.numpy as jnp

    bound = Bound(lambda tree: tree, source, "equinox", 1)
    copy = bound.with_parameters([jnp.asarray(leaves[path].array) for path, _ in bound.parameters()])
    for prefix, module in _walk(copy, ""):
        for name, value in sizes_of(module, partial(_equinox_leaf, leaves, prefix)).items():
            object.__setattr__(module, name, value)  # frozen to its users; this copy is not theirs yet
        weight = _equinox_leaf(leaves, prefix, "weight")
        if weight is not None and weight.bias is not None:
            spatial = (1,) * (len(weight.shape) - 2)
            object.__setattr__(module, "bias", jnp.asarray(weight.bias.reshape(-1, *spatial)))
            object.__setattr__(module, "use_bias", True)
    return copy


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield all equinox modules within one, with their paths."""
    import equinox

    if isinstance(node, equinox.Module):
        yield path, node
        inner = {f".{f.name}": getattr(node, f.name, None) for f in dataclasses.fields(node)}
    elif isinstance(node, tuple | list):
        inner = {f"[{i}]": item for i, item in enumerate(node)}
    else:
        inner = {f"[{key!r}]": item for key, item in node.items()} if isinstance(node, dict) else {}
    for key, item in inner.items():
        yield from _walk(item, path + key)


# -- the proof -------------------------------------------------------------------------------------------------------


def _verify(
    source: Any,
    bound: Bound,
    pruned: Any,
    leaves: Mapping[str, Leaf],
    model: ModelProto,
    feeds: Mapping[str, np.ndarray],
    kwargs: Mapping[str, Any] | None,
    vmap: bool,
) -> None:
    """Run the framework's own code on the pruned weights, and compare.

    Raises:
        UnsupportedError: it does not run, or computes something else.
    """
    if bound.kind in ("nnx", "equinox"):
        rebound = bind(pruned, None, kwargs, vmap)
    elif bound.kind == "linen":
        from spa.exporters.flax_linen import resized

        rebound = bind(resized(source), pruned, kwargs, vmap)
    else:
        rebound = bind(source, pruned, kwargs, vmap)
    expected = run(load_session(model), feeds)
    try:
        outputs = rebound.run(list(feeds.values()))
    except Exception as error:  # whatever the user's code raises
        raise UnsupportedError(_misfit(source, leaves, reason_of(error))) from error
    pairs = list(zip([o.astype(np.float64) for o in outputs], expected, strict=True))
    if any(o.shape != e.shape or np.max(np.abs(o - e)) > LARGEST_ERROR * np.max(np.abs(e)) for o, e in pairs if e.size):
        raise UnsupportedError(_misfit(source, leaves, "its outputs differ from those of the pruned ONNX model"))


def _misfit(source: Any, leaves: Mapping[str, Leaf], reason: str) -> str:
    """Say why a module's own code does not run on pruned weights, with the attributes that equal a former size."""
    sizes = {b for leaf in leaves.values() for b, n in zip(leaf.before, leaf.shape, strict=True) if b != n}
    biased = ", ".join(path for path, leaf in leaves.items() if leaf.bias is not None)
    new = f" Layers with a new bias: {biased}; prune with reconstruct='none' to get none." if biased else ""
    held = [f"{type(m).__name__}.{k} = {v}" for m in _modules(source) for k, v in _own_integers(m) if v in sizes]
    hint = f" Former sizes in it: {', '.join(dict.fromkeys(held))}; take them from the weights' shapes." if held else ""
    return f"{type(source).__name__}: its own code does not fit the pruned weights: {reason}.{hint}{new} {_remedy()}"


def _modules(source: Any) -> Iterator[Any]:
    """Yield the modules within one that are not the frameworks' own."""
    import sys

    yield source
    if "flax.nnx" in sys.modules and isinstance(source, sys.modules["flax.nnx"].Module):
        yield from (m for _, m in sys.modules["flax.nnx"].iter_modules(source))
    if "equinox" in sys.modules:
        yield from (m for _, m in _walk(source, ""))


def _own_integers(module: Any) -> Iterator[tuple[str, int]]:
    if type(module).__module__.startswith(("flax.", "equinox.")) or not hasattr(module, "__dict__"):
        return
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
