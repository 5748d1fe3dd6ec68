"""Calibration, repair and the output error, as one object that a pruning job holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
from onnx import ModelProto

from spa.calibration.batches import in_parts
from spa.coupling.analysis import Analysis, couple
from spa.coupling.plan import Plan
from spa.criteria.context import Inputs
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.obspa.compensate import compensate
from spa.obspa.linear import linear
from spa.obspa.readers import kind_of
from spa.obspa.readers.base import FitSettings
from spa.obspa.refit import Draft, left_out, reconstruct_together
from spa.obspa.resume import key_of
from spa.obspa.statistics import with_batch_statistics
from spa.progress import Progress, silent
from spa.running.change import Change, Yardstick, classes_seen
from spa.running.journal import NOTHING_KEPT, Journal
from spa.running.padding import with_padding
from spa.running.stream import Feeds, Stream, samples_in
from spa.running.tasks import ALONE, Workers
from spa.running.threads import bounded_threads
from spa.surgery.apply import apply
from spa.surgery.conform import conform

if TYPE_CHECKING:
    from spa.calibration.data import Calibration

Array = np.ndarray
P = ParamSpec("P")
T = TypeVar("T")
# See FitSettings for the next three. They were chosen by the outputs of ResNet-20 and ResNet-56 on held-out inputs
# (benchmarks/results/ablation.md).
DAMPING = 0.03
DAMPING_SAMPLES = 512  # given inputs damp by as much more as they are fewer: rows of one sample resemble each other
PRUNED_INPUT_FRACTION = 0.85
PRUNED_INPUT_FRACTION_SYNTHETIC = 0.7  # with synthetic inputs, from which fits carry over less
PRODUCER_ROUNDS = 3  # with given inputs; made-up ones gain nothing by more than one
NAMED_CLASSES = 5
NAMED_LAYERS = 5
COMPARED_SAMPLES = 64  # outputs are compared on about as many: an estimate, taken many times in one pruning


def _bounded(
    method: Callable[Concatenate[Calibrated, P], T],
) -> Callable[Concatenate[Calibrated, P], T]:
    """Limit linear algebra, too, to the object's number of threads while a method runs."""

    @wraps(method)
    def bounded(self: Calibrated, *args: P.args, **options: P.kwargs) -> T:
        with bounded_threads(self.threads):
            return method(self, *args, **options)

    return bounded


