"""A network's latency as a function of its widths, from timing its operators where it is to run.

The network is cut before every operator that multiplies and accumulates; each part is such an operator with what
follows it, so onnxruntime fuses in a part what it fuses in the network. The network is then shrunk in a few ways, and
each part that this changes is timed at each of its shapes, once. What is fitted to a part's times is

    ms = a + b MACs + c elements read and written + d elements of weights,    a, b, c, d >= 0,

with sizes rounded up to the block that vector instructions work on. Parts that no width changes are timed once. One
factor makes the sum over all parts equal the latency measured for the whole network.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from spa.algebra.axes import Axes
from spa.coupling.analysis import Analysis, Detour, Group, Part
from spa.coupling.cost import CostModel, Sizes, Switches, Term
from spa.coupling.plan import Plan, make_plan
from spa.errors import MetricError, ModelError, PlanError
from spa.model.graph import Graph, Node
from spa.model.marks import LEAVE, is_mark, marks_around
from spa.model.shapes import Walk
from spa.model.traits import FLOATS
from spa.progress import Progress, silent
from spa.surgery.apply import apply
from spa.widths.budget import Budget, Choice
from spa.widths.ladders import alignment, allowed_widths, widths_at
from spa.widths.ranking import structure
from spa.widths.stopwatch import Cache, Stopwatch, Timing

_LOG = logging.getLogger(__name__)
POINTS = 11  # networks whose parts are timed: a prime, see `_design`
BLOCKS = (1, 8, 16)  # channels that a machine may work on at once
BETTER = 0.9  # of the error, from which on a larger block is believed
CORRECTIONS = 4  # choices anew after measuring what was chosen
LONGEST_STEP = 0.5  # of the latency that is left, the most that a correction goes beyond what was measured
BUSY = 2.0  # the spread of the dense network's times from which on they are not to be trusted
SAME = 0.005  # of the estimated latency: choices that differ less are not worth another measurement
TOLERANCE = 0.05  # of the latency asked for, within which what is measured counts as meeting it
WITHOUT_TIMES = "Write a table of this model with  spa layers  and the same options."
WITHOUT_RUNS = "A budget of latency needs a model that onnxruntime runs. Use --of macs."
Features = tuple[tuple[Axes, ...], ...]
Picked = TypeVar("Picked")


@dataclass(frozen=True)
class LatencyModel:
    """The latency of a network as a sum of products of its axis sizes.

    Attributes:
        dense_ms: the dense network's latency as measured, and as estimated.
        terms: (milliseconds per element, axes of a tensor).
        block: sizes of axes count as rounded up to multiples of this.
        inputs: the shapes that the network is fed.
        untimed: how many parts could not be timed alone; they count as free.
    """

    dense_ms: float
    terms: tuple[tuple[float, Axes], ...]
    block: int
    inputs: Mapping[str, tuple[int, ...]]
    untimed: int


# -- parts of a network ---------------------------------------------------------------------------------------------


def _parts(analysis: Analysis, alone: Sequence[set[int]] = ()) -> list[list[Node]]:
    """Split the operators that are executed into parts: each that multiplies and accumulates, with what follows it.

    An operator with several inputs goes with the last of them that is computed, as in a residual addition, which
    onnxruntime fuses into the convolution before it. The first part is what comes before all of these. A loop is one.

    Args:
        analysis: the network.
        alone: nodes that may go without the layer before, and are parts by themselves.
    """
    owner = {index: number for number, nodes in enumerate(alone) for index in nodes}
    begun: dict[int, int] = {}
    constant, around = _constants(analysis.graph), marks_around(analysis.graph)
    home: dict[str, int] = {}
    parts: list[list[Node]] = [[]]
    loop = 0
    for node in analysis.graph.nodes:
        law = analysis.laws.get(node.index)
        if law is None or constant.issuperset(o for o in node.outputs if o):
            continue
        inside = node.index in around
        if inside or (is_mark(node) and node.op in LEAVE):
            at = loop
        elif is_mark(node):
            parts.append([])
            at = loop = len(parts) - 1
        elif law.macs or (node.index in owner and owner[node.index] not in begun):
            parts.append([])
            at = len(parts) - 1
            if node.index in owner:
                begun[owner[node.index]] = at
        elif node.index in owner:
            at = begun[owner[node.index]]
        else:
            at = max((home.get(name, 0) for name in analysis.graph.reads(node)), default=0)
            if at in begun.values():
                parts.append([])
                at = len(parts) - 1
        parts[at].append(node)
        home.update(dict.fromkeys(node.outputs, at))
    return [part for part in parts if part]


def _constants(graph: Graph) -> set[str]:
    """Return the tensors that are computed from constants alone; onnxruntime computes them once."""
    known = {*graph.constants, *graph.producer}
    sources = [n for n in graph.nodes if not n.inputs or is_mark(n) or not known.issuperset(graph.reads(n))]
    varying = graph.behind(n.index for n in sources if graph.constants.keys().isdisjoint(n.outputs))
    return {*graph.constants, *(o for n in graph.nodes if n.index not in varying for o in n.outputs)}


def _features(analysis: Analysis, nodes: Sequence[Node]) -> Features:
    """Return the axes whose sizes' products a part's latency depends on, by feature: 1, MACs, activations, weights."""
    made = {o for n in nodes for o in n.outputs}
    macs: list[Axes] = []
    moved: list[Axes] = []
    weights: list[Axes] = []
    for node in nodes:
        law = analysis.laws[node.index]
        macs += law.macs
        moved += [a for a in law.outputs if a is not None]
        for name, axes in zip(node.inputs, law.inputs, strict=False):
            if axes is not None and name not in made:
                (weights if name in analysis.graph.constants else moved).append(axes)
    return ((),), tuple(macs), tuple(moved), tuple(weights)


class _Network:
    """A network at certain widths and input sizes, from which parts can be cut out."""

    def __init__(self, model: ModelProto, base: Path | None, shapes: Mapping[str, tuple[int, ...]], analysis: Analysis):
        self.graph = Graph(model, base)
        self.walk: Walk = analysis.points.walker.walk(self.graph, shapes)
        self.constant = _constants(self.graph)

    def cut(self, nodes: Sequence[Node]) -> _Cut:
        """Cut out the part that makes the same tensors as these nodes of the dense network do."""
        graph = self.graph
        own = {p.index: p for n in nodes for o in n.outputs if (p := graph.producer.get(o))}
        todo, inputs, weights = list(own.values()), dict[str, None](), dict[str, None]()
        made = {o for n in own.values() for o in n.outputs}
        while todo:  # not by networkx: the search stops at tensors that are stored
            for name in graph.reads(todo.pop()):
                if name in graph.constants or name in self.walk.computed:
                    weights[name] = None
                elif name in self.constant and name not in made:
                    maker = graph.producer[name]
                    own[maker.index] = maker
                    made.update(maker.outputs)
                    todo.append(maker)
                elif name not in made:
                    inputs[name] = None
        readers = {n: {u.index for u, _ in graph.users.get(n, ())} for n in made}
        for index, names in graph.captured.items():
            for name in names:
                readers.setdefault(name, set()).add(index)
        outputs = [n for n in made if n and (n in graph.outputs or readers[n] - own.keys())]
        return _Cut(self, [own[i] for i in sorted(own)], list(inputs), list(weights), sorted(outputs))


@dataclass(frozen=True)
class _Cut:
    """Some nodes of a network with everything that they need."""

    network: _Network
    nodes: list[Node]
    inputs: list[str]
    weights: list[str]
    outputs: list[str]

    def key(self, context: str) -> str:
        """Hash what the time of a part depends on: operators, attributes, shapes, types and small values."""
        walk, numbers = self.network.walk, dict[str, int]()

        def number(names: Iterable[str]) -> list[int]:
            return [numbers.setdefault(n, len(numbers)) for n in names]

        content: list[object] = [context]
        for node in self.nodes:
            attributes = sorted(a.SerializeToString(deterministic=True) for a in node.proto.attribute)
            content.append((node.key, node.version, attributes, number(node.inputs), number(node.outputs)))
        for name in (*self.inputs, *self.weights):
            value = walk.value.get(name)
            matters = value is not None and (value.size == 1 or value.dtype.kind in "iub")
            value_bytes = value.tobytes() if value is not None and matters else b""
            content.append((number([name]), walk.dtype.get(name), walk.shape.get(name), value_bytes))
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]

    def model(self) -> ModelProto:
        """Return the part as a network of its own, with fixed shapes."""
        graph, walk = self.network.graph, self.network.walk
        weights = [
            graph.inlined(n) if n in graph.constants else numpy_helper.from_array(np.asarray(walk.value[n]), n)
            for n in self.weights
        ]
        inputs = [helper.make_tensor_value_info(n, walk.dtype[n], walk.shape[n]) for n in self.inputs]
        return graph.part(self.nodes, inputs, self.outputs, weights)

    def feeds(self) -> dict[str, np.ndarray]:
        """Draw normal floats; set integers to one, which indexes and divides."""
        rng, walk = np.random.default_rng(0), self.network.walk
        feeds = {}
        for name in self.inputs:
            dtype, shape = helper.tensor_dtype_to_np_dtype(walk.dtype[name]), walk.shape[name]
            floats = walk.dtype[name] in FLOATS
            feeds[name] = (rng.standard_normal(shape) if floats else np.ones(shape)).astype(dtype)
        return feeds

    @property
    def can_run(self) -> bool:
        """Return whether it has outputs, and inputs whose shapes are known."""
        return bool(self.outputs) and all(n in self.network.walk.shape for n in self.inputs)

    def time(self, stopwatch: Stopwatch, cache: Cache) -> float | None:
        """Return milliseconds, measured or remembered; None where the part cannot be timed alone."""
        if not self.can_run:
            return None
        key = self.key(stopwatch.context)
        ms = cache.get(key)
        if ms is None:
            try:
                ms = stopwatch.part(self.model(), self.feeds())
            except ModelError:
                return None
            cache.put(key, ms)
        return ms


# -- the model ------------------------------------------------------------------------------------------------------


def measure(
    analysis: Analysis,
    groups: Sequence[Group],
    budget: Budget,
    stopwatch: Stopwatch,
    cache: Cache,
    progress: Progress = silent,
) -> LatencyModel:
    """Time a network and its parts, and fit the model.

    Args:
        analysis: the dense network.
        groups: the groups that may be pruned.
        budget: says which widths they may have.
        stopwatch: what times.
        cache: times that are known already; those that are new are added.
        progress: called with the stage and the fraction of it that is done.

    Raises:
        ModelError: the runtime cannot run the network.
        MetricError: a command fails.
        PlanError: no part that a width changes could be timed.
    """
    graph = analysis.graph
    dense_ms, inputs = _dense(graph, stopwatch)
    parts = _parts(analysis, [set(g.operators) for g in groups if isinstance(g, Detour) and not g.writers])
    sizes = Sizes(analysis.space, groups)
    features = [_features(analysis, nodes) for nodes in parts]
    terms = [[[sizes.term(axes) for axes in f] for f in part] for part in features]
    moving = [any(t.axes for f in part for t in f) for part in terms]
    points = _design(analysis, groups, budget)
    times: list[list[float | None]] = [[] for _ in parts]
    kinds: list[str] = []
    for k, widths in enumerate(points):
        narrow = graph.model if k == 0 else apply(analysis, _narrowed(analysis, groups, widths))
        network = _Network(narrow, graph.base, inputs, analysis)
        for i, nodes in enumerate(parts):
            if k == 0 or (moving[i] and times[i][0] is not None):
                cut = network.cut(nodes)
                times[i].append(cut.time(stopwatch, cache))
                kinds += [cut.key("")] if k == 0 else []
            progress("latency", (k + (i + 1) / len(parts)) / len(points))
        cache.save()
    if not any(t[0] for t, moves in zip(times, moving, strict=True) if moves):
        raise PlanError(f"no layer that can be narrowed was timed by {stopwatch.label}. {WITHOUT_TIMES}")
    block, coefficients = _fit(terms, times, kinds, [{b: sizes.at(w, b) for b in BLOCKS} for w in points])
    switches = Switches(groups)
    found = [
        (ms, (*axes, *switches.of([next((n.index for n in nodes if analysis.laws[n.index].macs), nodes[0].index)])))
        for nodes, part, per_feature in zip(parts, features, coefficients, strict=True)
        for feature, ms in zip(part, per_feature, strict=True)
        for axes in feature
        if ms > 0
    ]
    untimed = sum(t[0] is None for t in times)
    dense_ms = dense_ms or sum(t[0] or 0.0 for t in times)
    model = LatencyModel(dense_ms, tuple(found), block, inputs, untimed)
    costs = CostModel(analysis, groups, model)
    factor = dense_ms / (costs.latency(costs.sizes) or 1.0)
    return replace(model, terms=tuple((ms * factor, axes) for ms, axes in found))


def _dense(graph: Graph, stopwatch: Stopwatch) -> tuple[float, Mapping[str, tuple[int, ...]]]:
    """Return the dense network's latency (0 where networks are not measured), and the shapes that it is fed."""
    try:
        if not stopwatch.measures:
            return 0.0, stopwatch.inputs(graph.self_contained())
        timing = stopwatch.networks([graph.self_contained()])
    except ModelError as error:
        raise ModelError(f"{error} {WITHOUT_RUNS}") from error
    return timing.ms[0], timing.inputs


