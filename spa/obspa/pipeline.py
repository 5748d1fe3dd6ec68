"""Calibration, scores, reconstruction and what they did to the outputs, as one object that pruning holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
from onnx import ModelProto

from spa import criteria
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.cost import CostModel
from spa.coupling.plan import Plan
from spa.criteria.gates import estimate_gates
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.obspa.compensate import compensate
from spa.obspa.curves import Curve
from spa.obspa.linear import linear
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.score import curves, faded
from spa.obspa.statistics import with_batch_statistics
from spa.progress import Progress, silent
from spa.running.stream import Feeds, Stream
from spa.surgery.apply import apply

if TYPE_CHECKING:
    from spa.calibration.data import Calibration

Array = np.ndarray
P = ParamSpec("P")
T = TypeVar("T")
DAMPING = 0.03  # of fits; this and the next three were chosen by the outputs of ResNet-20 and 56 on inputs held out
PRUNED_INPUT_SHARE = 0.85  # in what fits see, see `FitSettings`
PRUNED_INPUT_SHARE_SYNTHETIC = 0.7  # where inputs were made up
REFIT_DISCOUNT = 0.3  # how losses fade with the fits behind them, see `faded`
REFIT_DISCOUNT_SYNTHETIC = 0.0  # made-up inputs mend too little to count on
TRIALS = 1e11  # multiply-accumulates of all inputs, up to which both are tried where inputs were made up
MEASURED = 256  # samples on which outputs are compared


def _bounded(
    method: Callable[Concatenate[Calibrated, P], T],
) -> Callable[Concatenate[Calibrated, P], T]:
    """Run a method with at most its object's number of threads in linear algebra, too."""

    @wraps(method)
    def bounded(self: Calibrated, *args: P.args, **options: P.kwargs) -> T:
        from threadpoolctl import ThreadpoolController

        pools = ThreadpoolController()
        most = min([self.threads, *(p["num_threads"] for p in pools.info() if p["user_api"] == "blas")])
        with pools.limit(limits=most, user_api="blas"):
            return method(self, *args, **options)

    return bounded


