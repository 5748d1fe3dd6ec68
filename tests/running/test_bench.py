from __future__ import annotations

import gc
import json
import os
import signal
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa.errors import InvariantError, ModelError, PlanError
from spa.running import place
from spa.running.bench import _take_turns, bench

module = sys.modules["spa.running.bench"]

F = TensorProto.FLOAT


def value(name: str, dtype: int, shape: list | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def wide(width: int, *, layers: int = 1, rows: int | str = "batch", dtype: int = F) -> onnx.ModelProto:
    """A chain of square matrix products."""
    names = ["x", *(f"t{at}" for at in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[at], f"w{at}"], [names[at + 1]]) for at in range(layers)]
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    tensors = [numpy_helper.from_array(np.full((width, width), at, kind), f"w{at}") for at in range(layers)]
    inputs, outputs = [value("x", dtype, [rows, width])], [value("y", dtype, [rows, width])]
    graph = helper.make_graph(nodes, f"wide{width}", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def quick(models, **options):
    return bench(models, **{"runs": 5, "warmup": 1, "threads": 1, "isolate_memory": False, **options})


# -- turns -----------------------------------------------------------------------------------------------


def test_models_take_turns_after_the_warm_up():
    calls: list[str] = []
    times = _take_turns([lambda: calls.append("a"), lambda: calls.append("b")], runs=3, seconds=9, warmup=2)
    assert "".join(calls) == "ab" * (2 + 3)
    assert times.shape == (2, 3)
    assert (times >= 0).all()


def test_each_model_gets_its_own_time():
    def busy(count: int):
        return lambda: sum(range(count))

    slow, fast = np.median(_take_turns([busy(200_000), busy(2_000)], runs=9, seconds=9, warmup=1), axis=1)
    assert slow > 10 * fast


def test_without_a_number_of_runs_the_seconds_decide():
    short = _take_turns([lambda: None], runs=None, seconds=0, warmup=0)
    assert short.shape == (1, 10)
    assert _take_turns([lambda: None], runs=None, seconds=0.02, warmup=0).shape[1] > 10


def test_garbage_collection_is_on_again_even_after_an_error():
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("no")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="no"):
        _take_turns([fail], runs=1, seconds=1, warmup=0)
    assert gc.isenabled()


# -- the report ------------------------------------------------------------------------------------------


def test_a_smaller_model_is_faster_and_ratios_are_against_the_first():
    report = quick([wide(1024), wide(128)], batch=16, runs=15)
    big, small = report.models
    assert (big.speedup, big.size_ratio, big.memory_ratio) == (1.0, 1.0, None)
    assert small.speedup > 2  # 64 times fewer products.
    assert small.size_ratio == pytest.approx(small.file_bytes / big.file_bytes)
    assert small.size_ratio == pytest.approx(1 / 64, rel=0.05)
    for one in report.models:
        assert 0 < one.p10_ms <= one.median_ms <= one.p90_ms
        assert one.throughput == pytest.approx(16 * 1000 / one.median_ms)
        assert one.batch == 16
    assert (report.runs, report.warmup, report.threads, report.seed) == (15, 1, 1, 0)
    assert report.inputs == ({"x": (16, 1024)}, {"x": (16, 128)})


def test_a_fixed_batch_is_what_the_throughput_counts():
    (one,) = quick(wide(8, rows=6), batch=1).models
    assert one.batch == 6
    assert one.throughput == pytest.approx(6000 / one.median_ms)


def test_speed_is_per_sample_and_per_round(monkeypatch):
    # A machine that slows down from round to round.
    times = np.array([[1.0, 10.0, 100.0], [0.5, 5.0, 50.0]])
    monkeypatch.setattr(module, "_take_turns", lambda *_, **__: times)
    one, six = quick([wide(8, rows=1), wide(8, rows=6)]).models
    assert (one.median_ms, six.median_ms) == (10.0, 5.0)
    assert (one.speedup, six.speedup) == (1.0, 2.0 * 6)
    assert six.speedup_p10 == pytest.approx(2.0 * 6)
    times[1, 1:] = (
        2.5,
        100.0,
    )  # ratios 2, 4, 1; their median is 2, though that of the latencies is 10 over 2.5
    found = quick([wide(8, rows=1), wide(8, rows=1)]).models[1]
    assert found.speedup == 2.0
    assert found.speedup_p10 == pytest.approx(2.8 / 0.9)  # tenths between the first two of three runs


