"""Pruned modules of flax and equinox, and trees of variables, in a file, and again from it without tracing.

A file holds every array by its path in the pytree, and the numbers that the libraries' own layers keep as sizes; no
code. It is an ``.npz`` file that numpy reads without unpickling.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, UnsupportedError
from spa.exporters.jax_modules import Leaf, _walk, narrowed_module
from spa.exporters.jax_narrowing import ATTRIBUTE, NO_PLACE, Narrowing, carry, record_of
from spa.extras import extra
from spa.frameworks.jax import Bound, module_kind
from spa.model.files import read_bytes
from spa.model.writing import drafts

FORMAT = 1
HEADER = "spa"
TREE = "tree"  # of dicts, as linen's variables are
LAYERS = ("flax.nnx.", "equinox.nn.")


def save(source: Any, path: str | os.PathLike[str]) -> Path:
    """Write a pruned module, trained further or not, so that :func:`load` makes it again.

    Args:
        source: a flax nnx or equinox module, or a tree of dicts with arrays, such as the variables of a linen module.
        path: the file.

    Returns:
        The file.

    Raises:
        UnsupportedError: it is none of these.
        SpaError: the file cannot or must not be written.
    """
    kind = _kind(source)
    pairs = _bound(source, kind).parameters()
    arrays = {f"{i}": np.asarray(value) for i, (_, value) in enumerate(pairs)}
    header = {
        "format": FORMAT,
        "kind": kind,
        "class": type(source).__qualname__,
        "arrays": [{"path": path, "dtype": a.dtype.name} for (path, _), a in zip(pairs, arrays.values(), strict=True)],
        "keys": list(_keys(source, ())) if kind == TREE else [],
        "sizes": {prefix: sizes for prefix, module in _layers(source, kind) if (sizes := _plain(module))},
        "narrowing": getattr(source, ATTRIBUTE, None),
    }
    content: dict[str, Any] = {
        name: a if a.dtype.isbuiltin == 1 else a.view(f"u{a.dtype.itemsize}") for name, a in arrays.items()
    }
    content[HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    target = Path(path)
    with drafts(target) as draft:
        with (draft.folder / target.name).open("wb") as file:
            np.savez(file, **content)
        draft.publish_one(draft.folder / target.name)
    return target


def load(path: str | os.PathLike[str], source: Any = None) -> Any:
    """Make a pruned module again from a file of :func:`save` and a module as its constructor makes it.

    Args:
        path: the file.
        source: of the same class, made with the same arguments, not changed; its weights do not matter. A tree of
            variables needs none.

    Returns:
        The pruned module or tree.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the module is not of the class that was pruned.
    """
    with extra("jax"):
        import jax.numpy as jnp
    header, arrays = _content(Path(path))
    if header["kind"] == TREE:
        tree: dict[str, Any] = {}
        for keys, array in zip(header["keys"], arrays.values(), strict=True):
            inner = tree
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = jnp.asarray(array)
        return tree
    if source is None:
        raise ModelError(f"{str(path)!r} holds a {header['class']}. Give one as its constructor makes it.")
    kind = _kind(source)
    _refuse_another(source, header["class"], f"{str(path)!r} holds")
    copy = _copied(source, kind)
    _resize(copy, kind, header["sizes"], arrays)
    bound = _bound(copy, kind)
    found = dict(bound.parameters())
    for where in sorted(found.keys() ^ arrays.keys()):
        raise ModelError(f"{where} is in {'the module' if where in found else 'the file'} alone. {NO_PLACE}")
    for where, value in found.items():
        if value.ndim != arrays[where].ndim:
            raise ModelError(f"the module's {where} has {value.ndim} axes, not {arrays[where].ndim}. {NO_PLACE}")
    again = _merged(copy, kind, bound.with_parameters([jnp.asarray(arrays[where]) for where in found]))
    if header.get("narrowing") is not None:
        carry(again, header["narrowing"])
    return again


def narrowed(source: Any, pruned: Any) -> Any:
    """Give a fresh module the widths of a pruned one; the values are its own.

    Args:
        source: as its constructor makes it; not changed.
        pruned: a pruned module of the same class, or the file of :func:`save`.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the module is not of the class that was pruned.
        UnsupportedError: the pruned module or its file has no record of a pruning, or the source is no module.
    """
    kind = _kind(source)
    if kind == TREE:
        raise UnsupportedError("a tree of variables carries no record of a pruning. Give a flax nnx or equinox module.")
    if not isinstance(pruned, str | os.PathLike):
        _refuse_another(source, type(pruned).__qualname__, "the pruned module is")
        return _narrow(source, kind, record_of(pruned))
    header, _ = _content(Path(pruned))
    _refuse_another(source, header["class"], f"{str(pruned)!r} holds")
    if header.get("narrowing") is None:
        raise UnsupportedError(
            f"{str(pruned)!r} has no record of a pruning. Save what spa.prune(...).pruned is: equinox's functions make "
            "modules without the record."
        )
    return _narrow(source, kind, Narrowing.read(header["narrowing"]))


def _narrow(module: Any, kind: str, narrowing: Narrowing) -> Any:
    """Return a copy of a fresh module with the widths of a pruned one; its values are those of the kept indices.

    Args:
        module: as its constructor makes it; not changed.
        kind: ``nnx`` or ``equinox``.
        narrowing: what the pruned one carries along.

    Raises:
        ModelError: the module is not of the class that was pruned, or was made with other arguments.
    """
    found = dict(_bound(module, kind).parameters())
    for path in sorted(found.keys() ^ narrowing.shapes.keys()):
        raise ModelError(f"{path} is in {'the given' if path in found else 'the pruned'} module alone. {NO_PLACE}")
    leaves = {}
    for path, value in found.items():
        array, shape = np.asarray(value), narrowing.shapes[path]
        if array.shape != shape:
            raise ModelError(f"the module's {path} has shape {list(array.shape)}, not {list(shape)}. {NO_PLACE}")
        axes = narrowing.kept.get(path, {})
        kept = tuple(np.asarray(axes.get(axis, range(size)), np.intp) for axis, size in enumerate(shape))
        bias = np.zeros(narrowing.biases[path], array.dtype) if path in narrowing.biases else None
        leaves[path] = Leaf(array[np.ix_(*kept)] if kept else array, shape, kept, bias)
    small = narrowed_module(module, kind, leaves)
    carry(small, narrowing.text)
    return small


def _refuse_another(source: Any, name: str, what: str) -> None:
    if type(source).__qualname__ != name:
        raise ModelError(f"{what} a {name}, and a {type(source).__name__} is given. {NO_PLACE}")


def _kind(source: Any) -> str:
    if isinstance(source, Mapping):
        return TREE
    kind = module_kind(source) if callable(source) else ""
    if kind not in ("nnx", "equinox"):
        raise UnsupportedError(
            f"a {type(source).__name__} has no arrays of its own. Give a flax nnx or equinox module, or the variables "
            "of a linen module."
        )
    return kind


def _bound(source: Any, kind: str) -> Bound:
    """Return the arrays of a module or tree with their paths."""
    if kind == "nnx":
        from flax import nnx

        source = nnx.split(source, nnx.Not(nnx.RngState), ...)[1]
    return Bound(lambda tree: tree, source, kind, 1)


def _copied(source: Any, kind: str) -> Any:
    if kind == "nnx":
        from flax import nnx

        return nnx.clone(source)
    bound = _bound(source, kind)
    return bound.with_parameters([value for _, value in bound.parameters()])


def _merged(copy: Any, kind: str, tree: Any) -> Any:
    if kind == "nnx":
        from flax import nnx

        definition, _, rest = nnx.split(copy, nnx.Not(nnx.RngState), ...)
        return nnx.merge(definition, tree, rest)
    return tree


def _keys(tree: Mapping[str, Any], before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the keys to each array of a tree of dicts, in the pytree's order."""
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            yield from _keys(value, (*before, key))
        elif hasattr(value, "dtype"):
            yield (*before, key)
        else:
            raise UnsupportedError(f"{'.'.join((*before, key))!r} is no array. Give a tree of dicts with arrays.")


