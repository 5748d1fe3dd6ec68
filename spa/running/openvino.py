"""OpenVINO behind one door: models compiled for the CPU as users run them, and the times of their operators."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.errors import ModelError
from spa.extras import extra
from spa.model.files import place
from spa.model.writing import draft_folder
from spa.running.runtime import Model

NOT_INSIDE = ("Parameter", "Result", "Constant", "Reorder")  # what a part has at its ends, and the network has not


def version() -> str:
    """Return OpenVINO's version.

    Raises:
        UnsupportedError: it is not installed.
    """
    with extra("openvino"):
        import openvino
    return str(openvino.__version__).partition("-")[0]


def failures() -> tuple[type[Exception], ...]:
    """Return what OpenVINO raises; its readers' classes have no common base below Exception."""
    from openvino import frontend

    return (
        RuntimeError,
        frontend.GeneralFailure,
        frontend.InitializationFailure,
        frontend.NotImplementedFailure,
        frontend.OpConversionFailure,
        frontend.OpValidationFailure,
    )


def reason_of(error: Exception) -> str:
    """Return the last line of OpenVINO's reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].lstrip("- ")


def step(
    model: Model, feeds: Mapping[str, np.ndarray], threads: int, name: str, profiled: bool = False
) -> Callable[[], Any]:
    """Make a function that runs a model once, in the precision that OpenVINO prefers, and returns the request.

    Args:
        model: a path, the bytes of a file, or a parsed model that holds its weights.
        feeds: one array per input.
        threads: for its operators.
        name: what messages call the model.
        profiled: whether requests tell the times of operators.

    Raises:
        UnsupportedError: OpenVINO is not installed.
        ModelError: it cannot load or run the model.
    """
    with extra("openvino"):
        import openvino
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": profiled}
    try:
        with draft_folder(Path(tempfile.gettempdir())) as folder:
            file = _file(model, folder)
            compiled = openvino.Core().compile_model(file, "CPU", settings)
        request = compiled.create_infer_request()
        for key, array in feeds.items():
            request.set_tensor(key, openvino.Tensor(np.ascontiguousarray(array)))
    except failures() as error:
        raise ModelError(f"openvino cannot load {name}: {reason_of(error)} Leave --runtime out.") from error

    def run_once() -> Any:
        try:
            request.infer()
        except failures() as error:
            raise ModelError(f"openvino cannot run {name}: {reason_of(error)} Leave --runtime out.") from error
        return request

    return run_once


def _file(model: Model, folder: Path) -> Path:
    if not isinstance(model, ModelProto | bytes):
        return Path(model)
    file = folder / "model.onnx"
    if isinstance(model, bytes):
        file.write_bytes(model)
    else:
        place(model, file, None)
    return file


def operator_milliseconds(request: Any) -> float:
    """Add up the milliseconds that a profiled request's operators took, but for conversions of layouts."""
    times = (
        i.real_time for i in request.profiling_info if i.status == i.Status.EXECUTED and i.node_type not in NOT_INSIDE
    )
    return sum(time.total_seconds() for time in times) * 1000
