"""The way in and the way out: a framework's model becomes ONNX, and a result becomes the framework's again.

The functions here choose among ``spa.importers`` and ``spa.exporters``, which alone import frameworks, when they are
called.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa.errors import ModelError, OptionError, PlanError, UnsupportedError
from spa.frameworks.kinds import SUFFIXES, kind_of
from spa.frameworks.torch import give_types, in_single, unwrapped

if TYPE_CHECKING:
    from spa.api import Result
    from spa.importers import Imported

IN_SINGLE = "weights in bfloat16 were converted, pruned and compared in single precision"
TARGETS = ("onnx", "graphsurgeon", "torch", "keras", "jax")


@dataclass(frozen=True)
class FrameworkModel:
    """A framework's model with its conversion: all that is needed to give a result back as what was given.

    Attributes:
        source: the object or path that was given.
        kind: ``torch``, ``tensorflow`` or ``jax``.
        imported: the model in ONNX.
        example_inputs: what the source is called with, or None.
        options: the importer's, as given.
        types_of: the module in bfloat16 that was given, where ``source`` is its copy in single precision.
    """

    source: Any
    kind: str
    imported: Imported
    example_inputs: Any
    options: Mapping[str, Any]
    types_of: Any = None


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
    return import_model(source, example_inputs, options).imported


def import_model(source: Any, example_inputs: Any, options: Mapping[str, Any]) -> FrameworkModel:
    """Convert a framework's model, and keep both together; raise as :func:`convert` does."""
    kind = kind_of(source, options)
    if kind is None:
        named = repr(str(source)) if isinstance(source, str | os.PathLike) else f"a {type(source).__name__}"
        raise ModelError(
            f"cannot tell which framework {named} belongs to. Give an object of PyTorch, Keras or JAX, or a file "
            f"that ends in {', '.join(SUFFIXES)}."
        )
    source, types_of = unwrapped(source), None
    notes: tuple[str, ...] = ()
    if kind == "torch":
        from spa.importers.pytorch import convert as importer

        if (single := in_single(source, example_inputs)) is not None:
            types_of, (source, example_inputs), notes = source, single, (IN_SINGLE,)
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
    imported = replace(imported, notes=(*notes, *imported.notes))
    return FrameworkModel(source, kind, imported, example_inputs, dict(options), types_of)


def convert_result(result: Result, target: str) -> Any:
    """Return a result as an object of a framework (see :meth:`spa.api.Result.to`)."""
    if target not in TARGETS:
        raise OptionError(f"cannot give a result to {target!r}. Choose one of {', '.join(TARGETS)}.")
    if target == "onnx":
        return result.model
    if target == "graphsurgeon":
        return result.to_graphsurgeon()
    if target == "torch":
        return _to_torch(result, _dense(result, "torch"))
    if target == "keras":
        return _to_keras(result, _dense(result, "tensorflow"))
    return _to_jax(result, _dense(result, "jax"))


def _dense(result: Result, kind: str) -> FrameworkModel | None:
    """Return the framework's model that was pruned, if it is of this framework."""
    dense = result.origin
    return dense if dense is not None and dense.kind == kind else None


def _to_torch(result: Result, dense: FrameworkModel | None) -> Any:
    from spa.exporters.pytorch import to_torch

    if dense is None:
        return to_torch(result)[0]
    import torch

    own = dense.source if isinstance(dense.source, torch.nn.Module) else None
    if isinstance(own, torch.jit.ScriptModule):
        own = None
    module, _, notes = to_torch(result, own, dense.imported.names, dense.example_inputs)
    if dense.types_of is not None:
        give_types(module, dense.types_of)
    for note in notes:
        warnings.warn(note, stacklevel=4)  # of Result.pruned or Result.to
    return module


