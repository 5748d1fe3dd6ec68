"""The framework that a model belongs to, told by its class or its path; nothing is imported for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

PACKAGES = {
    "torch": "torch",
    "keras": "tensorflow",
    "tensorflow": "tensorflow",
    "flax": "jax",
    "equinox": "jax",
    "jax": "jax",
    "jaxlib": "jax",
}
SUFFIXES = {
    ".pt": "torch",
    ".pth": "torch",
    ".pt2": "torch",
    ".ckpt": "torch",
    ".safetensors": "torch",
    ".keras": "tensorflow",
    ".pb": "tensorflow",
    ".tflite": "tensorflow",
}
# Whose classes have one size of a head, and of the parts of an axis; Keras' attention has two.
ONE_SIZE = ("torch", "jax")


def kind_of(source: Any, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the framework that an object or a path belongs to.

    Args:
        source: any object, or a path.
        options: of the importer; a mapping counts as a state_dict of PyTorch where they hold a ``factory``.

    Returns:
        ``torch``, ``tensorflow`` or ``jax``; None for what is of no framework, an ``.onnx`` file for one.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return "tensorflow" if any(path.glob("saved_model.pb*")) else None
        return SUFFIXES.get(path.suffix.lower())
    roots = [base.__module__.partition(".")[0] for base in type(source).__mro__]
    framework = next((PACKAGES[r] for r in roots if r in PACKAGES), None)
    if framework is not None:
        return framework
    if isinstance(source, Mapping) and "factory" in (options or {}):
        return "torch"
    return "jax" if isinstance(source, FunctionType) else None


def has_config(source: Any) -> bool:
    """Tell whether a module has a configuration of Hugging Face's, with one number for all layers."""
    return hasattr(getattr(source, "config", None), "to_dict") and hasattr(source, "save_pretrained")


def equal_by_default(kind: str | None, source: Any) -> tuple[str, ...]:
    """Return what keeps one fraction in models of a framework where the user does not say: words of ``equal``.

    Args:
        kind: the framework, or None.
        source: the object or path that was given.
    """
    if kind not in ONE_SIZE:
        return ()
    return ("heads", "parts", "layers") if has_config(source) else ("heads", "parts")
