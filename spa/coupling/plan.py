"""Plans: the channels to keep, as frozen data that JSON holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa.algebra.axes import Dim, Kept
from spa.coupling.analysis import Analysis
from spa.errors import PlanError

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Kept indices of each pruned group; groups that are not named keep everything. An empty plan is the identity.

    Attributes:
        kept: group name → sorted kept indices.
        sizes: group name → number of channels of the group in the dense model.
        parameters: initializer name → axis → sorted kept indices, for use in other tools.

    >>> plan = Plan(kept={"fc1.weight[0]": (0, 2)}, sizes={"fc1.weight[0]": 3}, parameters={})
    >>> plan.removes, Plan.from_json(plan.to_json()) == plan
    (True, True)
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    parameters: Mapping[str, Mapping[int, tuple[int, ...]]]

    @property
    def removes(self) -> bool:
        """True if the plan removes any channel."""
        return any(len(kept) < self.sizes[name] for name, kept in self.kept.items())

    def masks(self, analysis: Analysis) -> dict[Dim, np.ndarray]:
        """Return by dimension a boolean array of shape (size,), True where the index is kept.

        Raises:
            PlanError: the plan does not fit the model, prunes a frozen group, or removes every channel of a group.
        """
        groups = {g.name: g for g in analysis.groups}
        masks: dict[Dim, np.ndarray] = {}
        for name, kept in self.kept.items():
            group = groups.get(name)
            if group is None or group.size != self.sizes[name]:
                fact = "has no group of that name" if group is None else f"has {group.size} channels there"
                raise PlanError(
                    f"the plan names {name!r} with {self.sizes[name]} channels: the model {fact}. Make a new plan."
                )
            if len(kept) == group.size:
                continue
            if group.frozen is not None:
                raise PlanError(f"group {name!r} is frozen: {group.frozen}. Take it out of the plan.")
            if not kept:
                raise PlanError(f"group {name!r} keeps none of its {group.size} channels. Keep 1 or more of them.")
            if min(kept) < 0 or max(kept) >= group.size:
                raise PlanError(
                    f"group {name!r} keeps indices {min(kept)} to {max(kept)}, but its channels are 0 to "
                    f"{group.size - 1}. Make a new plan."
                )
            mask = np.zeros(group.size, dtype=bool)
            mask[list(kept)] = True
            masks[group.dim] = mask
        return masks

    def to_json(self) -> str:
        """Return the plan as JSON text; equal plans give equal text."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "groups": {n: {"size": self.sizes[n], "kept": list(k)} for n, k in self.kept.items()},
            "kept": {t: {str(a): list(k) for a, k in axes.items()} for t, axes in self.parameters.items()},
        }
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan that :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan of this format.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise PlanError(
                    f"the plan has format {content['format']}, this version reads {FORMAT}. Make a new plan."
                )
            groups = content["groups"]
            kept = {n: tuple(sorted({int(i) for i in g["kept"]})) for n, g in groups.items()}
            sizes = {n: int(g["size"]) for n, g in groups.items()}
            parameters = {t: {int(a): tuple(k) for a, k in x.items()} for t, x in content.get("kept", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a plan: {error!r}. Write one with --plan-out.") from error
        return Plan(kept=kept, sizes=sizes, parameters=parameters)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            PlanError: the file cannot be read, or is not a plan.
        """
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}. Check the path.") from error


def make_plan(analysis: Analysis, kept: Mapping[str, np.ndarray]) -> Plan:
    """Make a plan from kept indices by group name; groups that keep everything are left out.

    Args:
        analysis: the model.
        kept: group name → kept indices, in any order.

    Raises:
        PlanError: a group is unknown or frozen, or would lose every channel.
    """
    groups = {g.name: g for g in analysis.groups}
    pruned: dict[str, tuple[int, ...]] = {}
    for name, indices in kept.items():
        unique = tuple(sorted({int(i) for i in indices}))
        if name not in groups or len(unique) != groups[name].size:
            pruned[name] = unique
    sizes = {name: groups[name].size if name in groups else -1 for name in pruned}
    masks = Plan(kept=pruned, sizes=sizes, parameters={}).masks(analysis)
    return Plan(kept=pruned, sizes=sizes, parameters=_parameters(analysis, analysis.kept(masks)))


def _parameters(analysis: Analysis, kept: Kept) -> dict[str, dict[int, tuple[int, ...]]]:
    result: dict[str, dict[int, tuple[int, ...]]] = {}
    for use, axes in analysis.uses.items():
        for axis, expr in enumerate(axes):
            if kept.size(expr) != expr.size:
                indices = tuple(int(i) for i in np.flatnonzero(kept.mask(expr)))
                result.setdefault(use[0], {}).setdefault(axis, indices)
    return {name: result[name] for name in sorted(result)}
