"""The findings of ``spa inspect``, as plain data."""

from __future__ import annotations

from typing import Any

from spa.coupling.analysis import Analysis, Group
from spa.coupling.cost import CostModel, group_fractions, measure
from spa.model.sizes import open_keys
from spa.model.two_points import open_inputs


def inspection(analysis: Analysis) -> dict[str, Any]:
    """List groups by their fraction of the parameters, frozen groups and barriers with reasons, and the reach.

    Returns:
        ``cost`` of the dense model, the shapes of the ``inputs`` that it is counted for, the ``open`` axes; ``groups``
        (prunable, largest first), ``frozen``, ``barriers``; ``reach``, the fraction of parameters that goes if half of
        every free group goes, and of those that cross normalisations, too.
    """
    fractions = group_fractions(analysis)

    def row(group: Group) -> dict[str, Any]:
        params, macs = fractions.get(group.name, (0.0, 0.0))
        return {
            "name": group.name,
            "channels": group.size,
            "params": params,
            "macs": macs,
            "operators": [analysis.graph.nodes[i].label for i in group.operators],
            "readers": [analysis.graph.nodes[i].label for i in group.readers],
            "writers": [analysis.graph.nodes[i].label for i in group.writers],
            "crossings": list(group.crossings),
            "frozen": group.frozen,
        }

    rows = sorted((row(g) for g in analysis.groups if g.size > 1), key=lambda r: (-r["params"], r["name"]))
    return {
        "cost": measure(analysis).to_dict(),
        "inputs": {name: list(shape) for name, shape in analysis.points.sizes[0].items()},
        "open": open_keys(open_inputs(analysis.graph.model)),
        "groups": [r for r in rows if r["frozen"] is None],
        "frozen": [r for r in rows if r["frozen"] is not None],
        "barriers": [{"operator": o, "reason": r} for o, r in analysis.barriers.items()],
        "reach": {"free": _reach(analysis, analysis.free), "with crossings": _reach(analysis, analysis.prunable)},
    }


def _reach(analysis: Analysis, groups: tuple[Group, ...]) -> float:
    """Return the fraction of all parameters that would go if half of every one of these groups went."""
    costs = CostModel(analysis, groups)
    dense = costs.evaluate(costs.sizes).params
    halved = costs.evaluate([(n + 1) // 2 for n in costs.sizes]).params
    return 1 - halved / dense if dense else 0.0
