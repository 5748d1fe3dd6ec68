"""The checks that a file passes before it takes its name: the checker, a run, a comparison where it was rewritten."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from spa.errors import InvariantError, ModelError
from spa.model.files import data_file
from spa.model.graph import tensors_of
from spa.model.io import without_weights
from spa.running.feeds import first_run, working_feeds
from spa.running.guarded import ForeignFailure, guarded, seconds_for
from spa.running.obstacle import found
from spa.running.runtime import load_graph, load_session, run
from spa.running.trial import runs_by_windows
from spa.running.windows import is_large

if TYPE_CHECKING:
    from spa.running.verify import OutputDifference

# Relative L2 distance of outputs. Rewriting re-associates sums: torchvision's networks in float32, optimised or in
# OpenVINO, come out within 1e-6. The limits of sixteen-bit types are some twenty times their rounding error.
_ALLOWED: dict[int, float] = {TensorProto.FLOAT16: 2e-2, TensorProto.BFLOAT16: 1e-1}
_ALLOWED_ELSE = 1e-5
_SEEDS = 3


def check(
    draft: Path,
    source: Path | None,
    name: str = "the model",
    sizes: Mapping[str, int] | None = None,
    macs: float | None = None,
    obstacle: str | None = None,
) -> None:
    """Check that a file passes the checker (unless its source fails it, too), loads and runs; in a child process.

    Args:
        draft: the file.
        source: the file that it was made from.
        name: what messages call the draft.
        sizes: of open axes, to run it at; where the source, too, is refused at them, others are tried.
        macs: of a run, where they are known.
        obstacle: what keeps onnxruntime from running the source, where something does.

    Raises:
        ModelError: the source does not load or run either, the checker objects to the draft alone, or onnxruntime
            crashes or does not end.
        InvariantError: the draft does not load or run.
    """
    size = draft.stat().st_size + (data_file(draft).stat().st_size if data_file(draft).exists() else 0)
    seconds = seconds_for(size, macs)
    if obstacle is None:
        try:
            guarded(_check, draft, source, name, sizes, True, name=name, seconds=seconds)
        except ForeignFailure:  # of mapped weights, perhaps
            guarded(_check, draft, source, name, sizes, False, name=name, seconds=seconds)
    else:
        guarded(_check_unrun, draft, source, name, name=name, seconds=seconds)


def _check(draft: Path, source: Path | None, name: str, sizes: Mapping[str, int] | None, mapped: bool) -> None:
    _check_form(draft, source, name)
    try:
        if sizes:
            _run(draft, sizes, mapped)
            return
    except ModelError as error:
        if source is not None and _runs(source, sizes or {}):
            raise InvariantError(f"{name} does not run at sizes at which its source does: {error}") from error
    try:
        _run(draft, None, mapped)
    except ModelError as error:
        if source is not None:
            _run(source)  # raises with onnxruntime's reason where the source is at fault
        raise InvariantError(f"{name} does not run: {error}") from error


def _runs(path: Path, sizes: Mapping[str, int]) -> bool:
    with contextlib.suppress(ModelError):
        _run(path, sizes)
        return True
    return False


def _check_unrun(draft: Path, source: Path | None, name: str) -> None:
    """Check a file that onnxruntime has no kernels for: it must object to nothing else."""
    _check_form(draft, source, name)
    try:
        found(draft)
    except ModelError as error:
        raise InvariantError(f"{name} does not load: {error}") from error


def _check_form(draft: Path, source: Path | None, name: str) -> None:
    reason = objection(draft)
    if reason is not None and (source is None or objection(source) is None):
        raise ModelError(f"{name} fails onnx.checker: {reason}. Check what it was made from.")


def objection(path: Path) -> str | None:
    """Return onnx.checker's objection to a file, or None; it refuses GroupNormalization at opsets 18 to 20, for one."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    except UnicodeDecodeError:  # of its message
        return "a name is not text in UTF-8"
    return None


def _run(path: Path, sizes: Mapping[str, int] | None = None, mapped: bool = False) -> None:
    """Run a file once; ``mapped`` leaves large weights in it, for onnxruntime to map, and runs many by windows."""
    name = repr(str(path))
    model = _with_weights_outside(path) if mapped else None
    if model is not None and is_large(model) and runs_by_windows(model, path.parent, sizes, name):
        return
    session = load_session(path) if model is None else load_session(model, name=name, folder=path.parent)
    working_feeds(session, model=path if model is None else model, sizes=sizes or None, name=name)


def _with_weights_outside(path: Path) -> ModelProto | None:
    """Read a file of which large weights lie outside, or are left in the file; None where none do."""
    return load_graph(path) if data_file(path).exists() else without_weights(path)


def allowed(model: ModelProto) -> float:
    """Return how far rounding alone may move outputs: a relative L2 distance, by the model's coarsest float type."""
    types = {t.data_type for t in tensors_of(model.graph)}
    types |= {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    return max((_ALLOWED.get(t, 0.0) for t in types), default=0.0) or _ALLOWED_ELSE


def difference(original: Path, other: Path, limit: float) -> str | None:
    """Say how a model differs from the original in interface or outputs (onnxruntime, three seeded inputs), or None.

    Args:
        original: an ``.onnx`` file.
        other: what onnxruntime loads.
        limit: the relative L2 distance allowed for outputs of floats; others must be equal.

    Raises:
        ModelError: one of them cannot be loaded or run.
    """
    from spa.running.verify import verify  # not needed where a file is only checked

    report = verify(original, other, atol=0.0)
    if not report.same_interface:
        return report.interface[0].rstrip(".")
    return next((_changed(o) for o in report.outputs if not _within(o, limit)), None)


def _within(output: OutputDifference, limit: float) -> bool:
    if "float" in output.dtype_a and output.relative_l2 is not None:
        return output.dtype_a == output.dtype_b and output.relative_l2 <= limit
    return bool(output.equal)


def _changed(output: OutputDifference) -> str:
    by = "" if output.relative_l2 is None else f" by {output.relative_l2:.2g} of its size"
    return f"output {output.name!r} changes{by}"


def distance(
    original: Path,
    compute: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]],
    batches: Sequence[int | None] = (None,),
) -> float:
    """Return the largest relative L2 distance of an output from onnxruntime's, over seeded inputs.

    Args:
        original: an ``.onnx`` file.
        compute: another runtime: outputs in the model's order, from inputs by name.
        batches: sizes of open batch axes to try; None for a size on which the model runs.
    """
    session = load_session(original)
    worst = 0.0
    for batch in batches:
        recipe, _ = first_run(session, model=original, batch=batch, name=repr(str(original)))
        for seed in range(_SEEDS):
            feeds = recipe.feeds(seed)
            pairs = zip(run(session, feeds), compute(feeds), strict=True)
            worst = max([worst, *(_relative(np.asarray(a), np.asarray(b)) for a, b in pairs)])
    return worst


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the relative L2 distance; infinite where shapes differ, or one is NaN or infinite and the other is not."""
    if a.shape != b.shape:
        return np.inf
    x, y = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    different = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not different.any():
        return 0.0
    size = np.linalg.norm(x[np.isfinite(x)])
    distance = np.linalg.norm(x[different] - y[different]) / size if size else np.inf
    return float(distance) if np.isfinite(distance) else np.inf
