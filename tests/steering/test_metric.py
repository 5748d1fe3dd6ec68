"""Metrics: what is one, what is refused, how sure it is, and the ready-made ones against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from spa.errors import MetricError, OptionError, PlanError
from spa.model.graph import Graph
from spa.steering.labelled import Samples
from spa.steering.measurement import Measurement, standard_error
from spa.steering.meter import Meter, Tolerance
from spa.steering.metric import Metric, check_evaluate, metric_of


def linear(weight: np.ndarray) -> ModelProto:
    """A classifier: scores are inputs times a matrix."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


DENSE = linear(np.eye(7))
OTHER = linear(np.random.default_rng(1).standard_normal((7, 7)))


def samples() -> Samples:
    return Samples(Path(), Graph(DENSE, None))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", x=rng.standard_normal((151, 7)).astype(np.float32), label=rng.integers(0, 7, 151))
    return tmp_path / "s.npz"


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_is_the_percentage_of_labels_among_the_k_highest(labelled: Path, k: int) -> None:
    found = metric_of(f"top{k}:{labelled}", samples()).evaluate(DENSE)
    data = np.load(labelled)
    hits = [label in np.argsort(row)[-k:] for row, label in zip(data["x"], data["label"], strict=True)]
    assert found.value == pytest.approx(100 * np.mean(hits))
    assert found.by_sample is not None and np.array_equal(found.by_sample > 0, hits)


def test_agreement_is_with_the_dense_model(labelled: Path) -> None:
    metric = metric_of(f"agreement:{labelled}", samples())
    x = np.load(labelled)["x"]
    weight = numpy_helper.to_array(OTHER.graph.initializer[0])
    assert metric.evaluate(DENSE).value == 100
    assert metric.evaluate(OTHER).value == pytest.approx(100 * np.mean(x.argmax(1) == (x @ weight).argmax(1)))


def test_mae_is_to_the_targets_and_lower_is_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 11, 7)).astype(np.float32)
    np.savez(tmp_path / "s.npz", x=x, target=target)
    metric = metric_of(f"mae:{tmp_path / 's.npz'}", samples())
    assert not metric.higher_is_better
    assert metric.evaluate(DENSE).value == pytest.approx(np.abs(x - target).mean())


def test_a_folder_has_a_folder_of_images_for_each_class(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "image",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.repeat(np.eye(3, dtype=np.float32), 4, axis=0), "w")],  # the strongest channel
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for name, colour in (("2", (0, 0, 255)), ("0", (255, 0, 0)), ("1", (0, 255, 0))):
        (tmp_path / name).mkdir()
        for i in range(2):
            shade = tuple(max(0, value - 40 * i) for value in colour)
            Image.new("RGB", (2, 2), shade).save(tmp_path / name / f"{i}.png")
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "2" / "wrong.png")
    found = metric_of(f"top1:{tmp_path}", Samples(Path(), Graph(model, None))).evaluate(model)
    assert found.value == pytest.approx(100 * 6 / 7)


@pytest.mark.parametrize("evaluate", ["top1:x.npz", "my.module:function", "python eval.py {model}", len])
def test_what_can_be_a_metric(evaluate: Any) -> None:
    check_evaluate(evaluate)


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ("eval.py", "Give module:function"),
        ("top2:x", "Did you mean 'top5'"),
        ("top1:", "Give module:function"),
        ("a b:c", "Give module:function"),
    ],
)
def test_what_cannot_be_a_metric(evaluate: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        check_evaluate(evaluate)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "gives nan as 'metric'"),
        (float("inf"), "gives inf"),
        ("97", "gives '97', which is no number"),
        (None, "gives None, which is no number"),
        (True, "gives True, which is no number"),
        ({}, "which is no number"),
        ({"a": "x"}, "which is no number"),
        ([1, 2], r"gives \[1, 2\], which is no number"),
    ],
)
def test_what_is_no_number_is_refused(value: Any, words: str) -> None:
    with pytest.raises(MetricError, match=words):
        metric_of(lambda path: value, samples(), key=None).evaluate(DENSE) if value is None else _fixed(value)


def _fixed(value: Any) -> Measurement:
    def metric(path: str) -> Any:
        return value

    return metric_of(metric, samples()).evaluate(DENSE)


