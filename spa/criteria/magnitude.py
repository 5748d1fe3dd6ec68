"""Criteria that look at the weights alone: l1, l2, bn_scale, fpgm and lamp; and random scores to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.criteria.context import Context
from spa.criteria.parameter import Parameter, weights
from spa.criteria.registry import Criterion, criterion
from spa.criteria.scores import by_parameter

Array = np.ndarray


def l1(parameter: Parameter) -> Array:
    """Sum the absolute values of each channel."""
    return parameter.per_channel(np.abs)


def l2(parameter: Parameter) -> Array:
    """Sum the squares of each channel."""
    return parameter.per_channel(np.square)


def fpgm(parameter: Parameter) -> Array:
    """Sum each channel's distances to all other channels of the parameter.

    The channel nearest to the geometric median is the most replaceable (He et al., CVPR 2019, equation 6).
    """
    rows = parameter.rows()
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    np.fill_diagonal(distances, 0.0)
    return np.sqrt(np.maximum(distances, 0)).sum(axis=1)


def lamp(parameter: Parameter) -> Array:
    """Divide a channel's squares by those of all channels at least as large (Lee et al., ICLR 2021, equation 3)."""
    squares = l2(parameter)
    order = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.where(remaining > 0, remaining, 1.0)
    return scores


def _scales(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Select the scales of BatchNormalization, or the weights where a group has none."""
    scales = [p for p in parameters if p.operator == "BatchNormalization" and p.operand == 1]
    return scales or weights(parameters)


def _random(context: Context) -> dict[str, Array]:
    """Draw scores uniformly from [0, 1)."""
    rng = np.random.default_rng(context.seed)
    return {g.name: rng.random(g.size) for g in context.groups}


criterion(
    Criterion(
        name="l1",
        score=by_parameter(l1, in_parallel=True),
        summary="The sum of absolute weights.",
        source="Li et al., ICLR 2017 (arXiv 1608.08710), section 3.1",
    )
)
criterion(
    Criterion(
        name="l2",
        score=by_parameter(l2, in_parallel=True),
        summary="The sum of squared weights.",
        source="He et al., IJCAI 2018 (arXiv 1808.06866)",
    )
)
criterion(
    Criterion(
        name="bn_scale",
        score=by_parameter(l1, _scales, in_parallel=True),
        summary="The absolute scale of BatchNormalization; l1 where a group has none.",
        source="Liu et al., ICCV 2017 (arXiv 1708.06519), section 3",
    )
)
criterion(
    Criterion(
        name="fpgm",
        score=by_parameter(fpgm),
        summary="The distance to all other channels, low near the geometric median.",
        source="He et al., CVPR 2019 (arXiv 1811.00250), equation 6",
    )
)
criterion(
    Criterion(
        name="lamp",
        score=by_parameter(lamp, in_parallel=True),
        summary="The squared weights over those of all channels that are at least as large.",
        source="Lee et al., ICLR 2021 (arXiv 2010.07611), equation 3",
    )
)
criterion(
    Criterion(
        name="random",
        score=_random,
        summary="Uniform random numbers from the seed, to compare with.",
        needs=frozenset(),
    )
)
