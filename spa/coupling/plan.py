"""A plan says which channels are kept: frozen data, readable as JSON."""

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
        sizes: group name → how many channels the group has in the dense model.
        parameters: initializer name → axis → sorted kept indices, for use in other tools.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    parameters: Mapping[str, Mapping[int, tuple[int, ...]]]

    @property
    def removes(self) -> bool:
        """Whether any channel goes."""
        return any(len(kept) < self.sizes[name] for name, kept in self.kept.items())

    def masks(self, analysis: Analysis) -> dict[Dim, np.ndarray]:
        """Boolean arrays of kept indices by dimension.

        Raises:
            PlanError: the plan does not fit the model.
        """
        groups = {g.name: g for g in analysis.groups}
        masks: dict[Dim, np.ndarray] = {}
        for name, kept in self.kept.items():
            group = groups.get(name)
            if group is None or group.size != self.sizes[name]:
                what = "no group of that name" if group is None else f"{group.size} channels there"
                raise PlanError(f"the plan names {name!r} with {self.sizes[name]} channels: {what}. Make a new plan.")
            if len(kept) == group.size:
                continue
            if group.frozen is not None:
                raise PlanError(f"group {name!r} is frozen: {group.frozen}. Take it out of the plan.")
            if not kept or min(kept) < 0 or max(kept) >= group.size:
                raise PlanError(f"group {name!r} keeps {len(kept)} of {group.size} channels: keep 1 or more of them.")
            mask = np.zeros(group.size, dtype=bool)
            mask[list(kept)] = True
            masks[group.dim] = mask
        return masks

    def to_json(self) -> str:
        """The plan as JSON text; equal plans give equal text."""
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
            PlanError: the text is no plan.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise PlanError(f"the plan has format {content['format']}, this version reads {FORMAT}.")
            groups = content["groups"]
            kept = {n: tuple(sorted({int(i) for i in g["kept"]})) for n, g in groups.items()}
            sizes = {n: int(g["size"]) for n, g in groups.items()}
            parameters = {t: {int(a): tuple(k) for a, k in x.items()} for t, x in content.get("kept", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is no plan: {error!r}. Write one with --plan-out.") from error
        return Plan(kept, sizes, parameters)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            PlanError: there is no such file, or it is no plan.
        """
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}.") from error


def make_plan(analysis: Analysis, kept: Mapping[str, np.ndarray]) -> Plan:
    """A plan from kept indices by group name; groups that keep everything are left out.

    Raises:
        PlanError: a group is unknown or frozen, or would lose every channel.
    """
    groups = {g.name: g for g in analysis.groups}
    chosen: dict[str, tuple[int, ...]] = {}
    for name, indices in kept.items():
        unique = tuple(sorted({int(i) for i in indices}))
        if name not in groups or len(unique) != groups[name].size:
            chosen[name] = unique
    sizes = {name: groups[name].size if name in groups else -1 for name in chosen}
    masks = Plan(chosen, sizes, {}).masks(analysis)
    return Plan(chosen, sizes, _parameters(analysis, analysis.kept(masks)))


def _parameters(analysis: Analysis, kept: Kept) -> dict[str, dict[int, tuple[int, ...]]]:
    result: dict[str, dict[int, tuple[int, ...]]] = {}
    for use, axes in analysis.uses.items():
        for axis, expr in enumerate(axes):
            if kept.size(expr) != expr.size:
                indices = tuple(int(i) for i in np.flatnonzero(kept.mask(expr)))
                result.setdefault(use[0], {}).setdefault(axis, indices)
    return {name: result[name] for name in sorted(result)}