@dataclass
class Calibrated:
    """A model with inputs to learn from.

    Attributes:
        analysis: the dense model.
        batches: the inputs.
        synthetic: whether they were made up; BatchNormalizations then use their statistics while calibrating.
        threads: of onnxruntime, and of linear algebra at most.
        seed: of the places that fits see.
        progress: called with a stage and the share of it that is done.
    """

    analysis: Analysis
    batches: Sequence[Feeds]
    synthetic: bool
    threads: int = 2
    seed: int = 0
    progress: Progress = silent
    _twin: Analysis = field(init=False)
    _outputs: list[dict[str, Array]] | None = field(init=False, default=None)
    _curves: dict[tuple[str, ...], tuple[dict[str, Curve], dict[str, Curve]]] = field(init=False, default_factory=dict)

    @_bounded
    def __post_init__(self) -> None:
        graph = self.analysis.graph
        model = with_batch_statistics(graph, self.batches, self.threads) if self.synthetic else None
        self._twin = self.analysis if model is None else couple(Graph(model, graph.base))

    @property
    def fadings(self) -> tuple[float, ...]:
        """How losses may fade with the fits behind them: what is taken, and what is worth a trial beside it."""
        if not self.synthetic:
            return (REFIT_DISCOUNT,)
        inputs = sum(len(next(iter(b.values()))) for b in self.batches)
        cheap = CostModel(self.analysis, []).evaluate([]).macs * inputs <= TRIALS
        return (REFIT_DISCOUNT_SYNTHETIC, REFIT_DISCOUNT) if cheap else (REFIT_DISCOUNT_SYNTHETIC,)

    @_bounded
    def curves(self, groups: Sequence[Group], fading: float | None = None) -> dict[str, Curve]:
        """Loss curves of groups; those that only other operators read are ranked by their squared weights.

        Computed once for the same groups: a budget may take several choices.
        """
        key = tuple(g.name for g in groups)
        if key not in self._curves:
            self._curves[key] = self._found(groups)
        found, rest = self._curves[key]
        return faded(found, groups, self.fadings[0] if fading is None else fading) | rest

    def _found(self, groups: Sequence[Group]) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """The curves of what is understood, and of the rest."""
        twins = {g.name: g for g in self._twin.groups}
        wanted = [twins[g.name] for g in groups]
        found = curves(self._twin, wanted, self.batches, self.threads, self.seed, progress=self.progress)
        rest = [g for g in groups if g.name not in found]
        return found, {n: by_scores(s) for n, s in criteria.score(self.analysis, rest, "l2", "mean").items()}

    @_bounded
    def scores(self, groups: Sequence[Group], criterion: str, norm: str, agg: str) -> dict[str, Array]:
        """Scores of groups by a criterion that looks at activations (see :func:`spa.criteria.score`)."""
        twins = {g.name: g for g in self._twin.groups}
        stream = Stream(self._twin.graph.model, self._twin.graph.base, self.batches, self.threads)
        wanted = [twins[g.name] for g in groups]
        return criteria.score(self._twin, wanted, criterion, norm, agg, stream=stream, progress=self.progress)

    @_bounded
    def gates(self, groups: Sequence[Group]) -> dict[str, Array]:
        """Scores of groups by gating their channels (see :func:`spa.criteria.gates.estimate_gates`)."""
        twins = {g.name: g for g in self._twin.groups}
        wanted = [twins[g.name] for g in groups]
        return estimate_gates(
            self._twin, wanted, self.batches, seed=self.seed, threads=self.threads, progress=self.progress
        )

    @_bounded
    def reconstruct(self, plan: Plan, pruned: ModelProto, how: str = "full") -> None:
        """Mend the pruned model in place: ``full`` refits its layers, ``bias`` moves their means alone."""
        own = self._twin is self.analysis
        twin = pruned if own else apply(self._twin, plan)
        if how == "bias":
            learnt = compensate(self._twin, plan, twin, self.batches, self.threads, self.progress)
        else:
            share = PRUNED_INPUT_SHARE_SYNTHETIC if self.synthetic else PRUNED_INPUT_SHARE
            settings = FitSettings(damping=DAMPING, pruned_input_share=share, refit_producers=True, seed=self.seed)
            learnt = reconstruct(self._twin, plan, twin, self.batches, settings, self.threads, progress=self.progress)
        if not own:
            Stream(pruned, self.analysis.graph.base, (), self.threads).repeat(learnt)

    def notes(self) -> tuple[str, ...]:
        """What keeps reconstruction from doing all that it could."""
        graph = self.analysis.graph
        layers = (linear(graph, node) for node in graph.nodes)
        fixed = [x.node.label for x in layers if x is not None and x.bias is not None and x.bias not in graph.constants]
        if not fixed:
            return ()
        which = fixed[0] if len(fixed) == 1 else f"{fixed[0]} and {len(fixed) - 1} more"
        return (
            f"the bias of {which} is computed in the graph and stays as it is; as an initializer it would be refitted",
        )

    @_bounded
    def distortion(self, pruned: ModelProto) -> float | None:
        """Mean squared change of the float outputs over their variance, on some inputs; None without such outputs."""
        graph = self.analysis.graph
        if self._outputs is None:
            self._outputs = Stream(graph.model, graph.base, self._some(), self.threads).finish()
        dense = self._outputs
        small = Stream(pruned, graph.base, self._some(), self.threads).finish()
        shares = [_relative(dense, small, n) for n in graph.outputs if dense[0][n].dtype.kind == "f"]
        return float(np.mean(shares)) if shares else None

    def _some(self) -> list[Feeds]:
        """As many batches as outputs are compared on."""
        some: list[Feeds] = []
        for batch in self.batches:
            if sum(len(next(iter(b.values()))) for b in some) < MEASURED:
                some.append(batch)
        return some


def accuracy(model: ModelProto, base: Path | None, data: Calibration, threads: int = 2) -> float:
    """Top-1 accuracy in percent: the first output's highest entry along its last axis is the label.

    Raises:
        PlanError: the first output is not one row of scores per sample.
    """
    outputs = Stream(model, base, data.batches, threads).finish()
    name = model.graph.output[0].name
    scores = np.concatenate([b[name] for b in outputs])
    labels = np.asarray(data.labels)
    if scores.ndim != 2 or len(scores) != len(labels):
        raise PlanError(
            f"output {name!r} has shape {scores.shape}, not one row of class scores per sample. Leave the labels out."
        )
    return float((scores.argmax(axis=1) == labels).mean() * 100)


def by_scores(scores: Array) -> Curve:
    """A loss curve from scores of single channels: the share of the sum that has gone."""
    order = np.argsort(scores, kind="stable")
    lowest = min(float(scores.min(initial=0.0)), 0.0)
    shares = np.cumsum(scores[order] - lowest)
    return Curve(order, np.concatenate([[0.0], shares / shares[-1] if shares.size and shares[-1] > 0 else shares]))


def _relative(dense: Sequence[Mapping[str, Array]], small: Sequence[Mapping[str, Array]], name: str) -> float:
    error = sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for a, b in zip(dense, small, strict=True))
    count = sum(a[name].shape[0] for a in dense)
    mean = sum(a[name].astype(np.float64).sum(axis=0) for a in dense) / count
    energy = sum(float(np.square(a[name] - mean).sum()) for a in dense)
    return error / energy if energy > 0 else error
