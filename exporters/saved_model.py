"""Any graph as a TensorFlow SavedModel: the program that JAX makes of it, which TensorFlow runs without JAX."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.errors import SpaError, UnsupportedError
from spa.exporters.checks import allowed, distance
from spa.exporters.files import drafts, place
from spa.exporters.jax_files import PLATFORMS, Program, program_of
from spa.extras import extra
from spa.importers.jax import reason_of
from spa.runtime import TensorSpec, input_specs, load_session, output_specs

SIGNATURE = "serving_default"


def write_saved_model(model: ModelProto, directory: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Write a network as a SavedModel, read it again, and compare with onnxruntime.

    TensorFlow has no operators of its own for an ONNX graph. JAX has (:mod:`spa.exporters.jax`), and TensorFlow runs
    what it compiles: ``tf.saved_model.load(folder).signatures["serving_default"](**inputs)``. Inputs and outputs bear
    the model's names, with ``_`` for what TensorFlow does not take in names; weights are variables. It is for running
    (TensorFlow, its Serving): there are no gradients and no Keras layers. A Keras model that was pruned is better
    rebuilt: :func:`spa.exporters.tensorflow.save` writes ``result.to("keras")``.

    Args:
        model: what to write; not changed.
        directory: the folder, which does not exist yet.
        base: the folder of the model's external data.

    Returns:
        The folder.

    Raises:
        UnsupportedError: TensorFlow or JAX is not installed, JAX cannot take the network, or TensorFlow computes
            something else.
        SpaError: the folder exists, or cannot be written.
    """
    with extra("tensorflow"):
        import tensorflow  # noqa: F401
    target = Path(directory)
    if target.exists():
        raise SpaError(f"cannot write {str(target)!r}: it exists. Choose another name.")
    with drafts(target) as folder:
        original = folder / "model.onnx"
        place(model, original, base)
        program = program_of(original)
        session = load_session(original)
        interface = input_specs(session), output_specs(session)
        _save(program, interface, folder / "saved")
        try:
            off = distance(original, _Saved(folder / "saved", interface), program.batches)
        except Exception as error:  # TensorFlow and XLA raise anything
            reason = next((m[1] for m in re.finditer(r"error: (.+)", str(error))), reason_of(error))
            raise UnsupportedError(f"TensorFlow cannot run the network: {reason}. Export to onnx instead.") from error
        if off > allowed(model):
            raise UnsupportedError(f"TensorFlow's outputs differ from onnxruntime's by {off:.2g}. Export to onnx.")
        shutil.move(folder / "saved", target)
    return target


Interface = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]


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

    def serve(*given: Any) -> dict[str, Any]:
        """The outputs by name, in the model's own types, which JAX has narrowed."""
        operands = [tf.cast(x, aval.dtype) for x, aval in zip(given, avals, strict=True)]
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
    """A program with its composites (erf, for one) replaced by what they are made of; TensorFlow knows them less well.

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

        given = {name: tf.constant(value) for name, value in zip(self.inputs, feeds.values(), strict=True)}
        results = self.owner.signatures[SIGNATURE](**given)
        return [np.asarray(results[name]) for name in self.outputs]


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    """The names of tensors as TensorFlow takes them, all different."""
    names: list[str] = []
    for spec in specs:
        name = _clean(spec.name)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _clean(name: str) -> str:
    """Letters, digits and ``_``, with a letter in front."""
    cleaned = re.sub(r"\W", "_", name, flags=re.ASCII)
    return cleaned if cleaned[:1].isalpha() else f"t{cleaned}"
