"""Widths that the user gives, by patterns of layers: exact ones, fractions to remove, and least ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spa.coupling.analysis import Analysis, Group
from spa.errors import PlanError
from spa.widths.equal import head_counts
from spa.widths.ladders import alignment, allowed_widths
from spa.widths.patterns import by_group, check_patterns, writes


def given_widths(
    analysis: Analysis,
    groups: Sequence[Group],
    *,
    width: Mapping[str, int],
    heads: Mapping[str, int],
    ratio_of: Mapping[str, float],
    keep_at_least: Mapping[str, int],
    round_to: int,
) -> dict[str, dict[str, int]]:
    """Return the widths that groups must have (``fixed``) and those that they do not fall below (``floors``), by name.

    Args:
        analysis: the model.
        groups: those that may be pruned.
        width: exact widths by pattern; they need not be multiples of anything.
        heads: numbers of heads of attentions by pattern.
        ratio_of: fractions to remove by pattern, met as nearly as multiples of ``round_to`` allow.
        keep_at_least: least widths by pattern.
        round_to: the number that widths become multiples of.

    Raises:
        PlanError: a pattern matches nothing, a width is more than the group has, or two contradict each other.
    """
    check_patterns(
        analysis, {"width": [*width], "heads": [*heads], "ratio_of": [*ratio_of], "keep_at_least": [*keep_at_least]}
    )
    sizes = {g.name: g.size for g in groups}
    exact = by_group(analysis, groups, "width", width)
    for name, number in _heads(analysis, groups, heads).items():
        if exact.setdefault(name, number) != number:
            raise PlanError(
                f"width and heads give group {name!r} {exact[name]} and {number}. Leave one of the two out."
            )
    fractions = by_group(analysis, groups, "ratio_of", ratio_of)
    floors = by_group(analysis, groups, "keep_at_least", keep_at_least)
    for option, numbers in (("width or heads", exact), ("keep_at_least", floors)):
        for name, number in numbers.items():
            if number > sizes[name]:
                raise PlanError(f"{option}: group {name!r} has {sizes[name]} channels, not {number}. Ask for less.")
    if twice := sorted(exact.keys() & fractions.keys()):
        raise PlanError(f"width (or heads) and ratio_of both name group {twice[0]!r}. Leave one of the two out.")
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


def _heads(analysis: Analysis, groups: Sequence[Group], heads: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of heads by group name.

    Raises:
        PlanError: a pattern matches no attention, or two of them give one attention different numbers.
    """
    if not heads:
        return {}
    names = head_counts(analysis)
    counts = [g for g in groups if g.name in names]
    for pattern in heads:
        if not any(writes(analysis, g, pattern) for g in counts):
            raise PlanError(
                f"heads: {pattern!r} names no attention whose heads may go under this request. "
                "'spa inspect --all' lists groups and what is frozen."
            )
    return by_group(analysis, counts, "heads", heads)
