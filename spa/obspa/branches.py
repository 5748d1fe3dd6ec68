"""Measure what the outputs lose when one residual branch alone goes, after a cheap repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from spa.coupling.analysis import Analysis, Detour, Part
from spa.coupling.plan import Plan, make_plan
from spa.criteria.answers import Curve
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.sensitivity import Measured
from spa.progress import Progress, silent
from spa.running.change import Yardstick
from spa.running.stream import Feeds
from spa.surgery.apply import apply

MOST_REFITTED = 6  # readers behind a branch that went
MOST_BEHIND_DETOURS = 2  # of which there may be many


class BranchGauge:
    """Measures branches of a dense network.

    Args:
        analysis: the network.
        batches: the inputs that repairs learn from, a few of those that there are.
        held_out: the inputs on which outputs are compared.
        damping: of the repairs, a fraction of the mean input variance.
        threads: of onnxruntime.
    """

    def __init__(
        self,
        analysis: Analysis,
        batches: Sequence[Feeds],
        held_out: Sequence[Feeds],
        damping: float,
        threads: int = 2,
    ) -> None:
        self.analysis, self.batches, self.threads = analysis, batches, threads
        self._settings = FitSettings(damping=damping)
        self._yardstick = Yardstick(analysis.graph, held_out, threads)
        self._readers = sorted({i for g in analysis.groups for i in g.readers})

    def changes(self, branches: Sequence[Part], progress: Progress = silent) -> dict[str, float]:
        """Drop each branch alone, repair what follows it up to the next sum, and compare the outputs.

        Returns:
            By branch the change of the outputs, mean squared over variance; those that cannot be compared are missing.
        """
        sums = sorted(b.sum for b in self.analysis.branches)
        found = {}
        for done, branch in enumerate(branches):
            progress("depth", done / len(branches))
            end = next((s for s in sums if s > branch.end), len(self.analysis.graph.nodes))
            behind = [i for i in self._readers if branch.end < i < end][:MOST_REFITTED]
            plan = make_plan(self.analysis, {branch.name: np.zeros(0, int)})
            ways = (True,) if isinstance(branch, Detour) else (True, False)
            if isinstance(branch, Detour):
                behind = behind[:MOST_BEHIND_DETOURS]
            errors = [self._change(plan, {branch.end, *behind}, carriers) for carriers in ways]
            known = [error for error in errors if error is not None and np.isfinite(error)]
            if known:
                found[branch.name] = min(known)
        return found

    def _change(self, plan: Plan, nodes: Set[int], carriers: bool) -> float | None:
        """Apply a plan, refit some nodes, and return the change of the outputs."""
        pruned, settings = apply(self.analysis, plan), replace(self._settings, carriers=carriers)
        reconstruct(self.analysis, plan, pruned, self.batches, settings, self.threads, nodes)
        return self._yardstick.change(pruned).error


def priced(
    changes: Mapping[str, float], curves: Mapping[str, Curve], measured: Mapping[str, Measured]
) -> dict[str, Curve]:
    """Return measured changes of branches in the unit of loss curves, as curves of one channel.

    Args:
        changes: by branch, of the outputs.
        curves: by group, corrected by what was measured.
        measured: the point of each curve that was measured; the median of loss over change there is the unit.
    """
    points = [(curves[n].loss[m.removed], m.change) for n, m in measured.items() if n in curves and m.change > 0]
    unit = float(np.median([loss / change for loss, change in points])) if points else 1.0
    return {name: Curve(np.zeros(1, int), np.array([0.0, change * unit])) for name, change in changes.items()}
