"""The public functions: what they return, what they leave alone, how users extend them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import spa
from spa import rules
from spa.errors import ModelError, PlanError
from spa.model.graph import Graph
from spa.obspa import criterion as obspa
from spa.running.runtime import load_session, run

RESNET = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"


@pytest.fixture
def own_rule() -> Iterator[str]:
    key = "my.domain::MyScale"
    spa.rule(key, "X[n c *s], S[c] -> Y[n c *s]")
    yield key
    del rules._RULES[key]


def scaled() -> ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 11), "s": (11,), "b": (11, 5)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MyScale", ["h", "s"], ["t"], name="mine", domain="my.domain"),
        helper.make_node("MatMul", ["t", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", 7), ("y", 5))]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_without_a_rule_a_users_operator_is_a_barrier() -> None:
    analysis = spa.analyze(scaled())
    assert analysis.barriers["MyScale 'mine'"] == "operator my.domain::MyScale has no rule"
    assert analysis.prunable == ()


def test_one_line_of_notation_makes_a_users_operator_prunable(own_rule: str) -> None:
    result = spa.prune(scaled(), ratio=0.4, of="channels", round_to=1, criterion="l2")
    sizes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert sizes == {"a": (7, 7), "s": (7,), "b": (7, 5)}


def test_an_operator_that_onnxruntime_cannot_run_is_said_with_the_criteria_that_need_no_run(own_rule: str) -> None:
    with pytest.raises(ModelError, match=r"MyScale.*Criteria that look at the weights alone \(l2, say\) need no run"):
        spa.prune(scaled(), ratio=0.4, of="channels", round_to=1)


def test_a_model_of_frozen_groups_is_refused_in_a_sentence() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="look"),
        helper.make_node("Gather", ["e", "pick"], ["y"], axis=1, name="choose"),
    ]
    ids, pick = (helper.make_tensor_value_info(n, TensorProto.INT64, [n[0]]) for n in ("ids", "pick"))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["i", "p"])
    table = numpy_helper.from_array(np.ones((7, 5), np.float32), "table")
    graph = helper.make_graph(nodes, "g", [ids, pick], [y], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(
        PlanError, match=r"'table\[1\]' is frozen: Gather 'choose' looks it up by index\. 'spa inspect'"
    ):
        spa.prune(model, criterion="l2")


def test_a_line_that_is_no_notation_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read"):
        spa.rule("my.domain::Bad", "X[n (] -> Y[n]")


def test_the_input_model_is_not_changed() -> None:
    model = onnx.load(RESNET)
    before = model.SerializeToString(deterministic=True)
    spa.prune(model, ratio=0.3)
    assert model.SerializeToString(deterministic=True) == before


def test_groups_say_where_they_are_and_who_reads_and_writes_them() -> None:
    analysis = spa.analyze(RESNET)
    group = next(g for g in analysis.free if len(g.readers) == len(g.writers) == 1)
    writer, reader = (analysis.graph.nodes[i] for i in (*group.writers, *group.readers))
    assert writer.op == "Conv"
    assert reader.op in ("Conv", "Gemm", "MatMul")
    assert {p.tensor for p in group.places} >= {writer.inputs[1], reader.inputs[1]}


def test_the_operator_graph_can_be_asked_with_networkx() -> None:
    analysis = spa.analyze(RESNET)
    graph = analysis.operator_graph
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.number_of_nodes() == len(analysis.graph.nodes)
    group = analysis.free[0]
    assert all(group.name in graph.nodes[i]["groups"] for i in group.operators)
    assert nx.has_path(graph, group.writers[0], group.readers[0])


def test_the_public_names_are_few_and_all_there() -> None:
    public = [n for n in spa.__all__ if not n.startswith("_")]
    assert len(public) <= 28
    assert all(getattr(spa, n) is not None for n in public)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        spa.nonsense  # noqa: B018 - reading it is the test


def test_a_plan_survives_its_json_and_refuses_another_model(tmp_path: Path) -> None:
    plan = spa.prune(RESNET, ratio=0.3, criterion="l2").plan
    again = spa.Plan.from_json(plan.to_json())
    assert again == plan
    with pytest.raises(spa.PlanError, match="no group of that name"):
        spa.prune(RESNET.parent / "digits_vit.onnx", plan=plan)
    with pytest.raises(spa.PlanError, match="this is not a plan"):
        spa.Plan.from_json("{}")
    with pytest.raises(spa.PlanError, match="cannot read the plan"):
        spa.Plan.load(tmp_path / "none.json")


def test_a_plan_may_not_empty_or_thaw_a_group() -> None:
    analysis = spa.analyze(RESNET)
    frozen = next(g for g in analysis.groups if g.frozen and g.size > 1)
    free = analysis.free[0]
    for group, kept, words in (
        (frozen, (0,), "is frozen"),
        (free, (), "Keep 1 or more"),
        (free, (999,), "its channels are 0 to"),
    ):
        with pytest.raises(spa.PlanError, match=words):
            spa.Plan({group.name: kept}, {group.name: group.size}, {}).masks(analysis)


TRAINING = RESNET.parent / "digits_train.npz"
NETWORKS = ["digits_resnet", "digits_vgg", "digits_vit", "digits_lstm"]


def correct(model: ModelProto) -> float:
    with np.load(RESNET.parent / "digits_test.npz") as test:
        logits = run(load_session(model), {"input": test["input"]})[0]
        return float((logits.argmax(axis=1) == test["label"]).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_macs_go_for_at_most_three_points_with_training_images(name: str) -> None:
    result = spa.prune(RESNET.parent / f"{name}.onnx", ratio=0.5, data=TRAINING)
    found = result.report.calibration
    assert found is not None
    assert found["after"] < 0.5 * found["before"]
    dense, pruned = found["accuracy"]
    assert 90 < pruned <= 100 and dense - pruned < 3
    assert correct(result.model) > correct(onnx.load(RESNET.parent / f"{name}.onnx")) - 0.03
    assert sum(g.loss is not None for g in result.report.groups) == len(result.report.groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_data_reconstruction_is_better_than_cutting_alone(name: str) -> None:
    path = RESNET.parent / f"{name}.onnx"
    cut = spa.prune(path, ratio=0.5, reconstruct=False)
    mended = spa.prune(path, plan=cut.plan, reconstruct=True)
    assert mended.plan == cut.plan
    assert correct(mended.model) > correct(cut.model)
    assert correct(mended.model) > 0.9


def test_reconstruction_stands_on_any_criterion_and_is_deterministic() -> None:
    first, second = (
        spa.prune(RESNET, ratio=0.5, criterion="l2", reconstruct=True, data=TRAINING, samples=128) for _ in range(2)
    )
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert correct(first.model) > correct(spa.prune(RESNET, ratio=0.5, criterion="l2").model)


@pytest.mark.parametrize("ranking", ["uniform", "isomorphic"])
def test_obspa_takes_the_other_rankings(ranking: str) -> None:
    report = spa.prune(RESNET, ratio=0.4, ranking=ranking, data=TRAINING, samples=64).report
    assert abs(report.reached - 0.4) < 0.03 or report.notes


def test_labels_that_no_score_answers_to_are_refused() -> None:
    data = [{"x": np.random.default_rng(0).standard_normal((40, 6, 7)).astype(np.float32)}]
    tall = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6, 7])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 5])],
            [
                numpy_helper.from_array(np.eye(7, 11, dtype=np.float32), "a"),
                numpy_helper.from_array(np.eye(11, 5, dtype=np.float32), "b"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    with pytest.raises(PlanError, match="not one row of class scores per sample"):
        spa.prune(tall, ratio=0.4, round_to=1, data=[(data[0], np.zeros(40, np.int64))])


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(PlanError, match="samples is 0"):
        spa.prune(RESNET, samples=0)


def test_zero_removes_what_nobody_reads_and_nothing_else() -> None:
    model = onnx.load(RESNET)
    assert spa.prune(model, criterion="zero").report.reached == 0
    group = next(g for g in spa.analyze(model).prunable if len(g.readers) == 1)
    readers = {p.tensor: p.axis for p in group.places}
    for tensor in model.graph.initializer:
        if tensor.name in readers and len(tensor.dims) > 1:
            value = numpy_helper.to_array(tensor).copy()
            np.moveaxis(value, readers[tensor.name], 0)[:3] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    result = spa.prune(model, criterion="zero")
    assert {g.name: g.size - g.kept for g in result.report.groups if g.size != g.kept} == {group.name: 3}
    assert spa.verify(model, result.model, atol=1e-4).equal


def test_zero_with_inputs_reports_what_they_say() -> None:
    report = spa.prune(RESNET, criterion="zero", reconstruct="bias", samples=16).report
    assert report.calibration is not None
    assert report.calibration["before"] == 0
    assert report.calibration["after"] < 1e-9


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_gradients_come_from_labelled_data_or_from_the_caller(criterion: str) -> None:
    request = {"ratio": 0.3, "criterion": criterion, "samples": 64}
    found = spa.prune(RESNET, data=RESNET.parent / "digits_train.npz", **request)
    assert 0.28 < found.report.reached < 0.32
    shapes = {t.name: tuple(t.dims) for t in onnx.load(RESNET).graph.initializer}
    ones = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    given = {"snip": "gradients", "grasp": "hessian_gradients"}[criterion]
    assert spa.prune(RESNET, **request, **{given: ones}).report.calibration is None
    with pytest.raises(spa.PlanError, match="labelled data"):
        spa.prune(RESNET, **request)


def test_gates_only_run_the_model() -> None:
    report = spa.prune(RESNET, ratio=0.3, criterion="gate", samples=16).report
    assert 0.28 < report.reached < 0.32
    assert report.calibration is not None


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"ratio": "half"}, "'auto'"),
        ({"ratio": 1}, "between 0 and 1"),
        ({"max_distortion": 1e-9, "round_to": 8, "samples": 16}, "more than 1e-09"),
        ({"max_distortion": 0.1, "criterion": "snip", "samples": 16}, "labelled data"),
        ({"ratio": 0.5, "max_distortion": 0.1}, "asked for together"),
        ({"max_distortion": -1.0}, "above 0"),
        ({"of": "latency", "ratio": "auto"}, "takes a number"),
    ],
)
def test_budgets_that_contradict_themselves_are_refused(request_: dict[str, object], reason: str) -> None:
    with pytest.raises(spa.PlanError, match=reason):
        spa.prune(RESNET, **request_)


def test_a_bias_that_cannot_be_refitted_is_named() -> None:
    model = onnx.load(RESNET)
    conv = next(n for n in model.graph.node if len(n.input) > 2 and n.op_type in ("Conv", "Gemm"))
    model.graph.node.insert(0, helper.make_node("Identity", [conv.input[2]], ["computed"]))
    conv.input[2] = "computed"
    request = {"ratio": 0.3, "samples": 16}
    (note,) = [n for n in spa.prune(model, **request).report.notes if "computed in the graph" in n]
    assert conv.name in note or conv.output[0] in note
    assert not [n for n in spa.prune(RESNET, **request).report.notes if "computed in the graph" in n]
    assert not [n for n in spa.prune(model, ratio=0.3, criterion="l2").report.notes if "computed in the graph" in n]


def test_made_up_inputs_try_two_choices_of_widths_and_keep_the_better(monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(*discounts: float, trials: float = obspa.TRIALS) -> spa.Result:
        monkeypatch.setattr(obspa, "TRIALS", trials)
        for name, discount in zip(("REFIT_DISCOUNT_SYNTHETIC", "REFIT_DISCOUNT"), discounts, strict=True):
            monkeypatch.setattr(obspa, name, discount)
        return spa.prune(RESNET, ratio=0.5, samples=64, round_to=1)

    single = [pruned(discount, discount, trials=0) for discount in (0.0, 0.3)]
    assert single[0].plan != single[1].plan
    better = min(single, key=lambda r: r.report.calibration["after"])
    assert pruned(0.0, 0.3).plan == pruned(0.3, 0.0).plan == better.plan


def test_a_tolerated_change_of_the_outputs_is_met_and_used_up() -> None:
    changes = []
    for most in (0.005, 0.05):
        report = spa.prune(RESNET, max_distortion=most, samples=64).report
        assert report.calibration is not None
        assert 0.2 * most < report.calibration["after"] <= most
        changes.append(report.reached)
    assert changes[0] < changes[1]


def test_the_weights_suggest_a_ratio() -> None:
    report = spa.prune(RESNET, ratio="auto", criterion="l2").report
    assert 0.02 < report.reached < 0.6
    model = onnx.load(RESNET)
    for tensor in model.graph.initializer:  # evenly spread weights have nothing to spare
        if len(tensor.dims) > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.sign(numpy_helper.to_array(tensor)), tensor.name))
    with pytest.raises(spa.PlanError, match="PQ index removes nothing"):
        spa.prune(model, ratio="auto", criterion="l2")


def _given(samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((samples, 1, 8, 8)).astype(np.float32)}


def test_changes_are_measured_on_inputs_that_no_fit_has_seen() -> None:
    result = spa.prune(RESNET, ratio=0.3, data=_given(40), samples=32)
    found = result.report.calibration
    assert found is not None
    assert (found["samples"], found["held_out"]) == (32, 8)
    few = spa.prune(RESNET, ratio=0.3, data=_given(4)).report.calibration
    assert few is not None
    assert (few["samples"], few["held_out"]) == (4, 0)


def test_a_repaired_network_that_is_no_better_than_a_constant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"ratio": 0.97, "round_to": 1, "samples": 16}
    assert spa.prune(RESNET, **options).report.calibration["after"] < 0.9
    monkeypatch.setattr("spa.goals.DESTROYED", 0.4)
    with pytest.raises(PlanError, match=r"no better than a constant, on 8 made-up inputs.*--data.*--insist"):
        spa.prune(RESNET, **options)
    result = spa.prune(RESNET, insist=True, **options)
    assert any("no better than a constant" in note for note in result.report.notes)


def test_a_repair_that_does_not_help_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.obspa.pipeline import Calibrated

    def spoil(self: Calibrated, drafts: list[tuple[spa.Plan, ModelProto]], *options: object) -> None:
        for tensor in (t for _, pruned in drafts for t in pruned.graph.initializer):
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.5, tensor.name))

    cut = spa.prune(RESNET, ratio=0.2, data=_given(40), reconstruct="none")
    monkeypatch.setattr(Calibrated, "reconstruct", spoil)
    result = spa.prune(RESNET, ratio=0.2, data=_given(40))
    assert any(note.startswith("the repair was left out") for note in result.report.notes)
    assert result.model.SerializeToString() == cut.model.SerializeToString()
    assert result.report.calibration["after"] == result.report.calibration["before"]


def test_a_network_that_nothing_refits_is_said_to_need_training() -> None:
    result = spa.prune(RESNET, ratio=0.9, round_to=1, criterion="flap", samples=16)
    (note,) = [n for n in result.report.notes if "no better than a constant" in n]
    assert note.endswith("fine-tuning is needed, or --reconstruct full")


@pytest.mark.parametrize(("ratio", "is_destroyed"), [(0.05, False), (0.9, True)])
def test_given_data_measures_what_a_criterion_of_weights_did(ratio: float, is_destroyed: bool) -> None:
    result = spa.prune(RESNET, ratio=ratio, round_to=1, criterion="l2", data=_given(40))
    assert result.model == spa.prune(RESNET, ratio=ratio, round_to=1, criterion="l2").model
    assert result.report.calibration["held_out"] == 10
    assert (result.report.calibration["after"] >= 0.9) is is_destroyed
    assert any("fine-tuning is needed" in note for note in result.report.notes) is is_destroyed
    assert not any("not measured" in note for note in result.report.notes)


@pytest.mark.parametrize(("scale", "is_strange"), [(1, False), (255, True), (0.01, True)])
def test_inputs_of_another_scale_than_the_batch_normalisations_are_named(scale: float, is_strange: bool) -> None:
    with np.load(TRAINING) as train:
        data = {"input": train["input"][:40] * np.float32(scale)}
    notes = spa.prune(RESNET, ratio=0.1, criterion="l2", data=data).report.notes
    assert any("far from the statistics of the network's BatchNormalizations" in note for note in notes) is is_strange


def test_labels_that_are_numbered_otherwise_are_told_by_the_dense_accuracy() -> None:
    with np.load(TRAINING) as train:
        data = {"input": train["input"][:40], "label": train["label"][:40]}
    said = "% of the labelled inputs, hardly more than chance"
    assert not any(said in note for note in spa.prune(RESNET, ratio=0.1, criterion="l2", data=data).report.notes)
    data["label"] = (data["label"] + 3) % 10
    assert any(said in note for note in spa.prune(RESNET, ratio=0.1, criterion="l2", data=data).report.notes)


def test_a_change_that_was_not_measured_is_said() -> None:
    def notes(**options: object) -> list[str]:
        return [n for n in spa.prune(RESNET, **options).report.notes if "the outputs was not measured" in n]

    (note,) = notes(ratio=0.3, criterion="l1")
    assert note.startswith("criterion l1 looks at the weights alone") and "--data" in note
    plan = spa.prune(RESNET, ratio=0.3, criterion="l2").plan
    assert notes(plan=plan) == notes(criterion="zero") == notes(ratio=0.3, criterion="activation_l2", samples=4) == []
    assert notes(ratio=0.3, criterion="l2", evaluate=lambda path: 1.0) == []


def test_a_pruning_measures_on_what_it_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from spa.obspa import pipeline

    seen: list[int] = []

    class Spy(pipeline.Yardstick):
        def __init__(self, graph: Graph, batches: Sequence[dict[str, np.ndarray]], threads: int = 2) -> None:
            seen.append(sum(len(b["input"]) for b in batches))
            super().__init__(graph, batches, threads)

    monkeypatch.setattr(pipeline, "Yardstick", Spy)
    spa.prune(RESNET, ratio=0.3, data=_given(40), samples=32)
    assert seen == [8]
