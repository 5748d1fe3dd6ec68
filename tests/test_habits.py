"""The manners of the command line: help, completion, how much is said, files of options, tables, and the doctor."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spa.cli import app, bars
from spa.errors import OptionError
from spa.report import doctor, text
from spa.request import Request, examples, options
from spa.request.option import flag_of
from spa.running.bench import BenchReport, ModelBench

MODELS = Path(__file__).parent.parent / "models"
RESNET = MODELS / "digits_resnet.onnx"
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def spa(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    settings = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", **(env or {})}
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="spa", env=settings)


def prune(*arguments: object) -> Result:
    return spa("prune", "model.onnx", "-o", "small.onnx", "--criterion", "l2", *arguments)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(RESNET, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- help and completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_short_help_and_says_more_or_less(command: str) -> None:
    found = spa(command, "-h")
    assert found.exit_code == 0
    assert all(flag in found.output for flag in ("--verbose", "-v", "--quiet", "-q", "--help", "-h"))


def test_options_stand_in_a_panel_for_each_subject_with_an_example() -> None:
    panels = re.findall(r"^╭─ (.+?) ─+╮$", spa("prune", "-h").output, re.M)
    for section, example in examples().items():
        assert f"{section.capitalize()}: {example}" in panels


@pytest.mark.parametrize("section", examples())
def test_a_panels_example_shows_options_of_its_subject(section: str) -> None:
    own = {flag_of(about) for home, about in options() if home == section}
    given = [word for word in shlex.split(examples()[section]) if word.startswith("-")]
    assert given and set(given) <= own


def completed(line: str) -> list[str]:
    words = line.split(" ")
    env = {"_SPA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return spa(env=env).output.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("spa pro", ["prove"]),
        ("spa prune --criterion la", ["lamp"]),
        ("spa prune --ranking i", ["isomorphic"]),
        ("spa sweep --of ma", ["macs"]),
        ("spa prune --evaluate top", ["top1:", "top5:"]),
        ("spa export --to o", ["onnx", "ort", "openvino"]),
        ("spa prune --samples 1", []),
    ],
)
def test_a_shell_completes_commands_and_choices(line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in spa("-h").output


# -- how much is said ------------------------------------------------------------------------------------------------


def test_quiet_says_nothing_and_writes_the_file(folder: Path) -> None:
    found = prune("-q")
    assert (found.exit_code, found.output) == (0, "")
    assert (folder / "small.onnx").exists()
    assert spa("verify", "model.onnx", "model.onnx", "-q").output == ""
    assert "MACs" in spa("inspect", "model.onnx", "-q").output  # which is there to print
    failed = prune("-q", "--ratio", "0.999")
    assert isinstance(failed.exception, Exception)
    assert failed.exit_code != 0


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SECONDS_PER_LINE", 0.0)
    for quiet in (False, True):
        with bars.progress_bars(True, quiet) as progress:
            progress("score", 0.5)
        assert ("score 50%" in capsys.readouterr().err) is not quiet


@pytest.mark.parametrize(("said", "shown"), [((), True), (("-q",), False)])
def test_warnings_are_shown_unless_quiet(folder: Path, said: tuple[str, ...], shown: bool) -> None:
    prune(*said)
    assert logging.getLogger("spa.running").isEnabledFor(logging.WARNING) is shown


def test_verbose_tells_each_step_and_twice_more(folder: Path) -> None:
    silent, steps, details = (prune(*said).stderr for said in ((), ("-v",), ("-vv",)))
    assert silent == ""
    assert re.search(r"^spa: choose: \d+\.\d\d s$", steps, re.M)
    assert re.search(r"^spa\.progress: choose: \d", details, re.M)
    assert "spa: " not in details


def test_json_stays_json_beside_a_log(folder: Path) -> None:
    found = prune("-v", "--json")
    assert json.loads(found.stdout)["output"] == "small.onnx"
    assert "spa: choose" in found.stderr


def test_the_log_is_pythons_own(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    import spa as package

    with caplog.at_level(logging.INFO, "spa"):
        package.prune("model.onnx", criterion="l2")
    assert {"spa.progress"} == {record.name for record in caplog.records}
    assert any(record.getMessage().startswith("choose: ") for record in caplog.records)


# -- files of options ------------------------------------------------------------------------------------------------


def requested(*arguments: object) -> dict[str, Any]:
    found = prune("--json", *arguments)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)["requested"]


def test_a_folders_own_file_counts_and_is_named(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.spa.goal]\nratio = 0.2\n", encoding="utf-8")
    assert requested()["goal"]["ratio"] == 0.2
    assert "with the options of pyproject.toml" in prune().stderr
    assert prune("-q").stderr == ""
    (folder / "spa.toml").write_text("[goal]\nratio = 0.3\n", encoding="utf-8")
    assert requested()["goal"]["ratio"] == 0.3  # it comes first
    assert requested("--config", "pyproject.toml")["goal"]["ratio"] == 0.2
    assert requested("--ratio", "0.4")["goal"]["ratio"] == 0.4


@pytest.mark.parametrize("content", ["", "[tool.ruff]\nline-length = 120\n", "[tool]\nspa = 3\n", "[tool", "\xff"])
def test_other_projects_files_do_not_matter(folder: Path, content: str) -> None:
    (folder / "pyproject.toml").write_text(content, encoding="latin-1")
    assert requested()["goal"] == Request.of().to_dict()["goal"]
    with pytest.raises(OptionError, match=r"has no \[tool.spa\]|cannot read the request"):
        Request.from_toml(folder / "pyproject.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[tool.spa.goal]\nratoi = 0.2\n", r"\[goal\] has no option 'ratoi'. Did you mean 'ratio' in \[goal\]"),
        ("[tool.spa]\nratio = 0.2\n", r"'ratio' is no section. It belongs to \[goal\]"),
        ("[tool.spa.gaol]\nratio = 0.2\n", "'gaol' is no section. Did you mean 'goal'"),
    ],
)
def test_unknown_keys_are_refused_with_near_names(folder: Path, content: str, message: str) -> None:
    (folder / "pyproject.toml").write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        Request.from_toml("pyproject.toml")


# -- tables ----------------------------------------------------------------------------------------------------------

LONG = "/models/of/somebody/in/a/folder/with_a_rather_long_name/network_that_was_pruned_and_quantised.onnx"


@pytest.mark.parametrize("width", [80, 200])
def test_names_in_tables_are_never_broken(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    entry = ModelBench(
        name=LONG,
        median_ms=123.456,
        p10_ms=120.5,
        p90_ms=150.25,
        throughput=8.1,
        batch=1,
        file_bytes=10**8,
        peak_memory_bytes=10**9,
        speedup=1.5,
        speedup_p10=1.25,
        size_ratio=1.0,
        memory_ratio=1.0,
    )
    text.show_bench(BenchReport((entry, entry), 10, 3, 2, 0, ({"x": (1, 3)},), "1.0", "onnxruntime 1.0"))
    printed = capsys.readouterr().out
    assert LONG in printed
    assert all(figure in printed for figure in ("123.456", "150.25", "1.50x"))
    assert all(len(line) <= width for line in printed.splitlines() if LONG not in line)


def test_titles_are_never_broken(folder: Path) -> None:
    shutil.move("model.onnx", "a_model_whose_name_is_longer_than_the_table_below_it_is_wide.onnx")
    found = spa(
        "prune",
        "a_model_whose_name_is_longer_than_the_table_below_it_is_wide.onnx",
        "-o",
        "o.onnx",
        "--criterion",
        "l2",
    )
    assert "a_model_whose_name_is_longer_than_the_table_below_it_is_wide.onnx → o.onnx\n" in found.output


# -- the doctor ------------------------------------------------------------------------------------------------------


def test_the_doctor_lists_versions_providers_cores_and_extras() -> None:
    found = spa("doctor", "--json")
    said = json.loads(found.stdout)
    assert "CPUExecutionProvider" in said["providers"]
    assert 0 < said["cores"]["usable"] <= said["cores"]["machine"]
    assert 0 < said["memory"]["available"] <= said["memory"]["total"]
    assert set(said["extras"]) == {"torch", "tensorflow", "jax", "openvino", "plot", "text", "dask", "ray"}
    assert said["packages"]["onnx"]["met"]
    assert said["environment"]["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.exit_code == bool(said["problems"])
    shown = spa("doctor").output
    assert all(word in shown for word in ("onnxruntime", "cores: ", "memory: ", "torch", "providers"))


def test_the_doctor_names_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=999", "nowhere-to-be-found>=1", 'rich>=999; extra == "torch"', 'jax; python_version < "3"']
    needed += ['not-asked-for>=1; extra == "openvino"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    problems = doctor.examination()["problems"]
    assert any(re.match(r"numpy \d.*: >=999 is needed. Run  pip install -U numpy", p) for p in problems)
    assert any(p.startswith("nowhere-to-be-found is missing: >=1 is needed") for p in problems)
    assert any(re.match(r"the extra 'torch': rich \d.* \(needed: >=999\)", p) for p in problems)
    assert not any("not-asked-for" in p for p in problems)  # an extra that nobody has installed
    assert spa("doctor").exit_code == 1


@pytest.mark.parametrize(("least", "said"), [(2**80, True), (0, False)])
def test_the_doctor_says_where_room_is_scarce(least: int, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE", least)
    problems = doctor.examination()["problems"]
    assert (
        any(p.endswith("MiB of memory are free. Ask for fewer --samples, or end other programs.") for p in problems)
        is said
    )
    assert any(p.endswith("Set TMPDIR.") for p in problems) is said


def test_a_container_counts_the_cores_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Path, "read_text", lambda self, **_: "50000 100000\n")
    assert doctor.usable_cores() == 0.5
    monkeypatch.setattr(doctor.Path, "read_text", lambda self, **_: "max 100000\n")
    assert doctor.usable_cores() >= 1