def test_a_dict_has_the_metric_its_error_and_others() -> None:
    found = metric_of(lambda path: {"loss": 2, "acc": np.float64(0.5), "stderr": 0.1}, samples(), key="acc")
    measured = found.evaluate(DENSE)
    assert (measured.value, measured.others, measured.error) == (0.5, {"loss": 2.0}, 0.1)
    assert found.name == "acc"
    with pytest.raises(MetricError, match=r"no number 'ac': it gives acc\. Did you mean 'acc'"):
        metric_of(lambda path: {"acc": 1}, samples(), key="ac").evaluate(DENSE)


def test_a_function_gets_a_file_of_its_own_that_is_removed_and_what_it_raises_is_told() -> None:
    seen: list[Path] = []

    def careless(path: str) -> float:
        seen.append(Path(path))
        Path(path).write_bytes(b"")
        return 1.0

    before = DENSE.SerializeToString()
    metric_of(careless, samples()).evaluate(DENSE)
    assert not seen[0].exists() and DENSE.SerializeToString() == before
    with pytest.raises(MetricError, match="evaluate raised ZeroDivisionError: division by zero") as failure:
        metric_of(lambda path: 1 / 0, samples()).evaluate(DENSE)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_the_error_of_a_difference_is_that_of_paired_samples() -> None:
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.7) * 100.0
    b = a.copy()
    b[:8] = 100 - b[:8]
    dense, pruned = (Measurement(v.mean(), by_sample=v, step=100.0) for v in (a, b))
    assert pruned.error is not None and pruned.error > 2
    assert pruned.error_beside(dense) == pytest.approx(100 * (8 + 2.7) ** 0.5 / 400, rel=0.01)
    assert standard_error(np.arange(5.0), 0.0) == pytest.approx(np.std(np.arange(5.0), ddof=1) / 5**0.5)
    assert Measurement(1.0, stderr=3.0).error_beside(Measurement(2.0, stderr=4.0)) == 5
    assert Measurement(1.0).error_beside(Measurement(2.0, stderr=4.0)) is None


def numbered(*values: float, higher: bool = True, repeatable: bool = False) -> Metric:
    """A metric that gives these values one after the other."""
    left = iter(values)
    return Metric("m", higher, lambda model: Measurement(next(left)), repeatable)


def test_a_metric_that_does_not_repeat_itself_counts_against_candidates() -> None:
    meter = Meter(numbered(90.0, 90.4, 89.7, 89.6), DENSE, Tolerance(max_drop=1.0))
    assert [e.model for e in meter.log] == ["dense", "dense, again"]
    shortfalls = [meter.shortfall(meter.measure(DENSE)) for _ in range(2)]
    assert shortfalls == pytest.approx([0.3 + 1.645 * 0.4 - 1, 0.4 + 1.645 * 0.4 - 1])
    assert [e.met for e in meter.log] == [None, None, True, False]
    report = meter.report(None)
    assert report["pruned"] is None and report["evaluations"][2]["drop"] == pytest.approx(0.3)


def test_lower_may_be_better() -> None:
    meter = Meter(numbered(0.2, 0.2, 0.25, 0.31, higher=False), DENSE, Tolerance(min_metric=0.3))
    assert [meter.shortfall(meter.measure(DENSE)) <= 0 for _ in range(2)] == [True, False]
    assert meter.drop(Measurement(0.25)) == pytest.approx(0.05)


def test_what_the_dense_model_does_not_reach_and_what_anything_reaches_is_refused() -> None:
    with pytest.raises(PlanError, match=r"dense model's m is 0.7, 0.75 is asked for"):
        Meter(numbered(0.7, repeatable=True), DENSE, Tolerance(min_metric=0.75))
    with pytest.raises(PlanError, match=r"dense model's m is 0.97, so that a drop of 1 allows anything.*0.01"):
        Meter(numbered(0.97, repeatable=True), DENSE, Tolerance(max_drop=1.0))
    with pytest.raises(PlanError, match="asked for"):
        Meter(numbered(0.4, higher=False, repeatable=True), DENSE, Tolerance(min_metric=0.3))


def test_wrong_samples_are_named(tmp_path: Path, labelled: Path) -> None:
    np.savez(tmp_path / "bare.npz", x=np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32))
    np.savez(tmp_path / "few.npz", x=np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32), target=[1.0])
    for evaluate, words in (
        (f"top1:{tmp_path / 'bare.npz'}", "it has no labels"),
        (f"mae:{tmp_path / 'bare.npz'}", "it has no targets"),
        (f"mae:{tmp_path / 'few.npz'}", "1 targets for 5 samples"),
        (f"mae:{tmp_path}", "targets come as an .npz file"),
    ):
        with pytest.raises(MetricError, match=words):
            metric_of(evaluate, samples()).evaluate(DENSE)
