"""PyTorch networks to ONNX.

The network is captured by ``torch.export`` and translated without optimisation, or traced by the older TorchScript
exporter where that fails; then cleaned up (``_tidy``), named by its state_dict, and compared in onnxruntime with its
own outputs (``_torch_finish``). Both exporters see it through ``_torch_interface.Flat``, which takes and gives tensors
only.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from spa.errors import ModelError, PlanError, SpaError, UnsupportedError
from spa.extras import extra
from spa.frameworks.torch import unwrapped
from spa.importers import Imported
from spa.model.versions import newest_opset

with extra("torch"):
    import torch
    from torch import nn
    from torch.ao.quantization import FakeQuantizeBase

from spa.importers import _torch_files as files
from spa.importers._torch_finish import DifferentError, declared_axes, finish
from spa.importers._torch_interface import (
    Axes,
    Example,
    Flat,
    Run,
    batch_axes,
    given_axes,
    reason,
    resized,
    single,
    split,
)

EXPORTERS = {"dynamo": "torch.onnx.export(dynamo=True)", "torchscript": "torch.onnx.export(dynamo=False)"}
OPSET = 18  # the one that PyTorch's exporter is written in; it converts to later ones
NEWEST_TRACED = 20  # the TorchScript exporter's last
REMEDY = "Change that operator, or convert a part of the network."
HALVES = "onnxruntime has few operators in bfloat16: convert network.float()."
PREFIX = "module."  # of names within Flat
_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


def convert(
    source: Any,
    example_inputs: Any = None,
    *,
    factory: files.Factory | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    opset: int = OPSET,
    trust: bool = False,
    exporter: str | None = None,
) -> Imported:
    """Convert a PyTorch network to ONNX, in evaluation mode.

    Args:
        source: an ``nn.Module`` (not changed), an ``ExportedProgram``, a ``ScriptModule``, a state_dict, or a file:
            TorchScript, ``torch.export``'s (.pt2), a checkpoint or safetensors.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; arrays count as tensors. An
            exported program brings its own.
        factory: what makes the network that a checkpoint's weights belong to: ``package.module:function`` (the working
            directory is searched, too), or the function itself; it is called without arguments.
        dynamic_batch: leave the first axis open, of every input whose first axis is as long as the first input's. Where
            the network does not allow that, it stays closed, and the notes say why.
        dynamic_shapes: which axes are open instead: for each argument of ``forward`` (a dict by name, or a tuple)
            a dict from axis to a name or a ``torch.export.Dim``, or None. Nothing less is then accepted.
        opset: of ONNX.
        trust: allow files to run code while they are read, which pickled networks need.
        exporter: ``dynamo`` or ``torchscript``; by default the first of these that succeeds.

    Returns:
        The network in ONNX, checked against its own outputs: with an open batch, at three sizes, one of them 1; with
        other open axes, at two.

    Raises:
        PlanError: an option is missing or fits nothing: example inputs, a factory, an opset.
        ModelError: the file cannot be read, or the outputs in ONNX are not those of the network.
        UnsupportedError: neither exporter can express the network.
    """
    _check_options(opset, exporter)
    with _quiet():
        network, notes = _read(source, factory, trust)
        if isinstance(network, torch.export.ExportedProgram):
            if dynamic_shapes is not None or exporter == "torchscript":
                raise PlanError(
                    "an ExportedProgram has its open axes and its graph: leave dynamic_shapes and exporter."
                )
            imported = _convert_program(network, example_inputs, opset)
        else:
            example = Example.of(network, split(example_inputs))
            with _unchanged(network):
                network.eval()
                imported = _convert_module(network, example, dynamic_batch, dynamic_shapes, opset, exporter)
    return replace(imported, notes=(*notes, *imported.notes))


def _check_options(opset: int, exporter: str | None) -> None:
    if not OPSET <= opset <= newest_opset():
        raise PlanError(
            f"opset is {opset}. Choose one of {OPSET} to {newest_opset()}, which exporters and runtimes know."
        )
    if exporter is not None and exporter not in EXPORTERS:
        raise PlanError(f"unknown exporter {exporter!r}. Choose one of {', '.join(EXPORTERS)}.")


def _read(
    source: Any, factory: files.Factory | None, trust: bool
) -> tuple[nn.Module | torch.export.ExportedProgram, tuple[str, ...]]:
    note = ""
    if isinstance(source, str | os.PathLike):
        source, note = files.read(Path(source), factory, trust)
    elif isinstance(source, Mapping):
        source, note = files.assembled(source, factory, "the state_dict")
    elif factory is not None:
        raise PlanError(
            f"a factory is for checkpoints; the {type(source).__name__} is a network already. Leave it out."
        )
    source = unwrapped(source)
    if not isinstance(source, nn.Module | torch.export.ExportedProgram):
        raise ModelError(
            f"cannot convert a {type(source).__name__}. Give an nn.Module, ExportedProgram, ScriptModule or file."
        )
    if not hasattr(source, "training") and isinstance(source, torch.jit.ScriptModule):
        raise UnsupportedError("frozen TorchScript has no parameters any more. Convert the network before freezing it.")
    if isinstance(source, nn.Module) and any(isinstance(m, FakeQuantizeBase) for m in source.modules()):
        raise UnsupportedError(
            f"the {type(source).__name__} was prepared for quantisation-aware training (torch.ao), which ONNX has no "
            "operators for. Prune the network before that, or give the ONNX file of the quantised one."
        )
    return source, (note,) if note else ()


# -- leaving things as they were ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings and log messages inside; what matters is in the notes."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what exporters print, from Python and from C++: whole graphs at times."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        open(os.devnull, "w") as nowhere,
    ):
        streams = {number: os.dup(number) for number in (1, 2)}
        for number in streams:
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for number, stream in streams.items():
                os.dup2(stream, number)
                os.close(stream)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Restore in the end the module's flags and buffers, and the state of random numbers."""
    training = {m: m.training for m in module.modules()}
    needs_gradient = {p: p.requires_grad for p in module.parameters()}
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng():
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # no exporter knows its kernels
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for owner, flag in training.items():
                if owner.training != flag:
                    owner.training = flag
            for parameter, flag in needs_gradient.items():
                parameter.requires_grad_(flag)
            for owner, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                if getattr(owner, name) is not buffer and not isinstance(owner, torch.jit.ScriptModule):
                    setattr(owner, name, buffer)


