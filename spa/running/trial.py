"""A first run of a model in a child process, before this one runs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from spa.errors import SpaError
from spa.model.files import data_file
from spa.model.graph import tensors_of
from spa.running.feeds import working_feeds
from spa.running.guarded import ForeignFailure, guarded, seconds_for
from spa.running.runtime import Model, load_session, model_name
from spa.running.sessions import open_session


def try_out(
    model: Model, sizes: Mapping[str, int] | None = None, macs: float | None = None, name: str | None = None
) -> None:
    """Run a model once on made-up inputs, in a child process. Only a crash or a hang counts here.

    Args:
        model: a path, the bytes of a file, or a parsed model that holds its weights.
        sizes: of open axes.
        macs: of the run, where they are known.
        name: what messages call the model.

    Raises:
        ForeignFailure: onnxruntime crashes on the model, does not end, or runs out of memory.
    """
    name = model_name(model) if name is None else name
    try:
        guarded(_run, model, sizes, name, name=name, seconds=seconds_for(_size(model), macs))
    except ForeignFailure:
        raise
    except SpaError:
        return  # said better where the model is run on the inputs that count


def _run(model: Model, sizes: Mapping[str, int] | None, name: str) -> None:
    if isinstance(model, ModelProto):  # of any size
        with open_session(model, name=name) as session:
            working_feeds(session, model=model, sizes=sizes, name=name)
    else:
        working_feeds(load_session(model, name=name), model=model, sizes=sizes, name=name)


def _size(model: Model) -> int:
    if isinstance(model, ModelProto):
        return sum(len(t.raw_data) for t in tensors_of(model.graph))  # ByteSize fails above 2 GiB
    if isinstance(model, bytes):
        return len(model)
    paths = (Path(os.fspath(model)), data_file(Path(os.fspath(model))))
    return sum(path.stat().st_size for path in paths if path.exists())
