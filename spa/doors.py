"""Models of frameworks: which framework's they are, how they become ONNX, and how a result becomes theirs again.

Frameworks are imported in the files of ``spa.importers`` and ``spa.exporters`` alone, when such a model is given.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from spa.errors import ModelError, PlanError, UnsupportedError

if TYPE_CHECKING:
    from spa.api import Result
    from spa.importers import Imported

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
TARGETS = ("onnx", "graphsurgeon", "torch", "keras", "jax")


@dataclass(frozen=True)
class Origin:
    """What a framework's model was given as.

    Attributes:
        given: the object or path.
        kind: ``torch``, ``tensorflow`` or ``jax``.
        imported: what it was converted to.
        example_inputs: as given.
        options: of the importer.
    """

    given: Any
    kind: str
    imported: Imported
    example_inputs: Any
    options: Mapping[str, Any]


def kind_of(source: Any, options: Mapping[str, Any] | None = None) -> str | None:
    """The framework that an object or a path belongs to: ``torch``, ``tensorflow``, ``jax``, or None."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return "tensorflow"
        return SUFFIXES.get(path.suffix.lower())
    roots = [base.__module__.partition(".")[0] for base in type(source).__mro__]
    found = next((PACKAGES[r] for r in roots if r in PACKAGES), None)
    if found is not None:
        return found
    if isinstance(source, Mapping) and "factory" in (options or {}):
        return "torch"  # a state_dict
    return "jax" if isinstance(source, FunctionType) else None


def convert(source: Any, example_inputs: Any = None, **options: Any) -> Imported:
    """Convert a framework's model to ONNX, and compare it with the framework's own outputs.

    Args:
        source: an object of PyTorch, TensorFlow, Keras or JAX (flax, equinox, a function), or a path: ``.pt``,
            ``.pth``, ``.pt2``, ``.safetensors``, ``.keras``, ``.pb``, ``.tflite`` or the folder of a SavedModel.
        example_inputs: what the model is called with, where tracing needs it.
        options: of the framework's importer: :func:`spa.importers.pytorch.convert`,
            :func:`spa.importers.tensorflow.convert`, :func:`spa.importers.jax.convert`.

    Returns:
        The ONNX model, the framework's parameter names, and how large the difference is.

    Raises:
        PlanError: an option is missing or does not fit.
        ModelError: the model cannot be read, or what was converted computes something else.
        UnsupportedError: the framework is not installed, or its exporter refuses the model.
    """
    return origin(source, example_inputs, options).imported


def origin(source: Any, example_inputs: Any, options: Mapping[str, Any]) -> Origin:
    """Convert a framework's model, and remember where it came from; raises as :func:`convert`."""
    kind = kind_of(source, options)
    if kind is None:
        what = repr(str(source)) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"
        raise ModelError(
            f"cannot tell which framework {what} belongs to. Give an object of PyTorch, Keras or JAX, or a file "
            f"that ends in {', '.join(SUFFIXES)}."
        )
    if kind == "torch":
        from spa.importers.pytorch import convert as importer
    elif kind == "tensorflow":
        from spa.importers.tensorflow import convert as importer
    else:
        from spa.importers.jax import convert as importer
    try:
        imported = importer(source, example_inputs, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error) or not options:
            raise
        raise PlanError(f"the importer of {kind} models: {error}. See help(spa.convert).") from error
    return Origin(source, kind, imported, example_inputs, dict(options))


def give_back(result: Result, target: str) -> Any:
    """A result as an object of a framework (see :meth:`spa.api.Result.to`)."""
    if target not in TARGETS:
        raise PlanError(f"cannot give a result to {target!r}. Choose one of {', '.join(TARGETS)}.")
    came = result.origin
    if target == "onnx":
        return result.model
    if target == "graphsurgeon":
        return result.to_graphsurgeon()
    if target == "torch":
        return _to_torch(result, came if came is not None and came.kind == "torch" else None)
    if target == "keras":
        return _to_keras(result, came if came is not None and came.kind == "tensorflow" else None)
    return _to_jax(result, came if came is not None and came.kind == "jax" else None)


def _to_torch(result: Result, came: Origin | None) -> Any:
    from spa.exporters.pytorch import to_torch

    if came is None:
        return to_torch(result)[0]
    import torch

    own = came.given if isinstance(came.given, torch.nn.Module) else None
    if isinstance(own, torch.jit.ScriptModule):
        own = None
    module, _, notes = to_torch(result, own, came.imported.names, came.example_inputs)
    for note in notes:
        warnings.warn(note, stacklevel=4)  # of Result.pruned or Result.to
    return module


def _to_keras(result: Result, came: Origin | None) -> Any:
    from spa.exporters.tensorflow import write_back

    if came is None or came.imported.kind != "keras":
        raise UnsupportedError(
            "a Keras model is rebuilt from the Keras model that was pruned, and this result came from none. "
            "Prune the keras.Model or the .keras file."
        )
    model = came.given
    if isinstance(model, str | os.PathLike):
        import keras

        model = keras.models.load_model(model)
    return write_back(model, result, came.imported.names)


def _to_jax(result: Result, came: Origin | None) -> Any:
    if came is None:
        from spa.exporters.jax import function

        return function(result.model, result.source.base)
    from spa.exporters.jax_modules import write_back

    options = {k: v for k, v in came.options.items() if k in ("params", "kwargs", "vmap")}
    return write_back(came.given, result, came.imported.names, **options)
