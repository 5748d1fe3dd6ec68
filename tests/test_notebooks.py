"""The notebooks, the container file and the workflow of ``examples/``: what they say runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like ``examples``, with the models beside it."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=lambda _, names: {n for n in names if "." not in n})
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    return tmp_path


def cells(name: str) -> list[dict[str, Any]]:
    found = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    return found["cells"]


def executed(name: str) -> dict[str, Any]:
    """The names that a notebook leaves behind; the last expression of a cell is shown, as a notebook shows it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for at, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {at}", "exec"), namespace)
    assert "result" in namespace
    assert "MACs" in namespace["result"]._repr_html_()
    return namespace


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_hold_no_output_that_could_fall_behind(path: Path) -> None:
    assert [c for c in cells(path.name) if c.get("outputs") or c.get("execution_count")] == []
    ids = [c["id"] for c in cells(path.name)]
    assert len(set(ids)) == len(ids)


def test_a_vision_network_is_pruned_by_accuracy(folder: Path) -> None:
    found = executed("prune_by_accuracy.ipynb")
    report = found["result"].report
    assert report.after.macs < 0.8 * report.before.macs
    assert found["dense"] - found["pruned"] <= 2.0  # a point, and what half of the images cannot tell
    assert (folder / "examples" / "small.onnx").exists()


def test_an_embedder_is_compressed_by_what_it_finds(folder: Path) -> None:
    pytest.importorskip("onnxscript", reason="PyTorch's exporter needs it")
    found = executed("compress_an_embedder.ipynb")
    metric = found["result"].report.metric
    assert metric["dense"] > 20  # it has learnt something: chance is below 2
    assert metric["drop"] <= 5.0
    assert type(found["small"]).__name__ == "Embedder"
    assert found["result"].report.after.macs < 0.9 * found["result"].report.before.macs


def test_the_workflow_prunes_and_checks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra docs")
    from typer.testing import CliRunner

    from spa.cli import app

    workflow = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text(encoding="utf-8"))
    monkeypatch.chdir(folder)
    commands = [line for step in workflow["jobs"]["prune"]["steps"] for line in step.get("run", "").splitlines()]
    ours = [shlex.split(line) for line in commands if line.startswith("spa ")]
    assert [words[1] for words in ours] == ["doctor", "prune", "bench", "verify"]
    for words in ours[1:]:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    written = workflow["jobs"]["prune"]["steps"][-1]["with"]["path"].split()
    assert all((folder / name).exists() for name in written)


def copied() -> list[str]:
    text = (EXAMPLES / "Containerfile").read_text(encoding="utf-8")
    return [word for words in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in words.split()]


def test_the_container_gets_files_that_are_there() -> None:
    assert all((ROOT / name).exists() for name in copied())


@pytest.mark.slow
def test_what_the_container_gets_is_all_that_an_installation_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"spa/cli/commands.py", "spa/importers/pytorch.py", "spa/exporters/onnx.py"} <= set(names)