# -- exporting ---------------------------------------------------------------------------------------------------


def _convert_module(
    module: nn.Module,
    example: Example,
    dynamic_batch: bool,
    dynamic_shapes: Any,
    opset: int,
    exporter: str | None,
) -> Imported:
    runs = [Run.first(module, example)]
    closed: tuple[Axes, ...] = tuple({} for _ in example.tensors)
    axes, why_closed = closed, ""
    if dynamic_shapes is not None:
        axes = given_axes(example, dynamic_shapes)
    elif dynamic_batch:
        axes = batch_axes(example)
    if any(axes):
        second = resized(module, example, axes)
        if second is not None:
            runs.append(second)
            if dynamic_shapes is None:
                runs += single(module, example, axes)
        elif dynamic_shapes is not None:
            raise PlanError(
                f"{example.call} takes no other sizes of the axes that dynamic_shapes opens. Leave them out."
            )
        else:
            axes, why_closed = closed, "the network itself takes no other"
    scripted = isinstance(module, torch.jit.ScriptModule)
    exporters = [exporter] if exporter else ["torchscript"] if scripted else list(EXPORTERS)
    choices = [axes, closed] if any(axes) and dynamic_shapes is None else [axes]
    flat = Flat(module, example, [name for name, _ in runs[0].outputs])
    failures: list[tuple[str, Exception]] = []
    for name, open_ in itertools.product(exporters, choices):
        try:
            narrow = dynamic_shapes is not None
            with _silent():
                model, limits = _export(flat, example.names, runs, open_, opset, name, narrow)
            checks = runs if any(open_) else runs[:1]
            imported = finish(model, module.state_dict(), example.names, checks, open_, PREFIX)
        except Exception as error:  # exporters raise whatever they like
            failures.append((name, error))
            continue
        notes = [f"{EXPORTERS[n]} fails: {reason(error)}" for n, error in failures[:1] if n != name]
        notes += limits
        if any(axes) and not any(open_):
            why_closed = reason(next(error for n, error in failures if n == name))
        if why_closed:
            notes.append(f"the batch is fixed to that of the example inputs: {why_closed}")
        if name == "torchscript" and opset > NEWEST_TRACED:
            notes.append(f"opset {NEWEST_TRACED} in place of {opset}: the TorchScript exporter knows no later one")
        return replace(imported, exporter=EXPORTERS[name], notes=(*notes, *imported.notes))
    halves = any(torch.is_tensor(t) and t.dtype == torch.bfloat16 for t in module.state_dict().values())
    remedy = HALVES if halves else REMEDY
    if exporter is not None and not scripted:
        other = next(name for name in EXPORTERS if name != exporter)
        remedy = f"Try exporter={other!r}, which the default does, too. {remedy}"
    raise _refusal(example.call, failures, remedy)


def _convert_program(program: torch.export.ExportedProgram, example_inputs: Any, opset: int) -> Imported:
    module = program.module()
    example = Example.of(module, program.example_inputs if example_inputs is None else split(example_inputs))
    with _unchanged(module):
        runs = [Run.first(module, example)]
        try:
            with _silent():
                model = _translate(program, opset)
        except Exception as error:  # the exporter raises whatever it likes
            raise _refusal("the ExportedProgram", [("dynamo", error)]) from error
        axes = declared_axes(model)
        notes = []
        if any(axes):
            second = resized(module, example, axes)
            if second is None:
                notes.append("checked at one size only: the program takes no size beside it of all its open axes")
            else:
                runs.append(second)
        else:
            notes.append("no axis is open: the program was exported so. Give dynamic_shapes to torch.export.export")
        imported = finish(model, program.state_dict, example.names, runs, axes, "")
    return replace(imported, exporter=EXPORTERS["dynamo"], notes=(*notes, *imported.notes))


