"""Calibration, reconstruction and the outputs' change, as one object that pruning holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
from onnx import ModelProto

from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import Plan
from spa.criteria.context import Inputs
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.obspa.compensate import compensate
from spa.obspa.linear import linear
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import reconstruct
from spa.obspa.statistics import with_batch_statistics
from spa.progress import Progress, silent
from spa.running.stream import Feeds, Stream
from spa.running.threads import bounded_threads
from spa.surgery.apply import apply

if TYPE_CHECKING:
    from spa.calibration.data import Calibration

Array = np.ndarray
P = ParamSpec("P")
T = TypeVar("T")
DAMPING = 0.03  # of refits; this and the next two were chosen by the outputs of ResNet-20 and 56 on inputs held out
PRUNED_INPUT_SHARE = 0.85  # how much refits see of the pruned network's own inputs, see `reconstruct`
PRUNED_INPUT_SHARE_SYNTHETIC = 0.7  # where inputs were made up
MEASURED = 256  # samples on which outputs are compared


def _bounded(
    method: Callable[Concatenate[Calibrated, P], T],
) -> Callable[Concatenate[Calibrated, P], T]:
    """Run a method with at most its object's number of threads in linear algebra, too."""

    @wraps(method)
    def bounded(self: Calibrated, *args: P.args, **options: P.kwargs) -> T:
        with bounded_threads(self.threads):
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
        seed: of the places that refits see.
        progress: called with a stage and the share of it that is done.
    """

    analysis: Analysis
    batches: Sequence[Feeds]
    synthetic: bool
    threads: int = 2
    seed: int = 0
    progress: Progress = silent
    _calibration_analysis: Analysis = field(init=False)
    _outputs: list[dict[str, Array]] | None = field(init=False, default=None)

    @_bounded
    def __post_init__(self) -> None:
        graph = self.analysis.graph
        model = with_batch_statistics(graph, self.batches, self.threads) if self.synthetic else None
        self._calibration_analysis = self.analysis if model is None else couple(Graph(model, graph.base))

    def inputs(self, labels: Array | None = None) -> Inputs:
        """Return what criteria run.

        Args:
            labels: the class of each sample, (samples,), where there are any.
        """
        return Inputs(
            analysis=self._calibration_analysis,
            batches=self.batches,
            labels=labels,
            synthetic=self.synthetic,
            threads=self.threads,
            progress=self.progress,
        )

    @_bounded
    def reconstruct(self, plan: Plan, pruned: ModelProto, extent: str = "full") -> None:
        """Repair the pruned model in place: ``full`` refits its layers, ``bias`` moves their means alone."""
        own = self._calibration_analysis is self.analysis
        calibrated = pruned if own else apply(self._calibration_analysis, plan)
        if extent == "bias":
            learnt = compensate(self._calibration_analysis, plan, calibrated, self.batches, self.threads, self.progress)
        else:
            share = PRUNED_INPUT_SHARE_SYNTHETIC if self.synthetic else PRUNED_INPUT_SHARE
            settings = FitSettings(damping=DAMPING, pruned_input_share=share, refit_producers=True, seed=self.seed)
            learnt = reconstruct(
                self._calibration_analysis,
                plan,
                calibrated,
                self.batches,
                settings,
                self.threads,
                progress=self.progress,
            )
        if not own:
            Stream(pruned, self.analysis.graph.base, (), self.threads).repeat(learnt)

    def notes(self) -> tuple[str, ...]:
        """Say what keeps reconstruction from doing all that it could."""
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
        """Return the mean squared change of the float outputs over their variance, on some inputs; None without any."""
        graph = self.analysis.graph
        if self._outputs is None:
            self._outputs = Stream(graph.model, graph.base, self._some(), self.threads).finish()
        dense = self._outputs
        small = Stream(pruned, graph.base, self._some(), self.threads).finish()
        shares = [_relative(dense, small, n) for n in graph.outputs if dense[0][n].dtype.kind == "f"]
        return float(np.mean(shares)) if shares else None

    def _some(self) -> list[Feeds]:
        """Return the first batches, as many as outputs are compared on."""
        some: list[Feeds] = []
        for batch in self.batches:
            if sum(len(next(iter(b.values()))) for b in some) < MEASURED:
                some.append(batch)
        return some


def accuracy(model: ModelProto, base: Path | None, data: Calibration, threads: int = 2) -> float:
    """Return the top-1 accuracy in percent: the first output's highest entry along its last axis is the label.

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


def _relative(dense: Sequence[Mapping[str, Array]], small: Sequence[Mapping[str, Array]], name: str) -> float:
    error = sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for a, b in zip(dense, small, strict=True))
    count = sum(a[name].shape[0] for a in dense)
    mean = sum(a[name].astype(np.float64).sum(axis=0) for a in dense) / count
    energy = sum(float(np.square(a[name] - mean).sum()) for a in dense)
    return error / energy if energy > 0 else error
