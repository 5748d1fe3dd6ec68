"""The three answers that a criterion may give: scores, loss curves, or the removal itself.

Scores are a plain mapping from a group's name to an array (channels,), higher where a channel matters more; the width
search ranks them. :class:`Curves` say what each width costs; the width search divides the budget among groups by them.
A :class:`Removal` leaves nothing to search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto

from spa.coupling.analysis import Group
from spa.coupling.plan import Plan
from spa.errors import PlanError

Array = np.ndarray
Scores: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Curve:
    """The loss of removing channels of one group.

    Attributes:
        order: channels in the order in which they go, (channels,).
        loss: the loss once the first i of them are gone, (channels + 1,); nondecreasing, loss[0] = 0.
    """

    order: Array
    loss: Array

    def scores(self) -> Array:
        """Return what each channel adds to the loss when it goes, (channels,)."""
        scores = np.empty(self.order.size)
        scores[self.order] = np.diff(self.loss)
        return scores

    def sampled(self, points: int) -> tuple[tuple[int, float], ...]:
        """Return (channels left, loss) at so many places at most, evenly from the whole to none.

        >>> Curve(np.arange(4), np.array([0, 1, 3, 6, 9.0])).sampled(3)
        ((4, 0.0), (2, 3.0), (0, 9.0))
        """
        gone = np.unique(np.linspace(0, self.order.size, points).round().astype(int))
        return tuple((self.order.size - int(n), float(self.loss[n])) for n in gone)

    @staticmethod
    def of_scores(scores: Array) -> Curve:
        """Build a curve from scores of single channels: the fraction of their sum that has gone.

        Args:
            scores: (channels,).
        """
        order = np.argsort(scores, kind="stable")
        lowest = min(float(scores.min(initial=0.0)), 0.0)
        sums = np.cumsum(scores[order] - lowest)
        return Curve(order, np.concatenate([[0.0], sums / sums[-1] if sums.size and sums[-1] > 0 else sums]))


@dataclass(frozen=True)
class Curves:
    """Loss curves of groups.

    Attributes:
        candidates: by group name; residual branches may be among them, as groups of one channel. The first are used;
            where there are more, and the pruned network is refitted, each is tried and the one that changes the
            outputs least stays.
    """

    candidates: tuple[Mapping[str, Curve], ...]


@dataclass(frozen=True)
class Removal:
    """Channels to remove whatever the budget.

    Attributes:
        plan: what is kept.
        fold: changes the pruned model in place, given the folder of its external data; for what removed channels
            leave behind.
        notes: what the user should know.
    """

    plan: Plan
    fold: Callable[[ModelProto, Path | None], None] | None = None
    notes: tuple[str, ...] = ()


Answer: TypeAlias = Scores | Curves | Removal


def checked_answer(answer: Any, groups: Sequence[Group], name: str) -> Answer:
    """Return an answer as the width search takes it: scores of float64; groups that it does not name keep everything.

    Args:
        answer: a criterion's or a user's.
        groups: those that may be pruned; what the answer says of others is left out of scores.
        name: the criterion's, for messages.

    Raises:
        PlanError: it is none of the three answers, it names none of the groups, or what it says of one is not one
            finite real number per channel.
    """
    if isinstance(answer, Removal):
        return answer
    if isinstance(answer, Curves):
        _check_curves(answer, groups, name)
        return answer
    if not isinstance(answer, Mapping):
        raise PlanError(
            f"criterion {name!r} answers with a {type(answer).__name__}. "
            "Return scores by group name, Curves or a Removal."
        )
    scores = {}
    for group in scored_groups(answer, groups, name):
        scores[group.name], fault = real_scores(answer[group.name], group.size)
        if fault:
            raise PlanError(
                f"criterion {name!r} gives {fault} for group {group.name!r}. "
                f"Give one finite score per channel, shape {(group.size,)}."
            )
    return scores


def scored_groups(answer: Scores | Curves, groups: Sequence[Group], name: str) -> tuple[Group, ...]:
    """Return the groups that an answer names.

    Raises:
        PlanError: there are some, and it names none of them.
    """
    known = (answer.candidates[0] if answer.candidates else {}) if isinstance(answer, Curves) else answer
    named = tuple(g for g in groups if g.name in known)
    if groups and not named:
        raise PlanError(
            f"the scores of criterion {name!r} name no group that can be pruned under this request. "
            "Name groups as analyze does."
        )
    return named


def real_scores(values: Any, channels: int) -> tuple[Array, str]:
    """Convert scores of channels to an array (channels,), float64.

    Returns:
        The array, and what is wrong with it: empty, or a phrase for a message.
    """
    try:
        scores = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged lists; tensors of a framework that are on a device
        return np.empty(0), f"a {type(values).__name__} that is no array"
    if values is None or isinstance(values, Mapping | set | frozenset):
        return scores, "None" if values is None else f"a {type(values).__name__}"
    if scores.shape != (channels,):
        return scores, f"shape {scores.shape}"
    if scores.dtype.kind not in "fiub" or not np.isfinite(scores).all():
        return scores, "values that are not finite numbers"
    return scores.astype(np.float64), ""


def _check_curves(curves: Curves, groups: Sequence[Group], name: str) -> None:
    named = {g.name for g in scored_groups(curves, groups, name)}
    for candidate in curves.candidates:
        if other := sorted(named ^ {g.name for g in groups if g.name in candidate}):
            raise PlanError(f"criterion {name!r} gives group {other[0]!r} a curve in some candidates. Give it in all.")
        for group in groups:
            if group.name in named and not _is_curve(candidate[group.name], group.size):
                raise PlanError(
                    f"criterion {name!r} gives no curve for group {group.name!r}. Give a Curve: an order of its "
                    f"{group.size} channels, and {group.size + 1} finite losses."
                )


def _is_curve(curve: object, channels: int) -> bool:
    if not isinstance(curve, Curve):
        return False
    order, loss = np.asarray(curve.order), np.asarray(curve.loss)
    return (
        order.dtype.kind in "iu"
        and np.array_equal(np.sort(order, axis=None), np.arange(channels))
        and order.ndim == 1
        and loss.shape == (channels + 1,)
        and loss.dtype.kind in "fiu"
        and bool(np.isfinite(loss).all())
    )
