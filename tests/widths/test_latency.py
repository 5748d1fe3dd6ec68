"""Latency as a budget: parts that make up the network, a model that meets its times, budgets that are met.

Timing is done by a stand-in that computes what an operator takes, so nothing here depends on the machine but for one
run from end to end, of which only the form is looked at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest
from onnx import ModelProto, TensorProto, helper
from platformdirs.api import PlatformDirsABC
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.coupling.analysis import Analysis, Group, couple
from spa.coupling.cost import CostModel
from spa.coupling.plan import make_plan
from spa.errors import ModelError, PlanError
from spa.model.graph import Graph
from spa.report import Report
from spa.report.text import branched
from spa.running import place
from spa.running.bench import bench
from spa.running.feeds import working_feeds
from spa.running.ranges import input_ranges
from spa.running.runtime import load_session, run
from spa.surgery.apply import apply
from spa.widths import latency, stopwatch
from spa.widths.budget import Budget
from spa.widths.ladders import alignment, allowed_widths
from spa.widths.latency import LatencyModel
from spa.widths.ranking import RANKINGS
from spa.widths.stopwatch import Cache, Stopwatch
from tests.coupling.test_detours import mobile
from tests.zoo import exported

MODELS = Path(__file__).parents[2] / "models"
RESNET, VIT, LSTM = (MODELS / f"digits_{name}.onnx" for name in ("resnet", "vit", "lstm"))
NETWORKS = ("resnet_basic", "mobilenet_v2", "densenet", "vit", "llama", "lstm", "handmade_if", "handmade_qdq", "yolo")


class Fake(Stopwatch):
    """A machine on which a weight takes a nanosecond, and widths count in multiples of ``block``."""

    block = 1
    slower = 1.0  # whole networks, once they are pruned
    spread = 1.1
    timed = 0
    dense = 0.0

    def _ms(self, model: ModelProto) -> float:
        def padded(n: int) -> int:
            return -(-n // self.block) * self.block if n % 8 == 0 else n

        weights = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
        return 1e-6 * sum(prod(map(padded, t.dims)) for t in weights)

    def part(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        self.timed += 1
        return 1e-5 + self._ms(model)

    def networks(self, models: Sequence[ModelProto]) -> stopwatch.Timing:
        times = [self._ms(m) for m in models]
        self.dense = times[0]
        inputs = bench(models[:1], runs=1, warmup=0, threads=1, isolate_memory=False).inputs[0]
        return stopwatch.Timing((times[0], *(t * self.slower for t in times[1:])), inputs, self.spread)


class Blocked(Fake):
    """A machine that works on sixteen channels at once."""

    block = 16


class Slow(Fake):
    """A machine that gains less from pruning than its operators let hope."""

    slower = 1.2


class Slots(Fake):
    """A machine that takes a second for each Sigmoid, besides."""

    def _ms(self, model: ModelProto) -> float:
        return super()._ms(model) + 1e3 * sum(n.op_type == "Sigmoid" for n in model.graph.node)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stopwatch.cache_file()


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Fake())


def measured(path: Path, watch: Fake, file: Path) -> tuple[Analysis, list[Group], LatencyModel]:
    analysis = spa.analyze(path)
    groups = list(analysis.free)
    return analysis, groups, latency.measure(analysis, groups, Budget(of="latency"), watch, Cache(file))


def widths(analysis: Analysis, groups: Sequence[Group], seed: int, multiple: int = 8) -> list[int]:
    rng = np.random.default_rng(seed)
    steps = alignment(analysis, groups, multiple)
    return [int(rng.choice(allowed_widths(g.size, s, 1))) for g, s in zip(groups, steps, strict=True)]


# -- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("narrow", [False, True])
def test_parts_run_one_after_another_do_what_the_network_does(name: str, narrow: bool) -> None:
    analysis = spa.analyze(exported(name))
    groups = list(analysis.free)
    kept = [max(1, g.size // 2) if narrow else g.size for g in groups]
    model = apply(analysis, latency._narrowed(analysis, groups, kept))
    session = load_session(model)
    feeds = working_feeds(session, ranges=input_ranges(model), batch=1)
    network = latency._Network(model, None, {n: v.shape for n, v in feeds.items()}, analysis)
    live = dict(feeds)
    for nodes in latency._parts(analysis):
        cut = network.cut(nodes)
        values = run(load_session(cut.model()), {n: live[n] for n in cut.inputs})
        live.update(zip(cut.outputs, values, strict=True))
        run(load_session(cut.model(), optimise=True), cut.feeds())
    for output, expected in zip(network.graph.outputs, run(session, feeds), strict=True):
        np.testing.assert_allclose(live[output], expected, rtol=1e-5, atol=1e-5)


def test_a_residual_addition_goes_with_the_convolution_before_it() -> None:
    analysis = spa.analyze(RESNET)
    part = next(p for p in latency._parts(analysis) if any(n.op == "Add" for n in p))
    assert [n.op for n in part] == ["Conv", "BatchNormalization", "Add", "Relu"]


def test_every_part_has_one_operator_that_multiplies_and_accumulates() -> None:
    analysis = spa.analyze(VIT)
    heavy = [sum(bool(analysis.laws[n.index].macs) for n in part) for part in latency._parts(analysis)]
    assert set(heavy[1:]) == {1}
    assert sum(heavy) == sum(bool(law.macs) for law in analysis.laws.values())


def test_activations_that_may_go_are_parts_by_themselves(tmp_path: Path) -> None:
    analysis = couple(Graph(mobile()))
    groups = [*analysis.free, *analysis.detours]
    alone = [set(d.operators) for d in analysis.detours if not d.writers]
    parts = latency._parts(analysis, alone)
    assert len(parts) == len(latency._parts(analysis)) + 4  # three activations, and the pooling behind one
    assert all(nodes in [{n.index for n in part} for part in parts] for nodes in alone)
    watch = Slots()
    model = latency.measure(analysis, groups, Budget(of="latency"), watch, Cache(tmp_path / "c"))
    costs = CostModel(analysis, groups, model)
    for gone in ([0], [1], [3], [2, 4], [1, 2]):
        names = [analysis.detours[i].name for i in gone]
        sizes = [0 if g.name in names else g.size for g in groups]
        pruned = apply(analysis, make_plan(analysis, dict.fromkeys(names, np.zeros(0, int))))
        assert costs.latency(sizes) == pytest.approx(watch._ms(pruned), rel=0.02)


def test_under_a_budget_of_latency_activations_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Slots())
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(32, 5, 6, 4)).astype(np.float32)}
    result = spa.prune(mobile(), data=data, of="latency", ratio=0.5, depth="auto", threads=1)
    assert sum(n.op_type == "Sigmoid" for n in result.model.graph.node) == 2
    assert 2 == len(result.report.gone) == sum(b.gone for b in result.report.branches)
    assert "2 of 5 activations, depthwise convolutions and gates went as a whole: " in branched(result.report)


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RESNET, VIT, LSTM])
@pytest.mark.parametrize(("machine", "block"), [(Fake, 1), (Blocked, 16)])
def test_the_model_knows_the_latency_at_widths_that_were_not_timed(
    path: Path, machine: type[Fake], block: int, tmp_path: Path
) -> None:
    watch = machine()
    analysis, groups, model = measured(path, watch, tmp_path / "c")
    costs = CostModel(analysis, groups, model)
    assert model.untimed == 0
    assert model.block in (1, block)  # 1 where all widths that were timed are multiples of 16
    assert costs.latency(costs.sizes) == pytest.approx(watch.dense)
    for seed in range(5):
        chosen = widths(analysis, groups, seed, 8 * block)
        pruned = apply(analysis, latency._narrowed(analysis, groups, chosen))
        # One factor stands for all that is not in the parts: here for what each part takes besides its weights.
        assert costs.latency(chosen) == pytest.approx(watch._ms(pruned), rel=0.05)


def test_the_machines_block_is_found(tmp_path: Path) -> None:
    assert measured(RESNET, Blocked(), tmp_path / "a")[2].block == 16
    assert measured(RESNET, Fake(), tmp_path / "b")[2].block == 1


def test_wider_is_never_faster_however_noisy_the_times_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)

    class Noisy(Fake):
        def part(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
            return super().part(model, feeds) * rng.uniform(0.3, 3)

    analysis, groups, model = measured(RESNET, Noisy(), tmp_path / "c")
    costs = CostModel(analysis, groups, model)
    for seed in range(20):
        a, b = widths(analysis, groups, seed), widths(analysis, groups, seed + 100)
        narrow, wide = ([f(x) for x in zip(a, b, strict=True)] for f in (min, max))
        assert costs.latency(narrow) <= costs.latency(wide) + 1e-12


def test_a_fit_without_negative_numbers_agrees_with_projected_gradients() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        a = rng.uniform(0, 1, (9, 4)) + np.array([2.0, 0, 0, 0])
        x = np.zeros(4)
        for _ in range(20000):
            x = np.maximum(x - 0.02 * a.T @ (a @ x - 1), 0)
        found, error = latency._nonnegative(a)
        assert (found >= 0).all()
        assert error == pytest.approx(float(np.square(a @ x - 1).sum()), abs=1e-6)
        assert error == pytest.approx(float(np.square(a @ found - 1).sum()), abs=1e-9)


def test_the_groups_shrink_unlike_each_other() -> None:
    analysis = spa.analyze(RESNET)
    groups = list(analysis.free)
    points = latency._design(analysis, groups, Budget(round_to=1))
    assert points[0] == [g.size for g in groups]
    for a, b in itertools.pairwise(range(len(groups))):
        shares = np.array([[p[i] / groups[i].size for i in (a, b)] for p in points[1:]])
        assert abs(np.corrcoef(shares.T)[0, 1]) < 0.9
        assert np.ptp(shares, axis=0).min() > 0.8


# -- the cache ------------------------------------------------------------------------------------------------------


def test_equal_parts_are_timed_once_and_never_again(tmp_path: Path) -> None:
    first, again = Fake(), Fake()
    *_, model = measured(RESNET, first, tmp_path / "folder" / "c")
    stored = json.loads((tmp_path / "folder" / "c").read_text())
    assert first.timed == len(stored) > 0
    *_, same = measured(RESNET, again, tmp_path / "folder" / "c")
    assert again.timed == 0
    assert [ms for ms, _ in same.terms] == [ms for ms, _ in model.terms]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["c"]


def test_repeated_blocks_share_their_timings(tmp_path: Path) -> None:
    analysis = spa.analyze(exported("vit"))
    watch = Fake()
    latency.measure(analysis, list(analysis.free), Budget(of="latency"), watch, Cache(tmp_path / "c"))
    assert watch.timed < 0.7 * latency.POINTS * len(latency._parts(analysis))


def test_times_hold_for_one_processor_one_runtime_and_one_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = spa.analyze(RESNET)
    network = latency._Network(analysis.graph.model, None, {"input": (1, 1, 8, 8)}, analysis)
    cut = network.cut(latency._parts(analysis)[1])
    keys = {cut.key(Stopwatch(threads).context) for threads in (1, 2)}
    monkeypatch.setattr(stopwatch, "cpu_name", lambda: "another")
    keys.add(cut.key(Stopwatch(1).context))
    monkeypatch.setattr(place.ort, "__version__", "0.0")
    keys.add(cut.key(Stopwatch(1).context))
    larger = latency._Network(analysis.graph.model, None, {"input": (2, 1, 8, 8)}, analysis)
    keys.add(larger.cut(latency._parts(analysis)[1]).key(Stopwatch(1).context))
    assert len(keys) == 5


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', '{"a": -1.0}', '{"a": NaN}', "\x00"])
def test_a_corrupted_cache_is_ignored_and_written_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_text(content)
    cache = Cache(tmp_path / "c")
    assert cache.get("a") is None
    cache.put("a", 2)
    cache.save()
    assert Cache(tmp_path / "c").get("a") == 2.0


def test_two_runs_at_once_keep_each_others_times(tmp_path: Path) -> None:
    one, other = Cache(tmp_path / "c"), Cache(tmp_path / "c")
    one.put("a", 1)
    one.save()
    other.put("b", 2)
    other.save()
    assert (Cache(tmp_path / "c").get("a"), Cache(tmp_path / "c").get("b")) == (1.0, 2.0)


def test_a_cache_that_cannot_be_written_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "c")
    cache.put("a", 1)
    cache.save()
    assert cache.get("a") == 1.0


@pytest.mark.parametrize(
    ("platform", "parts"),
    [
        (Unix, (".cache", "spa", "latency.json")),
        (MacOS, ("Library", "Caches", "spa", "latency.json")),
        (Windows, ("AppData", "Local", "spa", "latency.json")),
    ],
)
def test_the_cache_lies_where_the_system_wants_it(
    monkeypatch: pytest.MonkeyPatch, platform: type[PlatformDirsABC], parts: tuple[str, ...]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if platform is Windows:  # elsewhere there is no Windows to ask
        monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: str(Path.home() / "AppData" / "Local"))
    monkeypatch.setattr(platformdirs, "PlatformDirs", platform)
    assert stopwatch.cache_file().relative_to(Path.home()).parts == parts


# -- budgets --------------------------------------------------------------------------------------------------------


def timing_notes(report: Report) -> list[str]:
    """Return the notes but for the one that l2 looks at weights alone."""
    return [note for note in report.notes if "change of the outputs was not measured" not in note]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("path", [RESNET, VIT])
def test_a_budget_of_latency_is_met(fake: None, ranking: str, path: Path) -> None:
    report = spa.prune(path, ratio=0.4, of="latency", ranking=ranking, criterion="l2", round_to=1).report
    assert report.latency is not None
    assert report.reached == pytest.approx(0.4, abs=0.03)
    assert report.latency["measured"] == pytest.approx(0.6 * report.latency["dense"], rel=latency.TOLERANCE)
    assert report.latency["choices"] == 1
    assert not timing_notes(report)


def test_a_budget_of_latency_is_met_with_optimal_brain_surgery(fake: None) -> None:
    report = spa.prune(RESNET, ratio=0.4, of="latency", data=MODELS / "digits_train.npz", samples=64, round_to=1).report
    assert report.reached == pytest.approx(0.4, abs=0.03)


def test_widths_become_multiples_of_the_machines_block(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Blocked())
    report = spa.prune(RESNET, ratio=0.4, of="latency", criterion="l2").report
    assert report.latency is not None
    assert report.latency["block"] == 16
    assert all(g.kept == g.size or g.kept % 16 == 0 for g in report.groups)


def test_what_is_measured_corrects_what_was_estimated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Slow())
    report = spa.prune(RESNET, ratio=0.4, of="latency", criterion="l2", round_to=1).report
    assert report.latency is not None
    assert report.latency["choices"] == 2
    assert report.latency["measured"] == pytest.approx(0.6 * report.latency["dense"], rel=latency.TOLERANCE)
    assert report.latency["measured"] == pytest.approx(1.2 * report.latency["estimated"], rel=0.05)


@pytest.mark.parametrize(("power", "choices"), [(3.0, 3), (0.4, 4)])
def test_a_network_is_not_emptied_where_estimates_are_far_off(
    power: float, choices: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Curved(Fake):
        """A machine on which the whole gains much more, or much less, than its parts."""

        def networks(self, models: Sequence[ModelProto]) -> stopwatch.Timing:
            timing = super().networks(models)
            return replace(timing, ms=tuple(timing.ms[0] * (ms / timing.ms[0]) ** power for ms in timing.ms))

    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Curved())
    report = spa.prune(RESNET, ratio=0.3, of="latency", criterion="l2", round_to=1).report
    assert report.latency is not None
    assert report.latency["measured"] == pytest.approx(0.7 * report.latency["dense"], rel=latency.TOLERANCE)
    estimated = report.latency["estimated"] / report.latency["dense"]
    assert estimated == pytest.approx(0.7 ** (1 / power), abs=0.07)
    assert report.latency["choices"] <= choices
    assert not timing_notes(report)


def test_one_wild_measurement_does_not_empty_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed(Fake):
        asked = 0

        def networks(self, models: Sequence[ModelProto]) -> stopwatch.Timing:
            timing = super().networks(models)
            self.asked += len(models) > 1
            wild = 4.0 if len(models) > 1 and self.asked == 1 else 1.0
            return replace(timing, ms=(timing.ms[0], *(wild * ms for ms in timing.ms[1:])), spread=wild)

    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, watch=Disturbed(), **__: watch)
    report = spa.prune(RESNET, ratio=0.3, of="latency", criterion="l2", round_to=1).report
    assert report.reached < 0.6
    assert any("too busy to time by" in note and "factor of 4" in note for note in report.notes)


def test_a_budget_that_is_missed_in_the_end_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hopeless(Fake):
        slower = 1000.0

    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Hopeless())
    report = spa.prune(RESNET, ratio=0.4, of="latency", criterion="l2", round_to=1).report
    assert any("the nearest network that was found takes" in note for note in report.notes)


def test_milliseconds_can_be_asked_for(fake: None) -> None:
    watch = Fake()
    watch.networks([onnx.load(RESNET)])
    goal = 0.7 * watch.dense
    report = spa.prune(RESNET, latency_ms=goal, criterion="l2", round_to=1).report
    assert report.latency is not None
    assert report.latency["goal"] == goal
    assert report.latency["measured"] == pytest.approx(goal, rel=latency.TOLERANCE)
    assert report.requested["goal"]["latency_ms"] == goal
    assert report.requested["goal"]["ratio"] is None


def test_milliseconds_out_of_reach_are_refused_with_the_least(fake: None) -> None:
    with pytest.raises(PlanError, match=r"1e-06 of 0\.\d+ ms are out of reach: about 0\.\d+ ms is the least"):
        spa.prune(RESNET, latency_ms=1e-6, criterion="l2")
    with pytest.raises(PlanError, match=r"takes 0\.\d+ ms already, and 50 ms are asked for"):
        spa.prune(RESNET, latency_ms=50, criterion="l2")


def test_a_ratio_out_of_reach_is_refused(fake: None) -> None:
    with pytest.raises(PlanError, match=r"cannot remove 99\.9% of the latency: at most"):
        spa.prune(RESNET, ratio=0.999, of="latency", criterion="l2")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"latency_ms": 1.0, "ratio": 0.5}, "ratio=0.5 and latency_ms=1 are asked for together"),
        ({"latency_ms": 1.0, "of": "params"}, "a latency of 1 ms and a budget of params"),
        ({"latency_ms": 0.0}, "Give a number above 0"),
        ({"latency_ms": float("nan")}, "Give a number"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(request_: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        spa.prune(RESNET, criterion="l2", **request_)  # type: ignore[arg-type]


def test_a_network_that_onnxruntime_cannot_run_is_said_with_the_remedy(cache: Path) -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 8]) for n in "xy"]
    weights = [helper.make_tensor(n, TensorProto.FLOAT, [8, 8], np.ones(64)) for n in "ab"]
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["t"])]
    nodes.append(helper.make_node("Nowhere", ["t"], ["y"], domain="my.domain"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), opset_imports=opsets)
    model.ir_version = 8
    with pytest.raises(ModelError, match=r"Nowhere.*needs a model that onnxruntime runs\. Use --of macs"):
        spa.prune(model, of="latency", criterion="l2", round_to=1)


def test_a_part_that_cannot_be_timed_alone_is_counted_and_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Fake):
        def part(self, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
            if any(n.op_type == "Add" for n in model.graph.node):
                raise ModelError("no")
            return super().part(model, feeds)

    monkeypatch.setattr(stopwatch, "Stopwatch", lambda *_, **__: Picky())
    report = spa.prune(RESNET, ratio=0.3, of="latency", criterion="l2", round_to=1).report
    assert any("could not be timed alone" in note for note in report.notes)


# -- from end to end ------------------------------------------------------------------------------------------------


def test_with_real_times_the_report_has_them_all(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "seconds", 0.02)
    monkeypatch.setattr(Stopwatch, "part_seconds", 0.0)
    result = spa.prune(LSTM, ratio=0.1, of="latency", criterion="l2", threads=1, batch=3)
    found = result.report.latency
    assert found is not None
    assert min(found[key] for key in ("goal", "estimated", "measured", "dense")) > 0
    assert found["inputs"] == {"input": [3, 1, 8, 8]}
    assert 1 <= found["choices"] <= 1 + latency.CORRECTIONS
    assert result.report.reached == 1 - found["measured"] / found["dense"]
    assert result.report.after.params < result.report.before.params
    assert len(json.loads(cache.read_text())) > 0
    result.save(tmp_path / "small.onnx")


def test_the_command_line_takes_both_and_prints_the_latency(fake: None, tmp_path: Path) -> None:
    target, page = tmp_path / "o.onnx", tmp_path / "o.html"
    common = ["prune", str(RESNET), "-o", str(target), "--criterion", "l2", "--round-to", "1", "--report", str(page)]
    done = CliRunner().invoke(app, [*common, "--of", "latency", "--ratio", "0.3"])
    assert done.exit_code == 0, done.output
    assert "latency 0." in done.output
    assert "input 1x1x8x8" in done.output
    assert "<p>latency 0." in page.read_text()
    goal = 0.8 * float(done.output.split("dense ")[1].split()[0])
    done = CliRunner().invoke(app, [*common, "--latency-ms", str(goal), "--json"])
    assert json.loads(done.output)["latency"]["goal"] == goal
    refused = CliRunner().invoke(app, [*common, "--latency-ms", "1", "--ratio", "0.3"])
    assert isinstance(refused.exception, PlanError)