def _export(
    flat: Flat, names: Sequence[str], runs: Sequence[Run], axes: Sequence[Axes], opset: int, exporter: str, narrow: bool
) -> tuple[ModelProto, list[str]]:
    """Export the network, under the exporter's names; return what limits its open axes, too.

    Args:
        flat: the network.
        names: of the inputs.
        runs: of the network, whose inputs serve as examples.
        axes: to be left open.
        opset: of ONNX.
        exporter: a key of ``EXPORTERS``.
        narrow: whether open axes may be limited to the sizes that the network allows.
    """
    # Exporters take an axis of size 1 for a constant.
    inputs = next((r.inputs for r in runs if _all_long(r.inputs, axes)), runs[0].inputs)
    if exporter == "torchscript":
        return _trace(flat, names, inputs, axes, opset, len(runs[0].outputs)), []
    shapes = [{axis: dim for axis, (_, dim) in open_.items()} for open_ in axes]
    try:
        return _translate(_capture(flat, inputs, shapes), opset), []
    except torch._dynamo.exc.UserError as error:
        limits = _limits(str(error)) if narrow else {}
        if not limits:
            raise
    dims = {label: torch.export.Dim(label, min=low, max=high) for label, (low, high) in limits.items()}
    shapes = [{axis: dims.get(label, dim) for axis, (label, dim) in open_.items()} for open_ in axes]
    notes = [
        f"the network takes {label!r} of at {'least' if high is None else 'most'} {low if high is None else high}"
        for label, (low, high) in limits.items()
    ]
    return _translate(_capture(flat, inputs, shapes), opset), notes


def _capture(
    flat: Flat, inputs: tuple[torch.Tensor, ...], shapes: Sequence[Mapping[int, Any]]
) -> torch.export.ExportedProgram:
    return torch.export.export(
        flat,
        inputs,
        dynamic_shapes={"tensors": tuple(shapes)} if inputs else None,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _limits(message: str) -> dict[str, tuple[int, int | None]]:
    """Return the ranges that ``torch.export`` suggests for open axes; empty where it suggests anything else, too."""
    _, _, suggested = message.partition("Suggested fixes:")
    limits = {}
    for line in suggested.strip().partition("\n\n")[0].splitlines():
        match = re.fullmatch(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", line.strip())
        if match is None:
            return {}
        label, low, high = match.groups()
        limits[label] = (int(low or 0), None if high is None else int(high))
    return limits


def _all_long(tensors: Sequence[torch.Tensor], axes: Sequence[Axes]) -> bool:
    return all(t.shape[axis] > 1 for t, open_ in zip(tensors, axes, strict=True) for axis in open_)


def _translate(program: torch.export.ExportedProgram, opset: int) -> ModelProto:
    translated = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
    if translated is None:
        raise UnsupportedError("PyTorch's exporter returned nothing.")
    return translated.model_proto


def _trace(
    flat: Flat, names: Sequence[str], inputs: tuple[torch.Tensor, ...], axes: Sequence[Axes], opset: int, outputs: int
) -> ModelProto:
    names = [f"tensors.{name}" for name in names]
    if isinstance(flat.module, torch.jit.ScriptModule):  # the exporter's own tracing does not enter these
        flat = torch.jit.trace(flat, inputs, check_trace=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            flat,
            inputs,
            str(path),  # no Path: only beside a string does the exporter put weights of more than 2 GiB
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            opset_version=min(opset, NEWEST_TRACED),
            input_names=names,
            output_names=[f"results.{i}" for i in range(outputs)],
            dynamic_axes={
                n: {a: label for a, (label, _) in open_.items()} for n, open_ in zip(names, axes, strict=True)
            },
        )
        model = onnx.load(path)
    for node in model.graph.node:
        node.name = node.name.replace(f"/{PREFIX[:-1]}/", "/", 1)
    return model


def _refusal(call: str, failures: Sequence[tuple[str, Exception]], remedy: str = REMEDY) -> SpaError:
    """Make the error of a conversion in which nothing succeeded."""
    different = next((error for _, error in failures if isinstance(error, DifferentError)), None)
    if different is not None:
        return ModelError(f"{call} in ONNX is not the same: {different} Check that its outputs depend on nothing else.")
    told = "; ".join(dict.fromkeys(f"{EXPORTERS[name]}: {reason(error).rstrip('.')}" for name, error in failures))
    return UnsupportedError(f"{call} cannot be expressed in ONNX. {told}. {remedy}")