@dataclass
class Calibrated:
    """A dense model with the inputs that criteria and repair learn from.

    Attributes:
        analysis: the dense model.
        batches: the calibration inputs.
        synthetic: whether they are synthetic; BatchNormalizations then use their statistics while calibrating.
        threads: the number of onnxruntime's threads, and the most that linear algebra uses.
        seed: the seed of the positions that refits learn from.
        progress: called with a stage and the fraction of it that is done.
        held_out: inputs that no fit sees, on which changes are measured; without any, they are measured on all.
        workers: who scores groups.
        journal: keeps scores and refits as they are found.
    """

    analysis: Analysis
    batches: Sequence[Feeds]
    synthetic: bool
    threads: int = 2
    seed: int = 0
    progress: Progress = silent
    held_out: Sequence[Feeds] = ()
    workers: Workers = ALONE
    journal: Journal = NOTHING_KEPT
    _calibration_analysis: Analysis = field(init=False)
    _yardstick: Yardstick | None = field(init=False, default=None)

    @_bounded
    def __post_init__(self) -> None:
        graph = self.analysis.graph
        self.batches = with_padding(graph, in_parts(self.analysis, self.batches), self.threads)
        self.held_out = with_padding(graph, in_parts(self.analysis, self.held_out), self.threads)
        model = with_batch_statistics(graph, self.batches, self.threads) if self.synthetic else None
        self._calibration_analysis = (
            self.analysis if model is None else couple(Graph(model, graph.base), self.analysis.points.chosen)
        )

    def inputs(self, labels: Array | None = None) -> Inputs:
        """Return the inputs in the form that criteria take.

        Args:
            labels: the class of each sample, (samples,); None without labels.
        """
        return Inputs(
            analysis=self._calibration_analysis,
            batches=self.batches,
            labels=labels,
            synthetic=self.synthetic,
            held_out=self.held_out,
            threads=self.threads,
            progress=self.progress,
            workers=self.workers,
            journal=self.journal,
        )

    @_bounded
    def reconstruct(self, drafts: Sequence[Draft], extent: str = "full", carriers: bool = True) -> None:
        """Repair pruned models in place; each comes out as it would alone.

        Args:
            drafts: plans, and the models that surgery made of them.
            extent: ``full`` refits readers and their producers, ``quick`` too, with fewer steps of these, ``readers``
                the readers alone, ``bias`` moves biases alone.
            carriers: see :class:`spa.obspa.readers.base.FitSettings`.
        """
        same_model = self._calibration_analysis is self.analysis
        calibrated = drafts if same_model else [(p, apply(self._calibration_analysis, p)) for p, _ in drafts]
        edits = self._biased(calibrated) if extent == "bias" else self._refitted(calibrated, extent, carriers)
        for (_, pruned), edited in zip(drafts, edits, strict=True):
            if not same_model:
                Stream(pruned, self.analysis.graph.base, (), self.threads).repeat(edited)
            conform(pruned)  # refits may have added biases

    def _biased(self, drafts: Sequence[Draft]) -> list[Stream]:
        """Move the biases of pruned models in place; return their streams."""
        analysis = self._calibration_analysis
        return [compensate(analysis, *draft, self.batches, self.threads, self.progress) for draft in drafts]

    def _refitted(self, drafts: Sequence[Draft], extent: str, carriers: bool) -> list[Stream]:
        """Refit pruned models in place; return their streams."""
        fraction = PRUNED_INPUT_FRACTION_SYNTHETIC if self.synthetic else PRUNED_INPUT_FRACTION
        rounds = {"readers": 0, "quick": 1}.get(extent, 1 if self.synthetic else PRODUCER_ROUNDS)
        settings = FitSettings(
            damping=DAMPING if self.synthetic else DAMPING * (1 + DAMPING_SAMPLES / samples_in(self.batches)),
            pruned_input_fraction=fraction,
            producer_rounds=rounds,
            quick=extent == "quick",
            carriers=carriers,
            seed=self.seed,
        )
        return reconstruct_together(
            self._calibration_analysis,
            drafts,
            self.batches,
            settings,
            self.threads,
            progress=self.progress,
            journals=[self.journal.part("refit", key_of(plan, f"{extent} {carriers}")) for plan, _ in drafts],
        )

    def notes(self) -> tuple[str, ...]:
        """Return notes on what reconstruction cannot refit, and what the inputs did not show, one sentence each."""
        return (
            *self._without_fit(),
            *self._computed_biases(),
            *self._missing_classes(),
            *self._unvarying_outputs(),
        )

    def _without_fit(self) -> tuple[str, ...]:
        """Name the layers with weights that no kind of reader fits."""
        graph = self.analysis.graph
        readers = (graph.nodes[i] for i, law in self.analysis.laws.items() if law.reads)
        left = [
            node
            for node in readers
            if any(len(graph.constants[n].dims) > 1 for n in node.inputs if n in graph.constants)
            and kind_of(graph, node) is None
        ]
        if not left:
            return ()
        return (
            f"the weights of {_listed([n.label for n in left])} are ranked by l2 and not refitted: obspa fits layers "
            "of floats, and of integers behind DequantizeLinear or in MatMulNBits",
        )

    def left_out(self, plan: Plan) -> tuple[str, ...]:
        """Return a note on the cut layers inside loops and branches that no refit reaches, one for each reason."""
        analysis = self._calibration_analysis
        labels: dict[str, list[str]] = {}
        for node, why in left_out(analysis, analysis.kept(plan.masks(analysis))):
            labels.setdefault(why, []).append(node.label)
        return tuple(
            f"{_listed(nodes, NAMED_LAYERS)} {'was' if len(nodes) == 1 else 'were'} cut and not refitted: "
            f"{'it' if len(nodes) == 1 else 'each'} {why}"
            for why, nodes in labels.items()
        )

    def _unvarying_outputs(self) -> tuple[str, ...]:
        names = () if self._yardstick is None else self._yardstick.unvarying
        return tuple(
            f"output {n!r} hardly differs between the inputs, so its change says little: real inputs (--data) would"
            for n in names
        )

    def _missing_classes(self) -> tuple[str, ...]:
        """Say which classes given inputs never produce; made-up ones are not expected to."""
        if self.synthetic:
            return ()
        notes = []
        graph = self.analysis.graph
        for output, (seen, classes) in classes_seen(graph, self.batches, self.threads).items():
            missing = np.setdiff1d(np.arange(classes), seen)
            if missing.size:
                first = ", ".join(map(str, missing[:NAMED_CLASSES])) + (" …" if missing.size > NAMED_CLASSES else "")
                notes.append(
                    f"{missing.size} of the {classes} classes of output {output!r} ({first}) are never the dense "
                    "network's choice on the inputs, and may suffer most: give inputs that show them"
                )
        return tuple(notes)

    def _computed_biases(self) -> tuple[str, ...]:
        """Name the layers whose bias is no initializer."""
        graph = self.analysis.graph
        layers = (linear(graph, node) for node in graph.nodes)
        biased = (lin for lin in layers if lin is not None and lin.bias is not None)
        fixed = [lin.node.label for lin in biased if lin.bias not in graph.constants]
        if not fixed:
            return ()
        return (
            f"the bias of {_listed(fixed)} is computed in the graph and stays as it is; as an initializer it would be "
            "refitted",
        )

    @_bounded
    def change(self, pruned: ModelProto) -> Change:
        """Return what pruning has changed of the outputs, on inputs that no fit has seen where there are some."""
        if self._yardstick is None:
            graph = self.analysis.graph
            self._yardstick = Yardstick(graph, self._first_batches(), self.threads)
        return self._yardstick.change(pruned)

    def _first_batches(self) -> list[Feeds]:
        """Return the first batches that together have the samples on which outputs are compared."""
        batches: list[Feeds] = []
        for batch in self.held_out or self.batches:
            if samples_in(batches) < COMPARED_SAMPLES:
                batches.append(batch)
        return batches


def _listed(labels: Sequence[str], named: int = 1) -> str:
    """Name the first few and count the rest.

    >>> _listed(["Conv 'a'", "Conv 'b'", "Conv 'c'"], 2)
    "Conv 'a', Conv 'b' and 1 more"
    """
    rest = len(labels) - named
    return ", ".join(labels[:named]) + (f" and {rest} more" if rest > 0 else "")


def accuracy(model: ModelProto, base: Path | None, data: Calibration, threads: int = 2) -> float:
    """Return the top-1 accuracy in percent: the first output's highest entry along its last axis is the prediction.

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
