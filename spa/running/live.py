"""The tensors of a batch that later nodes read; those that do not fit into memory lie in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


class PaddedBatch(dict[str, Array]):
    """The inputs of a batch of sequences of different lengths.

    Attributes:
        real: which positions are no padding, (samples, positions).
    """

    def __init__(self, feeds: Mapping[str, Array], real: Array) -> None:
        super().__init__(feeds)
        self.real = real


class _File:
    """A temporary file without a name, which is closed with the last tensor in it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="spa-", buffering=0)  # noqa: SIM115 - closed by the next line
        weakref.finalize(self, self._file.close)
        self.end = 0

    def append(self, value: Array) -> int:
        """Write a tensor and return where its bytes begin."""
        at, data = self.end, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        self._file.seek(at)
        while data:  # the operating system may write less at a time
            data = data[self._file.write(data) :]
        self.end += value.nbytes
        return at

    def fill(self, value: Array, at: int) -> None:
        """Read a tensor's bytes into an array."""
        data = value.reshape(-1).view(np.uint8).data
        self._file.seek(at)
        while data:
            data = data[self._file.readinto(data) :]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes begin, its type and its shape."""

    file: _File
    at: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> Array:
        """Return the tensor, in memory of its own."""
        value = np.empty(self.shape, self.dtype)
        self.file.fill(value, self.at)
        return value


class Live(MutableMapping[str, Array]):
    """Tensors by name; those on disk are read whenever they are asked for, and not kept.

    Attributes:
        real: which positions of the batch's sequences are no padding, (samples, positions); None where all are.
        stored: the names of tensors that it was given, for those who want to know, and who clear it.
    """

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.stored: set[str] = set()
        self.real: Array | None = tensors.real if isinstance(tensors, Live | PaddedBatch) else None
        self._tensors: dict[str, Array | Stored] = dict(tensors._tensors if isinstance(tensors, Live) else tensors)

    def __getstate__(self) -> dict[str, object]:
        """Return what another process gets: all tensors in memory."""
        return vars(self) | {"_tensors": dict(self)}

    def __getitem__(self, name: str) -> Array:
        value = self._tensors[name]
        return value.read() if isinstance(value, Stored) else value

    def __setitem__(self, name: str, value: Array) -> None:
        self._tensors[name] = value
        self.stored.add(name)

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's type without reading it."""
        return self._tensors[name].dtype

    @property
    def nbytes(self) -> int:
        """The bytes that are in memory."""
        return sum(v.nbytes for v in self._tensors.values() if not isinstance(v, Stored))

    def store(self, name: str, value: Array, shelf: Shelf) -> None:
        """Take a tensor, in memory or in a file."""
        self._tensors[name] = shelf.place(value)
        self.stored.add(name)


@dataclass
class Shelf:
    """The places of new tensors: memory as long as there is room, else one file.

    Attributes:
        room: the bytes that may still go to memory.
    """

    room: int
    _file: _File | None = field(default=None, init=False)

    def place(self, value: Array) -> Array | Stored:
        """Return the value itself where there is room, else its place in the file."""
        if value.nbytes <= self.room or not value.nbytes or value.dtype.hasobject:
            self.room -= value.nbytes
            return value
        self._file = self._file or _File()
        return Stored(self._file, self._file.append(value), value.dtype, value.shape)
