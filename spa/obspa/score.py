"""Loss curves of groups by optimal brain surgery, from one pass of the dense network over the calibration inputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spa.coupling.analysis import Analysis, Group
from spa.criteria.answers import Curve
from spa.model.graph import Node
from spa.obspa.curves import MomentReader, Observation, greedy
from spa.obspa.readers import kind_of
from spa.obspa.sensitivity import Gauge, Measured, Use
from spa.progress import Progress, silent
from spa.running.change import Start
from spa.running.journal import NOTHING_KEPT, Journal
from spa.running.memory import give_back
from spa.running.stream import Feeds, Stream
from spa.running.tasks import ALONE, Workers

Array = np.ndarray
# The factor of the losses of a group with several readers. Their errors add up along the depth of the network, so that
# the harm is more than the sum of the losses. Chosen by the outputs of ResNet-20 and ResNet-56 on held-out inputs
# (benchmarks/results/ablation.md).
SHARED_GROUP_WEIGHT = 4.0


@dataclass(frozen=True)
class ScoreSettings:
    """Options of scoring that change no score but by the seed and the number of threads.

    Attributes:
        threads: the number of onnxruntime's threads.
        seed: the seed of the positions that readers are observed at.
        progress: called with a stage and the fraction of it that is done.
        workers: who scores groups, while this process observes the readers of the next ones.
        journal: keeps what is scored; groups that it has are not scored again.
    """

    threads: int = 2
    seed: int = 0
    progress: Progress = silent
    workers: Workers = ALONE
    journal: Journal = NOTHING_KEPT


DEFAULT_SETTINGS = ScoreSettings()


def curves(
    analysis: Analysis,
    groups: Sequence[Group],
    batches: Sequence[Feeds],
    settings: ScoreSettings = DEFAULT_SETTINGS,
    gauge: Gauge | None = None,
) -> tuple[dict[str, Curve], dict[str, Measured]]:
    """Find for each group the order in which channels are removed, and the relative output error of each width.

    A loss is the squared error of the reader's output, after the scale of a following BatchNormalization, divided by
    the energy of the residual sum that the output goes into, so that losses compare across the network.

    Args:
        analysis: the dense network.
        groups: the groups to score.
        batches: the calibration inputs.
        settings: the options.
        gauge: measures a point of each curve.

    Returns:
        The curves by group name; groups without a reader of a known kind (see :func:`observe`) are missing. And what
        was measured of them.
    """
    journal, found = settings.journal.part("score"), dict[str, tuple[Curve, Measured | None]]()
    for group in groups:
        if (kept := journal.get("group", group.name)) is not None:
            found[group.name] = kept
    stream = Stream(analysis.graph.model, analysis.graph.base, batches, settings.threads)
    observed = _observed(analysis, groups, stream, settings, found.copy(), gauge)
    for _, (name, curve, point) in settings.workers.each(_scored, gauge, observed, settings.threads):
        found[name] = curve, point
        journal.keep(found[name], "group", name)
    ordered = {name: found[name] for name in _completed(analysis, groups) if name in found}
    measured = {name: point for name, (_, point) in ordered.items() if point is not None}
    return {name: curve for name, (curve, _) in ordered.items()}, measured


def _completed(analysis: Analysis, groups: Sequence[Group]) -> list[str]:
    """Return the names of groups in the order in which the last of their readers run."""
    return [group.name for group in sorted(groups, key=lambda g: max(g.readers, default=-1))]


def _observed(
    analysis: Analysis,
    groups: Sequence[Group],
    stream: Stream,
    settings: ScoreSettings,
    done: Container[str],
    gauge: Gauge | None,
) -> Iterator[tuple[Group, list[Use], Start | None]]:
    """Run the dense network; yield each group with its readers and its start once the last of them is observed.

    Readers of groups that are done are run, but not observed; random numbers go on as if they were.
    """
    starts = None if gauge is None else gauge.starts([g for g in groups if g.name not in done])
    groups_of_reader: dict[int, list[Group]] = {}
    for group in groups:
        for index in group.readers:
            groups_of_reader.setdefault(index, []).append(group)
    rng, journal = np.random.default_rng(settings.seed), settings.journal.part("score", "random")
    last = {g.name: max(g.readers, default=-1) for g in groups}
    pending: dict[str, list[Use]] = {g.name: [] for g in groups}
    for index in sorted(groups_of_reader):
        settings.progress("score", index / len(stream.graph.nodes))
        node, waiting = stream.graph.nodes[index], [g for g in groups_of_reader[index] if g.name not in done]
        after = journal.get(index)
        if not waiting and after is not None:
            rng.bit_generator.state = after
            continue
        for observation in observe(analysis, stream, node, rng):
            for group in waiting:
                columns = observation.columns(group.dim, group.size)
                if columns is not None:
                    reader = observation.make_reader(columns)
                    _add(pending[group.name], Use(node, reader, observation.weights, observation.mean))
        give_back()
        if after is None:
            journal.keep(rng.bit_generator.state, index)
        for group in waiting:
            if last[group.name] == index and pending[group.name]:
                yield group, pending.pop(group.name), None if starts is None else starts.take(group, index)


def _scored(gauge: Gauge | None, observed: tuple[Group, list[Use], Start | None]) -> tuple[str, Curve, Measured | None]:
    """Score a group: its name, its curve, and what was measured of it."""
    group, uses, start = observed
    weight = SHARED_GROUP_WEIGHT if len(group.readers) > 1 else 1.0
    curve = greedy([use.reader for use in uses], group.size)
    point = None if gauge is None else gauge.measure(group, curve.order, uses, start)
    return group.name, Curve(curve.order, curve.loss * weight), point


def _add(readers: list[Use], new: Use) -> None:
    """Add a reader to those of a group; another use of the same weights joins the first.

    A recurrent network, unrolled, uses a matrix at each step: one matrix of second moments serves all of them.
    """
    for i, use in enumerate(readers):
        first, other = use.reader, new.reader
        if new.weights is None or use.weights != new.weights or not isinstance(first, MomentReader):
            continue
        if isinstance(other, MomentReader) and np.array_equal(first.columns, other.columns):
            readers[i] = replace(use, reader=first.with_use(other))
            return
    readers.append(new)


def discounted(curves: Mapping[str, Curve], groups: Sequence[Group], exponent: float) -> dict[str, Curve]:
    """Scale loss curves by ``(1 + n) ** -exponent``, with n readers (of any of the groups) behind a group's own.

    Each later refit repairs part of the error, so that the network's outputs see less of an early loss. Where a group
    has several readers, the mean of their factors counts.
    """
    readers = sorted({i for g in groups for i in g.readers})

    def factor(group: Group) -> float:
        behind = len(readers) - 1 - np.searchsorted(readers, sorted(group.readers))
        return float(np.mean((1.0 + behind) ** -exponent))

    return {g.name: Curve(c.order, c.loss * factor(g)) for g in groups if (c := curves.get(g.name)) is not None}


def observe(analysis: Analysis, stream: Stream, node: Node, rng: np.random.Generator) -> list[Observation]:
    """Run the network up to a node and return the statistics of its inputs; none if it is no reader of a known kind."""
    kind = kind_of(stream.graph, node) if stream.sees(node) else None
    if kind is None:
        return []
    stream.after(node)
    return kind.observe(analysis, stream, node, rng)
