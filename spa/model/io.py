"""Reading models from every source, and the checks that analysis relies on."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from spa.errors import ModelError, UnsupportedError
from spa.model.files import location_of, read_bytes
from spa.model.graph import stored_tensors, subgraphs_of, tensor_array, tensors_of
from spa.model.normalise import normalise
from spa.model.slices import Slices, embed
from spa.model.versions import OLDEST_OPSET, covers_opset, newest_opset
from spa.model.wire import without_data

NOT_OUTSIDE = "keeps sparse tensors or parts for training in external data. Store them in the model file itself."
LAZY_FILE = 2**24  # bytes of a file in which the data of weights may be left
LAZY_WEIGHT = 2**19 + 1  # bytes of such data; lists of numbers that say what an input may hold are smaller
MOST_TAKEN_IN = 2**30  # bytes of external data in sub-graphs and attributes that are read into the message


@dataclass(frozen=True)
class Source:
    """A model and its origin.

    Attributes:
        model: the message; external data is not loaded.
        path: its file, or None.
        base: the folder that external data lies in, or None.
        sizes: of open axes, by ``input[axis]``, at which the model is known to make sense; it is checked there.
        macs: of a run at these sizes, per sample, where they are known.
        obstacle: what keeps onnxruntime from running it, where that is known: an operator without a kernel, say.
        stamps: by path of a file of external data, what tells whether it was written to since.
        slices: what initializers of the message without data stand for, by name.
        inside: the name of the model file itself where the data of large weights was left there, else None.
    """

    model: ModelProto
    path: Path | None = None
    base: Path | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    macs: float | None = None
    obstacle: str | None = None
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    slices: Mapping[str, Slices] = field(default_factory=dict)
    inside: str | None = None

    @property
    def keeps_outside(self) -> bool:
        """Return whether initializers have their data in other files than the model's own."""
        outside = (t for t in self.model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        return any(location_of(tensor) != self.inside for tensor in outside)

    def embedded(self) -> Source:
        """Read what was left in the model file itself into the message, in place, and return the source without."""
        if self.inside is None or self.base is None:
            return self
        embed(self.model, self.base, lambda tensor: location_of(tensor) == self.inside)
        return replace(self, inside=None, stamps={})


def load(source: Any, *, lazily: bool = False) -> Source:
    """Read a model and check it for what analysis relies on. The given object is not changed.

    Args:
        source: a path, the file's bytes, a ``ModelProto`` or an onnx-graphsurgeon ``Graph``.
        lazily: leave the data of large weights in the model file, where it is large (``Source.inside``).

    Raises:
        UnreadableError: the file is not there or cannot be opened.
        ModelError: it is not ONNX, the model is malformed, or its external data is missing, lies outside its folder or
            in what is no regular file.
        UnsupportedError: the opset is too old or too new, or data lies outside where it cannot be written again.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    name = repr(str(path)) if path else "the model"
    inside = None
    if isinstance(source, ModelProto):
        model = source
    elif lazily and path is not None and (slim := without_weights(path)) is not None:
        model, inside = slim, path.name
    elif path is not None or isinstance(source, bytes):
        model = _parse(read_bytes(path) if path else source, name)
    elif type(source).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon as gs

        model = gs.export_onnx(source)
    else:
        raise ModelError(f"cannot read a {type(source).__name__}. Give a path, bytes, a ModelProto or a gs.Graph.")
    base = path.parent if path else None
    _check(model, name)
    _check_names(model, name)
    stamps = _check_external(model, name, base)  # functions included, before they are inlined
    _check_sparse(model, name)  # before they are made dense
    try:
        model = normalise(model, own=source is not model)
    except (ValidationError, InferenceError, RuntimeError) as error:  # of onnx's inliner
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(f"{name}: its local functions cannot be inlined: {reason}. Export it again.") from error
    _check_placeable(model, name)
    if base is not None:  # and the message is our own
        _take_in(model, base)
    return Source(model, path, base, stamps=stamps, inside=inside)


def without_weights(path: Path) -> ModelProto | None:
    """Read a large model file but for the data of its large weights, which it then has in itself as external data.

    Args:
        path: the file.

    Returns:
        The message; None where the file is small, has data in other files, or is to be read as a whole.
    """
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size < LAZY_FILE:
            return None
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            view = memoryview(content)
            try:
                return ModelProto.FromString(without_data(view, path.name, LAZY_WEIGHT))
            finally:
                view.release()
    except (OSError, ValueError, DecodeError):  # said better where the file is read as a whole
        return None


def _take_in(model: ModelProto, base: Path) -> None:
    """Read external data of attributes into the model: parts of a network that are run alone have no folder.

    Whole networks inside a sub-graph stay outside, where they would not fit into one message.
    """
    stored = islice(tensors_of(model.graph), len(model.graph.initializer), None)  # which come first
    inner = [tensor for tensor in stored if tensor.data_location == TensorProto.EXTERNAL]
    arrays = [tensor_array(tensor, base) for tensor in inner]
    if sum(array.nbytes for array in arrays) > MOST_TAKEN_IN:
        return
    for tensor, array in zip(inner, arrays, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def unchanged(source: Source) -> None:
    """Refuse a model whose external data was written to since it was read.

    Raises:
        ModelError: names the file.
    """
    if not any(t.data_location == TensorProto.EXTERNAL for t in stored_tensors(source.model)):
        return
    for file, stamp in source.stamps.items():
        if not file.exists() or _stamp(file.stat()) != stamp:
            raise ModelError(f"the external data file {str(file)!r} has changed since it was read. Start again.")


def _stamp(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _parse(data: bytes, name: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{name} is truncated or not an ONNX file. Export or copy it again.") from error
    return model


def _check(model: ModelProto, name: str) -> None:
    if not model.opset_import or not model.HasField("graph") or not (model.graph.node or model.graph.initializer):
        raise ModelError(f"{name} is not an ONNX model: it has no graph or no opset. Export or copy it again.")
    _check_text(model, name)
    if not model.graph.output:
        raise ModelError(f"{name} has no outputs. Export it again with its outputs named.")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), OLDEST_OPSET)
    if not covers_opset(opset):
        remedy = (
            "Export with a newer one" if opset < OLDEST_OPSET else "Export with an older one, or update onnxruntime"
        )
        raise UnsupportedError(f"{name} has opset {opset}; {OLDEST_OPSET} to {newest_opset()} are covered. {remedy}.")


def _check_text(model: ModelProto, name: str) -> None:
    """Refuse names that are not text: protobuf reads any bytes, and gives them as bytes."""
    graphs, nodes = [model.graph], [n for f in model.functions for n in f.node]
    words: list[Any] = [word for f in model.functions for word in (f.name, f.domain, *f.input, *f.output)]
    words += [o.domain for o in model.opset_import]
    while graphs or nodes:
        for graph in graphs:
            values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
            words += [graph.name, *(value.name for value in values)]
            words += [d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim]
            nodes += graph.node
        for node in nodes:
            words += [node.op_type, node.domain, node.name, *node.input, *node.output]
            words += [attribute.name for attribute in node.attribute]
        graphs, nodes = [inner for node in nodes for inner in subgraphs_of(node)], []
    wrong = next((word for word in words if isinstance(word, bytes)), None)
    if wrong is not None:
        raise ModelError(f"{name}: the name {wrong!r} is not text in UTF-8. Export the model again.")


def _check_external(model: ModelProto, name: str, base: Path | None) -> dict[Path, tuple[int, ...]]:
    """Check all external data of a model, wherever in it a tensor stands; return the stamp of each file."""
    files: dict[Path, tuple[int, ...]] = {}
    for tensor in stored_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            file = _data_file(tensor, name, base)
            files[file] = _stamp(file.stat())
    return files


def _check_sparse(model: ModelProto, name: str) -> None:
    """Refuse sparse initializers in external data."""
    parts = (part for sparse in model.graph.sparse_initializer for part in (sparse.values, sparse.indices))
    if any(part.data_location == TensorProto.EXTERNAL for part in parts):
        raise UnsupportedError(f"{name} {NOT_OUTSIDE}")


def _check_placeable(model: ModelProto, name: str) -> None:
    """Refuse external data where it cannot be pruned or written again."""
    outside = [t for t in stored_tensors(model) if t.data_location == TensorProto.EXTERNAL]
    known = [t for t in tensors_of(model.graph) if t.data_location == TensorProto.EXTERNAL]
    if len(outside) > len(known):
        raise UnsupportedError(f"{name} {NOT_OUTSIDE}")


def _data_file(tensor: TensorProto, name: str, base: Path | None) -> Path:
    """Return the file that a tensor's external data lies in: regular, large enough, in the model's folder."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise ModelError(f"{name}: tensor {tensor.name!r} has external data. Give the model's path instead.")
    root = base.resolve()
    try:
        file = (base / location).resolve()
    except (OSError, ValueError, RuntimeError):  # a null character; links in a circle
        file = root
    if not location or os.path.isabs(location) or root not in file.parents:
        raise ModelError(
            f"{name}: tensor {tensor.name!r} lies in {location!r}, outside the model's folder. "
            "Move the data beside the model; other places are refused."
        )
    try:
        about = file.stat()
    except OSError as error:
        raise ModelError(
            f"{name}: the external data file {location!r} of tensor {tensor.name!r} is missing. "
            "Put it beside the model."
        ) from error
    if not stat.S_ISREG(about.st_mode):
        raise ModelError(
            f"{name}: the external data {location!r} of tensor {tensor.name!r} is no regular file. Export it again."
        )
    bounds = [entries.get(key) or "0" for key in ("offset", "length")]
    if not all(bound.isascii() and bound.isdigit() and len(bound) < 20 for bound in bounds):
        raise ModelError(
            f"{name}: tensor {tensor.name!r} has external data at {bounds[0]!r}, of length {bounds[1]!r}: "
            "these are no numbers. Export it again."
        )
    if sum(map(int, bounds)) > about.st_size:
        raise ModelError(
            f"{name}: the external data file {location!r} is truncated at tensor {tensor.name!r}. Copy it again."
        )
    return file


def _check_names(model: ModelProto, name: str) -> None:
    """Refuse a graph in which a node reads what none computes."""
    graph = model.graph
    defined = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    defined |= {t.values.name for t in graph.sparse_initializer} | {""}
    defined |= {output for node in graph.node for output in node.output}
    for node in graph.node:
        missing = next((i for i in node.input if i not in defined), None)
        if missing is not None:
            raise ModelError(
                f"{name}: {node.op_type} {node.name!r} reads {missing!r}, which no node computes. "
                "Check the model with onnx.checker."
            )
    undefined = next((o.name for o in graph.output if o.name not in defined), None)
    if undefined is not None:
        raise ModelError(f"{name}: no node computes the output {undefined!r}. Check the model with onnx.checker.")
