"""Writing ``.onnx`` files: checked first, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from spa.errors import InvariantError, ModelError, PlanError, SpaError
from spa.feeds import ranges_for, working_feeds
from spa.graph import tensor_array, tensors_of
from spa.runtime import input_specs, load_session

LARGEST_MESSAGE = 2**31 - 2**20  # protobuf's limit, less some room for what is not weights
INLINE = 1024  # bytes; smaller tensors stay in the model file


def write(
    model: ModelProto,
    path: str | os.PathLike[str],
    *,
    base: Path | None = None,
    source: Path | None = None,
    force: bool = False,
    external: bool = False,
) -> Path:
    """Check a model and write it.

    The model goes to a temporary file beside the target, is checked there (``onnx.checker``, loaded and run in
    onnxruntime) and takes the target's name in one step. Weights go to ``NAME.data`` beside it where the source kept
    them outside (``external``), or where the model is too large for one file.

    Args:
        model: what to write; not changed.
        path: the target.
        base: the folder of the model's external data.
        source: the file that the model was made from.
        force: allow the target to be the source.
        external: keep large weights in a file of their own.

    Returns:
        The target.

    Raises:
        PlanError: the target is the source.
        ModelError: onnxruntime cannot load or run the source either.
        SpaError: the file cannot be written.
    """
    target = Path(path)
    if source is not None and not force and target.exists() and target.samefile(source):
        raise PlanError(f"the output {str(target)!r} is the input. Choose another name, or pass --force.")
    if target.is_dir():
        raise SpaError(f"cannot write {str(target)!r}: it is a folder. Name a file in it.")
    outside = external or any(t.data_location == TensorProto.EXTERNAL for t in tensors_of(model.graph))
    size = sum(len(t.raw_data) for t in tensors_of(model.graph))
    try:
        with _temporary_folder(target) as folder:
            draft = folder / target.name
            if outside or size > LARGEST_MESSAGE:
                _write_outside(model, draft, base)
            else:
                draft.write_bytes(model.SerializeToString(deterministic=True))
            _check(draft, source)
            for file in sorted(folder.iterdir(), reverse=True):
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise SpaError(f"cannot write {str(target)!r}: {error.strerror}. Choose another place.") from error
    return target


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder)


def _write_outside(model: ModelProto, draft: Path, base: Path | None) -> None:
    """Write the large tensors to a data file, one after the other, and the rest to the model file."""
    slim = ModelProto()
    slim.CopyFrom(model)
    with open(draft.parent / f"{draft.name}.data", "wb") as data:
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
            for key, value in (("location", f"{draft.name}.data"), ("offset", offset), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
    draft.write_bytes(slim.SerializeToString(deterministic=True))


def _raw(tensor: TensorProto, base: Path | None) -> bytes | memoryview:
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor.raw_data
    entries = {e.key: e.value for e in tensor.external_data}
    if base is not None and "length" in entries:
        with open(base / entries["location"], "rb") as file:
            file.seek(int(entries.get("offset", 0) or 0))
            return file.read(int(entries["length"]))
    return tensor_array(tensor, base).tobytes()


def _check(draft: Path, source: Path | None) -> None:
    """What is written must pass the checker (unless the source fails it, too), load and run."""
    reason = _objection(draft)
    if reason is not None and (source is None or _objection(source) is None):
        raise ModelError(f"the pruned model fails onnx.checker: {reason}. Check that the original passes it.")
    try:
        _run(draft)
    except ModelError as error:
        if source is not None:
            _run(source)  # raises with onnxruntime's reason where the source is at fault
        raise InvariantError(f"the pruned model does not run: {error}") from error


def _objection(path: Path) -> str | None:
    """What onnx.checker has against a file, or None; it refuses GroupNormalization at opsets 18 to 20, for one."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def _run(path: Path) -> None:
    session = load_session(path)
    working_feeds(session, ranges=ranges_for(path, input_specs(session)), name=repr(str(path)))
