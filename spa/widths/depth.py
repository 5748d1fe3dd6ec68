"""Depth: which residual branches may go, by an option of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spa.coupling.analysis import Analysis, Part
from spa.coupling.detours import KINDS
from spa.errors import PlanError
from spa.widths.budget import Budget
from spa.widths.patterns import check_patterns, inside, matches


def dropping(budget: Budget, branches: Sequence[Part]) -> Budget:
    """Return a budget under which some branches go."""
    return replace(budget, fixed={**budget.fixed, **{b.name: 0 for b in branches}})


def branches_for(
    analysis: Analysis, depth: str, kind: str, ignore: Sequence[str], only: Sequence[str], timed: bool = False
) -> tuple[Part, ...]:
    """Return the residual branches that an option lets go, and the detours.

    Detours hardly count in MACs or parameters, so the search has them where it is about latency; by name each may go.

    Args:
        analysis: the model.
        depth: a number, or a pattern of the branches that must go.
        kind: ``off``, ``auto``, ``number`` or ``pattern``.
        ignore: shell patterns; branches are left out that hold what matches.
        only: shell patterns; where there are some, branches are left out that hold nothing that matches.
        timed: whether the budget is one of latency.

    Raises:
        PlanError: there is none, or fewer than the number.
    """
    if kind == "off":
        return ()
    named = kind == "pattern" and depth.endswith(tuple(f"[{kind}]" for kind in KINDS))
    detours = tuple(d for d in analysis.detours if (timed and kind == "auto") or (named and d.name == depth))
    if kind == "pattern" and all(depth != p.name for p in (*analysis.branches, *detours)):
        check_patterns(analysis, {"depth": [depth]})
    names = {b: inside(analysis, b) for b in (*analysis.branches, *detours)}
    found = tuple(
        b
        for b in (*analysis.branches, *detours)
        if not any(matches(p, names[b]) for p in ignore)
        and (not only or any(matches(p, names[b]) for p in only))
        and (kind != "pattern" or matches(depth, names[b]))
    )
    if not analysis.branches and not detours:
        raise PlanError(
            f"depth is {depth!r}, and the model has no residual branch: no layers whose output is added to what "
            "they read, and used for nothing else. Leave depth out."
        )
    if not found:
        first = ", ".join(repr(b.name) for b in analysis.branches[:3])
        raise PlanError(f"depth: no residual branch is left under this request. There are {first}.")
    if kind == "number" and int(depth) > len(found):
        raise PlanError(f"depth: {depth} residual branches cannot go, there are {len(found)}. Ask for fewer.")
    return found