# -- the sizes of layers ---------------------------------------------------------------------------------------------


def _layers(source: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the libraries' own layers with their paths."""
    if kind == TREE:
        return
    if kind == "nnx":
        from flax import nnx

        modules = (("".join(f"[{key!r}]" for key in path), module) for path, module in nnx.iter_modules(source))
    else:
        modules = _walk(source, "")
    for prefix, module in modules:
        if any(c.__module__.startswith(LAYERS) for c in type(module).__mro__):
            yield prefix, module


def _plain(module: Any) -> dict[str, Any]:
    """Return the numbers of a layer, and its tuples of numbers, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(module).items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    return type(value) in (int, bool) or (isinstance(value, tuple) and all(type(n) is int for n in value))


def _resize(copy: Any, kind: str, sizes: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> None:
    """Set the numbers of layers, in place, and make room for a bias that the constructor does not make."""
    import jax.numpy as jnp

    found = dict(_layers(copy, kind))
    if missing := sorted(sizes.keys() - found.keys()):
        raise ModelError(f"the module has no layer {missing[0]}. {NO_PLACE}")
    for prefix, own in sizes.items():
        module = found[prefix]
        for name, value in own.items():
            if _is_plain(getattr(module, name, None)):
                object.__setattr__(module, name, tuple(value) if isinstance(value, list) else value)
        bias = arrays.get(f"{prefix}['bias'].value" if kind == "nnx" else f"{prefix}.bias")
        if bias is not None and getattr(module, "bias", 0) is None:
            made: Any = jnp.asarray(bias)
            if kind == "nnx":
                from flax import nnx

                made = nnx.Param(made)
            object.__setattr__(module, "bias", made)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a file's header, and its arrays by path."""
    import ml_dtypes

    refusal = f"{str(path)!r} is no file of spa.save"
    if not read_bytes(path, "the module").startswith(b"PK"):
        raise ModelError(f"{refusal}. Write it with spa.save.")
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(bytes(file[HEADER]))
            if header["format"] != FORMAT:
                raise ModelError(f"{refusal} of this version. Write it with spa.save.")
            arrays = {}
            for i, each in enumerate(header["arrays"]):
                dtype = np.dtype(getattr(ml_dtypes, each["dtype"], each["dtype"]))
                arrays[each["path"]] = file[f"{i}"].view(dtype)
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{refusal}: {error}. Write it with spa.save.") from error
    return header, arrays
