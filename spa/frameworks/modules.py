"""Modules of a PyTorch model in place of patterns: ``ignore=[net.head]``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spa.errors import OptionError
from spa.frameworks.torch import unwrapped

OPTIONS = ("ignore", "only")  # that take patterns of modules


def named(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the names of modules in place of the modules themselves.

    Args:
        model: what is pruned.
        options: of a request.

    Raises:
        OptionError: a module is no part of the model.
    """
    changed = {}
    for option in OPTIONS:
        given = options.get(option)
        items = [given] if _is_module(given) else given  # a Sequential is iterable, too
        if isinstance(items, Iterable) and not isinstance(items, str):
            items = tuple(items)
            if any(_is_module(item) for item in items):
                changed[option] = tuple(_name(model, option, i) if _is_module(i) else i for i in items)
    return options | changed


def _is_module(value: Any) -> bool:
    return hasattr(value, "named_modules")  # torch is not imported for this


def _name(model: Any, option: str, module: Any) -> str:
    model = unwrapped(model)
    for name, part in model.named_modules() if _is_module(model) else ():
        if part is module:
            return name or "*"
    raise OptionError(
        f"{option}: the {type(module).__name__} that is given is no part of the model. Give a module of the model that "
        "is pruned, or its name."
    )
