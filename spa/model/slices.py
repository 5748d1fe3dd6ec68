"""Constants as descriptions: where a stored tensor lies, and which indices are kept of it, until they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from spa.model.graph import tensor_array
from spa.model.stored import BLOCK, Place, fill, opened, place_of, rows_at_a_time


@dataclass(frozen=True, eq=False)
class Slices:
    """A stored tensor of which some indices are kept along some axes.

    Attributes:
        tensor: the stored one; its bytes lie outside of the message (:func:`spa.model.stored.place_of`).
        base: the folder of its file.
        masks: by axis the indices that are kept; None keeps all.
    """

    tensor: TensorProto
    base: Path
    masks: tuple[np.ndarray | None, ...]

    @classmethod
    def whole(cls, tensor: TensorProto, base: Path | None) -> Slices | None:
        """Describe a tensor as it is stored; None where its bytes are in the message or must be decoded."""
        if base is None or place_of(tensor, base) is None:
            return None
        return cls(tensor=tensor, base=base, masks=(None,) * len(tensor.dims))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        sizes = zip(self.tensor.dims, self.masks, strict=True)
        return tuple(int(size) if mask is None else int(np.count_nonzero(mask)) for size, mask in sizes)

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept."""
        return math.prod(self.shape) * helper.tensor_dtype_to_np_dtype(self.tensor.data_type).itemsize

    def same(self, other: Slices) -> bool:
        """Return whether another description is of the same values."""
        return self.tensor is other.tensor and all(
            (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
            for a, b in zip(self.masks, other.masks, strict=True)
        )

    def array(self) -> np.ndarray:
        """Return what is kept, in memory."""
        value = tensor_array(self.tensor, self.base)
        for axis, mask in enumerate(self.masks):
            if mask is not None:
                value = np.compress(mask, value, axis=axis)
        return np.ascontiguousarray(value)

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes of what is kept, in order, by blocks that are valid until the next.

        Raises:
            ModelError: the file is gone, or has become shorter.
        """
        place = place_of(self.tensor, self.base)
        assert place is not None  # `whole` and surgery ask
        dims, dtype = tuple(self.tensor.dims), helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        if not dims or all(mask is None for mask in self.masks):
            yield from _copied(place)
            return
        lead, count = rows_at_a_time(dims, dtype.itemsize)
        rows = self._rows(lead)
        rest = math.prod(dims[lead:]) * dtype.itemsize
        buffer = np.empty((min(count, len(rows)), *dims[lead:]), dtype)
        with opened(place) as file:
            for start in range(0, len(rows), count):
                kept = rows[start : start + count]
                if not kept.any():
                    continue
                values = buffer[: len(kept)]
                file.seek(place.offset + start * rest)
                fill(file, values, place)
                values = values if kept.all() else values[kept]
                for axis, mask in enumerate(self.masks[lead:], start=1):
                    values = values if mask is None else np.compress(mask, values, axis=axis)
                yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def _rows(self, lead: int) -> np.ndarray:
        """Return which rows are kept where so many leading axes are joined."""
        dims = self.tensor.dims[:lead]
        masks = [np.ones(n, bool) if m is None else m for n, m in zip(dims, self.masks[:lead], strict=True)]
        return reduce(np.logical_and.outer, masks).reshape(-1)

    def placeholder(self, name: str) -> TensorProto:
        """Return a tensor of this type and shape that holds no data; what reads it before it is filled fails."""
        old = self.tensor
        new = TensorProto(name=name, data_type=old.data_type, dims=self.shape, doc_string=old.doc_string)
        new.metadata_props.extend(old.metadata_props)
        new.data_location = TensorProto.EXTERNAL
        return new


def _copied(place: Place) -> Iterator[memoryview]:
    buffer = np.empty(min(4 * BLOCK, place.length), np.uint8)
    with opened(place) as file:
        for start in range(0, place.length, max(1, len(buffer))):
            values = buffer[: min(len(buffer), place.length - start)]
            fill(file, values, place)
            yield values.data


def materialise(model: ModelProto, slices: Mapping[str, Slices]) -> ModelProto:
    """Put the values in the place of the placeholders of a model's initializers, in place."""
    for tensor in model.graph.initializer:
        if tensor.name in slices:
            _fill_in(tensor, slices[tensor.name].array())
    return model


def embed(model: ModelProto, base: Path, lies_there: Callable[[TensorProto], bool]) -> None:
    """Read initializers that lie outside into the message, in place.

    Args:
        model: the message.
        base: the folder of its external data.
        lies_there: tells which to read.
    """
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and lies_there(tensor):
            _fill_in(tensor, tensor_array(tensor, base))


def _fill_in(tensor: TensorProto, value: np.ndarray) -> None:
    filled = numpy_helper.from_array(value, tensor.name)
    filled.data_type = tensor.data_type  # types that share a numpy dtype
    filled.doc_string = tensor.doc_string
    filled.metadata_props.extend(tensor.metadata_props)
    tensor.CopyFrom(filled)
