"""Criteria from activations against loops over every weight; bias compensation against its closed form."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from threadpoolctl import threadpool_info, threadpool_limits

import spa
from spa import criteria
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.plan import make_plan
from spa.criteria import Inputs
from spa.criteria.activation import signal
from spa.errors import ModelError, PlanError
from spa.inputs.runs import WITHOUT_RUNS
from spa.model.graph import Graph
from spa.obspa.compensate import compensate
from spa.obspa.pipeline import Calibrated
from spa.obspa.statistics import with_batch_statistics
from spa.running.feeds import working_feeds
from spa.running.runtime import load_session, run
from spa.running.stream import Stream
from spa.surgery.apply import apply
from tests.obspa.test_obspa import network, outputs, residual_net
from tests.test_api import NETWORKS, RESNET, TRAINING, correct
from tests.test_zoo import PRUNABLE
from tests.zoo import built

Array = np.ndarray
Index = tuple[int, ...]
ACTIVATION = ["activation_l2", "flap", "wanda"]
ELEMENT: Mapping[str, Callable[[float, Array], float]] = {  # a weight, and all values that it was multiplied with
    "wanda": lambda w, x: abs(w) * float(np.sqrt((x**2).sum())),
    "activation_l2": lambda w, x: w**2 * float((x**2).mean()),
    "flap": lambda w, x: w**2 * float(x.var()),
}


def values(model: ModelProto, name: str, feeds: Mapping[str, Array], axis: int) -> Array:
    """All values of an intermediate tensor, one row per index of an axis."""
    tapped = ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.append(helper.make_empty_tensor_value_info(name))
    if name in feeds:
        value = feeds[name]
    else:
        value = np.asarray(run(load_session(tapped), feeds)[0])
    return np.moveaxis(value.astype(np.float64), axis, 0).reshape(value.shape[axis], -1)


def loops(
    criterion: str, w: Array, seen: Array, enters: Callable[[Index], int], channel: Callable[[Index], int], size: int
) -> Array:
    """The scores in one operand: every weight on its own, with the input that enters it, added to its channel."""
    score = np.zeros(size)
    for index in np.ndindex(w.shape):
        score[channel(index)] += ELEMENT[criterion](float(w[index]), seen[enters(index)])
    return score


def scored(
    model: ModelProto, group: str, criterion: str, feeds: Sequence[Mapping[str, Array]], **options: str
) -> Array:
    analysis = couple(Graph(model))
    found = next(g for g in analysis.prunable if g.name.startswith(group))
    return criteria.score(analysis, [found], criterion, inputs=Inputs(analysis, feeds), **options)[found.name]


Reader = tuple[list[onnx.NodeProto], dict[str, Array], int, int, Callable[[Index], int], int]


def reader(kind: str, rng: np.random.Generator) -> Reader:
    """A reader of six channels h: its nodes and weights, the rank and channel axis of h, how inputs enter, and groups."""
    conv = helper.make_node("Conv", ["h", "w"], ["y"], pads=[1, 0, 0, 1])
    grouped = helper.make_node("Conv", ["h", "w"], ["y"], group=2)
    upwards = helper.make_node("ConvTranspose", ["h", "w"], ["y"], strides=[2, 2])
    turned = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["h", "t"], ["y"])]
    table: dict[str, Reader] = {
        "conv": ([conv], {"w": rng.standard_normal((5, 6, 3, 2))}, 4, 1, lambda i: i[1], 1),
        "grouped": ([grouped], {"w": rng.standard_normal((4, 3, 2, 1))}, 4, 1, lambda i: i[0] // 2 * 3 + i[1], 2),
        "transposed": ([upwards], {"w": rng.standard_normal((6, 5, 2, 3))}, 4, 1, lambda i: i[0], 1),
        "gemm": ([helper.make_node("Gemm", ["h", "w"], ["y"])], {"w": rng.standard_normal((6, 5))}, 2, 1, lambda i: i[0], 1),
        "gemm by rows": (
            [helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)],
            {"w": rng.standard_normal((5, 6))},
            2,
            1,
            lambda i: i[1],
            1,
        ),
        "matmul": ([helper.make_node("MatMul", ["h", "w"], ["y"])], {"w": rng.standard_normal((6, 5))}, 3, 2, lambda i: i[0], 1),
        "weights on the left": (
            [helper.make_node("MatMul", ["w", "h"], ["y"])],
            {"w": rng.standard_normal((5, 6))},
            3,
            1,
            lambda i: i[1],
            1,
        ),
        "behind a transpose": (turned, {"w": rng.standard_normal((5, 6))}, 3, 2, lambda i: i[1], 1),
    }  # fmt: skip
    return table[kind]


@pytest.mark.parametrize("criterion", ACTIVATION)
@pytest.mark.parametrize(
    "kind",
    ["conv", "grouped", "transposed", "gemm", "gemm by rows", "matmul", "weights on the left", "behind a transpose"],
)
def test_scores_are_those_of_every_weight_added_up(kind: str, criterion: str) -> None:
    rng = np.random.default_rng(0)
    nodes, weights, rank, axis, enters, groups = reader(kind, rng)
    size = 6 // groups
    if rank == 4:
        weights["a"], shape = rng.standard_normal((6, 7, 1, 2)), ["n", 7, 5, 4]
        write = helper.make_node("Conv", ["x", "a"], ["z"])
    elif axis == 1 and rank == 3:
        weights["a"], shape = rng.standard_normal((6, 7)), ["n", 7, 5]
        write = helper.make_node("MatMul", ["a", "x"], ["z"])
    else:
        weights["a"], shape = rng.standard_normal((7, 6)), ["n", 7] if rank == 2 else ["n", 5, 7]
        write = helper.make_node("MatMul", ["x", "a"], ["z"])
    by_columns = write.input[1] == "a" and rank < 4
    model = network([write, helper.make_node("Relu", ["z"], ["h"]), *nodes], weights, shape, rank)
    x = (rng.standard_normal((9, *map(int, shape[1:]))) * rng.uniform(0.1, 2, 9).reshape(-1, *[1] * (rank - 1))).astype(
        np.float32
    )
    feeds = [{"x": x[:5]}, {"x": x[5:]}]

    read = loops(criterion, weights["w"], values(model, "h", {"x": x}, axis), enters, lambda i: enters(i) % size, size)
    into, out = (0, 1) if by_columns else (1, 0)
    written = loops(
        criterion, weights["a"], values(model, "x", {"x": x}, axis), lambda i: i[into], lambda i: i[out] % size, size
    )
    if criterion == "flap":
        expected = (read - read.mean()) / read.std()
    else:
        expected = (written / written.mean() + read / read.mean()) / 2
    np.testing.assert_allclose(scored(model, "a[", criterion, feeds), expected, rtol=1e-4, atol=1e-4)  # of float32 runs
    if criterion != "flap":
        plain = scored(model, "a[", criterion, feeds, norm="none", agg="sum")
        np.testing.assert_allclose(plain, written + read, rtol=1e-4)


def attention() -> tuple[ModelProto, dict[str, Array]]:
    """Queries times keys."""
    rng = np.random.default_rng(1)
    weights = {n: rng.standard_normal((7, 5)) for n in ("q", "k")}
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["qs"]),
        helper.make_node("MatMul", ["x", "k"], ["ks"]),
        helper.make_node("Transpose", ["ks"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["qs", "kt"], ["y"]),
    ]
    return network(nodes, weights, ["n", 3, 7], 3), {"x": rng.standard_normal((6, 3, 7)).astype(np.float32)}


def test_where_activations_multiply_activations_one_stands_for_the_weights() -> None:
    model, feeds = attention()
    energy = np.square(values(model, "qs", feeds, 2)).mean(1) * np.square(values(model, "ks", feeds, 2)).mean(1)
    found = scored(model, "q[", "flap", [feeds])
    np.testing.assert_allclose(found, (energy - energy.mean()) / energy.std(), rtol=1e-4)
    norm = np.sqrt(np.square(values(model, "x", feeds, 2)).sum(1))
    rows = [norm @ np.abs(numpy_helper.to_array(t)) for t in model.graph.initializer]
    np.testing.assert_allclose(scored(model, "q[", "wanda", [feeds]), sum(r / r.mean() for r in rows) / 2, rtol=1e-4)


def test_the_state_of_a_recurrent_cell_is_seen_at_its_output() -> None:
    rng = np.random.default_rng(2)
    weights = {"W": rng.standard_normal((1, 20, 7)), "R": rng.standard_normal((1, 20, 5)) / 3}
    weights["out"] = rng.standard_normal((5, 3))
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R"], ["hs"], hidden_size=5),
        helper.make_node("MatMul", ["hs", "out"], ["y"]),
    ]
    model = network(nodes, weights, [4, "b", 7], 4)
    feeds = {"x": rng.standard_normal((4, 6, 7)).astype(np.float32)}
    variance = values(model, "hs", feeds, 3).var(1)
    rows = [variance * np.square(weights["R"]).sum((0, 1)), variance * np.square(weights["out"]).sum(1)]
    expected = sum((r - r.mean()) / r.std() for r in rows) / 2
    np.testing.assert_allclose(scored(model, "W[", "flap", [feeds]), expected, rtol=1e-4)


def test_a_group_that_meets_no_activations_is_scored_by_its_weights() -> None:
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((8, 4 + 4 + 6)), "out": rng.standard_normal((6, 5))}
    node = helper.make_node(
        "Attention", ["x", "w"], ["h"], domain="com.microsoft", num_heads=2, qkv_hidden_sizes=[4, 4, 6]
    )
    model = network([node, helper.make_node("MatMul", ["h", "out"], ["y"])], weights, ["n", 3, 8], 3)
    feeds = [{"x": rng.standard_normal((5, 3, 8)).astype(np.float32)}]
    analysis = couple(Graph(model))
    inside = next(g for g in analysis.prunable if g.readers == (0,))  # of queries and keys; the node shows neither
    found = criteria.score(analysis, [inside], "flap", inputs=Inputs(analysis, feeds))[inside.name]
    plain = criteria.score(analysis, [inside], "l2", norm="standardise")[inside.name]
    np.testing.assert_array_equal(found, plain)


def test_statistics_are_exact_over_uneven_batches_and_take_integers_about_their_mean() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((11, 3, 5)).astype(np.float32) + 100
    found = signal([x[:2], x[2:]], -2)
    flat = x.astype(np.float64).transpose(1, 0, 2).reshape(3, -1)
    assert found.count == 55
    np.testing.assert_allclose(found.mean, flat.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.square, np.square(flat).mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.variance, flat.var(1), rtol=1e-8)
    whole = signal([np.array([[128, 250], [130, 250]], np.uint8)], 1)
    np.testing.assert_allclose(whole.square, [1, 0])


def test_inputs_that_are_not_finite_are_refused() -> None:
    model, feeds = attention()
    feeds["x"][0, 0, 0] = np.inf
    with pytest.raises(ModelError, match="its input is not finite"):
        scored(model, "q[", "wanda", [feeds])
    with pytest.raises(PlanError, match="the criterion runs the model, but there are no inputs"):
        criteria.score(couple(Graph(model)), [], "wanda")


@pytest.mark.parametrize("name", PRUNABLE)
def test_every_architecture_gets_finite_scores_and_is_compensated(name: str) -> None:
    model = built(name)
    analysis = couple(Graph(model))
    feeds = [working_feeds(load_session(model), seed=0, batch=2)]
    scores = {}
    for criterion in ACTIVATION:
        scores = criteria.score(analysis, analysis.prunable, criterion, inputs=Inputs(analysis, feeds))
        assert all(np.isfinite(scores[g.name]).all() and scores[g.name].shape == (g.size,) for g in analysis.prunable)
    plan = make_plan(analysis, {n: np.sort(np.argsort(s)[len(s) // 3 :]) for n, s in scores.items()})
    pruned = apply(analysis, plan)
    compensate(analysis, plan, pruned, feeds)
    Stream(pruned, None, feeds).finish()


# -- compensation ---------------------------------------------------------------------------------------------------


def cut(model: ModelProto, group: str, gone: Sequence[int], x: Array) -> ModelProto:
    """The model without some channels of a group, compensated."""
    analysis = couple(Graph(model))
    found = the(analysis, group)
    plan = make_plan(analysis, {found.name: np.delete(np.arange(found.size), gone)})
    pruned = apply(analysis, plan)
    compensate(analysis, plan, pruned, [{"x": x[:7]}, {"x": x[7:]}])
    onnx.checker.check_model(pruned)
    return pruned


def the(analysis: Analysis, name: str) -> Group:
    return next(g for g in analysis.prunable if g.name.startswith(name))


def tensors(model: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}


def test_the_bias_takes_in_what_the_removed_inputs_gave_on_average() -> None:
    rng = np.random.default_rng(5)
    a, b, c = rng.standard_normal((7, 6)), rng.standard_normal((5, 6)), rng.standard_normal(5)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Gemm", ["h", "b", "c"], ["y"], transB=1),
    ]
    model = network(nodes, {"a": a, "b": b, "c": c}, ["n", 7], 2)
    x = (rng.standard_normal((50, 7)) + 3).astype(np.float32)
    pruned = cut(model, "a[", [0, 4], x)
    removed = (x.astype(np.float64) @ a).mean(0)[[0, 4]]
    np.testing.assert_allclose(tensors(pruned)["c"], c + b[:, [0, 4]] @ removed, rtol=1e-5)
    np.testing.assert_array_equal(tensors(pruned)["b"], np.delete(b, [0, 4], axis=1).astype(np.float32))
    np.testing.assert_allclose(outputs(pruned, x).mean(0), outputs(model, x).mean(0), rtol=1e-5)


@pytest.mark.parametrize("behind", ["nothing", "BatchNormalization", "Add"])
def test_the_mean_of_a_linear_network_is_kept_wherever_the_constant_goes(behind: str) -> None:
    rng = np.random.default_rng(6)
    weights = {"a": rng.standard_normal((6, 3, 3, 3)), "b": rng.standard_normal((4, 6, 3, 3))}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "b"], ["y" if behind == "nothing" else "z"], pads=[1, 1, 1, 1]),
    ]
    if behind == "BatchNormalization":
        weights |= {n: rng.uniform(0.5, 1.5, 4) for n in ("g", "e", "m", "v")}
        nodes.append(helper.make_node(behind, ["z", "g", "e", "m", "v"], ["y"]))
    elif behind == "Add":
        weights["c"] = rng.standard_normal((4, 1, 1))
        nodes.append(helper.make_node(behind, ["z", "c"], ["y"]))
    model = network(nodes, weights, ["n", 3, 5, 6], 4)
    x = (rng.standard_normal((20, 3, 5, 6)) + 2).astype(np.float32)
    pruned = cut(model, "a[", [1, 2, 5], x)
    want = outputs(model, x).mean((0, 2, 3))
    np.testing.assert_allclose(outputs(pruned, x).mean((0, 2, 3)), want, rtol=1e-4, atol=1e-4)
    changed = {n for n, v in tensors(pruned).items() if n not in weights or v.shape == weights[n].shape}
    changed = {n for n in changed if n not in weights or not np.allclose(tensors(pruned)[n], weights[n])}
    assert changed == {{"nothing": "y_bias", "BatchNormalization": "m", "Add": "c"}[behind]}


def test_every_layer_of_a_deep_network_gives_its_dense_mean_though_only_means_moved() -> None:
    rng = np.random.default_rng(7)
    model = residual_net(rng)
    analysis = couple(Graph(model))
    x = (rng.standard_normal((40, 3, 9, 7)) + 1).astype(np.float32)
    plan = make_plan(analysis, {g.name: np.arange(g.size // 2, g.size) for g in analysis.free if g.size == 11})
    pruned = apply(analysis, plan)
    before = tensors(pruned)
    compensate(analysis, plan, pruned, [{"x": x}])
    for name in ("n0", "n1", "f", "y"):
        mean = values(pruned, name, {"x": x}, 1).mean(1)
        np.testing.assert_allclose(mean, values(model, name, {"x": x}, 1).mean(1), atol=1e-4)  # float32 runs
    moved = {n for n, v in tensors(pruned).items() if n not in before or not np.array_equal(v, before[n])}
    assert moved == {"m0", "m1", "h1_bias", "bias"}


def test_with_inputs_that_were_made_up_no_more_than_the_means_move() -> None:
    rng = np.random.default_rng(8)
    real, made_up = ([{"x": rng.standard_normal((64, 3, 9, 7)).astype(np.float32) * s}] for s in (1, 1.5))
    model = with_batch_statistics(Graph(residual_net(rng)), real)  # as training would leave it
    assert model is not None
    analysis = couple(Graph(model))
    calibrated = Calibrated(analysis, made_up, synthetic=True)
    scores = criteria.score(analysis, analysis.free, "flap", inputs=calibrated.inputs())
    plan = make_plan(analysis, {n: np.sort(np.argsort(s)[len(s) // 2 :]) for n, s in scores.items()})
    pruned = apply(analysis, plan)
    measured = Calibrated(analysis, real, synthetic=False)
    before, change = tensors(pruned), measured.change(pruned).error
    calibrated.reconstruct([(plan, pruned)], "bias")
    after = measured.change(pruned).error
    assert change is not None and after is not None and after < change
    moved = {n for n, v in tensors(pruned).items() if n not in before or not np.array_equal(v, before[n])}
    assert {n.rstrip("01") for n in moved} <= {"m", "h_bias", "h1_bias", "h0_bias", "bias"}


# -- the public function ----------------------------------------------------------------------------------------------


def test_flap_loses_less_accuracy_with_its_compensation() -> None:
    found = []
    for how in ("bias", "none"):
        results = [
            spa.prune(
                RESNET.parent / f"{n}.onnx", ratio=0.3, criterion="flap", data=TRAINING, samples=256, reconstruct=how
            )
            for n in NETWORKS
        ]
        found.append(float(np.mean([correct(r.model) for r in results])))
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("criterion", "given", "how"),
    [
        ("flap", None, "bias"),
        ("flap", False, "none"),
        ("flap", "full", "full"),
        ("wanda", None, "none"),
        ("l2", "bias", "bias"),
    ],
)
def test_what_is_reconstructed_follows_the_criterion_unless_it_is_said(
    criterion: str, given: str | bool | None, how: str
) -> None:
    result = spa.prune(RESNET, ratio=0.3, criterion=criterion, reconstruct=given, samples=32)
    found = result.report.calibration
    assert found is not None
    assert found["reconstruct"] == how
    assert (found["after"] != found["before"]) == (how != "none")


def test_a_given_plan_is_compensated_when_that_is_asked_for() -> None:
    plan = spa.prune(RESNET, ratio=0.3, criterion="l2").plan
    assert spa.prune(RESNET, plan=plan, criterion="flap").report.calibration is None
    assert spa.prune(RESNET, plan=plan, reconstruct="bias", samples=32).report.calibration is not None
    with pytest.raises(
        PlanError, match=r"unknown reconstruct 'some'\. Choose one of auto, full, quick, readers, bias, none"
    ):
        spa.prune(RESNET, reconstruct="some")


@pytest.mark.parametrize(
    ("place", "method", "criterion"),
    [(Inputs, "counterparts", "obspa"), (Calibrated, "reconstruct", "obspa"), (Inputs, "stream", "wanda")],
)
def test_a_run_that_fails_late_is_said_with_the_criteria_that_need_none(
    place: type, method: str, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ModelError("onnxruntime cannot run it.")

    monkeypatch.setattr(place, method, fail)
    with pytest.raises(ModelError) as error:
        spa.prune(RESNET, criterion=criterion, samples=8)
    assert str(error.value) == f"onnxruntime cannot run it. {WITHOUT_RUNS}"


def test_linear_algebra_uses_no_more_threads_than_asked_for() -> None:
    def threads() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    seen: list[int] = []
    with threadpool_limits(3, "blas"):
        before = threads()
        spa.prune(RESNET, ratio=0.3, samples=8, threads=1, progress=lambda stage, share: seen.extend(threads()))
        assert threads() == before
    assert set(seen) == {1}


INTERRUPTED = """
import contextlib, sys
from spa.cli import commands

at = sys.argv.pop()

@contextlib.contextmanager
def progress(*_):
    stages = []
    def show(stage, share):
        stages.append(stage)
        if stages.count(at) == 3:
            raise KeyboardInterrupt
    yield show

commands.progress_bars = progress
commands.main()
"""


@pytest.mark.parametrize("stage", ["score", "reconstruct"])
def test_an_interrupt_leaves_no_file_and_no_traceback(stage: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(RESNET.parent.parent)}
    command = [sys.executable, "-c", INTERRUPTED, "prune", str(RESNET), "-o", str(tmp_path / "o.onnx"), stage]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "spa: interrupted; no half-written file is left\n"
    assert [p.name for p in tmp_path.iterdir()] == ["scratch"]
    assert {p.name for p in scratch.iterdir()} <= {".ses"}  # onnxruntime's own, from being imported
