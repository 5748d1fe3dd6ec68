"""Writing ``.onnx`` files: checked first, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from spa.errors import OptionError
from spa.exporters.checks import check
from spa.exporters.variants import load, variant
from spa.model.files import place
from spa.model.io import Source, unchanged
from spa.model.writing import drafts


def write(
    source: Source,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    external: bool = False,
    opset: int | None = None,
    ir_version: int | None = None,
    optimise: bool = False,
    name: str = "the model",
) -> Path:
    """Check a model and write it.

    The model goes to a temporary file beside the target, is checked there (``onnx.checker``, loaded and run in
    onnxruntime) and takes the target's name in one step. Weights go to ``NAME.data`` beside it where the source kept
    them outside (``external``), or where the model is too large for one file; both files appear, or none. What another
    model keeps its weights in is never replaced, nor are links, folders and special files.

    Args:
        source: the model to write, which is not changed, with the file that it was made from, if there is one, and
            the folder of its external data.
        path: the target.
        force: allow the target to be the source's file.
        external: keep large weights in a file of their own.
        opset: convert to this opset of the standard domain, upward or downward (``onnx.version_converter``).
        ir_version: write the file with this IR version, for runtimes that refuse newer ones.
        optimise: let onnxruntime's basic level fold and fuse what the standard's operators can express. The file
            runs anywhere, but cannot be pruned as well: BatchNormalization is gone.
        name: what messages call the model.

    Returns:
        The target.

    Raises:
        OptionError: the target is the source's file, or the opset or the IR version is out of range.
        PlanError: the opset, the IR version or the optimised graph is not possible, or computes something else in
            onnxruntime.
        ModelError: onnxruntime cannot load or run the source either.
        SpaError: a file cannot or must not be written.
    """
    target = Path(path)
    if source.path is not None and not force and target.exists() and target.samefile(source.path):
        raise OptionError(f"the output {str(target)!r} is the input. Choose another name, or pass --force.")
    with drafts(target, () if source.path is None else [source.path]) as drafted:
        draft = drafted.folder / target.name
        place(source.model, draft, source.base, external, source.slices, source.inside)
        unchanged(source)
        check(draft, source.path, name, source.sizes, source.macs, source.obstacle)
        rewritten = variant(draft, opset=opset, optimise=optimise, ir_version=ir_version)
        folder = draft.parent
        if rewritten != draft:
            folder = folder / "rewritten"
            folder.mkdir()
            place(load(rewritten), folder / target.name, rewritten.parent, external)
        drafted.publish(folder)
    return target
