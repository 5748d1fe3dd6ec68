"""The places where models are timed: another runtime, other providers, a command; what is not there is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from spa.cli import app
from spa.errors import MetricError, ModelError, OptionError, UnsupportedError
from spa.running import place as module
from spa.running.bench import bench
from spa.running.place import Place
from spa.running.runtime import load_session

MODELS = Path(__file__).parents[2] / "models"
RESNET, LSTM = MODELS / "digits_resnet.onnx", MODELS / "digits_lstm.onnx"
SMALL: dict[str, Any] = {"runs": 3, "warmup": 1, "threads": 1, "isolate_memory": False}


def printing(tmp_path: Path, code: str) -> str:
    """A command that runs Python's ``code``, with ``path`` for the model and ``calls`` for how often it has run."""
    script = tmp_path / "measure.py"
    counter = tmp_path / "calls"
    script.write_text(
        "import sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n"
        f"counter = Path({str(counter)!r})\ncalls = len(counter.read_text()) if counter.exists() else 0\n"
        f"counter.write_text('x' * (calls + 1))\n{code}\n",
        encoding="utf-8",
    )
    return f"'{sys.executable}' '{script}' {{model}}"


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime": "openvno"}, "unknown runtime 'openvno'. Did you mean 'openvino'"),
        ({"providers": ("cud",)}, "no provider 'cud'. Did you mean 'cuda'"),
        ({"providers": ("cpu",), "runtime": "openvino"}, "providers are onnxruntime's"),
        ({"command": "ssh board bench"}, "has no {model}"),
        ({"seconds": 0.0}, "latency_seconds is 0. Give a number above 0"),
    ],
)
def test_what_means_nothing_is_refused_before_any_work(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Place(**given)  # type: ignore[arg-type]


def test_a_provider_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match="has no CUDAExecutionProvider here, but CPUExecutionProvider"):
        bench(RESNET, place=Place(providers=("cuda",)), **SMALL)
    assert CliRunner().invoke(app, ["bench", str(RESNET), "--providers", "cuda"]).exit_code != 0


def test_a_provider_that_onnxruntime_silently_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def __init__(self, *_: object, **__: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(module.ort, "InferenceSession", Fallen)
    with pytest.raises(UnsupportedError, match="leaves CUDAExecutionProvider out"):
        load_session(str(RESNET), providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


def test_a_runtime_that_is_not_installed_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[openvino\]'"):
        bench(RESNET, place=Place(runtime="openvino"), **SMALL)


# -- what is measured ------------------------------------------------------------------------------------------------


def test_providers_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = module.load_session

    def spy(*arguments: object, **options: object) -> object:
        asked.append(options["providers"])
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_session", spy)
    assert bench(RESNET, place=Place(providers=("cpu",)), **SMALL).models[0].median_ms > 0
    assert asked == [("CPUExecutionProvider",)]


def test_a_command_measures_models_in_turns(tmp_path: Path) -> None:
    command = printing(tmp_path, "print('run 7'); print(path.stat().st_size / 1e6 + calls)")
    found = bench([RESNET, LSTM], place=Place(command=command), **(SMALL | {"runs": 2}))
    first, second = (path.stat().st_size / 1e6 for path in (RESNET, LSTM))
    assert found.models[0].median_ms == pytest.approx(np.median([first, first + 2]))
    assert found.models[1].median_ms == pytest.approx(np.median([second + 1, second + 3]))
    assert found.place == repr(command)
    assert all(model.peak_memory_bytes is None for model in found.models)


def test_the_command_line_measures_by_command(tmp_path: Path) -> None:
    command = printing(tmp_path, "print(2.5)")
    done = CliRunner().invoke(app, ["bench", str(RESNET), "--seconds", "0.01", "--measure", command, "--json"])
    assert json.loads(done.stdout)["models"][0]["median_ms"] == 2.5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('ready')", "prints no number"),
        ("print(-1)", "gives -1 for .*Print its milliseconds, above 0"),
        ("print('nan')", "gives nan"),
        ('print(\'{"p50": "x"}\')', "gives 'x'"),
        ("sys.exit('no board')", r"failed with exit code 1.*\n?.*no board"),
        ("import time; print('waiting', flush=True); time.sleep(60)", "not come to an end after 1 s"),
    ],
)
def test_a_command_that_gives_no_time_is_told_with_its_output(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        bench(RESNET, place=Place(command=printing(tmp_path, code), seconds=1.0 if "sleep" in code else 30.0), **SMALL)


def test_a_command_that_fails_half_way_says_what_it_measured_before(tmp_path: Path) -> None:
    command = printing(tmp_path, "sys.exit('the board is gone') if calls > 0 else print(3)")
    with pytest.raises(MetricError) as failure:
        bench([RESNET, LSTM], place=Place(command=command), **SMALL)
    told = str(failure.value)
    assert "the board is gone" in told
    assert told.endswith(f"Measured before:\n  {RESNET}: 3 ms")


def test_whole_rounds_before_a_failure_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = printing(tmp_path, "sys.exit('the board is gone') if calls > 4 else print(3 + calls)")
    found = bench([RESNET, LSTM], place=Place(command=command), **SMALL)
    assert found.runs == 2
    assert [m.median_ms for m in found.models] == [4, 5]
    assert "2 rounds count" in caplog.text and "the board is gone" in caplog.text


def test_openvino_measures_and_names_itself() -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    found = bench([RESNET, LSTM], place=Place(runtime="openvino"), **SMALL)
    assert found.place == f"openvino {openvino.__version__.partition('-')[0]}"
    assert all(model.median_ms > 0 for model in found.models)
    with pytest.raises(ModelError, match="openvino cannot load"):
        Place(runtime="openvino").step(b"no model", {}, 1, "nothing")
