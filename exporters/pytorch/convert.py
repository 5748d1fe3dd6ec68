"""From a pruned network to a module, and from a module to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from onnx import ModelProto
from torch import nn

from spa.errors import InvariantError, UnsupportedError
from spa.exporters.pytorch.check import arrays, difference, feeds_of, made_up, outputs_of, reference, tolerance
from spa.exporters.pytorch.module import OnnxModule, graph_module
from spa.exporters.pytorch.operators import tensor
from spa.exporters.pytorch.write_back import fitted
from spa.frameworks.reasons import first_line
from spa.model.writing import drafts, made_folder
from spa.running.runtime import input_specs

if TYPE_CHECKING:
    from spa.api import Result

OWN, GRAPH = "module", "graph"
FILE = "model.pt2"


def to_torch(
    result: Result,
    module: nn.Module | None = None,
    names: Mapping[str, str] | None = None,
    example_inputs: Any = None,
) -> tuple[nn.Module, str, tuple[str, ...]]:
    """Make a PyTorch module of the pruned network: the user's own class where its code allows it, else the graph.

    Args:
        result: what pruning gave.
        module: the dense module, if it came from one; not changed.
        names: state_dict keys by initializer.
        example_inputs: what the module is called with.

    Returns:
        The module, in evaluation mode unless the dense one trains; ``module`` or ``graph``; and what the user should
        know, such as why it is not the user's own class. Either was compared with onnxruntime.

    Raises:
        UnsupportedError: an operator of the graph is not covered.
    """
    notes: tuple[str, ...] = ()
    if module is not None and names is not None and example_inputs is not None:
        try:
            small, notes = fitted(module, result, names, example_inputs)
            return small, OWN, notes
        except UnsupportedError as finding:
            notes = (f"{finding} What you got is the ONNX graph as a module, with the same state_dict keys.",)
    buffers = [n for n, key in (names or {}).items() if module is not None and key in dict(module.named_buffers())]
    graph = graph_module(result.model, result.source.base, names, buffers)
    _check(graph, result.model, result.source.base, example_inputs)
    return graph.train(module is not None and module.training), GRAPH, notes


def _check(module: OnnxModule, model: ModelProto, base: Path | None, example_inputs: Any) -> None:
    feeds = made_up(model, base) if example_inputs is None else feeds_of(model, example_inputs)
    got = outputs_of(module, (), {n: tensor(v) for n, v in feeds.items()})
    off = difference(got, reference(model, base, feeds))
    if not off <= tolerance(model):
        raise InvariantError(f"the graph in PyTorch differs from onnxruntime by {off:.2g} of the largest output.")


def save(source: Result | ModelProto, directory: str | os.PathLike[str], base: Path | None = None) -> Path:
    """Write a network as a program that ``torch.export.load`` reads, without this package.

    Axes that are open in the model stay open where the program allows it. What was written is read again and compared
    with onnxruntime.

    Args:
        source: a result, or an ONNX model.
        directory: where ``model.pt2`` is put; made where it is missing.
        base: the folder of an ONNX model's external data.

    Returns:
        The file.

    Raises:
        UnsupportedError: an operator is not covered, or PyTorch cannot trace the graph (data decide what is run).
        SpaError: the file cannot be written.
    """
    model, base = (source, base) if isinstance(source, ModelProto) else (source.model, source.source.base)
    module = graph_module(model, base).eval()
    feeds = made_up(model, base)
    args = tuple(tensor(feeds[n]) for n in module.input_names)
    target = Path(directory)
    with made_folder(target), drafts(target / FILE) as draft:
        file = draft.folder / FILE
        try:
            torch.export.save(torch.export.export(module, args, dynamic_shapes=(_open_axes(model),)), file)
            with torch.no_grad():
                got = arrays(torch.export.load(file).module()(*args))
        except Exception as error:  # torch.export raises what each of its many parts raises
            reason = first_line(error)
            raise UnsupportedError(f"torch.export cannot take the network: {reason} Export to ONNX instead.") from error
        off = difference(got, reference(model, base, feeds))
        if not off <= tolerance(model):
            raise InvariantError(f"the saved program differs from onnxruntime by {off:.2g} of the largest output.")
        draft.publish_one(file)
    return target / FILE


def _open_axes(model: ModelProto) -> tuple[dict[int, Any], ...]:
    """Return for each input the axes whose size is left open, as far as the trace allows."""
    specs = input_specs(model)
    return tuple({i: torch.export.Dim.AUTO for i, n in enumerate(s.shape) if not isinstance(n, int)} for s in specs)
