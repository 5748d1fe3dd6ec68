"""Sessions of models of any size: large ones go to onnxruntime by way of a temporary file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto, TensorProto

from spa.model.bodies import nested
from spa.model.files import place
from spa.model.graph import tensors_of
from spa.model.writing import draft_folder
from spa.running.runtime import load_session, model_name

if TYPE_CHECKING:
    import onnxruntime as ort

LARGE = 2**28  # bytes of weights; a message of more takes three times as much in onnxruntime, a file once


@contextlib.contextmanager
def open_session(
    model: ModelProto, base: Path | None = None, name: str | None = None
) -> Iterator[ort.InferenceSession]:
    """Open a model of any size in onnxruntime, by way of a temporary file where its message is large.

    Args:
        model: not changed.
        base: the folder of its external data.
        name: what messages call it.

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    model = nested(model)
    outside = any(t.data_location == TensorProto.EXTERNAL for t in tensors_of(model.graph))
    if sum(len(t.raw_data) for t in tensors_of(model.graph)) <= LARGE:
        yield load_session(model, name=name, folder=base if outside else None)
        return
    with draft_folder(Path(tempfile.gettempdir())) as folder:
        file = folder / "model.onnx"
        place(model, file, base, external=True)
        name = model_name(model) if name is None else name
        del model  # perhaps the last reference to gigabytes
        yield load_session(file, name=name)
