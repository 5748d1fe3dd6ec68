"""Files that appear whole or not at all, and models as files and in onnxruntime."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto, TensorProto

from spa.errors import SpaError
from spa.model.graph import tensor_array, tensors_of
from spa.running.runtime import load_session, model_name

if TYPE_CHECKING:
    import onnxruntime as ort

LARGEST_MESSAGE = 2**31 - 2**20  # protobuf's limit, less some room for what is not weights
LARGE = 2**28  # bytes of weights; a message of more takes three times as much in onnxruntime, a file once
INLINE = 1024  # bytes; smaller tensors stay in the model file


@contextlib.contextmanager
def drafts(target: Path) -> Iterator[Path]:
    """A temporary folder beside a file to write, gone in the end.

    Raises:
        SpaError: the target is a folder, or the operating system refuses to write.
    """
    if target.is_dir():
        raise SpaError(f"cannot write {str(target)!r}: it is a folder. Name a file in it.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise SpaError(f"cannot write {str(target)!r}: {error.strerror}. Choose another place.") from error


def move(source: Path, target: Path) -> None:
    """Move the files of a folder to another, replacing; NAME.data goes before NAME, which refers to it."""
    for file in sorted((f for f in source.iterdir() if f.is_file()), reverse=True):
        os.replace(file, target / file.name)


def place(model: ModelProto, path: Path, base: Path | None, external: bool = False) -> None:
    """Write a model as it is, with large weights in NAME.data beside it where they were outside or do not fit.

    Args:
        model: what to write; not changed.
        path: the file, whose folder exists.
        base: the folder of the model's external data.
        external: put large weights outside in any case.
    """
    outside = external or any(t.data_location == TensorProto.EXTERNAL for t in tensors_of(model.graph))
    size = sum(len(t.raw_data) for t in tensors_of(model.graph))
    if outside or size > LARGEST_MESSAGE:
        _place_outside(model, path, base)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def session(model: ModelProto, base: Path | None = None, name: str | None = None) -> Iterator[ort.InferenceSession]:
    """A model of any size in onnxruntime, by way of a temporary file where it is large.

    Args:
        model: not changed.
        base: the folder of its external data.
        name: what messages call it.

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    outside = any(t.data_location == TensorProto.EXTERNAL for t in tensors_of(model.graph))
    if not outside and sum(len(t.raw_data) for t in tensors_of(model.graph)) <= LARGE:
        yield load_session(model, name=name)
        return
    with tempfile.TemporaryDirectory(prefix="spa-session-") as folder:
        file = Path(folder) / "model.onnx"
        place(model, file, base, external=True)
        name = model_name(model) if name is None else name
        del model  # perhaps the last reference to gigabytes
        yield load_session(file, name=name)


def data_file(path: Path) -> Path:
    """Where :func:`place` puts the large weights of a file."""
    return path.parent / f"{path.name}.data"


def _place_outside(model: ModelProto, path: Path, base: Path | None) -> None:
    """Write the large tensors to a data file, one after the other, and the rest to the model file."""
    slim = ModelProto()
    slim.CopyFrom(model)
    with open(data_file(path), "wb") as data:
        for tensor in tensors_of(slim.graph):
            if tensor.data_location != TensorProto.EXTERNAL and len(tensor.raw_data) < INLINE:
                continue
            content = _raw(tensor, base)
            data.write(b"\0" * (-data.tell() % 4096))
            offset = data.tell()
            data.write(content)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", data_file(path).name), ("offset", offset), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(slim.SerializeToString(deterministic=True))


def _raw(tensor: TensorProto, base: Path | None) -> bytes | memoryview:
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor.raw_data
    entries = {e.key: e.value for e in tensor.external_data}
    if base is not None and "length" in entries:
        with open(base / entries["location"], "rb") as file:
            file.seek(int(entries.get("offset", 0) or 0))
            return file.read(int(entries["length"]))
    return tensor_array(tensor, base).tobytes()
