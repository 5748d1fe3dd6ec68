"""Models to the files of other runtimes, by name of the target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spa.errors import PlanError
from spa.io import Source, load

TARGETS = ("onnx", "ort", "openvino", "torch")


def export(model: Any, target: str, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a model for a runtime or a framework, compared with what onnxruntime computes.

    Args:
        model: a path to an ``.onnx`` file, its bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``.
        target: ``onnx``, ``ort`` (``NAME.ort``, for onnxruntime's small builds), ``openvino`` (a folder with
            ``model.xml``) or ``torch`` (a folder with ``model.pt2``, which ``torch.export.load`` reads).
        path: the file to write, or the folder for ``openvino`` and ``torch``.
        options: of the target ``onnx`` alone: ``opset``, ``ir_version``, ``external``, ``optimise`` and ``force`` as
            in :func:`spa.exporters.onnx.write`.

    Returns:
        The file or folder to load.

    Raises:
        PlanError: no such target, an option that it does not have, or one that cannot be met.
        ModelError: the model is malformed.
        UnsupportedError: the target's package is not installed or cannot express the model.
        SpaError: nothing can be written there.
    """
    if target not in TARGETS:
        raise PlanError(f"cannot export to {target!r}. Choose one of {', '.join(TARGETS)}.")
    if target != "onnx" and options:
        raise PlanError(f"the target {target} takes no {', '.join(options)}: that is for onnx. Leave it out.")
    return _write(load(model), target, path, options)


def _write(source: Source, target: str, path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    if target == "onnx":
        from spa.exporters.onnx import write

        return write(source.model, path, base=source.base, source=source.path, **options)
    if target == "ort":
        from spa.exporters.ort import write_ort

        return write_ort(source.model, path, source.base)
    if target == "openvino":
        from spa.exporters.openvino import write_openvino

        return write_openvino(source.model, path, source.base)
    from spa.exporters.pytorch import save

    return save(source.model, path, source.base)
