"""Depth: which residual branches may go, by an option of a request."""

from __future__ import annotations

from collections.abc import Sequence

from spa.coupling.analysis import Analysis, Branch
from spa.errors import PlanError
from spa.widths.patterns import check_patterns, inside, matches

OFF, AUTO = "off", "auto"


def branches_for(analysis: Analysis, depth: str, ignore: Sequence[str], only: Sequence[str]) -> tuple[Branch, ...]:
    """Return the residual branches that an option lets go.

    Args:
        analysis: the model.
        depth: ``off``, ``auto``, a number, or a pattern of the branches that must go.
        ignore: shell patterns; branches are left out that hold what matches.
        only: shell patterns; where there are some, branches are left out that hold nothing that matches.

    Raises:
        PlanError: there is none, or fewer than the number.
    """
    if depth == OFF:
        return ()
    named = depth != AUTO and not depth.isdigit()
    if named and all(depth != b.name for b in analysis.branches):
        check_patterns(analysis, {"depth": [depth]})
    names = {b: inside(analysis, b) for b in analysis.branches}
    found = tuple(
        b
        for b in analysis.branches
        if not any(matches(p, names[b]) for p in ignore)
        and (not only or any(matches(p, names[b]) for p in only))
        and (not named or matches(depth, names[b]))
    )
    if not analysis.branches:
        raise PlanError(
            f"depth is {depth!r}, and the model has no residual branch: no layers whose output is added to what "
            "they read, and used for nothing else. Leave depth out."
        )
    if not found:
        first = ", ".join(repr(b.name) for b in analysis.branches[:3])
        raise PlanError(f"depth: no residual branch is left under this request. There are {first}.")
    if depth.isdigit() and int(depth) > len(found):
        raise PlanError(f"depth: {depth} residual branches cannot go, there are {len(found)}. Ask for fewer.")
    return found
