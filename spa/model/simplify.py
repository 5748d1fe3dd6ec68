"""Simplification of a model before it is analysed: constants are folded, and branches that are known to run inlined."""

from __future__ import annotations

from dataclasses import replace

from onnx import ModelProto

from spa.model.branches import inline_branches
from spa.model.constants import fold_constants, has_folds
from spa.model.io import Source
from spa.model.normalise import unique_names


def simplified(source: Source, *, fold: bool = True) -> Source:
    """Return a model that computes the same with fewer operators; the same source where there is nothing to do.

    Args:
        source: the model, whose message is not changed.
        fold: whether constants may be folded, which takes the names of weights away from those behind operators.
    """
    has_branches = any(node.op_type == "If" for node in source.model.graph.node)
    if not has_branches and not (fold and has_folds(source.model, source.base)):
        return source
    model = ModelProto()
    model.CopyFrom(source.model)
    changed = 0
    while True:
        changed += fold_constants(model, source.base) if fold else 0
        inlined = inline_branches(model)
        if not inlined:
            break
        changed += inlined
    if not changed:
        return source
    unique_names(model)
    return replace(source, model=model)
