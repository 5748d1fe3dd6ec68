"""The same model at another opset, with its graph optimised, or at another IR version; compared before it counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, version_converter

from spa.errors import ModelError, OptionError, PlanError, UnsupportedError
from spa.exporters.checks import allowed, difference, objection
from spa.model.files import INLINE, data_file
from spa.model.versions import OLDEST_IR, OLDEST_OPSET, covers_opset, newest_ir, newest_opset
from spa.running.runtime import ORT_ERRORS, clean_reason

# From its basic level on, onnxruntime merges a zero Pad into MaxPool, which pads with the lowest number.
_WRONG = ["Pad_Fusion"]


def variant(draft: Path, *, opset: int | None, optimise: bool, ir_version: int | None) -> Path:
    """Rewrite a model in this order: opset, graph, IR version.

    Args:
        draft: an ``.onnx`` file that runs, in a temporary folder; results go beside it.
        opset: of the standard domain; converted by ``onnx.version_converter``.
        optimise: let onnxruntime's basic level rewrite the graph, which stays within the standard's operators.
        ir_version: of the file.

    Returns:
        The last result's file.

    Raises:
        PlanError: the numbers are out of range, the conversion is not possible, or what came out is refused by the
            checker, does not run or computes something else.
    """
    path = draft
    if opset is not None and opset != opset_of(load(draft)):
        path = _at_opset(draft, opset)
    if optimise:
        path = _optimised(path)
    if ir_version is not None:
        path = _at_ir(path, ir_version)
    return path


def load(path: Path) -> ModelProto:
    """Read a model without its external data."""
    return onnx.load(path, load_external_data=False)


def opset_of(model: ModelProto) -> int:
    """Return the opset of the standard domain."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), newest_opset())


def optimise_to(path: Path, target: Path, *, level: str, form: str = "ONNX") -> None:
    """Have onnxruntime rewrite a graph for the CPU and save it.

    Args:
        path: an ``.onnx`` file.
        target: the file to write.
        level: ``BASIC`` (operators of the standard) or ``EXTENDED`` (onnxruntime's fused ones, too). What is beyond
            lays weights out for this machine's processor.
        form: ``ONNX`` or ``ORT``.

    Raises:
        UnsupportedError: onnxruntime cannot; carries its reason.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", form)
    if form == "ONNX" and data_file(path).exists():
        name = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{name}_file_name", data_file(target).name)
        options.add_session_config_entry(f"{name}_min_size_in_bytes", str(INLINE))
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_WRONG)
    except ORT_ERRORS as error:
        raise UnsupportedError(f"onnxruntime cannot save the optimised model: {clean_reason(error)}") from error


def _at_opset(draft: Path, opset: int) -> Path:
    model = load(draft)
    remedy = f"Keep opset {opset_of(model)}, or export the model again with opset {opset}."
    if not covers_opset(opset):
        raise OptionError(f"opset {opset} is out of range: {OLDEST_OPSET} to {newest_opset()} can be checked. {remedy}")
    try:
        converted = version_converter.convert_version(model, opset)
    except RuntimeError as error:
        reason = str(error).rpartition("failed: ")[2]
        raise PlanError(f"onnx cannot convert the model to opset {opset}: {reason}. {remedy}") from error
    return _accept(draft, "opset.onnx", converted, f"the model converted to opset {opset} is refused", remedy)


def _optimised(draft: Path) -> Path:
    path = draft.parent / "optimised.onnx"
    remedy = "Write it without optimising; onnxruntime does so when it loads a model."
    try:
        optimise_to(draft, path, level="BASIC")
    except UnsupportedError as error:
        raise PlanError(f"{error} {remedy}") from error
    model, own = load(path), {o.domain for o in load(draft).opset_import}
    used = [o for o in model.opset_import if o.domain in own | set(_domains(model.graph))]
    del model.opset_import[:]  # onnxruntime lists every domain that it knows
    model.opset_import.extend(used)
    return _accept(draft, path.name, model, "the optimised model is refused", remedy)


def _at_ir(draft: Path, ir_version: int) -> Path:
    model = load(draft)
    remedy = f"Keep IR version {model.ir_version}."
    if not OLDEST_IR <= ir_version <= newest_ir():
        raise OptionError(
            f"IR version {ir_version} is out of range: {OLDEST_IR} to {newest_ir()} can be checked. {remedy}"
        )
    model.ir_version = ir_version
    return _accept(draft, "ir.onnx", model, f"the model at IR version {ir_version} is refused", remedy)


def _accept(draft: Path, name: str, model: ModelProto, what: str, remedy: str) -> Path:
    """Write a rewritten model beside its draft, where its external data is, and compare it with the draft."""
    path = draft.parent / name
    path.write_bytes(model.SerializeToString(deterministic=True))
    reason = objection(path)
    if reason is None or objection(draft) is not None:
        try:
            reason = difference(draft, path, allowed(model))
        except ModelError as error:
            reason = str(error).replace(str(path), "it")
    if reason is not None:
        raise PlanError(f"{what}: {reason.rstrip('.')}. {remedy}")
    return path


def _domains(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.domain
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _domains(inner)
