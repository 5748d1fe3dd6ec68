"""Rows that are gathered in parts, and matrices that change in parts, are what they are as a whole."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from spa.coupling.analysis import couple
from spa.coupling.plan import make_plan
from spa.model.graph import Graph
from spa.obspa import dual
from spa.obspa.curves import MomentReader, greedy
from spa.obspa.linear import linear
from spa.obspa.moments import Moments
from spa.obspa.readers import rows as gathering
from spa.obspa.readers.base import FitSettings
from spa.obspa.readers.rows import Targets, add_rows
from spa.obspa.readers.steps import ProducerSteps
from spa.obspa.refit import reconstruct
from spa.surgery.apply import apply
from tests.obspa.test_obspa import group, network, outputs

Array = np.ndarray


@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm"])
def test_rows_are_the_same_in_parts(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    attributes = {"pads": [1] * 4} if op == "Conv" else {"transA": 1} if op == "Gemm" else {}
    w, shape = ((5, 4, 3, 3), (7, 4, 6, 5)) if op == "Conv" else ((4, 5), (4, 9) if op == "Gemm" else (7, 6, 4))
    model = network([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"w": rng.random(w)}, [*shape], len(shape))
    x = rng.standard_normal(shape).astype(np.float32)
    y = outputs(model, x)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    real = rng.random((7, 6)) < 0.6 if op == "MatMul" else None
    targets = Targets(y, real, rng.standard_normal(y.shape).astype(np.float32), rng.random(5).astype(np.float32))
    chosen = np.arange(0, lin.positions(y.shape), 2)
    found = []
    for most in (gathering.MAX_VALUES, 3 * len(chosen) * sum(lin.size(graph)[1:])):  # all; three samples at a time
        monkeypatch.setattr(gathering, "MAX_VALUES", most)
        moments = Moments()
        add_rows(moments, graph, lin, x, targets, chosen)
        found.append((moments.count, moments.mean_x, moments.mean_t, *moments.products()))
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    scaled = targets.more * np.expand_dims(targets.factor, lin.other_axes(y.ndim))  # type: ignore[operator]
    marks = slice(None) if real is None else real[:, chosen].reshape(-1)
    np.testing.assert_allclose(found[0][2][0], lin.output_rows(y + scaled, chosen)[0, marks].mean(axis=0), rtol=1e-5)
    wanted = 7 * len(chosen) if real is None else int(real[:, chosen].sum())
    assert found[0][0] == (9 if op == "Gemm" else wanted)


def test_parts_are_no_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 5))}, [7, 6, 4], 3)
    graph = Graph(model)
    lin = linear(graph, graph.nodes[0])
    assert lin is not None
    monkeypatch.setattr(gathering, "MAX_VALUES", 2 * 6 * 9)
    taken: list[int] = []
    moments = Moments()
    monkeypatch.setattr(moments, "add", lambda x, t: taken.append(x.shape[1]))
    add_rows(moments, graph, lin, np.ones((7, 6, 4), np.float32), Targets(np.ones((7, 6, 5), np.float32)), np.arange(6))
    assert taken == [12, 12, 12, 6]


def test_every_so_many_rows_are_kept_however_they_come() -> None:
    x, t = np.arange(20.0)[None, :, None], np.arange(20.0)[None, :, None] + 100
    rows = dual.Rows(3)
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 20)):
        rows.add(x[:, start:stop], t[:, start:stop])
    kept = np.arange(0, 20, 3)
    assert rows.count == len(kept)
    for found, wanted in zip(rows.centred(mean=False), (kept, kept + 100), strict=True):
        np.testing.assert_array_equal(found[0, :, 0], wanted)


def test_removals_are_the_same_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 200, 24)) @ rng.standard_normal((2, 24, 24))
    h, w = x.transpose(0, 2, 1) @ x / 200, rng.standard_normal((2, 5, 24))
    columns = rng.permutation(24).reshape(12, 2)
    found = []
    for some in (512, 3):
        monkeypatch.setattr("spa.obspa.curves.OUTER_ROWS", some)
        found.append(greedy([MomentReader(h, w, columns)], 12))
    np.testing.assert_array_equal(found[0].order, found[1].order)
    np.testing.assert_allclose(found[0].loss, found[1].loss, rtol=1e-9)


@pytest.mark.parametrize(("lengths", "typical"), [((9, 9, 4), True), ((9, 7, 4), False)])
def test_a_reader_learns_between_steps_from_samples_that_are_most(
    lengths: tuple[int, ...], typical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    weights = {"a": rng.standard_normal((6, 12)), "b": rng.standard_normal((12, 5)) / 3}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    analysis = couple(Graph(network(nodes, weights, ["n", "length", 6], 3)))
    plan = make_plan(analysis, {group(analysis, "a["): np.arange(7)})
    batches = [{"x": rng.standard_normal((20, length, 6)).astype(np.float32)} for length in lengths]
    of_samples: list[int] = []
    rows = ProducerSteps.rows

    def counted(steps: ProducerSteps) -> Moments:
        found = rows(steps)
        of_samples.append(found.count)
        return found

    monkeypatch.setattr(ProducerSteps, "rows", counted)
    reconstruct(analysis, plan, apply(analysis, plan), batches, FitSettings(producer_rounds=1))
    assert of_samples == ([2 * 20 * 9] if typical else [])
