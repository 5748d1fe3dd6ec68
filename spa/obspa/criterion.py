"""The criterion ``obspa``: the loss of removing a channel after all other channels have made up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spa.coupling.analysis import Group
from spa.coupling.cost import CostModel
from spa.criteria.answers import Curve, Curves
from spa.criteria.context import Context, Inputs
from spa.criteria.magnitude import l2
from spa.criteria.registry import Criterion, criterion
from spa.criteria.scores import by_parameter
from spa.errors import PlanError

if TYPE_CHECKING:
    from spa.running.stream import Feeds

# The exponent of `discounted`: how much later refits repair. Chosen by the outputs of ResNet-20 and ResNet-56 on
# held-out inputs (benchmarks/results/ablation.md).
REFIT_DISCOUNT = 0.3
REFIT_DISCOUNT_SYNTHETIC = 0.0  # with synthetic inputs: their refits repair too little to count on
# MACs over all synthetic inputs up to which both discounts are tried: neither is always the better one
# (benchmarks/results/trials.md).
TRIALS = 1e11
GAUGE_DAMPING = 0.1  # of the fits of a group that is cut alone, as refits to some hundred inputs have
# Measuring all groups on these inputs may cost as much as this many passes over all of them.
MEASURED_PASSES = 2
FEWEST_MEASURED, MOST_MEASURED = 4, 32
BRANCH_SAMPLES = 64  # that the repair behind a branch learns from, which is dropped alone


def loss_curves(context: Context) -> Curves:
    """Compute loss curves by optimal brain surgery; by ``l2`` for groups without a reader of a known kind.

    Args:
        context: the groups and the inputs; the options ``norm`` and ``agg`` are not used.

    Returns:
        The curves, once for each discount of :func:`refit_discounts`.
    """
    # These import onnxruntime, which not every use of the registry needs.
    from spa.obspa.branches import priced
    from spa.obspa.score import ScoreSettings, curves, discounted
    from spa.obspa.sensitivity import Gauge, corrected
    from spa.running.stream import first_samples

    inputs = context.required_inputs()
    few = first_samples(inputs.held_out, measured_samples(inputs.samples, len(context.groups)))
    losses, measured = curves(
        inputs.analysis,
        inputs.counterparts(context.groups),
        inputs.batches,
        ScoreSettings(inputs.threads, context.seed, inputs.progress, inputs.workers, inputs.journal),
        gauge=Gauge(inputs.analysis, few, GAUGE_DAMPING, inputs.threads) if few else None,
    )
    others = _by_weights(context, [g for g in context.groups if g.name not in losses])
    discounts = refit_discounts(context, inputs)
    widths = [corrected(discounted(losses, context.groups, d), measured) for d in discounts]
    candidates = [curve | others for curve in widths]
    if context.branches:
        changes = _branch_changes(context, inputs, few)
        with_branches = [curve | others | priced(changes, curve, measured) for curve in widths]
        candidates = with_branches + candidates  # the repair may make up for less than prices say
    return Curves(tuple(candidates))


def _branch_changes(context: Context, inputs: Inputs, held_out: Sequence[Feeds]) -> dict[str, float]:
    """Return what the outputs lose by each residual branch that goes.

    Raises:
        PlanError: there are no inputs to compare them on.
    """
    from spa.obspa.branches import BranchGauge
    from spa.running.stream import first_samples

    if not held_out:
        raise PlanError("what branches cost is measured on inputs held out, and there are none. Give 8 or more inputs.")
    names = {b.name for b in context.branches}
    branches = [p for p in inputs.analysis.parts if p.name in names]
    batches = first_samples(inputs.batches, BRANCH_SAMPLES)
    gauge = BranchGauge(inputs.analysis, batches, held_out, GAUGE_DAMPING, inputs.threads)
    return gauge.changes(branches, inputs.progress)


def measured_samples(samples: int, groups: int) -> int:
    """Return the number of inputs on which each group is measured."""
    return min(max(MEASURED_PASSES * samples // max(groups, 1), FEWEST_MEASURED), MOST_MEASURED)


def refit_discounts(context: Context, inputs: Inputs) -> tuple[float, ...]:
    """Return the exponent that discounts losses by later refits, then the others that are worth a trial."""
    if not inputs.synthetic:
        return (REFIT_DISCOUNT,)
    macs = CostModel(context.analysis, []).evaluate([]).macs
    cheap = macs * inputs.samples <= TRIALS
    return (REFIT_DISCOUNT_SYNTHETIC, REFIT_DISCOUNT) if cheap else (REFIT_DISCOUNT_SYNTHETIC,)


def _by_weights(context: Context, groups: Sequence[Group]) -> dict[str, Curve]:
    """Rank the channels of groups by their squared weights, the mean over parameters."""
    scores = by_parameter(l2)(Context(context.analysis, groups, norm="mean", agg="mean"))
    return {name: Curve.of_scores(s) for name, s in scores.items()}


OBSPA = criterion(
    Criterion(
        name="obspa",
        score=loss_curves,
        summary="The loss of a removal after all other channels have made up for it.",
        source="Structurally Prune Anything, arXiv 2403.18955, section 3.3; ZipLM, arXiv 2302.04089, equations 2 and 3",
        needs=frozenset({"weights", "inputs"}),
        reconstruct="full",
    )
)
