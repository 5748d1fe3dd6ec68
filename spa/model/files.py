"""Models as files: in one message, or with their large weights beside it."""

from __future__ import annotations

import stat
from pathlib import Path

from onnx import ModelProto, TensorProto

from spa.errors import UnreadableError
from spa.model.graph import tensor_array, tensors_of

LARGEST_MESSAGE = 2**31 - 2**20  # protobuf's limit, less some room for what is not weights
INLINE = 1024  # bytes; smaller tensors stay in the model file


def read_bytes(path: Path, what: str = "") -> bytes:
    """Read a file that somebody named.

    Args:
        path: the file.
        what: what messages call it, such as ``the plan``; its path follows.

    Raises:
        UnreadableError: it is not there, is no regular file, or cannot be opened.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
        reason = "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe, a device or a socket"
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = str(getattr(error, "strerror", None) or error)
    raise UnreadableError(f"cannot read {f'{what} {str(path)!r}'.strip()}: {reason}. Check the path.")


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


def data_file(path: Path) -> Path:
    """Return where :func:`place` puts the large weights of a file."""
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
