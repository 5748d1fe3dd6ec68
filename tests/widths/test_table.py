"""Budgets of latency elsewhere: OpenVINO, a command, a table of layers; what fails keeps what was measured."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest
from onnx import ModelProto
from platformdirs.unix import Unix
from typer.testing import CliRunner

import spa
from spa.cli import app
from spa.errors import MetricError, OptionError, PlanError, SpaError, UnreadableError
from spa.running.place import Place
from spa.widths.stopwatch import Stopwatch
from spa.widths.table import TabledStopwatch
from tests.running.test_place import printing

VGG = Path(__file__).parents[2] / "models" / "digits_vgg.onnx"
BYTES = "print(sum(t.ByteSize() for t in __import__('onnx').load(path).graph.initializer) / 1e6)"  # a device


def weights_ms(model: ModelProto) -> float:
    return 1e-6 * sum(t.ByteSize() for t in model.graph.initializer)


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in (Stopwatch, TabledStopwatch):  # one round of a command, few runs of a part
        threads, batch, sizes, *_, fewest, warmup = kind.__init__.__defaults__[:7]
        rest = kind.__init__.__defaults__[7:]
        monkeypatch.setattr(kind.__init__, "__defaults__", (threads, batch, sizes, 0.0, 0.0, fewest, warmup, *rest))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that take what the device would take for them, so that nothing depends on this machine."""

    def part(self: Stopwatch, model: ModelProto, feeds: Mapping[str, np.ndarray]) -> float:
        return 1e-5 + weights_ms(model)

    monkeypatch.setattr(Stopwatch, "part", part)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A command that is answered in this process."""
    asked: list[float] = []

    def milliseconds(self: Place, model: ModelProto | str, name: str) -> float:
        asked.append(weights_ms(model if isinstance(model, ModelProto) else onnx.load(model)))
        return asked[-1]

    monkeypatch.setattr(Place, "milliseconds", milliseconds)
    return asked


def prune(**options: object) -> spa.Result:
    return spa.prune(VGG, **({"criterion": "l2", "round_to": 1, "of": "latency", "ratio": 0.4} | options))


def test_a_budget_is_met_where_the_command_measures(exact: None, device: list[float]) -> None:
    found = prune(latency_command="bench {model}").report.latency
    assert found is not None
    assert found["by"] == "'bench {model}'"
    assert found["measured"] == pytest.approx(0.6 * found["dense"], rel=0.05)
    assert found["dense"] == weights_ms(onnx.load(VGG))
    report = prune(of="macs", ratio=None, latency_ms=0.5 * found["dense"], latency_command="bench {model}").report
    assert report.latency is not None
    assert report.latency["measured"] == pytest.approx(0.5 * found["dense"], rel=0.05)


def test_a_command_from_end_to_end(tmp_path: Path, exact: None) -> None:
    found = prune(latency_command=printing(tmp_path, BYTES)).report.latency
    assert found is not None
    assert found["measured"] == pytest.approx(0.6 * found["dense"], rel=0.05)


def test_a_command_that_fails_half_way_keeps_the_network_that_it_measured(
    exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def flaky(self: Place, model: ModelProto, name: str) -> float:
        asked.append(name)
        if len(asked) > 3:  # dense; dense and the first choice
            raise MetricError("the board is gone.")
        return 1.0 if len(asked) < 3 else 0.9  # far from the goal

    monkeypatch.setattr(Place, "milliseconds", flaky)
    result = prune(latency_command="bench {model}")
    assert result.report.latency is not None
    assert result.report.latency["measured"] == 0.9
    assert any("search for the latency ended early: the board is gone" in note for note in result.report.notes)


def test_a_command_that_fails_at_once_fails_the_run(exact: None, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="no board"):
        prune(latency_command=printing(tmp_path, "sys.exit('no board')"))
    target = tmp_path / "small.onnx"
    command = printing(tmp_path, "sys.exit('no board')")
    common = ["prune", str(VGG), "-o", str(target), "--criterion", "l2", "--of", "latency"]
    done = CliRunner().invoke(app, [*common, "--measure", command])
    assert isinstance(done.exception, MetricError)
    assert not target.exists()


def test_openvino_measures_whole_networks_in_process(exact: None) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    found = prune(runtime="openvino", ratio=0.2, threads=1).report.latency
    assert found is not None
    assert found["by"].startswith("openvino 20")
    assert min(found[key] for key in ("goal", "estimated", "measured", "dense")) > 0


def test_openvino_times_a_parts_operators() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    watch = Stopwatch(1, place=Place(runtime="openvino"))
    images = np.zeros((64, 1, 8, 8), np.float32)
    few, many = (watch.part(onnx.load(VGG), {"input": images[:n]}) for n in (1, 64))
    assert 0 < few < many


def test_times_of_one_runtime_are_not_anothers() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    contexts = {Stopwatch(1, place=where).context for where in (Place(), Place(runtime="openvino"))}
    assert len(contexts) == 2
    assert Stopwatch(1, place=Place(command="x {model}")).context == Stopwatch(1).context  # parts are timed here


# -- tables ----------------------------------------------------------------------------------------------------------


def layers(folder: Path, *options: str) -> Path:
    done = CliRunner().invoke(app, ["layers", str(VGG), "-o", str(folder), "--round-to", "1", "-q", *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.output == ""
    return folder / "layers.csv"


def rows(sheet: Path) -> list[dict[str, str]]:
    with sheet.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, some: Sequence[dict[str, str]]) -> None:
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(some[0]))
        writer.writeheader()
        writer.writerows(some)


def test_a_table_is_written_filled_and_used(tmp_path: Path) -> None:
    sheet = layers(tmp_path / "layers")
    found = rows(sheet)
    assert len({row["key"] for row in found}) == len(found) > 20
    assert {row["file"] for row in found} == {p.name for p in sheet.parent.glob("*.onnx")}
    assert any("Conv" in row["layer"] for row in found)
    for row in found:
        onnx.checker.check_model(str(sheet.parent / row["file"]))
        row["ms"] = repr(1e-5 + weights_ms(onnx.load(sheet.parent / row["file"])))
    fill(sheet, found)
    result = prune(latency_table=sheet)
    latency = result.report.latency
    assert latency is not None
    assert latency["by"] == f"the table {str(sheet)!r}"
    assert latency["estimated"] == pytest.approx(0.6 * latency["dense"], rel=0.05)
    assert weights_ms(result.model) == pytest.approx(
        0.6 * weights_ms(onnx.load(VGG)), rel=0.1
    )  # what a device would say
    assert any("estimated from the table, and was not measured" in note for note in result.report.notes)


def test_a_table_gives_the_parts_and_a_command_the_whole(tmp_path: Path, device: list[float]) -> None:
    sheet = layers(tmp_path / "layers", "--measure", "bench {model}")
    assert all(float(row["ms"]) > 0 for row in rows(sheet) if "Conv" in row["layer"])
    latency = prune(latency_table=sheet, latency_command="bench {model}").report.latency
    assert latency is not None
    assert latency["by"] == "'bench {model}'"
    assert latency["measured"] == pytest.approx(0.6 * latency["dense"], rel=0.05)


def test_a_command_that_fails_keeps_the_times_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def flaky(self: Place, model: Path, name: str) -> float:
        asked.append(name)
        if len(asked) == 4:
            raise MetricError("the board is gone.")
        return float(len(asked))

    monkeypatch.setattr(Place, "milliseconds", flaky)
    with pytest.raises(MetricError, match=r"the board is gone\.\n3 times before it are in .*; the next call goes on"):
        layers(tmp_path / "layers", "--measure", "bench {model}")
    kept = [row["ms"] for row in rows(tmp_path / "layers" / "layers.csv") if row["ms"]]
    assert kept == ["1.0", "2.0", "3.0"]
    sheet = layers(tmp_path / "layers", "--measure", "bench {model}")
    assert all(row["ms"] for row in rows(sheet))
    assert [row["ms"] for row in rows(sheet)][:3] == kept
    assert len(asked) == len(rows(sheet)) + 1


def test_files_of_somebody_elses_stay(tmp_path: Path) -> None:
    (tmp_path / "layers.csv").write_text("mine\n1\n", encoding="utf-8")
    with pytest.raises(OptionError, match="exists and is no table of layers"):
        layers(tmp_path)
    assert (tmp_path / "layers.csv").read_text(encoding="utf-8") == "mine\n1\n"
    with pytest.raises(SpaError, match="cannot make the folder"):
        layers(tmp_path / "layers.csv")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, UnreadableError, "table.csv"),
        ("a,b\n1,2\n", OptionError, "line 2: a column key or ms is missing"),
        ("key,ms\nx,fast\n", OptionError, "line 2: ms is 'fast'. Give milliseconds"),
        ("key,ms\nx,-1\n", OptionError, "line 2: ms is '-1'"),
        ("key,ms\nx,nan\n", OptionError, "line 2: ms is 'nan'"),
        ("key,ms\nx,\n", OptionError, "has no times"),
        ("", OptionError, "has no times"),
        ("key,ms\nx,1.5\n", PlanError, "no layer that can be narrowed was timed by the table"),
    ],
)
def test_a_table_that_is_none_is_refused(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    table = tmp_path / "table.csv"
    if content is not None:
        table.write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        prune(latency_table=table)


def test_layers_that_the_table_lacks_are_counted(tmp_path: Path, device: list[float]) -> None:
    sheet = layers(tmp_path / "layers", "--measure", "bench {model}")
    fill(sheet, [row for row in rows(sheet) if "Conv" in row["layer"]])
    assert any("could not be timed alone" in note for note in prune(latency_table=sheet, ratio=0.2).report.notes)


def test_a_sweep_keeps_the_points_before_the_command_fails(
    exact: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"

    def until_the_first_point(self: Place, model: ModelProto, name: str) -> float:
        if any(folder.glob("*.onnx")):
            raise MetricError("the board is gone.")
        return weights_ms(model)

    monkeypatch.setattr(Place, "milliseconds", until_the_first_point)
    dense = weights_ms(onnx.load(VGG))
    options = {"criterion": "l2", "round_to": 1, "samples": 8, "latency_command": "bench {model}"}
    found = spa.sweep(VGG, folder, latency_ms=[0.7 * dense, 0.5 * dense], **options)
    first, second = found.points
    assert first.file and (folder / first.file).exists()
    assert second.refused and "the board is gone" in second.refused
