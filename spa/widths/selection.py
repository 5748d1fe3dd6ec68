"""The groups that may be pruned under the constraints of a request, and why the others are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from spa.coupling.analysis import Analysis, Group, Part
from spa.errors import PlanError
from spa.model.stored import is_finite
from spa.model.workers import in_threads
from spa.widths.patterns import check_patterns, matches, touching, writes

NOT_FINITE = "holds values that are not finite, or whose squares are not"
# Operators whose statistics are a scale, which moves roundings alone: no normalisation, though no equality is claimed.
SCALES = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
ALL_CROSS = (
    "a normalisation takes statistics over every group: they are pruned all the same, since the repair makes up for "
    "the change, which is measured on inputs held out"
)


@dataclass(frozen=True)
class Selection:
    """The choice of the groups that may be pruned.

    Attributes:
        groups: those that may.
        branches: the residual branches and detours that may go as a whole.
        skipped: (name, channels, reason) of those that the request leaves out, or whose weights cannot be scored.
        notes: what the user should know of it.
    """

    groups: tuple[Group, ...]
    skipped: tuple[tuple[str, int, str], ...] = ()
    notes: tuple[str, ...] = ()
    branches: tuple[Part, ...] = ()

    @property
    def everything(self) -> tuple[Group, ...]:
        """The groups and the branches."""
        return (*self.groups, *self.branches)


def select(
    analysis: Analysis,
    ignore: Sequence[str] = (),
    cross_norm: bool = False,
    repaired: bool = False,
    only: Sequence[str] = (),
) -> Selection:
    """Select the groups that may be pruned.

    Args:
        analysis: the model.
        ignore: shell patterns; groups are left out where a parameter, a node or an operator matches.
        cross_norm: keep groups over which a normalisation takes statistics.
        repaired: whether a full repair follows, which makes up for changed statistics: then these groups are kept
            where there are no others.
        only: shell patterns; where there are some, groups are left out whose writers match none of them.

    Raises:
        PlanError: no group is left; the message names the first reason. Or a pattern matches nothing in the model.
    """
    check_patterns(analysis, {"ignore": ignore, "only": only})

    reasons: dict[str, str] = {}
    crossing: list[str] = []
    for group in analysis.prunable:
        pattern = next((p for p in ignore if matches(p, touching(analysis, group))), None)
        if pattern is not None:
            reasons[group.name] = f"the request ignores {pattern!r}"
        elif only and not any(writes(analysis, group, p) for p in only):
            reasons[group.name] = "the request prunes only others"
        elif not cross_norm and any(label.partition(" ")[0] not in SCALES for label in group.crossings):
            crossing.append(group.name)
            reasons[group.name] = f"{group.crossings[0]} takes statistics over it"
    odd = _not_finite(analysis, [g for g in analysis.prunable if g.name not in reasons])
    reasons |= {name: f"{tensor!r} {NOT_FINITE}" for name, tensor in odd.items()}
    groups = [g for g in analysis.prunable if g.name not in reasons]
    skipped = [(g.name, g.size, reasons[g.name]) for g in analysis.prunable if g.name in reasons]
    if not groups and crossing and repaired:
        return replace(select(analysis, ignore, cross_norm=True, only=only), notes=(ALL_CROSS,))
    if not groups:
        raise PlanError(_nothing_left(analysis, skipped))
    return Selection(tuple(groups), tuple(skipped))


REMEDIES = {
    "has no rule": "Give it a rule; ",
    "subgraphs": "Export a loop unrolled or as an LSTM or GRU, a branch with what decides fixed; ",
}


def _not_finite(analysis: Analysis, groups: Sequence[Group]) -> dict[str, str]:
    """Return by group name the first of its tensors that holds values which are not finite, where there is one."""
    graph = analysis.graph
    names = list(dict.fromkeys(place.tensor for group in groups for place in group.places))
    size = sum(prod(graph.constants[name].dims) for name in names)
    finite = dict(zip(names, in_threads(partial(is_finite, graph), names, size), strict=True))
    odd = ((g.name, next((p.tensor for p in g.places if not finite[p.tensor]), None)) for g in groups)
    return {name: tensor for name, tensor in odd if tensor is not None}


def _nothing_left(analysis: Analysis, skipped: Sequence[tuple[str, int, str]]) -> str:
    if skipped:
        name, _, reason = skipped[0]
        if all(why.endswith(NOT_FINITE) for _, _, why in skipped):
            return f"no group can be pruned: {name!r}: {reason}. Repair the weights, or train the network again."
        return (
            f"no group can be pruned under this request: {name!r}: {reason}. "
            "Change --ignore or --only, or allow --cross-norm."
        )
    if analysis.barriers:
        operator, reason = next(iter(analysis.barriers.items()))
        remedy = next((r for words, r in REMEDIES.items() if words in reason), "")
        return f"the model has no group that can be pruned: {operator}: {reason}. {remedy}'spa inspect' shows more."
    why = next((f". {g.name!r} is frozen: {g.frozen}" for g in analysis.groups if g.frozen), "")
    return f"the model has no group that can be pruned{why}. 'spa inspect' lists them all."
