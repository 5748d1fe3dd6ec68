"""Model files as bytes on the wire: tensors' data is found in a file, and written to one, without passing a message.

Protobuf's encoding is a list of fields, each a key (number and kind) and a value; a message in a message is a value
that begins with its length (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from onnx import GraphProto, ModelProto, TensorProto

from spa.model.slices import Slices

Bytes = bytes | memoryview
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA, _LOCATION = 7, 5, 9, 13, 14  # numbers of fields
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # kinds


class Unusual(ValueError):
    """The bytes are malformed, or in a form that no serialiser writes: they are to be parsed as a whole."""


# -- reading ---------------------------------------------------------------------------------------------------------


def without_data(file: memoryview, location: str, least: int) -> bytes:
    """Return a model file's message in which large data of initializers is external data in this very file.

    Args:
        file: the file's bytes, mapped perhaps.
        location: the file's name.
        least: bytes of data that is left out.

    Raises:
        Unusual: see there.
    """

    def tensor(start: int, end: int) -> Sequence[Bytes] | None:
        return _outside(file, start, end, location, least)

    def graph(start: int, end: int) -> Sequence[Bytes] | None:
        return _replaced(file, start, end, _INITIALIZER, tensor)

    if sum(number == _GRAPH for number, *_ in _fields(file, 0, len(file))) != 1:
        raise Unusual
    return b"".join(_replaced(file, 0, len(file), _GRAPH, graph))


def _fields(file: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message: number, where the key begins, where the value begins and ends."""
    at = start
    while at < end:
        begin = at
        key, at = _varint(file, at, end)
        value = at
        kind = key & 7
        if kind == _LENGTH:
            length, value = _varint(file, at, end)
            at = value + length
        elif kind == _VARINT:
            _, at = _varint(file, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise Unusual
        if at > end:
            raise Unusual
        yield key >> 3, begin, value, at


def _varint(file: memoryview, at: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while at < end and shift < 64:
        byte = file[at]
        result |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return result, at
        shift += 7
    raise Unusual


def _replaced(
    file: memoryview, start: int, end: int, number: int, change: Callable[[int, int], Sequence[Bytes] | None]
) -> list[Bytes]:
    """Return a message's bytes in which the values of one field are changed; None leaves a value as it is."""
    parts: list[Bytes] = []
    done = start
    for found, begin, value, after in _fields(file, start, end):
        new = change(value, after) if found == number else None
        if new is not None:
            parts += [file[done:begin], _key(number, _LENGTH), _encoded(sum(map(len, new))), *new]
            done = after
    return [*parts, file[done:end]]


def _outside(file: memoryview, start: int, end: int, location: str, least: int) -> Sequence[Bytes] | None:
    """Return a tensor's bytes with its data as external data, or None where it is small or outside already."""
    if end - start < least:
        return None
    fields = list(_fields(file, start, end))
    data = [(begin, value, after) for number, begin, value, after in fields if number == _RAW_DATA]
    if any(number in (_EXTERNAL_DATA, _LOCATION) for number, *_ in fields):
        raise Unusual
    if len(data) != 1 or data[0][2] - data[0][1] < least:
        return None
    begin, value, after = data[0]
    place = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", location), ("offset", value), ("length", after - value)):
        place.external_data.add(key=key, value=str(entry))
    return [file[start:begin], file[after:end], place.SerializeToString()]


# -- writing ---------------------------------------------------------------------------------------------------------


def write_whole(file: BinaryIO, model: ModelProto, slices: Mapping[str, Slices]) -> None:
    """Write a model as one message, as its deterministic serialisation is, with the data of descriptions in it.

    Args:
        file: open to write.
        model: the message, with placeholders for some initializers.
        slices: what these stand for, by name.
    """
    before, graph, after = _around(model)
    first, last = _around_initializers(model.graph)
    lengths = [_length(tensor, slices.get(tensor.name)) for tensor in model.graph.initializer]
    framed = sum(len(_key(_INITIALIZER, _LENGTH) + _encoded(length)) + length for length in lengths)
    file.write(before + graph + _encoded(len(first) + framed + len(last)) + first)
    for tensor, length in zip(model.graph.initializer, lengths, strict=True):
        file.write(_key(_INITIALIZER, _LENGTH) + _encoded(length))
        _write_tensor(file, tensor, slices.get(tensor.name))
    file.write(last + after)


def _around(model: ModelProto) -> tuple[bytes, bytes, bytes]:
    """Return a model's fields before the graph, the graph's key, and those after it."""
    parts = (ModelProto(), ModelProto())
    for field, value in model.ListFields():
        if field.number != _GRAPH:
            copy_field(parts[field.number > _GRAPH], field.name, value)
    before, after = (part.SerializeToString(deterministic=True) for part in parts)
    return before, _key(_GRAPH, _LENGTH), after


def _around_initializers(graph: GraphProto) -> tuple[bytes, bytes]:
    parts = (GraphProto(), GraphProto())
    for field, value in graph.ListFields():
        if field.number != _INITIALIZER:
            copy_field(parts[field.number > _INITIALIZER], field.name, value)
    first, last = (part.SerializeToString(deterministic=True) for part in parts)
    return first, last


def copy_field(message: Any, name: str, value: Any) -> None:
    """Give a message a field of another one of its kind."""
    field = getattr(message, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(message, name, value)


def _around_data(tensor: TensorProto) -> tuple[bytes, bytes]:
    """Return a placeholder's fields before and after its data; that it lies outside is left out."""
    first = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
    last = TensorProto(metadata_props=tensor.metadata_props)
    if tensor.HasField("doc_string"):
        last.doc_string = tensor.doc_string
    return first.SerializeToString(deterministic=True), last.SerializeToString(deterministic=True)


def _length(tensor: TensorProto, data: Slices | None) -> int:
    if data is None:
        return tensor.ByteSize()
    first, last = _around_data(tensor)
    size = data.nbytes
    return len(first) + len(_key(_RAW_DATA, _LENGTH) + _encoded(size)) + size + len(last)


def _write_tensor(file: BinaryIO, tensor: TensorProto, data: Slices | None) -> None:
    if data is None:
        file.write(tensor.SerializeToString(deterministic=True))
        return
    first, last = _around_data(tensor)
    file.write(first + _key(_RAW_DATA, _LENGTH) + _encoded(data.nbytes))
    for block in data.blocks():
        file.write(block)
    file.write(last)


def _key(number: int, kind: int) -> bytes:
    return _encoded(number << 3 | kind)


def _encoded(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
