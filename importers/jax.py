"""JAX to ONNX: plain functions with their parameters, flax nnx and linen modules, equinox modules.

jax2onnx exports the function with its parameters as *inputs*; a closure would lose their names. They then become
initializers named by their pytree path, and what merely rearranges one of them (flax's kernels are ``HWIO``, ONNX's
``OIHW``) is applied to it, with a note in the initializer of what was done
(:func:`spa.frameworks.jax.record_layout`).
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper

from spa.coupling.analysis import TIED
from spa.errors import ModelError, UnsupportedError
from spa.extras import extra
from spa.frameworks.jax import LARGEST_ERROR, Bound, bind, title
from spa.frameworks.reasons import reason_of
from spa.importers import Imported
from spa.importers._jax_layout import fold, join
from spa.model.io import load
from spa.running.runtime import load_session, run

OPSET = 23  # jax2onnx's default, the first with RMSNormalization
Axes = Mapping[int, Mapping[int, str]]


def convert(
    source: Any,
    example_inputs: Any = None,
    *,
    params: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    vmap: bool = False,
    axes: Axes | None = None,
    opset: int | None = None,
) -> Imported:
    """Convert a JAX model to ONNX, in inference mode, and compare it with the model's own output.

    Args:
        source: a flax nnx module, a flax linen module (with ``params=variables``, batch statistics included), an
            equinox module, or a function ``fn(params, *inputs)`` (``fn(*inputs)`` without `params`).
        example_inputs: one array, or a tuple of positional arguments (arrays, or pytrees of them).
        params: the linen module's variables or the function's parameters, any pytree.
        kwargs: further arguments of each call, such as ``{"train": False}``.
        vmap: map the source over the inputs' first axis: equinox modules often take one example.
        axes: axes of open size, as {input: {axis: name}}, with inputs counted in the order of the arrays. By default
            the first axis of all, where they agree in its size and jax2onnx manages.
        opset: the ONNX opset; 23 by default.

    Returns:
        The model, the pytree path (:func:`jax.tree_util.keystr`) of each parameter's initializer, and the error.

    Raises:
        ModelError: the inputs or parameters do not fit, or the exported model computes something else.
        UnsupportedError: jax2onnx refuses, with its reason, or a package is missing.
    """
    with extra("jax"):
        import jax2onnx  # noqa: F401
    arguments = _arguments(source, example_inputs)
    bound = bind(source, params, kwargs, vmap)
    export = _Export(source, bound, arguments)
    wanted = export.batch_axes() if axes is None else export.checked(axes)
    notes: tuple[str, ...] = () if bound.parameters() else ("the function's constants have no names: give params=",)
    try:
        model, error = export.verified(wanted, opset or OPSET)
    except (ModelError, UnsupportedError) as refusal:
        if axes is not None or not wanted:
            raise
        model, error = export.verified({}, opset or OPSET)
        notes += (f"the batch size is fixed: {refusal}",)
    named = {t.name for t in model.graph.initializer}
    names = {short: path for short, path in export.names.items() if short in named}
    return Imported(model, "jax", f"jax2onnx, {bound.kind}", names, error, notes)


def _arguments(source: Any, example_inputs: Any) -> tuple[Any, ...]:
    """Return the positional arguments."""
    if example_inputs is None or (isinstance(example_inputs, tuple | list) and not example_inputs):
        raise ModelError(f"{title(source)} needs example inputs: an array, or a tuple of one for each argument.")
    return tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)


class _Export:
    """One function on its way to ONNX."""

    def __init__(self, source: Any, bound: Bound, arguments: tuple[Any, ...]) -> None:
        import jax

        self.source, self.bound = source, bound
        paths = jax.tree_util.tree_leaves_with_path(arguments)
        self.structure = jax.tree_util.tree_structure(arguments)
        # In JAX's own view: 64 bits become 32 unless it is told otherwise.
        self.inputs = [np.asarray(jax.numpy.asarray(leaf)) for _, leaf in paths]
        self.parameters = [(path, np.asarray(jax.numpy.asarray(leaf))) for path, leaf in bound.parameters()]
        self.input_names = _input_names(source, [path for path, _ in paths], bound.first)
        self.names = _short_names([path for path, _ in self.parameters], self.input_names)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute the function's own outputs."""
        import jax

        arguments = jax.tree_util.tree_unflatten(self.structure, inputs)
        try:
            return self.bound.run(arguments)
        except Exception as error:  # whatever the user's function raises
            shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in inputs)
            remedy = "Check their number, shapes and types, and whether it takes one example (vmap=True)"
            raise ModelError(f"{title(self.source)} does not run on {shapes}: {reason_of(error)}. {remedy}.") from error

    def batch_axes(self) -> Axes:
        """Return the first axis of every input, where all have one and agree in its size."""
        sizes = {a.shape[0] if a.ndim else None for a in self.inputs}
        return {i: {0: "batch"} for i in range(len(self.inputs))} if len(sizes) == 1 and None not in sizes else {}

    def checked(self, axes: Axes) -> Axes:
        """Check that the user's axes fit the inputs, and return them."""
        for i, open_axes in axes.items():
            rank = self.inputs[i].ndim if 0 <= i < len(self.inputs) else 0
            if not all(0 <= axis < rank for axis in open_axes):
                shapes = [list(a.shape) for a in self.inputs]
                raise ModelError(
                    f"axes names axes {sorted(open_axes)} of input {i}; the inputs have shapes {shapes}. "
                    "Name axes that they have."
                )
        return axes

    def verified(self, axes: Axes, opset: int) -> tuple[ModelProto, float]:
        """Export, and return the error, too, on the example inputs and on inputs of another size along open axes."""
        reference = self.run(self.inputs)
        model = self._initialised(self._exported(axes, opset))
        session = load_session(model)
        error = self._error(session, self.inputs, reference)
        if axes:
            resized = self._resized(axes)
            error = max(error, self._error(session, resized, self.run(resized)))
        return model, error

    def _resized(self, axes: Axes) -> list[np.ndarray]:
        """Make each open axis of the inputs one shorter, or longer where it has one index only."""
        resized = list(self.inputs)
        for i, open_axes in axes.items():
            for axis in open_axes:
                size = resized[i].shape[axis]
                resized[i] = np.take(resized[i], range(size - 1) if size > 1 else [0, 0], axis)
        return resized

    def _error(self, session: Any, inputs: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
        """Return the largest difference over the reference's largest magnitude, of all outputs.

        Raises:
            ModelError: it exceeds :data:`LARGEST_ERROR`, or the shapes differ.
        """
        taken = {i.name for i in session.get_inputs()}
        feeds = {name: a for name, a in zip(self.input_names, inputs, strict=True) if name in taken}
        outputs = run(session, feeds, name=title(self.source))
        shapes, expected = [np.shape(o) for o in outputs], [r.shape for r in reference]
        if shapes != expected:
            raise ModelError(f"the exported model gives shapes {shapes}, {title(self.source)} itself {expected}.")
        errors = [_relative_error(np.asarray(o), r) for o, r in zip(outputs, reference, strict=True)]
        worst = max(errors, default=0.0)
        if not worst <= LARGEST_ERROR:
            raise ModelError(
                f"the exported model differs from {title(self.source)} by {worst:.2g} of its largest output, "
                f"more than {LARGEST_ERROR:g}. Is it in inference mode, and free of random numbers (kwargs=)?"
            )
        return worst

    def _exported(self, axes: Axes, opset: int) -> ModelProto:
        """Export the function with its parameters as inputs."""
        import jax
        from jax2onnx import to_onnx

        def flat(*operands: Any) -> tuple[Any, ...]:
            arguments = jax.tree_util.tree_unflatten(self.structure, operands[: len(self.inputs)])
            tree = self.bound.with_parameters(operands[len(self.inputs) :])
            with _positional():
                return tuple(jax.tree_util.tree_leaves(self.bound.call(tree, *arguments)))

        shapes: list[list[int | str]] = [list(a.shape) for a in self.inputs]
        for i, open_axes in axes.items():
            for axis, name in open_axes.items():
                shapes[i][axis] = name
        specs = [jax.ShapeDtypeStruct(tuple(s), a.dtype) for s, a in zip(shapes, self.inputs, strict=True)]
        specs += [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in self.parameters]
        try:
            with _quiet():
                return to_onnx(
                    flat,
                    specs,
                    model_name=title(self.source),
                    opset=opset,
                    enable_double_precision=any(s.dtype == np.float64 for s in specs),
                    input_names=[*self.input_names, *self.names],
                    # One LayerNormalization in place of a dozen nodes; what comes of it is measured.
                    normalization_mode="prefer_native",
                )
        except Exception as error:  # jax2onnx raises anything; its reason is what the user needs
            remedy = "Export without this operation, or give fixed sizes (axes={})"
            raise UnsupportedError(
                f"jax2onnx cannot export {title(self.source)}: {reason_of(error)}. {remedy}."
            ) from error

    def _initialised(self, model: ModelProto) -> ModelProto:
        """Turn the parameters of an exported model into initializers."""
        graph = model.graph
        values = {short: leaf for short, (_, leaf) in zip(self.names, self.parameters, strict=True)}
        inputs = [i for i in graph.input if i.name not in values]
        graph.ClearField("input")
        graph.input.extend(inputs)
        graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
        graph.ClearField("value_info")  # jax2onnx's is wrong at times
        join(model, set(values))
        fold(model, set(values))
        used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
        constants = [t for t in graph.initializer if t.name in used]
        graph.ClearField("initializer")
        graph.initializer.extend(constants)
        readers = Counter(name for node in graph.node for name in set(node.input))
        for tensor in graph.initializer:
            if tensor.name in values and readers[tensor.name] > 1:
                tensor.metadata_props.add(key=TIED, value="true")
        return load(model).model


def _input_names(source: Any, paths: Sequence[tuple[Any, ...]], skipped: int) -> list[str]:
    """Name the inputs by the source's arguments after the first few, with the path within one that is a pytree."""
    import jax

    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    called = source if inspect.isfunction(source) else type(source).__call__
    try:
        named = [p.name for p in inspect.signature(called).parameters.values() if p.kind in kinds][skipped:]
    except (TypeError, ValueError):  # a callable without a signature
        named = []
    names = []
    for position, *path in paths:
        argument = named[position.idx] if position.idx < len(named) else f"input_{position.idx}"
        inside = jax.tree_util.keystr(tuple(path), simple=True, separator=".")
        names.append(f"{argument}.{inside}" if inside else argument)
    return names


def _short_names(paths: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return paths by initializer name, in order: ``['block'].layers[0].weight`` is ``block.layers.0.weight``."""
    names: dict[str, str] = {}
    for path in paths:
        short = ".".join(re.findall(r"[^\[\]'\".]+", path.removesuffix(".value"))) or "params"
        names[path if short in names or short in taken else short] = path
    return names


def _relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Return ``max |value - reference| / max |reference|``; not finite where either is not."""
    if not reference.size:
        return 0.0
    largest = float(np.max(np.abs(reference.astype(np.float64)))) or 1.0
    return float(np.max(np.abs(value.astype(np.float64) - reference.astype(np.float64)))) / largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence jax2onnx, whose ``logging.info`` sets the root logger up where nobody did, and onnx_ir."""
    root, silenced = logging.getLogger(), logging.getLogger("onnx_ir")
    handler, level = logging.NullHandler(), silenced.level
    root.addHandler(handler)
    silenced.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        silenced.setLevel(level)
        root.removeHandler(handler)


@contextmanager
def _positional() -> Iterator[None]:
    """Let flax's pools take positional arguments within an export; jax2onnx's stand-ins for them refuse these."""
    replaced = []
    for home in ("flax.linen", "flax.nnx"):
        for name in ("max_pool", "avg_pool", "min_pool"):
            pool = getattr(sys.modules.get(home), name, None)
            if pool is not None:
                replaced.append((sys.modules[home], name, pool))
                setattr(sys.modules[home], name, _with_positions(pool))
    try:
        yield
    finally:
        for module, name, pool in replaced:
            setattr(module, name, pool)


def _with_positions(pool: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(pool).parameters)[1:]

    def called(inputs: Any, *positional: Any, **named: Any) -> Any:
        return pool(inputs, **dict(zip(names, positional, strict=False)), **named)

    return called
