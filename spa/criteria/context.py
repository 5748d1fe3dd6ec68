"""The input of a criterion: the model, the groups to score, and whatever else it asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spa.coupling.analysis import Analysis, Group, Part
from spa.errors import PlanError
from spa.progress import Progress, silent
from spa.running.journal import NOTHING_KEPT, Journal
from spa.running.tasks import ALONE, Workers

if TYPE_CHECKING:
    from spa.running.stream import Feeds, Stream

Array = np.ndarray


@dataclass(frozen=True)
class Inputs:
    """A model with inputs to run it on.

    Attributes:
        analysis: the model to run: the dense one or, where inputs are synthetic, a copy whose BatchNormalizations
            carry the statistics of these inputs.
        batches: by input name, samples along the first axis.
        labels: the class of each sample, (samples,), where the data has labels.
        synthetic: whether the inputs were made up.
        held_out: inputs on which nothing is fitted, for what is to be measured.
        threads: of onnxruntime.
        progress: called with a stage and the fraction of it that is done.
        workers: who scores groups.
        journal: keeps what is scored.
    """

    analysis: Analysis
    batches: Sequence[Feeds]
    labels: Array | None = None
    synthetic: bool = False
    held_out: Sequence[Feeds] = ()
    threads: int = 2
    progress: Progress = silent
    workers: Workers = ALONE
    journal: Journal = NOTHING_KEPT

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        from spa.running.stream import samples_in

        return samples_in(self.batches)

    def stream(self) -> Stream:
        """Return a new stream of all batches through the model."""
        from spa.running.stream import Stream

        graph = self.analysis.graph
        return Stream(graph.model, graph.base, self.batches, self.threads)

    def counterparts(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups of the model to run that have the names of some groups of the dense model."""
        by_name = {g.name: g for g in self.analysis.groups}
        return [by_name[g.name] for g in groups]


@dataclass(frozen=True)
class Context:
    """The model and the groups that a criterion scores, and what it scores them with.

    Attributes:
        analysis: the dense model.
        groups: the groups to score.
        norm: the NORM to make scores comparable within a parameter, one of :data:`spa.criteria.scores.NORMS`.
        agg: the AGG to combine the scores of a group's parameters, one of :data:`spa.criteria.scores.AGGREGATES`.
        seed: of everything random.
        inputs: what to run, where the criterion needs inputs or labels.
        derivatives: of a loss, by need (``gradients``, say) and initializer, in the initializer's shape.
        branches: residual branches that may go as a whole, for criteria that can say what that costs.
    """

    analysis: Analysis
    groups: Sequence[Group]
    norm: str = "mean"
    agg: str = "mean"
    seed: int = 0
    inputs: Inputs | None = None
    derivatives: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    branches: Sequence[Part] = ()

    def required_inputs(self) -> Inputs:
        """Return the inputs; raise PlanError if there are none."""
        if self.inputs is None:
            raise PlanError("the criterion runs the model, but there are no inputs. Give some.")
        return self.inputs
