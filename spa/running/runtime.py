"""onnxruntime behind one door: sessions, their interfaces, and runs that speak numpy.

onnxruntime's Python layer has three habits that every caller would otherwise have to know. Its exceptions
have no common base below ``Exception``; its messages carry C++ source lines; and bfloat16 enters and leaves
only through ``OrtValue``. All three end in this file.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError, EncodeError
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from spa.errors import ModelError, UnsupportedError
from spa.model.bodies import nested
from spa.model.files import check_readable, read_bytes

__all__ = [
    "CPU",
    "ORT_ERRORS",
    "Model",
    "TensorSpec",
    "clean_reason",
    "input_specs",
    "load_graph",
    "load_session",
    "model_name",
    "output_specs",
    "run",
    "to_ort",
]

CPU = "CPUExecutionProvider"

#: What the functions of this package that only look at a model accept: a file, its bytes, or a parsed model.
Model: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto

#: Everything that onnxruntime raises. Its classes derive from `Exception` one by one, so they are collected
#: from the extension module; `RuntimeError` and `ValueError` come from its Python layer (missing feeds,
#: unconvertible arrays).
ORT_ERRORS: tuple[type[Exception], ...] = (
    *sorted(
        (cls for cls in vars(_state).values() if isinstance(cls, type) and issubclass(cls, Exception)),
        key=lambda cls: cls.__name__,
    ),
    RuntimeError,
    ValueError,
)

# onnxruntime's word for an element type -> numpy's.
_NUMPY: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "bool": np.dtype(np.bool_),
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model, as onnxruntime declares it.

    Attributes:
        name: the tensor's name.
        type: onnxruntime's word for its type, such as ``tensor(float)`` or ``seq(tensor(int64))``.
        shape: one entry per axis: a size, the name of a dynamic axis, or None for a dynamic axis without a
            name.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def element(self) -> str:
        """The element type (``float``, ``int64`` ...) of a tensor, else the whole type."""
        match = re.fullmatch(r"tensor\((\w+)\)", self.type)
        return match[1] if match else self.type

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The numpy type of the elements, or None where there is none that onnxruntime takes."""
        return _NUMPY.get(self.element)


def model_name(model: Model, fallback: str = "the model") -> str:
    """Return what messages call a model: its path, or the name of its graph, or ``fallback``.

    Args:
        model: a path, the bytes of a file, or a parsed model.
        fallback: the name of a model that has none.

    Returns:
        A name to be put into a sentence, without quotation marks.
    """
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if isinstance(model, onnx.ModelProto) and model.graph.name:
        return model.graph.name
    return fallback


def load_session(
    model: Model,
    *,
    threads: int = 2,
    optimise: bool = False,
    profiling: bool | str = False,
    name: str | None = None,
    folder: Path | None = None,
    providers: Sequence[str] = (CPU,),
) -> ort.InferenceSession:
    """Open a model in onnxruntime, without a word on standard error.

    Args:
        model: a path, the bytes of a file, or a parsed model (below 2 GiB), whose bodies may lie flat.
        threads: threads within an operator; operators run one after another.
        optimise: whether onnxruntime may rewrite the graph (all its optimisations, as users run it). Off by
            default: onnxruntime 1.31 merges a zero Pad into MaxPool wrongly from its basic level on, so
            comparing needs none.
        profiling: whether to record a profile; a string is the prefix of its file, else it goes to the
            temporary folder. ``session.end_profiling()`` gives the file's name.
        name: what messages call the model; by default its path or the name of its graph.
        folder: of a parsed model's external data, which onnxruntime maps and does not copy.
        providers: what runs operators, the first preferred.

    Raises:
        UnreadableError: the file is not there, or is no regular one.
        ModelError: onnxruntime cannot load the model; the message carries its reason in one line.
        UnsupportedError: a provider is left out.
    """
    name = model_name(model) if name is None else name
    options = ort.SessionOptions()
    options.log_severity_level = 4  # Fatal only: what matters is raised, and said once.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    # An arena doubles as it grows, and lives as long as any output of its session.
    options.enable_cpu_mem_arena = optimise
    # An idle pool that spins takes the cores from the session that is being timed beside it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profiling:
        options.enable_profiling = True
        options.profile_file_prefix = (
            profiling if isinstance(profiling, str) else os.path.join(tempfile.gettempdir(), "spa-profile")
        )
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_prepacking", "1")  # which copies matrices
    source = _source(model, name)
    try:
        session = ort.InferenceSession(source, options, providers=list(providers))
    except ORT_ERRORS as error:
        raise ModelError(f"onnxruntime cannot load {name}: {clean_reason(error)}") from error
    left_out = [provider for provider in providers if provider not in session.get_providers()]
    if left_out:  # it falls back to the CPU
        remedy = "Install the driver or library that it lacks, or name another with --providers."
        raise UnsupportedError(f"onnxruntime leaves {left_out[0]} out. {remedy}")
    return session


