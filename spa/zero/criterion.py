"""The criterion ``zero``: remove the channels whose removal changes nothing, whatever the budget."""

from __future__ import annotations

from spa.coupling.analysis import Branch
from spa.criteria.answers import Removal
from spa.criteria.context import Context
from spa.criteria.registry import Criterion, criterion


def _remove(context: Context) -> Removal:
    """Find the channels whose removal changes nothing."""
    from spa.zero.compaction import lossless  # imports onnxruntime, which not every use of the registry needs

    branches = [p for p in context.branches if isinstance(p, Branch)]
    compaction = lossless(context.analysis, context.groups, branches)
    notes = () if compaction.plan.removes else ("no channel is always the same or read by nobody: nothing was removed",)
    return Removal(compaction.plan, compaction.fold, notes)


ZERO = criterion(
    Criterion(
        name="zero",
        score=_remove,
        summary="Precisely the channels whose removal changes nothing, whatever the budget.",
        source="spa.zero.compaction",
    )
)
