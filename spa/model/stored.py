"""Weights where they lie: read by blocks of rows, so that no tensor need be in memory as a whole.

External data is read from its file, not mapped: pages of a map count as this process' memory until the system takes
them back, and a file that shrinks under a map ends the process without a message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, helper

from spa.errors import ModelError
from spa.model.graph import SUBBYTE, Graph

BLOCK = 2**20  # bytes; two or three arrays of this size stay in a processor's cache


@dataclass(frozen=True)
class Place:
    """The place of a tensor's bytes.

    Attributes:
        file: the file.
        offset: of the first byte.
        length: in bytes.
    """

    file: Path
    offset: int
    length: int


def place_of(tensor: TensorProto, base: Path | None) -> Place | None:
    """Return where a tensor's bytes lie; None where the message holds them, or packs several elements in a byte."""
    if tensor.data_location != TensorProto.EXTERNAL or tensor.data_type in SUBBYTE or base is None:
        return None
    entries = {e.key: e.value for e in tensor.external_data}
    needed = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if int(entries.get("length") or needed) != needed:
        return None  # malformed, which reading it as a whole says
    return Place(file=base / entries["location"], offset=int(entries.get("offset") or 0), length=needed)


def rows_at_a_time(shape: Sequence[int], itemsize: int, size: int = BLOCK) -> tuple[int, int]:
    """Return how many leading axes to join into rows, and how many rows take about ``size`` bytes.

    Args:
        shape: of the tensor, with at least one axis.
        itemsize: bytes of an element.
        size: bytes of a block; a row of the last axis may be longer.
    """
    lead = 1
    while lead < len(shape) and math.prod(shape[lead:]) * itemsize > size:
        lead += 1
    return lead, max(1, size // max(1, math.prod(shape[lead:]) * itemsize))


def blocks(graph: Graph, name: str, size: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield a constant's values by blocks of rows.

    Args:
        graph: the model.
        name: of a constant with at least one axis; leading axes are joined as :func:`rows_at_a_time` says.
        size: bytes of a block, roughly.

    Yields:
        The rows as a slice, and their values (rows, *remaining axes), not to be written to and valid until the next.

    Raises:
        ModelError: the data is missing, malformed, or has become shorter.
    """
    tensor = graph.constants[name]
    place = place_of(tensor, graph.base)
    if place is None:
        yield from split(graph.array(name), size)
        return
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    lead, count = rows_at_a_time(tensor.dims, dtype.itemsize, size)
    total, rest = math.prod(tensor.dims[:lead]), tuple(tensor.dims[lead:])
    buffer = np.empty((min(count, total), *rest), dtype)
    with opened(place) as file:
        for start in range(0, total, count):
            values = buffer[: min(count, total - start)]
            fill(file, values, place)
            yield slice(start, start + len(values)), values


def split(values: np.ndarray, size: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield an array's values as :func:`blocks` yields those of a tensor."""
    lead, count = rows_at_a_time(values.shape, values.itemsize, size)
    rows = values.reshape(math.prod(values.shape[:lead]), *values.shape[lead:])
    for start in range(0, len(rows), count):
        yield slice(start, min(start + count, len(rows))), rows[start : start + count]


def opened(place: Place) -> BinaryIO:
    """Open a tensor's file where its bytes begin.

    Raises:
        ModelError: it is gone or cannot be opened.
    """
    try:
        file = open(place.file, "rb", buffering=0)  # noqa: SIM115 # the caller closes it
    except OSError as error:
        raise ModelError(f"cannot read the data file {str(place.file)!r}: {error.strerror}. Start again.") from error
    file.seek(place.offset)
    return file


def fill(file: BinaryIO, values: np.ndarray, place: Place) -> None:
    """Read the next bytes of a file into an array.

    Raises:
        ModelError: the file ends before, or cannot be read.
    """
    room = values.reshape(-1).view(np.uint8).data
    try:
        while room:
            count = file.readinto(room)  # type: ignore[attr-defined] # of raw files
            if not count:
                raise ModelError(
                    f"the data file {str(place.file)!r} has become shorter while it was read. Start again."
                )
            room = room[count:]
    except OSError as error:
        raise ModelError(f"cannot read the data file {str(place.file)!r}: {error.strerror}. Start again.") from error


def is_finite(graph: Graph, name: str) -> bool:
    """Return whether all values of a constant are finite numbers, and their squares finite in their type, too.

    Masks that exporters write hold the least number of their type. What numpy does not know as floats is finite.
    """
    if helper.tensor_dtype_to_np_dtype(graph.constants[name].data_type).kind not in "fc":
        return True
    if not graph.constants[name].dims:
        return all_finite(graph.array(name))
    return all(all_finite(values) for _, values in blocks(graph, name))


def all_finite(values: np.ndarray) -> bool:
    """Return whether some floats and their squares are finite; of halves, whose squares are singles, they alone."""
    if values.dtype == np.float16:  # numpy takes twenty times as long to ask each half
        return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00)
    return bool((np.abs(values) < np.sqrt(np.finfo(values.dtype).max)).all())