def load_graph(model: Model, *, name: str | None = None) -> onnx.ModelProto:
    """Read a model's structure; weights in external files stay there.

    Args:
        model: a path, the bytes of a file, or a parsed model (returned as it is).
        name: what messages call the model; by default its path or the name of its graph.

    Returns:
        The parsed model.

    Raises:
        UnreadableError: the file is not there or cannot be opened.
        ModelError: it is not an ONNX model.
    """
    if isinstance(model, onnx.ModelProto):
        return model
    name = model_name(model) if name is None else name
    content = model if isinstance(model, bytes) else read_bytes(Path(model))
    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ModelError(f"{name} is not an ONNX model, or is cut short: protobuf cannot parse it.") from error


def input_specs(model: ort.InferenceSession | onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Return the inputs that a caller must feed, in order, without initializers that are also listed as inputs.

    Args:
        model: a session or a parsed model.

    Returns:
        One entry per input.
    """
    if isinstance(model, onnx.ModelProto):
        given = {tensor.name for tensor in model.graph.initializer}
        given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
        return tuple(_spec(value) for value in model.graph.input if value.name not in given)
    return tuple(_spec(argument) for argument in model.get_inputs())


def output_specs(model: ort.InferenceSession | onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Return the outputs, in order.

    Args:
        model: a session or a parsed model.

    Returns:
        One entry per output.
    """
    outputs = model.graph.output if isinstance(model, onnx.ModelProto) else model.get_outputs()
    return tuple(_spec(value) for value in outputs)


def to_ort(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
    """Convert feeds to onnxruntime's own values, which carry bfloat16 and save copies in a timed loop.

    Args:
        session: the session that will take them.
        feeds: one array per input.

    Returns:
        The same, for ``session.run_with_ort_values``.
    """
    bfloat16 = {spec.name for spec in input_specs(session) if spec.element == "bfloat16"}
    return {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        if name in bfloat16
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in feeds.items()
    }


def run(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray], *, name: str = "the model") -> list[Any]:
    """Run a session once.

    Args:
        session: from ``load_session``.
        feeds: one array per input.
        name: what messages call the model.

    Returns:
        One value per output: an array, None for an absent optional, or a list for a sequence.

    Raises:
        ModelError: onnxruntime cannot run the model on these inputs; the message carries its reason.
        UnsupportedError: an output is of a type that has no numpy form.
    """
    bfloat16 = any("bfloat16" in spec.type for spec in (*input_specs(session), *output_specs(session)))
    try:
        if not bfloat16:
            return list(session.run(None, dict(feeds)))
        values = session.run_with_ort_values(None, to_ort(session, feeds))
    except ORT_ERRORS as error:
        raise ModelError(f"onnxruntime cannot run {name}: {clean_reason(error)}") from error
    return [_to_numpy(spec, value) for spec, value in zip(output_specs(session), values, strict=True)]


def clean_reason(error: BaseException | str) -> str:
    """Reduce onnxruntime's reason to one line, without error code, C++ source line and function signature.

    Args:
        error: the exception, or its message.

    Returns:
        The reason, for the end of a sentence of ours.

    >>> clean_reason("[ONNXRuntimeError] : 1 : FAIL : /src/model.cc:256 ort::Model::Model(int) Too old.")
    'Too old.'
    """
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    while match := re.search(r"(?:^|(?<=\s))\S*\.(?:cc|h|cpp|cu):\d+ ", text):
        text = text[: match.start()] + text[_after_signature(text, match.end()) :]
    return text.strip() or type(error).__name__


def _after_signature(text: str, start: int) -> int:
    """Find where the C++ function signature that begins at ``start`` ends; return ``start`` if there is none."""
    at = text.find("(", start)
    if at < 0:
        return start
    depth = 0
    while at < len(text):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
        # A pair inside the name, as in `(anonymous namespace)::f(int)`, has no space after it.
        if depth == 0 and text[at - 1] == ")" and text[at : at + 1] in ("", " "):
            break
    match = re.compile(r"(?: const)?(?: \[with .*?\])?\s*").match(text, at)
    return match.end() if match else at


def _source(model: Model, name: str) -> str | bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, str | os.PathLike):
        check_readable(Path(model))
        return os.fspath(model)
    try:
        return nested(model).SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{name} is too large to be one protobuf message (2 GiB). "
            "Save it with its weights in an external file and pass the path."
        ) from error


def _spec(value: onnx.ValueInfoProto | ort.NodeArg) -> TensorSpec:
    if not isinstance(value, onnx.ValueInfoProto):
        return TensorSpec(value.name, value.type, tuple(value.shape))
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return TensorSpec(value.name, {"sequence_type": "seq", "optional_type": "optional"}.get(kind or "", "map"), ())
    tensor = value.type.tensor_type
    word = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    # Some exporters write -1 for an open axis.
    shape: list[int | str | None] = [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or None
        for dim in tensor.shape.dim
    ]
    return TensorSpec(value.name, f"tensor({word})", tuple(shape))


def _to_numpy(spec: TensorSpec, value: ort.OrtValue) -> Any:
    if not value.has_value():
        return None
    if value.data_type() == "tensor(bfloat16)":
        raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape())
    try:
        return value.numpy()
    except ORT_ERRORS as error:
        raise UnsupportedError(f"Output '{spec.name}': its type {spec.type} has no numpy form.") from error
