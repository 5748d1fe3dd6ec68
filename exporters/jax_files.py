"""Any graph as files that JAX alone reads: a program (``jax.export``) and its parameters."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.errors import UnsupportedError
from spa.exporters.checks import allowed, check, distance
from spa.exporters.jax import function
from spa.extras import extra
from spa.frameworks.reasons import reason_of
from spa.model.files import place
from spa.model.io import load
from spa.model.writing import drafts, made_folder
from spa.running.feeds import first_run
from spa.running.runtime import input_specs, load_session, output_specs

PROGRAM, PARAMETERS = "model.jax", "params.npz"
PLATFORMS = ("cpu", "cuda", "tpu")
OTHER_BATCH = 3


def write_jax(model: ModelProto, directory: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Write a network as a program for JAX and its parameters, read both again, and compare with onnxruntime.

    They need nothing but JAX and numpy, on CPU, GPU or TPU:

        program = jax.export.deserialize(bytearray(Path("small/model.jax").read_bytes()))
        params = dict(np.load("small/params.npz"))
        outputs = program.call(params, *inputs)

    Outputs can be differentiated by parameters and inputs, once. Parameters bear the names of the initializers that
    they were; bfloat16 is stored as float32, which numpy has, and rounded back by the program. 64-bit inputs are 32-bit
    ones unless ``jax_enable_x64`` is set. ``program.in_avals`` says which sizes are open.

    Args:
        model: what to write; not changed.
        directory: the folder for ``model.jax`` and ``params.npz``; made where it is missing.
        base: the folder of the model's external data.

    Returns:
        The program's file.

    Raises:
        UnsupportedError: JAX is not installed, an operator is not covered, or the program computes something else.
        SpaError: the files cannot be written.
    """
    target = Path(directory)
    with made_folder(target), drafts(target / PROGRAM) as draft:
        original = draft.folder / "model.onnx"
        place(model, original, base)
        program = program_of(original)
        done = draft.folder / "done"
        done.mkdir()
        (done / PROGRAM).write_bytes(program.serialised)
        _write_arrays(done / PARAMETERS, program.params)
        draft.publish(done)
    return target / PROGRAM


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as ``numpy.savez`` would, which reserves names and puts the time into the file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


# -- programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A network as JAX exports it, compared with onnxruntime.

    Attributes:
        serialised: the bytes of a ``jax.export.Exported``.
        params: the parameters by name.
        batches: the sizes of the batch at which it was compared.
    """

    serialised: bytes
    params: Mapping[str, np.ndarray]
    batches: tuple[int | None, ...]

    def exported(self) -> Any:
        """Read the program from its bytes; its ``call(params, *inputs)`` gives one array or a tuple."""
        import jax.export

        return jax.export.deserialize(bytearray(self.serialised))

    def computed(self) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
        """Return a function from inputs in order to outputs, by the program read from its bytes."""
        import jax

        exported = self.exported()
        types = [aval.dtype for aval in exported.in_avals[len(self.params) :]]
        call, params = jax.jit(exported.call), dict(self.params)

        def compute(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            outputs = call(params, *(x.astype(t) for x, t in zip(feeds.values(), types, strict=True)))
            return [np.asarray(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

        return compute


def program_of(original: Path) -> Program:
    """Export a network with as many open sizes as JAX manages: all that are, or the batch's, or none.

    Args:
        original: an ``.onnx`` file.

    Raises:
        UnsupportedError: JAX is not installed, an operator is not covered, or the program computes something else.
    """
    with extra("jax"):
        import jax.export  # noqa: F401
    check(original, None)
    source = load(original)
    fn, weights = function(source.model, source.base)
    types = {name: weight.dtype for name, weight in weights.items()}
    params = {n: np.asarray(w, np.float32 if types[n].kind == "V" else None) for n, w in weights.items()}

    def call(params: Mapping[str, Any], *inputs: Any) -> Any:
        return fn({name: params[name].astype(dtype) for name, dtype in types.items()}, *inputs)

    reason = ""
    for variant in _variants(call, original):
        try:
            program = Program(variant.exported(params), params, variant.batches)
            off = distance(original, program.computed(), variant.batches)
        except Exception as error:  # tracing raises anything
            reason = reason_of(error)
            continue
        if off <= allowed(source.model):
            return program
        reason = f"its outputs differ from onnxruntime's by {off:.2g}"
    raise UnsupportedError(f"jax.export cannot take the network: {reason}. Export to onnx instead.")


@dataclass(frozen=True)
class _Variant:
    """A way to export: a function, the shapes of its inputs, and the sizes of the batch to compare at."""

    call: Callable[..., Any]
    shapes: Sequence[tuple[Any, ...]]
    types: Sequence[Any]
    batches: tuple[int | None, ...]

    def exported(self, params: Mapping[str, np.ndarray]) -> bytes:
        """Return the serialised program; with its derivative, where it has one."""
        import jax

        types = [jax.dtypes.canonicalize_dtype(t) for t in self.types]
        inputs = [jax.ShapeDtypeStruct(s, t) for s, t in zip(self.shapes, types, strict=True)]
        arrays = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in params.items()}
        exported = jax.export.export(jax.jit(self.call), platforms=PLATFORMS)(arrays, *inputs)
        try:
            return bytes(exported.serialize(vjp_order=1))
        except Exception:  # what has no derivative raises anything
            return bytes(exported.serialize())


def _variants(call: Callable[..., Any], original: Path) -> Iterator[_Variant]:
    """Yield what to try: open sizes as symbols; one sample mapped over the batch; sizes on which the model runs."""
    import jax

    session = load_session(original)
    specs, outputs = input_specs(session), output_specs(session)
    recipe, _ = first_run(session, model=original, name=repr(str(original)))
    fixed, types = [x.shape for x in recipe.feeds().values()], [s.dtype for s in specs]
    scope = jax.export.SymbolicScope()
    opened = {n for s in specs for n in s.shape if not isinstance(n, int)}
    batches = (None, OTHER_BATCH) if all(s.shape and not isinstance(s.shape[0], int) for s in specs) else (None,)
    if opened:
        symbols = {
            n: jax.export.symbolic_shape(f"n{i}", scope=scope)[0] for i, n in enumerate(sorted(map(str, opened)))
        }
        shapes = [tuple(n if isinstance(n, int) else symbols[str(n)] for n in s.shape) for s in specs]
        yield _Variant(call, shapes, types, batches)
    first = {s.shape[0] if s.shape else 1 for s in (*specs, *outputs)}
    if len(first) == 1 and isinstance(next(iter(first)), str):
        (batch,) = jax.export.symbolic_shape("batch", scope=jax.export.SymbolicScope())
        yield _Variant(_mapped(call), [(batch, *shape[1:]) for shape in fixed], types, batches)
    yield _Variant(call, fixed, types, (None,))


def _mapped(call: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of one sample over a batch."""
    import jax

    def one(params: Any, *inputs: Any) -> Any:
        return jax.tree.map(lambda y: y[0], call(params, *(x[None] for x in inputs)))

    return lambda params, *inputs: jax.vmap(lambda *sample: one(params, *sample))(*inputs)
