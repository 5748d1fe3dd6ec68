"""Gates: the worth of each channel to the outputs, by forward passes alone.

Every channel c of every group gets a gate z_c, which multiplies the slices of its readers (as a mask does) and is one
in the network as it is. With all signs s_c drawn at random, two runs at z = 1 ± ε s give a central difference along s,
Δ = (f(1 + ε s) − f(1 − ε s)) / 2ε = J s + O(ε²), J the Jacobian of f with respect to the gates. Over K draws,

    with labels      ∂L/∂z_c      ≈ mean_k s_kc Δ_k                  f the cross-entropy L
    without labels   ‖∂y/∂z_c‖²   ≈ mean_{k≠l} s_kc s_lc ⟨Δ_k, Δ_l⟩    f the outputs y

The first is simultaneous perturbation (Spall, IEEE Transactions on Automatic Control, 1992), of what the criterion
``taylor`` computes for the readers' slices. Without labels the squared change of the outputs has no first derivative in
the network as it is; half its second one is the diagonal of JᵀJ. The mean over pairs of different draws has no bias;
that of squares would count all other gates, too. Both are noisy, by about the root mean square of all gates'
derivatives times √(gates / K): a few dozens of draws tell the large ones, small ones take as many draws as there are
gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from spa.algebra.axes import leaves
from spa.coupling.analysis import Analysis, Group
from spa.coupling.places import channel_of
from spa.criteria.context import Context
from spa.criteria.registry import Criterion, criterion
from spa.errors import ModelError, PlanError
from spa.model.traits import FLOATS
from spa.progress import Progress, silent
from spa.running.runtime import load_session, run

Array = np.ndarray
Feeds = Mapping[str, Array]
Ends = Callable[[int], Iterator[tuple[list[Array], list[Array]]]]  # of each direction, by number of batch
STEP = 1e-2  # of the gates: the error of the difference goes with its square, that of rounding with its inverse
SAMPLED = 1 << 16  # numbers of an output, per batch; of larger ones a random part


def estimate_gates(
    analysis: Analysis,
    groups: Sequence[Group],
    batches: Sequence[Feeds],
    labels: Array | None = None,
    probes: int = 64,
    seed: int = 0,
    threads: int = 2,
    progress: Progress = silent,
) -> dict[str, Array]:
    """Estimate what the channels of some groups are worth to the outputs.

    Args:
        analysis: the model.
        groups: the groups to gate. Readers of integers have no gate.
        batches: inputs.
        labels: the class of each sample, (samples,); without them all float outputs count.
        probes: K, how many random directions; each takes two runs over all batches.
        seed: of the directions.
        threads: of onnxruntime.
        progress: called with a stage and the fraction of it that is done.

    Returns:
        By group name (channels,), float64. With labels the derivative of the mean cross-entropy (in nats) with respect
        to each gate, which has a sign: its magnitude is the importance. Without, the squared change of the outputs per
        unit of the gate, over their squared deviation from their mean, averaged over outputs; small ones may come out
        below zero.

    Raises:
        PlanError: there are no inputs or fewer than 2 probes; or there are labels, but the first output is not one
            row of scores per sample.
        ModelError: onnxruntime cannot run the model on the inputs, or gives values that are not finite.
    """
    if probes < 2 or not batches:
        raise PlanError(
            f"gates need at least 2 probes and 1 batch of inputs, not {probes} and {len(batches)}. Give more."
        )
    gated = Gated(analysis, groups, threads)
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (probes, gated.count))

    def ends(number: int) -> Iterator[tuple[list[Array], list[Array]]]:
        """Yield the outputs at both ends of each direction."""
        for k, direction in enumerate(signs):
            progress("gates", (number * probes + k) / (len(batches) * probes))
            up, down = (gated.run(batches[number], 1 + step * direction) for step in (STEP, -STEP))
            yield up, down

    if labels is not None:
        worth = _slopes(analysis, ends, len(batches), np.asarray(labels)) @ signs / probes
    else:
        products = _products(gated, ends, batches, rng)
        np.fill_diagonal(products, 0)
        worth = np.einsum("kc,kc->c", signs, products @ signs) / (probes * (probes - 1))
    if not np.isfinite(worth).all():
        raise ModelError("the outputs are not finite where channels are scaled by 1 ± 0.01. Give other inputs.")
    pieces = np.split(worth, np.cumsum([g.size for g in groups])[:-1])
    return dict(zip([g.name for g in groups], pieces, strict=True))


# -- measures ---------------------------------------------------------------------------------------------------------


def _slopes(analysis: Analysis, ends: Ends, batches: int, labels: Array) -> Array:
    """Return the derivative of the mean cross-entropy along each direction, (probes,)."""
    name = analysis.graph.outputs[0]
    last = analysis.graph.producer.get(name)
    probabilities = last is not None and last.op == "Softmax"
    seen, total = 0, np.zeros(())
    for number in range(batches):
        changes = []
        for up, down in ends(number):
            wanted = labels[seen : seen + len(up[0])]
            if up[0].ndim != 2 or len(wanted) != len(up[0]):
                raise PlanError(
                    f"output {name!r} has shape {up[0].shape}, not one row of class scores per sample, "
                    f"of which {len(labels)} have labels. Leave the labels out."
                )
            changes.append(_entropy(up[0], wanted, probabilities) - _entropy(down[0], wanted, probabilities))
        seen += len(wanted)
        total = total + np.asarray(changes)
    return total / (2 * STEP * seen)


def _entropy(scores: Array, labels: Array, probabilities: bool) -> float:
    """Return the sum of cross-entropies, in nats."""
    scores = scores.astype(np.float64)
    if probabilities:
        scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny))
    highest = scores.max(axis=1)
    totals = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
    return float((totals - scores[np.arange(len(labels)), labels]).sum())


def _products(gated: Gated, ends: Ends, batches: Sequence[Feeds], rng: np.random.Generator) -> Array:
    """Return inner products of the outputs' derivatives along the directions, (probes, probes)."""
    found: list[Array] = []
    energies: list[Spread] = []
    for number, batch in enumerate(batches):
        dense = gated.run(batch, np.ones(gated.count))
        floats = [i for i, y in enumerate(dense) if isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.size]
        sampled = [rng.permutation(dense[i].size)[:SAMPLED] for i in floats]
        changes = [
            [(up[i] - down[i]).reshape(-1)[p] for i, p in zip(floats, sampled, strict=True)]
            for up, down in ends(number)
        ]
        found = found or [np.zeros((len(changes), len(changes))) for _ in floats]
        energies = energies or [Spread() for _ in floats]
        for at, (i, p) in enumerate(zip(floats, sampled, strict=True)):
            energies[at].add(dense[i])
            table = np.stack([c[at] for c in changes]).astype(np.float64)
            found[at] += table @ table.T * (dense[i].size / len(p))
    if not found:
        raise PlanError("the model has no output of floats. Give labels.")
    relative = [f / e.energy for f, e in zip(found, energies, strict=True)]
    return np.mean(relative, axis=0) / (4 * STEP**2)


