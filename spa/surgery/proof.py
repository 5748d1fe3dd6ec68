"""The oracle on a user's own network and plan: does the pruned network compute what the masked original computes?

See :mod:`spa.surgery.masking` for the equation. Both sides are run by onnxruntime, with its graph optimisations off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from spa.coupling.analysis import Analysis
from spa.coupling.plan import Plan
from spa.errors import ModelError, OptionError, PlanError, UnsupportedError
from spa.model.graph import Graph
from spa.running.feeds import first_run
from spa.running.runtime import load_session, run
from spa.surgery.apply import apply
from spa.surgery.masking import masked

Array = np.ndarray
TOLERANCE = 1e-5  # of single precision: sums are taken in another order
COARSE_TOLERANCE = 2e-3  # where values are rounded to integers or halves, a sum in another order flips a rounding
_HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Proof:
    """The outcome of running both sides of the equation.

    Attributes:
        error: the largest max|pruned − masked| / max|masked| over outputs and inputs.
        effect: the same distance between the masked and the dense network: what masking moved.
        tolerance: up to which the two sides count as equal.
        groups: names of the pruned groups that the equation covers.
        crossing: names of pruned groups over which a normalisation takes statistics; removing their channels changes
            these, so that the equation makes no claim about them, and they are left whole here.
        seeds: of the inputs.
        inputs: the shapes that were fed, by input.
    """

    error: float
    effect: float
    tolerance: float
    groups: tuple[str, ...]
    crossing: tuple[str, ...]
    seeds: tuple[int, ...]
    inputs: Mapping[str, tuple[int, ...]]

    @property
    def holds(self) -> bool:
        """True if both sides are equal within the tolerance."""
        return self.error <= self.tolerance

    @property
    def is_empty(self) -> bool:
        """Return whether equality says nothing, because masking itself moved no output on these inputs."""
        return self.effect <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain data, ready for JSON."""
        return {**asdict(self), "holds": self.holds, "is_empty": self.is_empty}


def prove(
    analysis: Analysis,
    plan: Plan,
    *,
    seeds: int = 3,
    seed: int = 0,
    threads: int = 2,
    sizes: Mapping[str, int] | None = None,
    tolerance: float | None = None,
) -> Proof:
    """Compare the pruned network with the masked original, before any repair, on seeded inputs.

    Args:
        analysis: the dense model.
        plan: the channels that are kept.
        seeds: how many inputs to try.
        seed: of the first; the others follow it.
        threads: of onnxruntime.
        sizes: of open axes, by the axis' name or by ``input[axis]``.
        tolerance: for max|pruned − masked| / max|masked|; by default 1e-5, or 2e-3 for networks of half precision or
            with quantised operators.

    Raises:
        PlanError: the plan does not fit the model, or every group in it crosses a normalisation.
        ModelError: onnxruntime cannot run the model, or gives outputs that are not finite.
        UnsupportedError: the model draws random numbers, so that no two runs of it agree.
    """
    if seeds < 1:
        raise OptionError(f"seeds is {seeds}. Give 1 or more.")
    groups = analysis.by_name(plan.kept)
    plan.masks(analysis)  # refuses a plan that does not fit
    pruned = [n for n, kept in plan.kept.items() if len(kept) < plan.sizes[n]]
    crossing = tuple(n for n in pruned if groups[n].crossings)
    covered = tuple(n for n in pruned if not groups[n].crossings)
    if not covered:
        reason = (
            f"a normalisation takes statistics over each of its {len(crossing)} groups"
            if crossing
            else "it removes nothing"
        )
        raise PlanError(f"the plan has nothing that could be proved: {reason}. Give another plan.")
    plan = Plan({n: plan.kept[n] for n in covered}, {n: plan.sizes[n] for n in covered}, {})
    names = tuple(range(seed, seed + seeds))
    dense, recipe = _run_dense(analysis, names, threads, sizes)
    _check_finite(dense)
    feeds = [recipe.feeds(s) for s in names]
    base = analysis.graph.base
    expected = _outputs(Graph(masked(analysis, plan), base).self_contained(), feeds, threads, "the masked model")
    found = _outputs(Graph(apply(analysis, plan), base).self_contained(), feeds, threads, "the pruned model")
    return Proof(
        error=_largest(found, expected),
        effect=_largest(dense, expected),
        tolerance=_tolerance(analysis) if tolerance is None else tolerance,
        groups=covered,
        crossing=crossing,
        seeds=names,
        inputs={n: tuple(a.shape) for n, a in feeds[0].items()},
    )


def _run_dense(
    analysis: Analysis, seeds: Sequence[int], threads: int, sizes: Mapping[str, int] | None
) -> tuple[list[list[Any]], Any]:
    """Run the dense model on inputs that it accepts; return its outputs and the recipe of the inputs."""
    model = analysis.graph.self_contained()
    session = load_session(model, threads=threads, name="the dense model")
    recipe, first = first_run(session, model=model, seed=seeds[0], sizes=sizes)
    if _largest([run(session, recipe.feeds(seeds[0]))], [first]) > 0:
        raise UnsupportedError(
            "the model gives other outputs when it is run again on the same inputs: it draws random numbers. "
            "Export it for inference, or give its random operators a seed."
        )
    return [first, *(run(session, recipe.feeds(s)) for s in seeds[1:])], recipe


def _check_finite(outputs: Sequence[Sequence[Any]]) -> None:
    for value in (np.asarray(v) for values in outputs for v in values):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError("the dense model's outputs are not finite, so nothing can be compared. Give other sizes.")


def _outputs(model: ModelProto, feeds: Sequence[Mapping[str, Array]], threads: int, name: str) -> list[list[Any]]:
    session = load_session(model, threads=threads, name=name)
    return [run(session, arrays, name=name) for arrays in feeds]


def _largest(outputs: Sequence[Sequence[Any]], reference: Sequence[Sequence[Any]]) -> float:
    pairs = [(a, b) for xs, ys in zip(outputs, reference, strict=True) for a, b in zip(xs, ys, strict=True)]
    return max((distance(a, b) for a, b in pairs), default=0.0)


def distance(value: Any, reference: Any) -> float:
    """Return max|value − reference| / max|reference|; infinite where numbers are not finite, or non-numbers differ."""
    a, b = np.asarray(value), np.asarray(reference)
    if a.shape != b.shape:
        return np.inf
    if a.dtype.kind not in "fiub" and a.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(a, b) else np.inf
    if not a.size:
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b, equal_nan=True) else np.inf
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def _tolerance(analysis: Analysis) -> float:
    """Return the tolerance that the network's number types allow."""
    halves = any(dtype in _HALVES for dtype in analysis.points.first.dtype.values())
    rounding = any(n.op.startswith(("QLinear", "Quantize", "DynamicQuantize", "Round")) for n in analysis.graph.nodes)
    return COARSE_TOLERANCE if halves or rounding else TOLERANCE
