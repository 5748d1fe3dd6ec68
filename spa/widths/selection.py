"""The groups that may be pruned under the constraints of a request, and why the others are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.errors import PlanError

NOT_FINITE = "holds values that are not finite"
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
        skipped: (name, channels, reason) of those that the request leaves out, or whose weights cannot be scored.
        notes: what the user should know of it.
    """

    groups: tuple[Group, ...]
    skipped: tuple[tuple[str, int, str], ...] = ()
    notes: tuple[str, ...] = ()


def select(
    analysis: Analysis, ignore: Sequence[str] = (), cross_norm: bool = False, repaired: bool = False
) -> Selection:
    """Select the groups that may be pruned.

    Args:
        analysis: the model.
        ignore: shell patterns; groups are left out where a parameter, a node or an operator matches.
        cross_norm: keep groups over which a normalisation takes statistics.
        repaired: whether a full repair follows, which makes up for changed statistics: then these groups are kept
            where there are no others.

    Raises:
        PlanError: no group is left; the message names the first reason.
    """

    @cache
    def is_finite(tensor: str) -> bool:
        value = analysis.graph.array(tensor)
        return value.dtype.kind not in "fc" or bool(np.isfinite(value).all())

    groups: list[Group] = []
    skipped: list[tuple[str, int, str]] = []
    crossing: list[str] = []
    for group in analysis.prunable:
        pattern = _ignored_by(analysis, group, ignore)
        if pattern is not None:
            skipped.append((group.name, group.size, f"the request ignores {pattern!r}"))
        elif not cross_norm and any(label.partition(" ")[0] not in SCALES for label in group.crossings):
            crossing.append(group.name)
            skipped.append((group.name, group.size, f"{group.crossings[0]} takes statistics over it"))
        elif odd := next((p.tensor for p in group.places if not is_finite(p.tensor)), None):
            skipped.append((group.name, group.size, f"{odd!r} {NOT_FINITE}"))
        else:
            groups.append(group)
    if not groups and crossing and repaired:
        return replace(select(analysis, ignore, cross_norm=True), notes=(ALL_CROSS,))
    if not groups:
        raise PlanError(_nothing_left(analysis, skipped))
    return Selection(tuple(groups), tuple(skipped))


def _ignored_by(analysis: Analysis, group: Group, patterns: Sequence[str]) -> str | None:
    """Return the first pattern that matches the group, its parameters, readers or writers (node name or operator)."""
    if not patterns:
        return None
    nodes = [analysis.graph.nodes[i] for i in (*group.readers, *group.writers)]
    names = {group.name, *(p.tensor for p in group.places)}
    names |= {n.proto.name for n in nodes} | {n.key for n in nodes}
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names if name)), None)


def _nothing_left(analysis: Analysis, skipped: Sequence[tuple[str, int, str]]) -> str:
    if skipped:
        name, _, reason = skipped[0]
        if all(why.endswith(NOT_FINITE) for _, _, why in skipped):
            return f"no group can be pruned: {name!r}: {reason}. Repair the weights, or train the network again."
        return f"no group can be pruned under this request: {name!r}: {reason}. Change --ignore or allow --cross-norm."
    if analysis.barriers:
        operator, reason = next(iter(analysis.barriers.items()))
        return (
            f"the model has no group that can be pruned: {operator}: {reason}. "
            "Give it a rule; 'spa inspect' shows more."
        )
    why = next((f". {g.name!r} is frozen: {g.frozen}" for g in analysis.groups if g.frozen), "")
    return f"the model has no group that can be pruned{why}. 'spa inspect' lists them all."
