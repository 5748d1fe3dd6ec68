"""Widths that the user gives, by patterns of layers: exact ones, fractions to remove, and least ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spa.coupling.analysis import Analysis, Group
from spa.errors import PlanError
from spa.widths.ladders import alignment, allowed_widths
from spa.widths.patterns import by_group, check_patterns


def given_widths(
    analysis: Analysis,
    groups: Sequence[Group],
    *,
    width: Mapping[str, int],
    ratio_of: Mapping[str, float],
    keep_at_least: Mapping[str, int],
    round_to: int,
) -> dict[str, dict[str, int]]:
    """Return the widths that groups must have (``fixed``) and those that they do not fall below (``floors``), by name.

    Args:
        analysis: the model.
        groups: those that may be pruned.
        width: exact widths by pattern; they need not be multiples of anything.
        ratio_of: fractions to remove by pattern, met as nearly as multiples of ``round_to`` allow.
        keep_at_least: least widths by pattern.
        round_to: the number that widths become multiples of.

    Raises:
        PlanError: a pattern matches nothing, a width is more than the group has, or two contradict each other.
    """
    check_patterns(analysis, {"width": [*width], "ratio_of": [*ratio_of], "keep_at_least": [*keep_at_least]})
    sizes = {g.name: g.size for g in groups}
    exact = by_group(analysis, groups, "width", width)
    fractions = by_group(analysis, groups, "ratio_of", ratio_of)
    floors = by_group(analysis, groups, "keep_at_least", keep_at_least)
    for option, given in (("width", exact), ("keep_at_least", floors)):
        for name, number in given.items():
            if number > sizes[name]:
                raise PlanError(f"{option}: group {name!r} has {sizes[name]} channels, not {number}. Ask for less.")
    if twice := sorted(exact.keys() & fractions.keys()):
        raise PlanError(f"width and ratio_of both name group {twice[0]!r}. Leave one of the two out.")
    steps = dict(zip(sizes, alignment(analysis, groups, round_to), strict=True))
    fixed = exact | {
        name: min(allowed_widths(sizes[name], steps[name], 1), key=lambda w: abs(w - sizes[name] * (1 - fraction)))
        for name, fraction in fractions.items()
    }
    if below := sorted(name for name in fixed.keys() & floors.keys() if fixed[name] < floors[name]):
        name = below[0]
        raise PlanError(
            f"group {name!r} is to keep {floors[name]} channels at least, and {fixed[name]} exactly. Leave one out."
        )
    return {"fixed": fixed, "floors": floors}
