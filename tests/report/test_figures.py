"""Figures for papers: the formats, the files beside the model, and what is said where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import spa
from spa.errors import OptionError, UnsupportedError
from spa.report.figures import pruning_figure, sweep_figure
from tests.report.test_html import RESNET, found_sweep
from tests.test_cli import refused
from tests.test_cli import spa as run_cli

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_figures_are_png_or_svg_and_the_same_each_time(name: str, start: bytes) -> None:
    report = spa.prune(RESNET, ratio=0.4, criterion="l2").report
    for figure in (pruning_figure(report, Path(name)), sweep_figure(found_sweep(), Path(name))):
        assert figure.startswith(start)
    assert sweep_figure(found_sweep(), Path(name)) == sweep_figure(found_sweep(), Path(name))


def test_a_sweeps_figure_names_what_it_shows() -> None:
    figure = sweep_figure(found_sweep(), Path("a.svg")).decode()
    assert all(f"<!-- {word} -->" in figure for word in ("obspa", "l2", "knee", "dense", "MACs", "output error"))


def test_figures_that_cannot_be_drawn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    with pytest.raises(OptionError, match=r"a figure is PNG or SVG, not 'a\.pdf'"):
        sweep_figure(found_sweep(), Path("a.pdf"))
    with pytest.raises(OptionError, match="nothing was measured"):
        sweep_figure(replace(found_sweep(), loss=None), Path("a.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'spa-onnx\[plot\]'"):
        sweep_figure(found_sweep(), Path("a.png"))


def test_the_command_line_draws_beside_the_model(tmp_path: Path) -> None:
    common = ("prune", RESNET, "-o", tmp_path / "o.onnx", "--ratio", 0.3, "--criterion", "l2", "--plot")
    assert run_cli(*common, tmp_path / "a.png").returncode == 0
    assert run_cli(*common, tmp_path / "a.png").returncode == 0  # it may be drawn anew
    refused(run_cli(*common, tmp_path / "a.jpg"), 2, "a figure is PNG or SVG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "o.onnx"]
