"""A pruned class in a file, and the same class again in another process, without tracing.

What made the class narrower is plain data that the module carries along as an attribute: the kept indices of its
tensors, and the sizes that its modules keep as numbers. :func:`save` puts it beside the ``state_dict``, and
:func:`load` does the same to a module as its constructor makes it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spa.errors import ModelError, UnsupportedError
from spa.exporters.pytorch.following import follow
from spa.exporters.pytorch.sizes import Cut, tensors
from spa.frameworks.reasons import first_line
from spa.frameworks.torch import copied
from spa.model.files import read_bytes
from spa.model.writing import drafts

ATTRIBUTE = (
    "spa_narrowing"  # of a module that was pruned; plain dicts, lists and numbers, so that any pickle takes them
)
FORMAT = 1
NO_PLACE = "The class that was pruned is another one: give a module of that class, made with the same arguments."


@dataclass(frozen=True)
class Narrowing:
    """The record of a class made narrower.

    Attributes:
        kept: by state_dict key, then by axis, the kept indices of the tensor as the constructor makes it.
        shapes: of these tensors, as the constructor makes them.
        sizes: by path of a module, then by name, the numbers that it keeps; a list begins with ``tuple`` or ``list``.
        added: by state_dict key the shape of a parameter that the constructor does not make.
    """

    kept: Mapping[str, Mapping[int, Sequence[int]]] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    added: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it as dicts, lists and numbers."""
        return {
            "kept": {k: {a: [int(i) for i in kept] for a, kept in axes.items()} for k, axes in self.kept.items()},
            "shapes": {key: list(shape) for key, shape in self.shapes.items()},
            "sizes": {path: dict(sizes) for path, sizes in self.sizes.items()},
            "added": {key: list(shape) for key, shape in self.added.items()},
        }

    @classmethod
    def of(cls, module: nn.Module) -> Narrowing | None:
        """Return what a module carries along; None for one that was not pruned."""
        carried = getattr(module, ATTRIBUTE, None)
        return None if carried is None else cls(**carried)


# -- what was done -------------------------------------------------------------------------------------------------


def remember(dense: nn.Module, small: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Let a pruned module carry along what makes it narrower than a fresh one of its class.

    Args:
        dense: what was pruned, fresh or pruned before.
        small: what came of it.
        cuts: by state_dict key what was cut from the dense one's tensors.
    """
    before, was = Narrowing.of(dense) or Narrowing(), tensors(dense)
    kept = {key: dict(axes) for key, axes in before.kept.items()}
    same: dict[int, list[str]] = {}
    for key, value in was.items():
        same.setdefault(id(value), []).append(key)
    for key, cut in cuts.items():
        for alias in same.pop(id(was[key]), ()) if key not in before.added else ():  # tied ones once
            axes = kept.setdefault(alias, {})
            for axis, indices in cut.kept.items():
                axes[axis] = np.asarray(axes[axis])[indices] if axis in axes else indices
    added = [key for key in tensors(small) if key in before.added or key not in was]
    sizes = {path: dict(values) for path, values in before.sizes.items()}
    others = dict(small.named_modules())
    for path, each in dense.named_modules():
        if changed := _changed(vars(each), vars(others[path])):
            sizes[path] = {**sizes.get(path, {}), **changed}
    kept = {key: axes for key, axes in kept.items() if axes}
    narrowing = Narrowing(
        kept=kept,
        shapes={key: before.shapes.get(key) or tuple(was[key].shape) for key in kept},
        sizes=sizes,
        added={key: tuple(tensors(small)[key].shape) for key in added},
    )
    setattr(small, ATTRIBUTE, narrowing.plain())


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers, and the lists of numbers, that differ."""
    return {k: _plain(v) for k, v in new.items() if k in old and _is_plain(v) and _is_plain(old[k]) and v != old[k]}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value)
    return isinstance(value, int | float)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", *value]
    return value


# -- doing it again ------------------------------------------------------------------------------------------------


def narrow(module: nn.Module, narrowing: Narrowing) -> nn.Module:
    """Return a copy of a fresh module with the widths of a pruned one; its values are those of the kept indices.

    Raises:
        ModelError: the module is not of the class that was pruned, or was made with other arguments.
    """
    small = copied(module)
    old = tensors(small)
    owners = dict(small.named_modules(remove_duplicate=False))
    fresh: dict[tuple[int, str], Tensor] = {}
    for key, axes in narrowing.kept.items():
        path, _, leaf = key.rpartition(".")
        if key not in old or list(old[key].shape) != list(narrowing.shapes[key]):
            raise ModelError(f"the module has no {key!r} of the shape {list(narrowing.shapes[key])}. {NO_PLACE}")
        form = str(axes)
        cut = fresh.get((id(old[key]), form))
        if cut is None:
            cut = fresh[id(old[key]), form] = _sliced(old[key], axes)
        setattr(owners[path], leaf, cut)
    for key, shape in narrowing.added.items():
        path, _, leaf = key.rpartition(".")
        if path not in owners or getattr(owners[path], leaf, 0) is not None:
            raise ModelError(f"the module has no place for {key!r}. {NO_PLACE}")
        like = next(owners[path].parameters())
        setattr(owners[path], leaf, nn.Parameter(torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)))
    for path, sizes in narrowing.sizes.items():
        if path not in owners:
            raise ModelError(f"the module has no part {path!r}. {NO_PLACE}")
        for name, value in sizes.items():
            setattr(owners[path], name, _value(value))
    setattr(small, ATTRIBUTE, narrowing.plain())
    return small


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple(plain[1:]) if plain[0] == "tuple" else plain[1:]
    return plain