def _design(analysis: Analysis, groups: Sequence[Group], budget: Budget) -> list[list[int]]:
    """Choose the widths of all groups at each point: the dense ones, and others that shrink unlike each other.

    The points are a lattice: in point k group g is (k m_g mod p) / (p - 1) of the way down, p being the number of
    points, a prime; m stays below p / 2, as m and p - m are mirror images. Groups of one structure and size share m and
    thereby most of their timings, but for every second one, as they often feed each other.
    """
    steps = alignment(analysis, groups, budget.round_to)
    ladders = [
        [g.size] if isinstance(g, Part) else allowed_widths(g.size, s, budget.min_width)
        for g, s in zip(groups, steps, strict=True)
    ]
    ranks: dict[object, int] = {}
    seen: dict[object, int] = {}
    multipliers = []
    for group in groups:
        kind = structure(group), group.size
        rank = ranks.setdefault(kind, len(ranks))
        seen[kind] = seen.get(kind, -1) + 1
        multipliers.append(1 + (2 * rank + seen[kind] % 2) % (POINTS // 2))
    return [
        [r[round(k * m % POINTS / (POINTS - 1) * (len(r) - 1))] for r, m in zip(ladders, multipliers, strict=True)]
        for k in range(POINTS)
    ]


def _narrowed(analysis: Analysis, groups: Sequence[Group], widths: Sequence[int]) -> Plan:
    """Make the plan that keeps the first channels of every group."""
    return make_plan(analysis, {g.name: np.arange(w) for g, w in zip(groups, widths, strict=True)})


def _fit(
    terms: Sequence[Sequence[Sequence[Term]]],
    times: Sequence[Sequence[float | None]],
    kinds: Sequence[str],
    sizes: Sequence[Mapping[int, Sequence[int]]],
) -> tuple[int, list[np.ndarray]]:
    """Fit the block and each part's milliseconds per element of its features, by least relative squared error.

    Parts that are equal in the dense network share their coefficients.

    Args:
        terms: by part and feature the terms whose sum is the feature.
        times: by part and point; a part that nothing changes has the first alone.
        kinds: by part what is equal for equal parts.
        sizes: by point and block the sizes of axes.

    Returns:
        The block, and by part an array (features,).
    """
    best: tuple[float, int, dict[str, np.ndarray]] = np.inf, 1, {}
    for block in BLOCKS:
        rows: dict[str, list[tuple[list[float], float]]] = {}
        for part, measured, kind in zip(terms, times, kinds, strict=True):
            for at, ms in zip(sizes, measured, strict=False):
                if ms:
                    values = [float(sum(t.value(at[block]) for t in feature)) for feature in part]
                    rows.setdefault(kind, []).append((values, ms))
        error, found = 0.0, {}
        for kind, pairs in rows.items():
            found[kind], missed = _nonnegative(np.array([np.array(values) / ms for values, ms in pairs]))
            error += missed
        if error < BETTER * best[0]:
            best = error, block, found
    _, block, found = best
    return block, [found.get(kind, np.zeros(len(part))) for part, kind in zip(terms, kinds, strict=True)]


def _nonnegative(a: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the x >= 0 with the least ``|a x - 1|²``, and that sum of squares."""
    from scipy.optimize import nnls  # Here: it takes longer to import than all of spa.

    scale = np.abs(a).max(axis=0)
    scale[scale == 0] = 1.0  # a column of zeros gets x = 0
    x, distance = nnls(a / scale, np.ones(len(a)), maxiter=100 * a.shape[1])
    return x / scale, float(distance) ** 2


# -- meeting a budget -----------------------------------------------------------------------------------------------


def choose(
    analysis: Analysis,
    groups: Sequence[Group],
    budget: Budget,
    ms: float | None,
    pick: Callable[[Budget, LatencyModel], tuple[Choice, Picked]],
    stopwatch: Stopwatch,
    progress: Progress,
) -> tuple[Choice, Picked, dict[str, Any], tuple[str, ...]]:
    """Choose the channels to keep so that the pruned network's measured latency is what is asked for.

    What was chosen is measured beside the dense network. A choice that misses the goal by more than ``TOLERANCE`` is
    made anew, between the networks measured so far (the dense one is the first); the nearest one stays.

    Args:
        analysis: the dense network.
        groups: those that may be pruned.
        budget: the fraction to remove, where ``ms`` is None, and which widths groups may have.
        ms: the milliseconds to arrive at.
        pick: makes a choice for a budget in estimated latency, and something of its own.
        stopwatch: what times networks and their operators.
        progress: called with the stage and the fraction of it that is done.

    Returns:
        The choice; what ``pick`` gave; what :meth:`_Attempt.report` says; and notes.

    Raises:
        ModelError: the runtime cannot run the network.
        MetricError: a command fails before any choice was measured.
        PlanError: the goal is above what the dense network takes, or below what can be reached.
    """
    model = measure(analysis, groups, budget, stopwatch, stopwatch.known(), progress)
    ask = replace(budget, round_to=math.lcm(budget.round_to, model.block))
    if ms is not None:
        ask = replace(ask, ratio=_ratio(analysis, groups, ask, ms, model))
    attempts: list[_Attempt[Picked]] = []
    spread, notes = 1.0, list(stopwatch.notes)
    while len(attempts) <= CORRECTIONS:
        try:
            choice, picked = pick(ask, model)
            timing = _timed(analysis, choice, model, stopwatch)
        except (PlanError, MetricError) as error:
            if not attempts:
                raise
            if isinstance(error, MetricError):
                notes.append(f"the search for the latency ended early: {error}")
            break
        (dense, measured), spread = timing.ms, max(spread, timing.spread)
        goal = (1 - budget.ratio) * dense if ms is None else ms
        attempts.append(_Attempt(choice=choice, picked=picked, goal=goal, measured=measured, dense=dense))
        _LOG.info("%.4g of %.4g ms are left", measured, dense)
        ratio = _between(attempts)
        if attempts[-1].miss <= TOLERANCE or not 0 < ratio < 1 or abs(ratio - ask.ratio) < SAME:
            break
        ask = replace(ask, ratio=ratio)
    best = min(attempts, key=lambda a: a.miss)
    report = best.report(len(attempts), stopwatch, model)
    return best.choice, best.picked, report, (*notes, *_notes(report, model, spread))


def _timed(analysis: Analysis, choice: Choice, model: LatencyModel, stopwatch: Stopwatch) -> Timing:
    """Time the dense network and the one that was chosen; estimate them where networks are not measured."""
    if not stopwatch.measures:
        return Timing((model.dense_ms, model.dense_ms * (1 - choice.reached)), model.inputs, 1.0)
    pruned = Graph(apply(analysis, make_plan(analysis, choice.kept)), analysis.graph.base)
    return stopwatch.networks([analysis.graph.self_contained(), pruned.self_contained()])


def _between(attempts: Sequence[_Attempt[Picked]]) -> float:
    """Return the share of the estimated latency to remove next, by a straight line between what was measured.

    Attempts that are too slow and too fast enclose it. Where none is too fast, the line goes on from the last, but not
    far: what a busy machine takes for the latency must not empty the network.
    """
    last = attempts[-1]
    measured = [(a.choice.reached, a.measured / a.goal) for a in attempts]
    low, above = max([(0.0, last.dense / last.goal), *(m for m in measured if m[1] > 1)])
    fast = [m for m in measured if m[1] <= 1 and m[0] > low]
    if fast:
        high, below = min(fast)
        return low + (high - low) * (above - 1) / (above - below)
    return 1 - (1 - low) * max(1 / above, LONGEST_STEP)


@dataclass(frozen=True)
class _Attempt(Generic[Picked]):
    """A choice, what was picked with it, and milliseconds: the goal, and measured pruned and dense."""

    choice: Choice
    picked: Picked
    goal: float
    measured: float
    dense: float

    @property
    def miss(self) -> float:
        """The distance from the goal, relative to it."""
        return abs(self.measured / self.goal - 1)

    def report(self, choices: int, stopwatch: Stopwatch, model: LatencyModel) -> dict[str, Any]:
        """Return what the report says of it: milliseconds, how many ``choices`` were made, and how they were timed."""
        return {
            "goal": self.goal,
            "estimated": (1 - self.choice.reached) * self.dense,
            "measured": self.measured,
            "dense": self.dense,
            "choices": choices,
            "threads": stopwatch.threads,
            "by": stopwatch.label,
            "block": model.block,
            "inputs": {name: list(shape) for name, shape in model.inputs.items()},
        }


def _ratio(analysis: Analysis, groups: Sequence[Group], budget: Budget, ms: float, model: LatencyModel) -> float:
    """Return the fraction to remove so that so many milliseconds are left."""
    if not ms < model.dense_ms:
        raise PlanError(
            f"the network takes {model.dense_ms:.3g} ms already, and {ms:g} ms are asked for. Ask for fewer."
        )
    ladders = budget.ladders(analysis, groups)
    narrowest = widths_at(ladders, [len(x.rungs) - 1 for x in ladders])
    least = CostModel(analysis, groups, model).latency(narrowest)
    if ms < least:
        raise PlanError(
            f"{ms:g} of {model.dense_ms:.3g} ms are out of reach: about {least:.3g} ms is the least under these "
            "constraints. Ask for more, or allow --cross-norm, lower --min-width or --round-to, or ignore fewer groups."
        )
    return 1 - ms / model.dense_ms


def _notes(found: Mapping[str, Any], model: LatencyModel, spread: float) -> tuple[str, ...]:
    notes = []
    if spread > BUSY:
        notes.append(
            f"this machine is too busy to time by: the dense network's runs differ by a factor of {spread:.2g}; "
            "prune again where nothing else runs"
        )
    if abs(found["measured"] / found["goal"] - 1) > TOLERANCE:
        notes.append(
            f"asked for {found['goal']:.3g} ms; the nearest network that was found takes {found['measured']:.3g} ms"
        )
    if model.untimed:
        notes.append(f"{model.untimed} parts of the network could not be timed alone and count as free")
    return tuple(notes)
