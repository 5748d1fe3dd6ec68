"""The criterion ``obspa``: what a channel's removal costs after all other channels have made up for it."""

from __future__ import annotations

from collections.abc import Sequence

from spa.coupling.analysis import Group
from spa.coupling.cost import CostModel
from spa.criteria.answers import Curve, Curves
from spa.criteria.context import Context, Inputs
from spa.criteria.magnitude import l2
from spa.criteria.registry import Criterion, criterion
from spa.criteria.scores import by_parameter

REFIT_DISCOUNT = (
    0.3  # of losses by the refits behind them, see `discounted`; chosen as the constants of pipeline.py are
)
REFIT_DISCOUNT_SYNTHETIC = 0.0  # refits on made-up inputs repair too little to count on
TRIALS = 1e11  # multiply-accumulates of all inputs, up to which both are tried where inputs were made up


def loss_curves(context: Context) -> Curves:
    """Compute loss curves of groups by optimal brain surgery; those of groups without a known reader by ``l2``.

    Args:
        context: with inputs. NORM and AGG are not used.

    Returns:
        The curves; with made-up inputs, where a trial costs little, also with another discount.
    """
    from spa.obspa.score import curves, discounted  # with onnxruntime, which not every use of the registry needs

    inputs = context.required_inputs()
    found = curves(
        inputs.analysis,
        inputs.counterparts(context.groups),
        inputs.batches,
        inputs.threads,
        context.seed,
        progress=inputs.progress,
    )
    others = _by_weights(context, [g for g in context.groups if g.name not in found])
    discounts = refit_discounts(context, inputs)
    return Curves(tuple(discounted(found, context.groups, d) | others for d in discounts))


def refit_discounts(context: Context, inputs: Inputs) -> tuple[float, ...]:
    """Return the discount of losses by later refits, and those that are worth a trial beside it."""
    if not inputs.synthetic:
        return (REFIT_DISCOUNT,)
    macs = CostModel(context.analysis, []).evaluate([]).macs
    cheap = macs * inputs.samples <= TRIALS
    return (REFIT_DISCOUNT_SYNTHETIC, REFIT_DISCOUNT) if cheap else (REFIT_DISCOUNT_SYNTHETIC,)


def _by_weights(context: Context, groups: Sequence[Group]) -> dict[str, Curve]:
    """Rank the channels of groups by their squared weights."""
    scores = by_parameter(l2)(Context(context.analysis, groups, norm="mean", agg="mean"))
    return {name: Curve.of_scores(s) for name, s in scores.items()}


OBSPA = criterion(
    Criterion(
        name="obspa",
        score=loss_curves,
        summary="What a removal costs after all other channels have made up for it.",
        source="Structurally Prune Anything, arXiv 2403.18955, section 3.3; ZipLM, arXiv 2302.04089, equations 2 and 3",
        needs=frozenset({"weights", "inputs"}),
        reconstruct="full",
    )
)
