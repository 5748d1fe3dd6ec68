"""The other places that name the widths of a class: Hugging Face's configuration, timm's number of features."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from spa.errors import UnsupportedError
from spa.exporters.pytorch.sizes import HEAD_SIZES, HEADS, ROTATED, SHARED_HEADS, SHARES, WIDTHS, tensors
from spa.frameworks.kinds import has_config
from spa.frameworks.reasons import first_line

FEATURES = ("num_features", "head_hidden_size", "embed_dim", "in_features")  # of the classifier, in timm's words
MOST = 64  # configurations that are tried
COUNTED = (*HEADS, *SHARED_HEADS, *HEAD_SIZES, *WIDTHS, *SHARES, *ROTATED)  # numbers that attention computes with
Field = tuple[Any, str]  # a configuration, and the name of a number of it


class Unsavable:
    """Stands in for ``save_pretrained`` of a class whose configuration cannot say what it is."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{self.name}.save_pretrained: no configuration makes this pruned network: {self.reason}. Write it with "
            "spa.save, or leave that part whole (ignore=), and widths equal in all layers (equal=['layers'])."
        )


def follow(dense: nn.Module, small: nn.Module) -> None:
    """Set what a pruned class says of its widths elsewhere, in place.

    A Hugging Face configuration follows where some of its numbers make this very network again: the same shapes, the
    same buffers that no file holds, the same numbers in all modules. Else ``save_pretrained`` refuses.
    """
    _follow_features(dense, small)
    if not has_config(dense):
        return
    if "save_pretrained" in vars(small):  # of one that was pruned before
        del small.save_pretrained
    reason = _follow_config(dense, small)
    if reason is not None:
        small.save_pretrained = Unsavable(type(small).__name__, reason)  # type: ignore[assignment]


def _follow_features(dense: nn.Module, small: nn.Module) -> None:
    """Set the number of features of timm's classes to what their classifier takes."""
    if not callable(getattr(dense, "get_classifier", None)):
        return
    old, new = (getattr(m.get_classifier(), "in_features", None) for m in (dense, small))  # type: ignore[operator]
    for owner in (small, getattr(small, "head", None)):
        for name in FEATURES:
            if isinstance(owner, nn.Module) and old is not None and vars(owner).get(name) == old:
                setattr(owner, name, new)


# -- the configuration -----------------------------------------------------------------------------------------------


def _follow_config(dense: Any, small: Any) -> str | None:
    """Set the numbers of a configuration; return why none makes this network."""
    fields = list(_fields(small.config))
    sizes = _renamed(dense, small)
    choices = [[*sorted(sizes.get(value_of(f), set())), value_of(f)] for f in fields]
    open_fields = [(f, list(dict.fromkeys(c))) for f, c in zip(fields, choices, strict=True) if len(set(c)) > 1]
    before = {field_id(f): value_of(f) for f, _ in open_fields}
    reasons: list[tuple[int, str]] = []
    for values in islice(product(*(c for _, c in open_fields)), MOST):
        for (owner, name), value in zip((f for f, _ in open_fields), values, strict=True):
            setattr(owner, name, value)
        found = _misfit(small, sizes)
        if found is None:
            return None
        reasons.append(found)
    for (owner, name), _ in open_fields:
        setattr(owner, name, before[field_id((owner, name))])
    return min(reasons)[1]  # of the configuration that is nearest


def field_id(field: Field) -> tuple[int, str]:
    """Return what tells fields apart."""
    return id(field[0]), field[1]


def value_of(field: Field) -> int:
    """Return a field's value, of configurations that refuse numbers which layers may override, too."""
    owner, name = field
    return int(vars(owner)[name])


def _fields(config: Any) -> Iterator[Field]:
    """Yield the whole numbers of a configuration and of those inside it."""
    for name, value in vars(config).items():
        if type(value) is int and value > 1 and not name.endswith("token_id"):
            yield config, name
        elif hasattr(value, "to_dict"):
            yield from _fields(value)


def _renamed(dense: nn.Module, small: nn.Module) -> dict[int, set[int]]:
    """Return what became of each size: of axes, and of numbers that modules keep."""
    sizes: dict[int, set[int]] = {}
    now = tensors(small)
    for key, value in tensors(dense).items():
        for old, new in zip(value.shape, now[key].shape, strict=True) if key in now else ():
            if old != new:
                sizes.setdefault(old, set()).add(new)
    others = dict(small.named_modules())
    for path, module in dense.named_modules():
        for name, value in vars(module).items():
            new = vars(others[path]).get(name)
            if type(value) is int and type(new) is int and value != new:
                sizes.setdefault(value, set()).add(new)
    return sizes


def _misfit(small: Any, sizes: Mapping[int, set[int]]) -> tuple[int, str] | None:
    """Say in how many shapes a network made from the configuration differs from this one, and how; None if it does not.

    Sizes that modules keep without need follow the configuration.
    """
    config = copy.deepcopy(small.config)
    wanted = tensors(small)
    try:
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in tensors(type(small)(config)).items()}
        keys = wanted.keys() | shapes.keys()
        others = [k for k in keys if k not in wanted or shapes.get(k) != wanted[k].shape]
        if others:
            return len(others), f"{min(others)!r} has another shape"
        fresh = type(small)(config)
    except Exception as error:  # whatever the constructor raises on these numbers
        return len(wanted) + 1, f"its constructor refuses them ({first_line(error)})"
    saved = small.state_dict().keys()
    for key, value in tensors(fresh).items():
        if key not in saved and not torch.equal(value.cpu(), wanted[key].cpu()):
            return 0, f"the buffer {key!r}, which no file holds, has other values"
    unused: list[tuple[nn.Module, str, int]] = []
    made = dict(fresh.named_modules())
    for path, module in small.named_modules():
        for name, value in vars(module).items():
            new = vars(made[path]).get(name)
            if type(value) is int and type(new) is int and name not in COUNTED and new in sizes.get(value, ()):
                unused.append((module, name, new))
            elif type(value) in (int, float) and new != value:
                return 0, f"{path or type(small).__name__} has {name} = {value}"
    for module, name, new in unused:
        setattr(module, name, new)
    return None