def test_names_are_paths_or_graphs(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(wide(8), path)
    report = quick([path, wide(8), path.read_bytes()])
    assert [one.name for one in report.models] == [str(path), "wide8", "model 3"]
    assert len({one.file_bytes for one in report.models}) == 1
    assert report.models[0].file_bytes == os.path.getsize(path)


def test_external_data_counts_as_the_file(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(wide(64), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (one,) = quick(path).models
    assert one.file_bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert one.file_bytes > 64 * 64 * 4 > path.stat().st_size


def test_the_report_is_json():
    plain = quick([wide(8), wide(4)]).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["models"][1]["name"] == "wide4"
    assert plain["inputs"][0] == {"x": [1, 8]}


def test_what_is_timed_is_optimised_and_what_finds_the_inputs_is_not(monkeypatch):
    opened = []
    load = module.load_session

    def spy(*args, optimise=False, **options):
        opened.append(optimise)
        return load(*args, optimise=optimise, **options)

    monkeypatch.setattr(module, "load_session", spy)
    monkeypatch.setattr(place, "load_session", spy)
    quick([wide(8), wide(4)])
    assert opened == [False, False, True, True]


def test_bfloat16_is_timed():
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=F)]
    graph = helper.make_graph(nodes, "half", [value("x", TensorProto.BFLOAT16, ["n", 3])], [value("f", F, ["n", 3])])
    half = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (one,) = quick(half, isolate_memory=True, batch=2).models
    assert one.batch == 2
    assert one.median_ms > 0


# -- memory ----------------------------------------------------------------------------------------------

needs_memory = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module: memory is None")


@needs_memory
def test_peak_memory_is_each_models_own(tmp_path):
    # 32 MiB of weights against almost none, while this process holds 256 MiB, which a child must not inherit.
    ballast = np.ones(2**28, np.uint8)
    path = tmp_path / "big.onnx"
    onnx.save(wide(1024, layers=8), path)
    big, small = quick([path, wide(8)], isolate_memory=True, runs=1).models
    assert ballast[-1] == 1
    assert 32 * 2**20 < big.peak_memory_bytes < 160 * 2**20
    assert small.peak_memory_bytes < 20 * 2**20
    assert small.memory_ratio == pytest.approx(small.peak_memory_bytes / big.peak_memory_bytes)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone resets the mark")
def test_memory_that_was_freed_before_does_not_count():
    np.ones(2**27, np.uint8)  # 128 MiB, written and freed
    high = module.peak_resident()
    assert module._start_watching() < high - 2**26


def test_memory_is_not_measured_unless_asked():
    (one,) = quick(wide(8)).models
    assert (one.peak_memory_bytes, one.memory_ratio) == (None, None)


@pytest.mark.skipif(os.name != "posix", reason="signals end processes on POSIX only")
def test_a_model_that_crashes_the_runtime_is_named(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nkill -{int(signal.SIGSEGV)} $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(fake))
    with pytest.raises(ModelError, match=r"^onnxruntime crashes on wide8 with its optimisations on \(SIGSEGV\)\."):
        quick(wide(8), isolate_memory=True)
    fake.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    with pytest.raises(InvariantError, match=r"measures the memory of wide8 failed: broken This is a bug in spa"):
        quick(wide(8), isolate_memory=True)


def test_the_memory_process_hands_back_its_refusal(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"garbage" * 9)
    np.savez(tmp_path / "feeds.npz")
    job = {"model": str(tmp_path / "bad.onnx"), "name": "bad", "feeds": str(tmp_path / "feeds.npz")}
    answer = json.loads(module._measure_memory(json.dumps({**job, "inputs": [], "threads": 1})))
    assert answer == {"error": "onnxruntime cannot load bad: Protobuf parsing failed."}


# -- refusals --------------------------------------------------------------------------------------------


def test_a_model_that_does_not_load_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"garbage" * 9)
    with pytest.raises(ModelError, match=r"^onnxruntime cannot load .*bad\.onnx: Protobuf parsing failed\.$"):
        quick([wide(8), tmp_path / "bad.onnx"])


def test_sizes_concern_the_models_that_have_them():
    tall = wide(8)
    for each in (*tall.graph.input, *tall.graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = "rows"
    report = quick([wide(8), tall], sizes={"rows": 7})
    assert report.inputs == ({"x": (1, 8)}, {"x": (7, 8)})
    with pytest.raises(PlanError, match=r"^sizes: 'depth' is not a dynamic axis\. Choose from: batch\.$"):
        quick([wide(8), tall], sizes={"depth": 7})


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "models is empty. Give at least one."),
        ([b""], {"runs": 0}, "runs is 0. Give at least 1."),
        ([b""], {"warmup": -1}, "warmup is -1. Give at least 0."),
        ([b""], {"threads": 0}, "threads is 0. Give at least 1."),
    ],
)
def test_impossible_options_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        quick(models, **options)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizez'"):
        bench(wide(8), sizez={"n": 2})
