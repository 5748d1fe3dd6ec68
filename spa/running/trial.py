"""A first run of a model in a child process, before this one runs it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from spa.errors import SpaError
from spa.model.files import data_file
from spa.model.graph import tensors_of
from spa.model.sizes import kind_of_axis
from spa.running.feeds import make_feeds, open_input, working_feeds
from spa.running.guarded import ForeignFailure, guarded, seconds_for
from spa.running.runtime import Model, input_specs, load_session, model_name
from spa.running.sessions import open_session
from spa.running.windows import is_large, run_by_windows, weight_bytes

SHORT = 8  # tokens that sequences are cut to where the layers of a large model are run one after the other


def try_out(
    model: Model,
    sizes: Mapping[str, int] | None = None,
    macs: float | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> None:
    """Run a model once on made-up inputs, in a child process. Only a crash or a hang counts here.

    Args:
        model: a path, the bytes of a file, or a parsed model; of large weights outside, windows of layers are run.
        sizes: of open axes.
        macs: of the run, where they are known.
        name: what messages call the model.
        base: the folder of a parsed model's external data.

    Raises:
        ForeignFailure: onnxruntime crashes on the model, does not end, or runs out of memory.
    """
    name = model_name(model) if name is None else name
    try:
        guarded(_run, model, sizes, name, base, name=name, seconds=seconds_for(_size(model), macs))
    except ForeignFailure:
        raise
    except SpaError:
        return  # said better where the model is run on the inputs that count


def _run(model: Model, sizes: Mapping[str, int] | None, name: str, base: Path | None) -> None:
    if isinstance(model, ModelProto):  # of any size
        if base is not None and is_large(model) and runs_by_windows(model, base, sizes, name):
            return
        with open_session(model, base, name) as session:
            working_feeds(session, model=model, sizes=sizes, name=name)
    else:
        working_feeds(load_session(model, name=name), model=model, sizes=sizes, name=name)


def runs_by_windows(model: ModelProto, base: Path, sizes: Mapping[str, int] | None, name: str) -> bool:
    """Run a model by windows of layers; return whether that went well, else the run of the whole says why.

    Args:
        model: whose large weights are external data.
        base: their folder.
        sizes: of open axes; sequences are shortened, for kernels and shapes show on few tokens.
        name: what messages call the model.
    """
    inputs = {spec.name: open_input(spec) for spec in input_specs(model)}
    short = {
        key: min(size, SHORT)
        for key, size in (sizes or {}).items()
        if kind_of_axis(inputs[key.rpartition("[")[0]], int(key.rpartition("[")[2][:-1])) == "sequence"
    }
    for chosen in (dict(sizes or {}) | short, sizes):
        with contextlib.suppress(SpaError):
            run_by_windows(model, base, make_feeds(model, batch=1, sizes=chosen), name=name)
            return True
    return False


def _size(model: Model) -> int:
    if isinstance(model, ModelProto):
        return sum(map(weight_bytes, tensors_of(model.graph)))  # ByteSize fails above 2 GiB
    if isinstance(model, bytes):
        return len(model)
    paths = (Path(os.fspath(model)), data_file(Path(os.fspath(model))))
    return sum(path.stat().st_size for path in paths if path.exists())
