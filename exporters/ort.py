"""Writing ``.ort`` files, which onnxruntime's builds for phones and devices load."""

from __future__ import annotations

import os
from pathlib import Path

from onnx import ModelProto

from spa.errors import ModelError, UnsupportedError
from spa.exporters.checks import allowed, check, difference
from spa.exporters.variants import optimise_to
from spa.model.files import place
from spa.model.writing import drafts


def write_ort(model: ModelProto, path: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Write a model in onnxruntime's own format, optimised to its extended level.

    The file holds everything, runs in onnxruntime alone, on any processor, and is compared with the model.

    Args:
        model: what to write; not changed.
        path: the target, ``NAME.ort``: by this ending onnxruntime knows the format.
        base: the folder of the model's external data.

    Returns:
        The target.

    Raises:
        UnsupportedError: the name ends otherwise, or onnxruntime cannot save the model so or changes what it computes.
        SpaError: the file cannot be written.
    """
    target = Path(path)
    remedy = "Export to onnx, which every onnxruntime but the minimal builds loads."
    if target.suffix != ".ort":
        raise UnsupportedError(
            f"cannot write {str(target)!r}: onnxruntime knows the format by the ending .ort. Choose it."
        )
    with drafts(target) as draft:
        original = draft.folder / "model.onnx"
        place(model, original, base)
        check(original, None)
        done = draft.folder / "done"
        done.mkdir()
        try:
            optimise_to(original, done / target.name, level="EXTENDED", form="ORT")
            reason = difference(original, done / target.name, allowed(model))
        except (ModelError, UnsupportedError) as error:
            raise UnsupportedError(f"the .ort file cannot be made: {error} {remedy}") from error
        if reason is not None:
            raise UnsupportedError(f"the .ort file differs from the model: {reason}. {remedy}")
        draft.publish(done)
    return target
