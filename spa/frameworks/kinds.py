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
# Whose attention layers have one size of a head; those of Keras have two.
ONE_HEAD_SIZE = ("torch", "jax")


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