@dataclass
class Spread:
    """The sums from which an output's squared deviation from its mean follows."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Array) -> None:
        """Take in some values."""
        flat = values.reshape(-1).astype(np.float64)
        self.count, self.total = self.count + flat.size, self.total + float(flat.sum())
        self.squares += float(flat @ flat)

    @property
    def energy(self) -> float:
        """The sum of squared deviations; one where there are none."""
        energy = self.squares - self.total**2 / self.count
        return energy if energy > 0 else 1.0


# -- the model with gates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """The gates of what one operand is summed over.

    Attributes:
        shape: of the factor that the operand is multiplied with.
        dtype: of it.
        positions: for each group that lies on the axis the gate of each index, (indices,); the last one is always 1.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    positions: tuple[Array, ...]


class Gated:
    """A model whose readers' slices are multiplied with gates, which are inputs.

    Attributes:
        count: how many gates there are.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], threads: int) -> None:
        first = dict(zip([g.dim for g in groups], np.cumsum([0, *(g.size for g in groups)]), strict=False))
        self.count = sum(g.size for g in groups)
        self._gates: dict[str, Gate] = {}
        model = ModelProto()
        model.CopyFrom(analysis.graph.self_contained())
        nodes = list(model.graph.node)
        before: dict[int, list[NodeProto]] = {}
        walk = analysis.points.first
        for index, law in analysis.laws.items():
            for number, read in enumerate(law.reads):
                expr, operand = analysis.space.resolve(read.expr), law.node.inputs[read.operand]
                dims = [d for d in dict.fromkeys(leaves(expr)) if d in first]
                if not dims or walk.dtype[operand] not in FLOATS:
                    continue
                name = f"spa_gate_{index}_{number}"
                rank = len(walk.shape[operand])
                shape = tuple(expr.size if i == read.axis else 1 for i in range(rank))
                channels = {d: channel_of(expr, d) for d in dims}
                positions = tuple(np.where(c >= 0, c + first[d], self.count) for d, c in channels.items())
                dtype = helper.tensor_dtype_to_np_dtype(walk.dtype[operand])
                self._gates[name] = Gate(shape, dtype, positions)
                model.graph.input.append(helper.make_tensor_value_info(name, walk.dtype[operand], shape))
                now = nodes[index].input[read.operand]
                before.setdefault(index, []).append(helper.make_node("Mul", [now, name], [f"{name}_out"]))
                nodes[index].input[read.operand] = f"{name}_out"
        copies = [_copied(n) for i, node in enumerate(nodes) for n in (*before.get(i, ()), node)]
        del model.graph.node[:]
        model.graph.node.extend(copies)
        self._session = load_session(model, threads=threads)

    def run(self, batch: Feeds, gates: Array) -> list[Array]:
        """Return the outputs under some gates, (gates,), in the order of the groups."""
        values = np.append(gates, 1.0)
        factors = {n: np.prod([values[p] for p in g.positions], axis=0) for n, g in self._gates.items()}
        feeds = {n: f.reshape(self._gates[n].shape).astype(self._gates[n].dtype) for n, f in factors.items()}
        return run(self._session, {**batch, **feeds})


def _copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _score(context: Context) -> dict[str, Array]:
    """Estimate the gates of some groups from the outputs alone."""
    inputs = context.required_inputs()
    return estimate_gates(
        inputs.analysis,
        inputs.counterparts(context.groups),
        inputs.batches,
        seed=context.seed,
        threads=inputs.threads,
        progress=inputs.progress,
    )


criterion(
    Criterion(
        name="gate",
        score=_score,
        summary="The squared change of the outputs with a gate on the channel, estimated by running the model.",
        source="Spall, IEEE Transactions on Automatic Control, 1992; see spa.criteria.gates",
        needs=frozenset({"weights", "inputs"}),
    )
)
