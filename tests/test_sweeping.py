"""Sweeps: the files of single runs, made once, whatever interrupts them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import spa
from spa import goals, sweeping
from spa.coupling.cost import measure
from spa.errors import MetricError, OptionError, PlanError
from spa.job import Job
from spa.obspa import pipeline, score
from spa.obspa.readers import rows
from spa.progress import silent
from spa.request import Request
from spa.running import tasks
from spa.running.tasks import PREFIX
from tests.clusters import CLUSTERS, by_files
from tests.test_cli import refused
from tests.test_cli import spa as run_cli

MODELS = Path(__file__).parent.parent / "models"
VGG, TEST, TRAIN = MODELS / "digits_vgg.onnx", MODELS / "digits_test.npz", MODELS / "digits_train.npz"
SHARED: dict[str, Any] = {"data": TRAIN, "samples": 16, "threads": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "SECONDS", 0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".onnx"}


def test_each_file_is_that_of_a_single_run_after_one_calibration_and_one_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Job, "calibrate", counted(calls, "calibrate", Job.calibrate))
    monkeypatch.setattr(score, "curves", counted(calls, "score", score.curves))
    found = spa.sweep(VGG, tmp_path / "s", ratio="0.2:0.4:0.2", criterion=["obspa", "l2"], **SHARED)
    assert calls == ["calibrate", "score"]
    assert [p.name for p in found.points] == [f"{c}-macs-{r}-by8" for c in ("obspa", "l2") for r in (0.2, 0.4)]
    for point in found.points:
        assert point.repair == ("quick" if point.criterion == "obspa" else "none")
        options = {"ratio": point.ratio, "criterion": point.criterion, "reconstruct": point.repair}
        alone = spa.prune(VGG, **options, **SHARED)
        alone.save(tmp_path / "alone.onnx")
        assert (tmp_path / "s" / str(point.file)).read_bytes() == (tmp_path / "alone.onnx").read_bytes(), point.name
        assert (point.macs, point.reached) == (alone.report.after.macs, alone.report.reached)
        assert point.change is not None and point.milliseconds is not None and point.accuracy is not None
        if point.criterion == "obspa":
            assert alone.report.calibration is not None and point.change == alone.report.calibration["after"]
    assert found.loss == "change" and found.cost == "macs"
    beaten = {
        p.name
        for p in found.points
        for q in found.points
        if q.macs <= p.macs and q.change <= p.change and (q.macs, q.change) != (p.macs, p.change)
    }
    assert {p.name for p in found.points if not p.on_front} == beaten


def counted(calls: list[str], name: str, function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("of", ["bytes", "memory"])
def test_the_cost_is_in_the_unit_of_the_budget(of: str, tmp_path: Path) -> None:
    options = {"criterion": "l2", "evaluate": f"top1:{TEST}", "threads": 1}
    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.25, 0.5], of=of, **options)
    assert found.cost == of
    dense = measure(spa.analyze(VGG)).to_dict()[of]
    assert found.dense[of] == dense
    assert [getattr(p, of) / dense for p in found.points] == pytest.approx([0.75, 0.5], abs=0.01)
    assert [p.reached for p in found.points] == pytest.approx([1 - getattr(p, of) / dense for p in found.points])
    html = (tmp_path / "s" / "index.html").read_text(encoding="utf-8")
    assert f">{of}<" in html


def test_tables_say_the_same_as_the_result(tmp_path: Path) -> None:
    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.2, 0.5, 0.7], criterion="l2", evaluate=f"top1:{TEST}", **SHARED)
    table = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert table["points"] == json.loads(json.dumps(found.to_dict()))["points"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "s" / "sweep.csv").read_text())))
    assert [r["name"] for r in rows] == [p.name for p in found.points]
    assert [float(r["drop"]) for r in rows] == [p.drop for p in found.points]
    assert [r["is_knee"] == "True" for r in rows] == [p.name == found.knee for p in found.points]
    assert found.loss == "drop" and found.metric_name == "top1"
    assert found.dense["metric"] is not None and found.dense["metric"] > 99
    report = json.loads((tmp_path / "s" / f"{found.points[0].name}.json").read_text())
    assert [e["model"] for e in report["metric"]["evaluations"]] == ["dense", "pruned"]  # each point has its own log


def test_what_is_interrupted_goes_on_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    attain = sweeping.attain

    def interrupted(job: Any) -> Any:
        made.append(str(job.request.goal.ratio))
        if len(made) == 2:
            raise KeyboardInterrupt
        return attain(job)

    monkeypatch.setattr(sweeping, "attain", interrupted)
    options = {"ratio": [0.2, 0.3, 0.4], "criterion": "l2", **SHARED}
    with pytest.raises(KeyboardInterrupt):
        spa.sweep(VGG, tmp_path / "s", **options)
    first = contents(tmp_path / "s")
    assert list(first) == ["l2-macs-0.2-by8.onnx"]
    stamp = (tmp_path / "s" / "l2-macs-0.2-by8.onnx").stat().st_mtime_ns
    found = spa.sweep(VGG, tmp_path / "s", **options)
    assert made == ["0.2", "0.3", "0.3", "0.4"]
    assert (tmp_path / "s" / "l2-macs-0.2-by8.onnx").stat().st_mtime_ns == stamp
    assert len(contents(tmp_path / "s")) == 3 and all(p.macs for p in found.points)
    monkeypatch.setattr("spa.job.Job.calibrate", lambda job: pytest.fail("calibrated anew"))
    again = spa.sweep(VGG, tmp_path / "s", **options)
    assert [p.macs for p in again.points] == [p.macs for p in found.points]
    assert not [p for p in (tmp_path / "s").iterdir() if p.name.startswith(".")]


def test_another_sweep_and_a_folder_of_something_else_are_refused(tmp_path: Path) -> None:
    spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)
    before = contents(tmp_path / "s")
    with pytest.raises(OptionError, match="holds the sweep of another model, of other options"):
        spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", min_width=3, **SHARED)
    with pytest.raises(OptionError, match="holds the sweep of another model"):
        spa.sweep(MODELS / "digits_resnet.onnx", tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="is not empty and holds no sweep"):
        spa.sweep(VGG, tmp_path / "other", ratio=0.2, criterion="l2", **SHARED)
    assert contents(tmp_path / "s") == before
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    more = spa.sweep(VGG, tmp_path / "s", ratio=[0.2, 0.3], criterion="l2", **SHARED)  # more points are the same sweep
    assert len(more.points) == 2


def test_a_point_out_of_reach_is_said_and_the_others_are_made(tmp_path: Path) -> None:
    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.99, 0.3], criterion="l2", min_width=24, **SHARED)
    assert found.points[0].refused is not None and "cannot remove 99.0% of the macs" in found.points[0].refused
    assert found.points[0].file is None and found.points[1].macs
    with pytest.raises(PlanError, match=r"cannot remove|no point could be made"):
        spa.sweep(VGG, tmp_path / "t", ratio=[0.99], criterion="l2", min_width=24, **SHARED)


def test_a_metric_that_fails_on_a_network_costs_that_value_alone(tmp_path: Path) -> None:
    left = [90.0, 80.0]

    def metric(path: str) -> float:
        return left.pop(0)

    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.2, 0.3], criterion="l2", evaluate=metric, **SHARED)
    assert [p.metric for p in found.points] == [80.0, None]
    assert found.loss == "change"
    with pytest.raises(MetricError):
        spa.sweep(VGG, tmp_path / "t", ratio=[0.2], criterion="l2", evaluate=metric, **SHARED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.3, "max_distortion": 0.1}, "Leave the other goal out"),
        ({}, "needs budgets"),
        ({"ratio": 0.3, "latency_ms": 1, "of": "latency"}, "ratios of latency and milliseconds"),
        ({"ratio": 0.3, "criterion": "l3"}, "l3"),
        ({"ratio": [1.5], "criterion": "l2"}, "ratio is 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        spa.sweep(VGG, tmp_path / "s", **options)


def test_networks_are_repaired_beside_one_run_of_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    reconstruct = pipeline.reconstruct_together

    def counted_together(analysis: Any, drafts: Any, *arguments: Any, **options: Any) -> Any:
        together.append(len(drafts))
        return reconstruct(analysis, drafts, *arguments, **options)

    monkeypatch.setattr(pipeline, "reconstruct_together", counted_together)
    monkeypatch.setattr(rows, "MAX_ROWS", 200)  # so that positions are drawn, by each network for itself
    options: dict[str, Any] = {"ratio": [0.2, 0.4, 0.6], "reconstruct": "readers", **SHARED, "samples": 96}
    spa.sweep(VGG, tmp_path / "three", **options)
    monkeypatch.setattr(sweeping, "TOGETHER", 2)
    spa.sweep(VGG, tmp_path / "two", **options)
    monkeypatch.setattr(sweeping, "TOGETHER_BYTES", 1)
    spa.sweep(VGG, tmp_path / "one", **options)
    assert together == [3, 2, 1, 1, 1, 1]
    assert contents(tmp_path / "three") == contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_network_out_of_reach_or_destroyed_leaves_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goals, "DESTROYED", 0.1)
    options: dict[str, Any] = {"reconstruct": "readers", "min_width": 16, **SHARED}
    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.99, 0.1, 0.6], **options)
    out_of_reach, fine, destroyed = found.points
    assert out_of_reach.refused is not None and "cannot remove 99.0% of the macs" in out_of_reach.refused
    assert destroyed.refused is not None and "no better than a constant" in destroyed.refused
    assert fine.refused is None and contents(tmp_path / "s").keys() == {fine.file}


def test_the_repair_is_said_and_how_to_have_the_full_one(tmp_path: Path) -> None:
    found = spa.sweep(VGG, tmp_path / "s", ratio=[0.2, 0.5, 0.6, 0.8], **SHARED)
    assert {p.repair for p in found.points} == {"quick"}
    assert found.knee is not None and found.again is not None
    assert f"-o {found.knee}-full.onnx" in found.again and "--reconstruct full" in found.again
    assert "--ratio 0." in found.again and "--data" in found.again
    report = json.loads((tmp_path / "s" / f"{found.knee}.json").read_text())
    assert report["calibration"]["reconstruct"] == report["requested"]["repair"]["reconstruct"] == "quick"
    assert ",quick," in (tmp_path / "s" / "sweep.csv").read_text()
    assert "--reconstruct full" in (tmp_path / "s" / "index.html").read_text()


def test_two_sweeps_are_not_at_work_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / sweeping.LOCK), pytest.raises(OptionError, match="another sweep is at work"):
        spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)
    assert not list((tmp_path / "s").glob("*.onnx"))
    spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)


def test_inputs_count_by_their_content(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.2, "criterion": "l2", "threads": 1}
    rng = np.random.default_rng(0)
    data = {"input": rng.standard_normal((9, 1, 8, 8)).astype(np.float32)}
    spa.sweep(VGG, tmp_path / "s", data=data, **options)
    spa.sweep(VGG, tmp_path / "s", data={"input": data["input"].copy()}, **options)
    with pytest.raises(OptionError, match="of other options or inputs"):
        spa.sweep(VGG, tmp_path / "s", data={"input": data["input"] + 1}, **options)
    np.savez(tmp_path / "data.npz", **data)
    spa.sweep(VGG, tmp_path / "t", data=tmp_path / "data.npz", **options)
    np.savez(tmp_path / "data.npz", input=data["input"] + 1)
    with pytest.raises(OptionError, match="of other options or inputs"):
        spa.sweep(VGG, tmp_path / "t", data=tmp_path / "data.npz", **options)
    spa.sweep(VGG, tmp_path / "u", data=iter([data]), **options)
    with pytest.raises(OptionError, match="cannot be told of a Python object"):
        spa.sweep(VGG, tmp_path / "u", data=iter([data]), **options)


@pytest.mark.slow
def test_the_files_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": [0.2, 0.3, 0.5], **SHARED, "samples": 64, "threads": 2}
    for jobs in (1, 2, 4):
        spa.sweep(VGG, tmp_path / str(jobs), jobs=jobs, **options)
        assert {p.name for p in (tmp_path / str(jobs)).iterdir() if p.is_dir()} == set()
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "4")
    assert len(contents(tmp_path / "1")) == 3
    monkeyed = {"timing": 0, "seconds": 0, "requested": 0, "environment": 0}
    reports = [json.loads((tmp_path / n / "obspa-macs-0.3-by8.json").read_text()) | monkeyed for n in ("1", "4")]
    assert reports[0] == reports[1]
    table = json.loads((tmp_path / "4" / "sweep.json").read_text())
    again = spa.sweep(VGG, tmp_path / "4", jobs=3, **options)  # the same sweep
    assert [p.change for p in again.points] == [p["change"] for p in table["points"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the clusters' packages
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_files_are_the_same_on_a_cluster(cluster: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": [0.2, 0.3, 0.5], **SHARED, "samples": 64}
    spa.sweep(VGG, tmp_path / "here", **options)
    with CLUSTERS[cluster]() as workers:
        spa.sweep(VGG, tmp_path / "there", backend=workers.backend, scheduler=workers.scheduler, **options)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert len(contents(tmp_path / "there")) == 3


def test_a_cluster_that_cannot_be_reached_ends_a_sweep_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", json)
    cluster = {"backend": "dask", "scheduler": "tcp://127.0.0.1:1"}
    for run in (spa.prune, spa.sensitivity):
        with pytest.raises(OptionError, match="cannot be reached"):
            run(VGG, criterion="l2", **cluster)
    with pytest.raises(OptionError, match="cannot be reached"):
        spa.sweep(VGG, tmp_path / "s", ratio=0.3, criterion="l2", **cluster)
    assert not (tmp_path / "s").exists()


def test_networks_that_are_repaired_elsewhere_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"ratio": [0.2, 0.99, 0.4], "reconstruct": "readers", "min_width": 16, **SHARED}
    options["data"] = {"input": np.load(TRAIN)["input"][:16]}
    spa.sweep(VGG, tmp_path / "here", **options)
    by_files(monkeypatch)
    found = spa.sweep(VGG, tmp_path / "there", jobs=2, **options)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert [p.refused is None for p in found.points] == [True, False, True]


def test_what_a_killed_sweep_left_goes(tmp_path: Path) -> None:
    spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)
    (tmp_path / "s" / f"{PREFIX}x").mkdir()
    (tmp_path / "s" / f"{PREFIX}x" / "shared").write_text("half")
    spa.sweep(VGG, tmp_path / "s", ratio=0.2, criterion="l2", **SHARED)
    assert not (tmp_path / "s" / f"{PREFIX}x").exists()


def test_sets_of_networks_mix_large_and_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def sets(jobs: int, repair: str) -> list[list[int]]:
        runner = sweeping._Runner(analysis, Request.of(jobs=jobs), (), silent, Path())
        return runner._shared_out([SimpleNamespace(reconstruct=repair)] * 7)  # type: ignore[list-item]

    analysis = spa.analyze(VGG)
    monkeypatch.setattr(sweeping, "side_by_side", lambda job: True)
    assert sets(1, "quick") == sets(1, "full") == [[0, 1, 2, 3, 4, 5, 6]]
    assert sets(2, "quick") == [[0, 2, 4, 6], [1, 3, 5]]
    assert sets(2, "full") == [[0, 4], [1, 5], [2, 6], [3]]
    assert sets(9, "quick") == [[n] for n in range(7)]
    monkeypatch.setattr(sweeping, "side_by_side", lambda job: False)
    assert sets(1, "none") == [[n] for n in range(7)]


def test_the_command_line_makes_a_folder_and_prints_a_table(tmp_path: Path) -> None:
    common = ("--criteria", "l2", "--samples", 16, "--threads", 1)
    done = run_cli("sweep", VGG, "-o", tmp_path / "s", "--ratios", "0.2,0.5", *common)
    assert done.returncode == 0, done.stderr
    assert "l2-macs-0.5-by8" in done.stdout and "dense" in done.stdout
    assert (tmp_path / "s" / "sweep.csv").exists()
    refused(run_cli("sweep", VGG, "-o", tmp_path / "t", "--ratios", "half", *common), 2, "Give numbers, such as")


def test_sensitivity_is_of_each_group_alone() -> None:
    found = spa.sensitivity(VGG, criterion="l2", measure=True, fractions=[0.5], **SHARED)
    first = found.groups[0]
    assert (first.layer, first.channels, first.widths) == ("/features/features.0/Conv", 32, (16,))
    assert found.criterion == "l2" and len(found.groups) == 7
    analysis = spa.analyze(VGG)
    values = spa.score(analysis, criterion="l2")[first.name]
    plan = spa.Plan({first.name: tuple(sorted(values.argsort(kind="stable")[16:].tolist()))}, {first.name: 32}, {})
    result = spa.prune(VGG, plan=plan, reconstruct="none")
    assert first.macs[0] == pytest.approx(result.report.reached)
    assert first.params[0] == pytest.approx(1 - result.report.after.params / result.report.before.params)
    assert first.change is not None and first.change[0] > 0.05
    lines = found.to_csv().splitlines()
    assert len(lines) == 8 and lines[1].startswith(f"{first.name},{first.layer},32,16,")
    with pytest.raises(PlanError, match="between 0 and 1"):
        spa.sensitivity(VGG, criterion="l2", fractions=[1.0])


def test_scores_and_sensitivity_go_through_files_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"fractions": [0.3], **SHARED}
    found = spa.sensitivity(VGG, **options)
    by_files(monkeypatch)
    written: list[str] = []
    monkeypatch.setattr(tasks, "read_value", counted(written, "read", tasks.read_value))
    assert spa.sensitivity(VGG, jobs=2, **options) == found
    assert len(written) == 2 * (1 + 2 * len(found.groups))  # of scores and of costs: what is shared, items and answers


@pytest.mark.slow
def test_sensitivity_is_the_same_for_any_number_of_processes() -> None:
    options: dict[str, Any] = {"measure": True, "fractions": [0.3], **SHARED, "samples": 64, "threads": 2}
    assert spa.sensitivity(VGG, **options) == spa.sensitivity(VGG, jobs=2, **options)  # of obspa: scores, too


def test_sensitivity_on_the_command_line() -> None:
    done = run_cli("sensitivity", VGG, "--criterion", "l2", "--csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 22 and done.stdout.startswith("group,layer,channels,width")
