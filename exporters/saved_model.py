"""Any graph as a TensorFlow SavedModel or for TensorFlow Lite: the program that JAX makes of it, which needs no JAX."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.errors import SpaError, UnsupportedError
from spa.exporters.checks import allowed, distance
from spa.exporters.jax_files import PLATFORMS, Program, program_of
from spa.extras import extra
from spa.frameworks.reasons import reason_of
from spa.model.files import place
from spa.model.writing import drafts
from spa.running.runtime import TensorSpec, input_specs, load_session, output_specs

SIGNATURE = "serving_default"


def write_saved_model(model: ModelProto, path: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Write a network as a SavedModel or a ``.tflite`` file, read it again, and compare with onnxruntime.

    TensorFlow has no operators of its own for an ONNX graph. JAX has (:mod:`spa.exporters.jax`), and TensorFlow runs
    what it compiles: ``tf.saved_model.load(folder).signatures["serving_default"](**inputs)``. Inputs and outputs bear
    the model's names, with ``_`` for what TensorFlow does not take in names; weights are variables. It is for running
    (TensorFlow, its Serving): there are no gradients and no Keras layers. A Keras model that was pruned is better
    rebuilt: :func:`spa.exporters.tensorflow.save` writes ``result.to("keras")``.

    TensorFlow Lite's converter takes the SavedModel, with its own operators alone. It knows few of open sizes:
    convolutional networks keep an open batch, most others want all sizes fixed.

    Args:
        model: what to write; not changed.
        path: a folder, which does not exist yet, or a ``.tflite`` file.
        base: the folder of the model's external data.

    Returns:
        The path.

    Raises:
        UnsupportedError: TensorFlow or JAX is not installed, JAX or TensorFlow Lite cannot take the network, or
            TensorFlow computes something else.
        SpaError: the folder exists, nothing can be written there, or a ``.keras`` file is asked for.
    """
    with extra("tensorflow"):
        import tensorflow  # noqa: F401
    target = Path(path)
    if target.suffix == ".keras":
        raise SpaError(
            f"cannot write {str(target)!r}: only the result of pruning a Keras model, with its sizes open, is "
            "rebuilt as Keras layers. Choose .tflite or, for a SavedModel, no suffix."
        )
    lite = target.suffix == ".tflite"
    if target.is_dir() or (target.exists() and not lite):
        raise SpaError(f"cannot write {str(target)!r}: it exists. Choose another name.")
    with drafts(target) as draft:
        folder = draft.folder
        original = folder / "model.onnx"
        place(model, original, base)
        program = program_of(original)
        session = load_session(original)
        interface = input_specs(session), output_specs(session)
        written = folder / "saved"
        _save(program, interface, written)
        _compare(lambda: _Saved(written, interface), "TensorFlow", model, original, program.batches)
        if lite:
            content = _lite(written, _is_open(interface))
            _compare(lambda: _Lite(content, interface), "TensorFlow Lite", model, original, program.batches)
            written = folder / target.name
            written.write_bytes(content)
        draft.publish_one(written)
    return target


def _compare(
    read: Callable[[], Compute], what: str, model: ModelProto, original: Path, batches: Sequence[int | None]
) -> None:
    """Refuse what computes something else than onnxruntime."""
    try:
        off = distance(original, read(), batches)
    except Exception as error:  # TensorFlow and XLA raise anything
        raise UnsupportedError(f"{what} cannot run the network: {_reason(error)}. Export to onnx instead.") from error
    if off > allowed(model):
        raise UnsupportedError(f"{what}'s outputs differ from onnxruntime's by {off:.2g}. Export to onnx.")


def _reason(error: Exception) -> str:
    """Return what an error of TensorFlow says, without the places that it names."""
    return next((m[1] for m in re.finditer(r"error: (.+)", str(error))), reason_of(error)).rstrip(".")


def _lite(folder: Path, is_open: bool) -> bytes:
    """Convert a SavedModel to TensorFlow Lite's file."""
    import tensorflow as tf

    try:
        return bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())
    except Exception as error:  # the converter's own class derives from Exception alone
        remedy = "Fix its open sizes (--size batch=1, say)" if is_open else "Export a SavedModel (no suffix)"
        raise UnsupportedError(f"TensorFlow Lite refuses the network: {_reason(error)}. {remedy}.") from error


