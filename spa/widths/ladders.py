"""Ladders: the widths that a group, or several groups together, may have.

A ladder begins with the whole width and goes down in steps that keep the axes of a group multiples of what the
runtime likes; where the user gives the width, it has one rung. Groups that must keep the same fraction of their
channels stand on one ladder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

from spa.algebra.axes import Dim, Expr, Prod, Sum
from spa.coupling.analysis import Analysis, Group
from spa.errors import PlanError


@dataclass(frozen=True)
class Ladder:
    """Groups that shrink together, most often one alone.

    Attributes:
        members: the groups' positions.
        rungs: the widths that the members may have, one per member, from the whole down.
    """

    members: tuple[int, ...]
    rungs: tuple[tuple[int, ...], ...]


def ladders_of(
    analysis: Analysis,
    groups: Sequence[Group],
    *,
    round_to: int = 1,
    min_width: int = 1,
    equal: Collection[frozenset[str]] = (),
    fixed: Mapping[str, int] | None = None,
    floors: Mapping[str, int] | None = None,
) -> list[Ladder]:
    """Return the ladders of all groups, in the order of the groups.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        round_to: widths become multiples of this.
        min_width: no group becomes narrower than this.
        equal: sets of names of groups that keep the same fraction of their channels. A set with a name that is not
            among the groups has a ladder of one rung: none of it is pruned.
        fixed: by group name the only width that it may have.
        floors: by group name the width that it does not fall below.

    Raises:
        PlanError: groups that keep the same fraction have no such width in common.
    """
    fixed, floors = fixed or {}, floors or {}
    steps = alignment(analysis, groups, round_to)
    widths_alone = [
        _alone(g, step, fixed, max(min_width, floors.get(g.name, 1))) for g, step in zip(groups, steps, strict=True)
    ]
    set_of = {name: names for names in equal for name in names}
    positions = {g.name: i for i, g in enumerate(groups)}
    ladders: dict[int, Ladder] = {}  # by the position of the first member
    for group in groups:
        names = set_of.get(group.name, frozenset((group.name,)))
        members = tuple(sorted(positions[n] for n in names if n in positions))
        sizes = [groups[m].size for m in members]
        rungs = tuple(zip(*_equal_fractions([widths_alone[m] for m in members], sizes), strict=True))
        if not rungs:
            raise PlanError(
                f"group {group.name!r} keeps the same fraction as {len(members) - 1} others, and has another width "
                "than they may have. Give all of them the same fraction, or leave --equal out."
            )
        ladders.setdefault(members[0], Ladder(members, rungs if len(members) == len(names) else rungs[:1]))
    return list(ladders.values())


def _alone(group: Group, step: int, fixed: Mapping[str, int], least: int) -> list[int]:
    """Return the widths of a group by itself; a branch is there or not."""
    if group.name in fixed:
        return [fixed[group.name]]
    return allowed_widths(group.size, step, least) if group.least else [group.size, 0]


def _equal_fractions(width_lists: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
    """Keep the widths that are the same fraction of the whole in all lists.

    >>> _equal_fractions([[16, 12, 8, 4], [8, 7, 6, 5, 4, 3]], [16, 8])
    [[16, 12, 8], [8, 6, 4]]
    """
    pairs = list(zip(width_lists, sizes, strict=True))
    common = set.intersection(*({Fraction(w, size) for w in widths} for widths, size in pairs))
    return [[w for w in widths if Fraction(w, size) in common] for widths, size in pairs]


def allowed_widths(size: int, step: int, min_width: int) -> list[int]:
    """Return the widths that a group may have, from the whole down.

    >>> allowed_widths(30, 8, 10)
    [30, 24, 16]
    """
    widths = [size]
    while (narrower := (widths[-1] - 1) // step * step) >= max(min_width, 1):
        widths.append(narrower)
    return widths


def widths_at(ladders: Sequence[Ladder], rungs: Sequence[int]) -> list[int]:
    """Return the width of each group when each ladder stands on one of its rungs.

    >>> widths_at([Ladder((0, 2), ((8, 4), (6, 3))), Ladder((1,), ((5,), (4,)))], [1, 0])
    [6, 5, 3]
    """
    widths = {
        member: width
        for ladder, rung in zip(ladders, rungs, strict=True)
        for member, width in zip(ladder.members, ladder.rungs[rung], strict=True)
    }
    return [widths[i] for i in range(len(widths))]


def alignment(analysis: Analysis, groups: Sequence[Group], multiple: int) -> list[int]:
    """Return the step in which each group may shrink so that the axes it lies on stay multiples of a number.

    In a product the innermost factor that can shrink bears the alignment; the factors outside it are free
    (docs/decisions/0004). A group narrower than its step keeps its width.

    Args:
        analysis: the model.
        groups: the groups that may be pruned.
        multiple: the number that the sizes of axes stay multiples of.
    """
    steps = {g.dim: 1 for g in groups}

    def align(expr: Expr) -> None:
        if isinstance(expr, Dim):
            if expr in steps:
                steps[expr] = lcm(steps[expr], multiple)
        elif isinstance(expr, Sum):
            for term in expr.terms:
                align(term)
        elif isinstance(expr, Prod):
            remaining = multiple  # of which the factors further in already provide the rest
            for factor in reversed(expr.factors):
                if isinstance(factor, Dim) and factor in steps and factor.size > remaining:
                    steps[factor] = lcm(steps[factor], remaining)
                    return
                remaining //= gcd(remaining, factor.size)

    for group in groups:
        for place in group.places:
            align(analysis.expr(place))
    return [steps[g.dim] for g in groups]
