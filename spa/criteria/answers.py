"""The three answers that a criterion may give: scores, loss curves, or the removal itself.

Scores are a plain mapping from a group's name to an array (channels,), higher where a channel matters more; the width
search ranks them. :class:`Curves` say what each width costs; the width search divides the budget among groups by them.
A :class:`Removal` leaves nothing to search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from onnx import ModelProto

from spa.coupling.plan import Plan

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
        candidates: by group name. The first are used; where there are more, and the pruned network is refitted, each
            is tried and the one that changes the outputs least stays.
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