Interface = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
Compute = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]


def _is_open(interface: Interface) -> bool:
    return any(not isinstance(n, int) for spec in interface[0] for n in spec.shape or ())


def _save(program: Program, interface: Interface, folder: Path) -> None:
    import tensorflow as tf
    from jax.experimental import jax2tf

    exported, (inputs, outputs) = _spelled_out(program.exported()), interface
    avals = exported.in_avals[len(program.params) :]
    shapes = ["(" + ",".join(str(n) for n in aval.shape) + ("," if aval.ndim == 1 else "") + ")" for aval in avals]
    call = jax2tf.convert(
        exported.call,
        polymorphic_shapes=[None, *shapes],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    module.params = {name: tf.Variable(value, name=_clean(name)) for name, value in program.params.items()}
    names = _names(outputs)

    def serve(*arguments: Any) -> dict[str, Any]:
        """Return outputs by name, in the model's own types, which JAX has narrowed."""
        operands = [tf.cast(x, aval.dtype) for x, aval in zip(arguments, avals, strict=True)]
        results = call(dict(module.params), *operands)
        results = results if isinstance(results, tuple) else (results,)
        return {n: tf.cast(y, o.dtype) for n, o, y in zip(names, outputs, results, strict=True)}

    signature = [
        tf.TensorSpec([n if isinstance(n, int) else None for n in aval.shape], spec.dtype, name=name)
        for aval, spec, name in zip(avals, inputs, _names(inputs), strict=True)
    ]
    module.serve = tf.function(serve, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: module.serve})


def _spelled_out(exported: Any) -> Any:
    """Replace a program's composites (erf, for one), which TensorFlow knows less well, by what they are made of.

    It cannot read those of a later StableHLO than its own, nor run those with open sizes.
    """
    from jax._src.interpreters.mlir import make_ir_context
    from jaxlib.mlir.dialects import stablehlo
    from jaxlib.mlir.ir import Module
    from jaxlib.mlir.passmanager import PassManager

    with make_ir_context():
        stablehlo.register_stablehlo_passes()
        module = Module.parse(exported.mlir_module())
        passes = "func.func(stablehlo-legalize-composite-to-call),inline,symbol-dce"
        PassManager.parse(f"builtin.module({passes})").run(module.operation)
        oldest = stablehlo.get_version_from_compatibility_requirement(
            stablehlo.StablehloCompatibilityRequirement.WEEK_12
        )
        written = stablehlo.serialize_portable_artifact_str(str(module), oldest)
    return dataclasses.replace(exported, mlir_module_serialized=written)


class _Saved:
    """A SavedModel as :func:`spa.exporters.checks.distance` runs it."""

    def __init__(self, folder: Path, interface: Interface) -> None:
        import tensorflow as tf

        self.owner = tf.saved_model.load(str(folder))
        self.inputs, self.outputs = (_names(specs) for specs in interface)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import tensorflow as tf

        tensors = {name: tf.constant(value) for name, value in zip(self.inputs, feeds.values(), strict=True)}
        results = self.owner.signatures[SIGNATURE](**tensors)
        return [np.asarray(results[name]) for name in self.outputs]


class _Lite:
    """A ``.tflite`` file's content as :func:`spa.exporters.checks.distance` runs it."""

    def __init__(self, content: bytes, interface: Interface) -> None:
        import tensorflow as tf

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is to be had from another package later
            self.serve = tf.lite.Interpreter(model_content=content).get_signature_runner(SIGNATURE)
        self.inputs, self.outputs = (_names(specs) for specs in interface)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = self.serve(**dict(zip(self.inputs, feeds.values(), strict=True)))
        return [np.asarray(results[name]) for name in self.outputs]


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    """Return the names of tensors as TensorFlow takes them, all different."""
    names: list[str] = []
    for spec in specs:
        name = _clean(spec.name)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _clean(name: str) -> str:
    """Return a name of letters, digits and ``_``, with a letter in front."""
    cleaned = re.sub(r"\W", "_", name, flags=re.ASCII)
    return cleaned if cleaned[:1].isalpha() else f"t{cleaned}"