def _sliced(value: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    new = value.detach()
    for axis, indices in axes.items():
        new = new.index_select(axis, torch.as_tensor(indices, device=new.device))
    return nn.Parameter(new, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else new


# -- files ---------------------------------------------------------------------------------------------------------


def save(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a pruned module, trained further or not, so that :func:`load` makes it again.

    Args:
        module: what :func:`spa.prune` gave as the user's own class.
        path: the file.

    Returns:
        The file.

    Raises:
        UnsupportedError: it is no module that SPA made narrower.
        SpaError: the file cannot or must not be written.
    """
    narrowing = _record(module)
    state = module.state_dict()
    content = {
        "format": FORMAT,
        "class": type(module).__qualname__,
        "narrowing": narrowing.plain(),
        "state": state,
        "unsaved": {k: b for k, b in module.named_buffers() if k not in state},
    }
    target = Path(path)
    with drafts(target) as draft:
        torch.save(content, draft.folder / target.name)
        draft.publish_one(draft.folder / target.name)
    return target


def load(path: str | os.PathLike[str], module: nn.Module) -> nn.Module:
    """Make a pruned module again from a file of :func:`save` and a module as its constructor makes it.

    Nothing is traced or run, and no code is read from the file.

    Args:
        path: the file.
        module: of the same class, made with the same arguments; not changed. Its weights do not matter.

    Returns:
        The pruned module, in the given one's mode and on its device.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the module is not of the class that was pruned.
    """
    content = _content(Path(path))
    small = narrow(module, _narrowing_of(content, module, f"{str(path)!r} holds"))
    held = tensors(small)
    values = {**content["state"], **content["unsaved"]}
    for key, value in held.items():
        wanted = values.get(key)
        if isinstance(wanted, Tensor) and value.dtype != wanted.dtype:
            value.data = value.data.to(wanted.dtype)
    for key, value in content["unsaved"].items():
        if key not in held or held[key].shape != value.shape:
            raise ModelError(f"the module has no {key!r} of the shape {list(value.shape)}. {NO_PLACE}")
        held[key].data.copy_(value)
    try:
        small.load_state_dict(content["state"])
    except RuntimeError as error:
        raise ModelError(f"the weights do not fit: {first_line(error)} {NO_PLACE}") from error
    follow(module, small)
    return small


def narrowed(module: nn.Module, pruned: nn.Module | str | os.PathLike[str]) -> nn.Module:
    """Give a fresh module the widths of a pruned one; the values are its own.

    Args:
        module: as its constructor makes it; not changed.
        pruned: a pruned module of the same class, or the file of :func:`save`.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the module is not of the class that was pruned.
    """
    if isinstance(pruned, nn.Module):
        content = {"class": type(pruned).__qualname__, "narrowing": _record(pruned).plain()}
        small = narrow(module, _narrowing_of(content, module, "the pruned module is"))
    else:
        small = narrow(module, _narrowing_of(_content(Path(pruned)), module, f"{str(pruned)!r} holds"))
    follow(module, small)
    return small


def _record(module: nn.Module) -> Narrowing:
    narrowing = Narrowing.of(module)
    if narrowing is None:
        raise UnsupportedError(
            f"this {type(module).__name__} carries no record of a pruning. Give what spa.prune(...).pruned is where "
            "the class comes back, or what was trained from it; keep the .onnx file of what comes back as a graph."
        )
    return narrowing


def _narrowing_of(content: Mapping[str, Any], module: nn.Module, what: str) -> Narrowing:
    """Return what a file or a module records, if it is of the class of the module that is to become narrower."""
    if content["class"] != type(module).__qualname__:
        raise ModelError(f"{what} a {content['class']}, and a {type(module).__name__} is given. {NO_PLACE}")
    return Narrowing(**content["narrowing"])


def _content(path: Path) -> dict[str, Any]:
    if not read_bytes(path, "the module").startswith(b"PK"):  # of a zip, as which PyTorch writes
        raise ModelError(f"{str(path)!r} is no file of spa.save. Write it with spa.save.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is no file of spa.save: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "narrowing" not in content:
        raise ModelError(f"{str(path)!r} is no file of spa.save of this version. Write it with spa.save.")
    return content
