"""Writing models for OpenVINO, the runtime for Intel's processors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa.errors import UnsupportedError
from spa.exporters.checks import allowed, check, distance
from spa.extras import extra
from spa.model.files import place
from spa.model.writing import drafts, made_folder
from spa.running.openvino import failures, reason_of


def write_openvino(model: ModelProto, directory: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Convert a model to OpenVINO's format, in the model's own precision, and compare it with onnxruntime.

    Args:
        model: what to write; not changed.
        directory: the folder for ``model.xml`` and ``model.bin``; made where it is missing.
        base: the folder of the model's external data.

    Returns:
        The ``.xml`` file.

    Raises:
        UnsupportedError: openvino is not installed, refuses the model, or computes something else.
        SpaError: the files cannot be written.
    """
    with extra("openvino"):
        import openvino
    target = Path(directory)
    names = [output.name for output in model.graph.output]
    with made_folder(target), drafts(target / "model.xml") as draft:
        original = draft.folder / "model.onnx"
        place(model, original, base)
        check(original, None)
        done = draft.folder / "done"
        done.mkdir()
        try:
            openvino.save_model(openvino.convert_model(original), done / "model.xml", compress_to_fp16=False)
            # Without the hint it computes in bfloat16 where the processor can.
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
            compiled = openvino.Core().compile_model(done / "model.xml", "CPU", settings)
            worst = distance(original, lambda feeds: _outputs(compiled, feeds, names))
        except failures() as error:
            reason = reason_of(error)
            raise UnsupportedError(f"openvino cannot take the model: {reason}. Export to onnx or ort.") from error
        if worst > allowed(model):
            raise UnsupportedError(
                f"openvino's outputs differ from onnxruntime's by {worst:.2g}. Export to onnx or ort."
            )
        draft.publish(done)
    return target / "model.xml"


def _outputs(compiled: Any, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    results = compiled(feeds)
    return [results[name] for name in names]
