"""Simplification of a model before it is analysed.

Constants are folded, branches that are known to run are inlined, two networks of which data decides which one runs are
taken apart, and the bodies of loops are laid flat.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from spa.errors import ModelError, SpaError
from spa.model.alternatives import separated
from spa.model.bodies import KINDS, flattened
from spa.model.branches import inline_branches
from spa.model.constants import fold_constants, has_folds
from spa.model.graph import Graph
from spa.model.halves import SKELETON, is_separated
from spa.model.io import Source
from spa.model.marks import FLAT
from spa.model.normalise import unique_names
from spa.model.two_points import two_points


def simplified(source: Source, *, fold: bool = True) -> Source:
    """Return a model that computes the same with fewer operators; the same source where there is nothing to do.

    Args:
        source: the model, whose message is not changed.
        fold: whether constants may be folded, which takes the names of weights away from those behind operators.
    """
    if is_separated(source.model):  # a mark of ours, which no file has by rights
        source = replace(source, model=_unmarked(source.model))
    if any(o.domain == FLAT for o in source.model.opset_import):
        raise ModelError(f"the model imports the domain {FLAT!r}, which is our own. Rename it.")
    has_bodies = any(node.op_type in KINDS for node in source.model.graph.node)
    if not has_bodies and not (fold and has_folds(source.model, source.base)):
        return source
    model = ModelProto()
    model.CopyFrom(source.model)
    changed = _simplify(model, source.base, fold)
    if fold and (both := _taken_apart(model, source)) is not None:
        model, changed = both, changed + 1
    while (flat := flattened(model, source.base)) is not None:  # what was inside may be known to run, or be folded
        model, changed = flat, changed + 1
        if not _simplify(model, source.base, fold):
            break
    if not changed:
        return source
    unique_names(model)
    return replace(source, model=model)


def _unmarked(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    copy.metadata_props.extend(entry for entry in model.metadata_props if entry.key != SKELETON)
    return copy


def _simplify(model: ModelProto, base: Path | None, fold: bool = True) -> int:
    """Fold and inline in place until nothing is left to do; return how much was done."""
    changed = 0
    while True:
        changed += fold_constants(model, base) if fold else 0
        inlined = inline_branches(model)
        changed += inlined
        if not inlined:
            return changed


def _taken_apart(model: ModelProto, source: Source) -> ModelProto | None:
    """Return the two networks of a model that decides between them, where there are sizes at which both run."""
    both = separated(model, lambda half: _simplify(half, source.base))
    if both is None:
        return None
    try:
        two_points(Graph(both, source.base))
    except SpaError:
        return None
    return both
