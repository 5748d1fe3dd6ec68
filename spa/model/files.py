"""Models as files: in one message, or with their large weights beside it."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from onnx import ModelProto, TensorProto

from spa.errors import UnreadableError
from spa.model.graph import tensor_array, tensors_of
from spa.model.slices import Slices
from spa.model.wire import copy_field, write_whole
from spa.model.workers import in_threads

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
    check_readable(path, what)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, what, error.strerror or str(error)) from error


def check_readable(path: Path, what: str = "") -> None:
    """Refuse what is no regular file before another reader, such as onnxruntime, waits for a pipe.

    Args:
        path: the file.
        what: what messages call it; its path follows.

    Raises:
        UnreadableError: it is not there, or is no regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _unreadable(path, what, str(getattr(error, "strerror", None) or error)) from error
    if not stat.S_ISREG(mode):
        raise _unreadable(path, what, "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe, a device or a socket")


def _unreadable(path: Path, what: str, reason: str) -> UnreadableError:
    return UnreadableError(f"cannot read {f'{what} {str(path)!r}'.strip()}: {reason}. Check the path.")


def place(
    model: ModelProto,
    path: Path,
    base: Path | None,
    external: bool = False,
    slices: Mapping[str, Slices] | None = None,
    inside: str | None = None,
) -> None:
    """Write a model as it is, with large weights in NAME.data beside it where they were outside or do not fit.

    Args:
        model: what to write; not changed.
        path: the file, whose folder exists.
        base: the folder of the model's external data.
        external: put large weights outside in any case.
        slices: what initializers without data stand for, by name; their values are copied from file to file.
        inside: the name of a file in which weights lie that are written as the message's own: the model file itself.
    """
    contents = dict(slices or {})
    kept_outside = external
    for tensor in tensors_of(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in contents:
            own = inside is not None and location_of(tensor) == inside
            kept_outside |= not own
            if own and (whole := Slices.whole(tensor, base)) is not None:
                contents[tensor.name] = whole
    size = sum(len(t.raw_data) for t in tensors_of(model.graph)) + sum(s.nbytes for s in contents.values())
    if kept_outside or size > LARGEST_MESSAGE:
        _place_outside(model, path, base, contents)
    elif contents:
        with open(path, "wb") as file:
            write_whole(file, model, contents)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))


def location_of(tensor: TensorProto) -> str:
    """Return the name of the file that a tensor's data lies in, empty where there is none."""
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def data_file(path: Path) -> Path:
    """Return where :func:`place` puts the large weights of a file."""
    return path.parent / f"{path.name}.data"


def _place_outside(model: ModelProto, path: Path, base: Path | None, slices: Mapping[str, Slices]) -> None:
    """Write the large tensors to a data file, one after the other, and the rest to the model file."""
    slim = _without_data(model)
    pieces: list[tuple[int, Iterable[bytes | memoryview]]] = []
    end = 0
    for tensor, full in zip(tensors_of(slim.graph), tensors_of(model.graph), strict=True):
        if tensor.data_location != TensorProto.EXTERNAL and len(full.raw_data) < INLINE:
            continue
        length, content = _content(full, base, slices)
        offset = end + -end % 4096
        end = offset + length
        pieces.append((offset, content))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", data_file(path).name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    with open(data_file(path), "wb") as data:
        data.truncate(end)  # the gaps between tensors are zeros
    in_threads(partial(_write_piece, data_file(path)), pieces, end)
    path.write_bytes(slim.SerializeToString(deterministic=True))


def _write_piece(path: Path, piece: tuple[int, Iterable[bytes | memoryview]]) -> None:
    """Write a tensor's content at its offset in a file."""
    offset, content = piece
    with open(path, "r+b") as data:
        data.seek(offset)
        for block in content:
            data.write(block)


def _without_data(model: ModelProto) -> ModelProto:
    """Copy a model without the data of its large initializers."""
    slim, weights = ModelProto(), model.graph.initializer
    large = {tensor.name for tensor in weights if len(tensor.raw_data) >= INLINE}
    if not large:
        slim.CopyFrom(model)
        return slim
    for message, copy in ((model, slim), (model.graph, slim.graph)):
        for field, value in message.ListFields():
            if field.name not in ("graph", "initializer"):
                copy_field(copy, field.name, value)
    for tensor in weights:
        new = slim.graph.initializer.add()
        for field, value in tensor.ListFields():
            if field.name != "raw_data" or tensor.name not in large:
                copy_field(new, field.name, value)
    return slim


def _content(
    tensor: TensorProto, base: Path | None, slices: Mapping[str, Slices]
) -> tuple[int, Iterable[bytes | memoryview]]:
    """Return a tensor's bytes: how many, and blocks of them, which are read as they are asked for."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return len(tensor.raw_data), _raw(tensor)
    stored = slices.get(tensor.name) or Slices.whole(tensor, base)
    if stored is not None:
        return stored.nbytes, stored.blocks()
    entries = {e.key: e.value for e in tensor.external_data}
    if base is not None and "length" in entries:
        with open(base / entries["location"], "rb") as file:
            file.seek(int(entries.get("offset", 0) or 0))
            content = file.read(int(entries["length"]))
    else:
        content = tensor_array(tensor, base).tobytes()
    return len(content), (content,)


def _raw(tensor: TensorProto) -> Iterator[bytes]:
    yield tensor.raw_data  # a copy, when it is written
