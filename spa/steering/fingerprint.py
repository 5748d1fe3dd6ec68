"""Fingerprints, which tell whether a folder holds what the same model, options and inputs made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from spa._version import __version__

BLOCK = 1 << 20


def of_run(model: ModelProto, options: Mapping[str, Mapping[str, Any]], inputs: Iterable[Any]) -> str | None:
    """Return a fingerprint of a calibration: the model, the options, the inputs, and the version.

    Args:
        model: with its weights.
        options: of the request by section; those on who does the work do not count.
        inputs: paths, or arrays.

    Returns:
        None where inputs cannot be known without using them up.
    """
    contents = [content_of(value) for value in inputs]
    if None in contents:
        return None
    counted = {section: values for section, values in options.items() if section != "execution"}
    digest = hashlib.sha256(json.dumps([counted, contents, __version__], sort_keys=True, default=str).encode())
    graph = model.graph
    for part in (*model.opset_import, *graph.input, *graph.output, *graph.node, *graph.initializer):
        digest.update(part.SerializeToString(deterministic=True))  # a whole message of 2 GB has no bytes
    return digest.hexdigest()


def content_of(value: Any) -> str | None:
    """Return a fingerprint of inputs; None where their content cannot be known without using them up.

    Args:
        value: a path, whose files count (of a folder their names and sizes), or arrays in mappings and sequences.

    >>> import numpy as np
    >>> content_of({"x": np.arange(3)}) == content_of({"x": np.arange(3)}), content_of(iter([1]))
    (True, None)
    """
    if isinstance(value, str | os.PathLike):
        return _of_path(Path(value))
    if not _is_plain(value):
        return None
    import joblib

    return str(joblib.hash(value, hash_name="sha1"))


def _is_plain(value: Any) -> bool:
    """Return whether a value is made of arrays and numbers alone."""
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return type(value) in (list, tuple) and all(_is_plain(v) for v in value)
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return value is None or isinstance(value, str | bytes | int | float | np.generic)


def _of_path(path: Path) -> str:
    """Return a fingerprint of a file's bytes, or of a folder's names and sizes; of the name where nothing is there."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
    elif path.is_file():
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    else:
        digest.update(os.fspath(path).encode())
    return digest.hexdigest()