def _to_keras(result: Result, dense: FrameworkModel | None) -> Any:
    from spa.exporters.tensorflow import write_back

    if dense is None or dense.imported.kind != "keras":
        raise UnsupportedError(
            "a Keras model is rebuilt from the Keras model that was pruned, and this result came from none. "
            "Prune the keras.Model or the .keras file."
        )
    model = dense.source
    if isinstance(model, str | os.PathLike):
        import keras

        model = keras.models.load_model(model)
    return write_back(model, result, dense.imported.names)


def _to_jax(result: Result, dense: FrameworkModel | None) -> Any:
    if dense is None:
        from spa.exporters.jax import function

        return function(result.model, result.source.base)
    from spa.exporters.jax_modules import write_back

    options = {k: v for k, v in dense.options.items() if k in ("params", "kwargs", "vmap")}
    return write_back(dense.source, result, dense.imported.names, **options)


def save(module: Any, path: str | os.PathLike[str]) -> Path:
    """Write a pruned model of a framework, trained further or not, so that :func:`spa.load` makes it again.

    The file holds weights, and what makes the class narrower, as plain data: no code, and no pickled class.

    Args:
        module: what :func:`spa.prune` gave as your own class, or what you trained from it: a PyTorch module, a flax nnx
            or equinox module, the variables of a linen module, or a Keras model.
        path: the file; for a Keras model a ``.keras`` file.

    Returns:
        The file.

    Raises:
        UnsupportedError: it is no module that SPA made narrower.
        SpaError: the file cannot or must not be written.
    """
    module = unwrapped(module)
    return _saving(module, "save").save(module, path)


def load(path: str | os.PathLike[str], module: Any = None) -> Any:
    """Make a pruned model again from a file of :func:`spa.save`, without tracing or running anything.

    Args:
        path: the file.
        module: one of the same class as its constructor makes it, with the same arguments; not changed. A Keras model
            needs none, unless its layers have classes of your own, nor do variables of a linen module.

    Returns:
        The pruned model, with the weights of the file.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file, or the module is not of the class that was pruned.
    """
    module = unwrapped(module)
    if module is None:
        keras = kind_of(path) == "tensorflow"
        return _saving_of("tensorflow" if keras else "jax").load(path)
    return _saving(module, "load").load(path, module)


def narrow(module: Any, pruned: Any) -> Any:
    """Give a fresh model the widths of a pruned one, without tracing or running anything.

    The values are the fresh module's own at the kept indices: to train the narrow network from the start, or from an
    earlier checkpoint of the dense one. :func:`spa.load` gives it the pruned one's values, too.

    Args:
        module: a PyTorch, flax nnx or equinox module or a Keras model, as its constructor makes it, with the arguments
            that the pruned one was made with; not changed.
        pruned: what :func:`spa.prune` gave as your own class, or what you trained from it in place; or its file of
            :func:`spa.save`.

    Returns:
        A model of the same class; a PyTorch module in the given one's mode and on its device.

    Raises:
        UnreadableError: the file is not there.
        ModelError: it is no such file (a plan, say, which does not tell what numbers the class keeps), or the module
            is not of the class that was pruned.
        UnsupportedError: it is no model that SPA made narrower.

    Example: ``spa.narrow(Net(), "small.pt")``; docs/guides/from-pytorch.md has one that runs.
    """
    module, pruned = unwrapped(module), unwrapped(pruned)
    return _saving(module, "narrow").narrowed(module, pruned)


def _saving(module: Any, what: str) -> Any:
    """Return the functions that save and load models of a kind."""
    kind = "jax" if isinstance(module, Mapping) and what == "save" else kind_of(module)
    if kind is None or isinstance(module, str | os.PathLike) or (kind == "torch" and not hasattr(module, "state_dict")):
        raise OptionError(
            f"cannot {what} a {type(module).__name__}. Give a PyTorch, flax or equinox module, or a Keras model."
        )
    return _saving_of(kind)


def _saving_of(kind: str) -> Any:
    if kind == "torch":
        from spa.exporters.pytorch import saving
    elif kind == "tensorflow":
        from spa.exporters import keras_saving as saving
    else:
        from spa.exporters import jax_saving as saving
    return saving
