"""The criterion obspa against optimal brain surgery's formula, written with loops."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from spa import criteria
from spa.coupling.analysis import couple
from spa.criteria import Context, Curve, Inputs
from spa.errors import PlanError
from spa.model.graph import Graph
from spa.obspa import criterion as obspa
from spa.obspa.curves import MomentReader
from spa.obspa.score import discounted
from tests.obspa.test_obspa import network, residual_net


def test_a_channels_score_is_its_weights_squared_over_the_inverse_hessian() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5))
    h, w = x.T @ x / 300, rng.standard_normal((3, 5))
    inverse = np.linalg.inv(h)
    expected = []
    for c in range(5):
        expected.append(sum(float(w[o, c]) ** 2 / float(inverse[c, c]) for o in range(3)))  # Hassibi et al., equation 5
    state = MomentReader(h[None], w[None], np.arange(5)[:, None]).state(1e-12)
    np.testing.assert_allclose(state.scores(np.arange(5)), expected, rtol=1e-6)  # of the damping that is left


def test_the_first_channel_that_goes_is_the_one_of_the_least_score_relative_to_the_outputs_energy() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((7, 5)), rng.standard_normal((5, 3))
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    model = network(nodes, {"a": a, "b": b}, ["n", 7], 2)
    x = (rng.standard_normal((3000, 7)) + 2).astype(np.float32)
    analysis = couple(Graph(model))
    (group,) = analysis.free
    context = Context(analysis, [group], inputs=Inputs(analysis, [{"x": x[:1000]}, {"x": x[1000:]}]))
    (curves,) = obspa.loss_curves(context).candidates
    hidden = x.astype(np.float64) @ a
    hidden -= hidden.mean(axis=0)  # a mean goes into the bias
    hessian = hidden.T @ hidden
    damping = 1e-3 * (1 + 10 * 5 / 3000)  # more where rows are few
    hessian += damping * np.trace(hessian) / 5 * np.eye(5)
    inverse = np.linalg.inv(hessian)
    energy = float(np.square(hidden @ b).sum())
    scores = [sum(float(b[c, o]) ** 2 / float(inverse[c, c]) for o in range(3)) / energy for c in range(5)]
    curve = curves[group.name]
    assert curve.order[0] == np.argmin(scores)
    assert curve.loss[1] == pytest.approx(min(scores), rel=1e-5)


def test_losses_count_less_the_more_readers_lie_behind() -> None:
    analysis = couple(Graph(residual_net(np.random.default_rng(0))))
    inner = [g for g in analysis.free if g.size == 11]  # each with one reader, one behind the other
    curves = {g.name: Curve(np.arange(11), np.linspace(0, 3, 12)) for g in inner}
    scaled = discounted(curves, inner, 0.3)
    for behind, group in enumerate(sorted(inner, key=lambda g: -g.readers[0])):
        np.testing.assert_allclose(scaled[group.name].loss, curves[group.name].loss * (1 + behind) ** -0.3)


@pytest.mark.parametrize(
    ("synthetic", "trials", "expected"), [(False, 1e11, (0.3,)), (True, 1e11, (0.0, 0.3)), (True, 1.0, (0.0,))]
)
def test_two_discounts_are_tried_where_inputs_are_made_up_and_few(
    synthetic: bool, trials: float, expected: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obspa, "TRIALS", trials)
    analysis = couple(Graph(residual_net(np.random.default_rng(0))))
    inputs = Inputs(analysis, [{"x": np.ones((4, 3, 9, 7), np.float32)}], synthetic=synthetic)
    assert obspa.refit_discounts(Context(analysis, analysis.free, inputs=inputs), inputs) == expected


def test_obspa_needs_inputs() -> None:
    analysis = couple(Graph(residual_net(np.random.default_rng(0))))
    with pytest.raises(PlanError, match="there are no inputs"):
        criteria.score(analysis, analysis.free, obspa.OBSPA)
