"""Pages: self-contained, with nothing that escapes its place; in a browser where there is one."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import spa
from spa.report import GroupReport, Report
from spa.report.command import command_line
from spa.report.comparison import Point, Sweep
from spa.report.html import page, sensitivity_page, sweep_page
from spa.request import Request

RESNET = Path(__file__).parent.parent.parent / "models" / "digits_resnet.onnx"
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report() -> Report:
    return spa.prune(RESNET, ratio=0.4, criterion="l2", ignore=["layer1.1.conv1*"]).report


class Reader(html.parser.HTMLParser):
    """The tags of a page, what they refer to, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def data_of(text: str) -> dict[str, object]:
    found = re.search(r"<script type=application/json id=data>(.*?)</script>", text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_a_page_fetches_nothing(report: Report) -> None:
    text = page(report, "a.onnx", "b.onnx")
    reader = Reader(text)
    assert reader.links == [] and "link" not in reader.tags
    assert "@import" not in text and "url(" not in text.partition("<script")[0]


def test_groups_stand_in_the_order_of_the_network_with_the_names_of_layers(report: Report) -> None:
    groups = data_of(page(report, "a.onnx", "b.onnx"))["groups"]
    assert isinstance(groups, list)
    layers = [g["layer"] for g in groups]
    assert layers[0] == "/layer1/layer1.0/conv1/Conv"
    assert layers.index("/layer2/layer2.1/conv1/Conv") < layers.index("/layer3/layer3.0/conv1/Conv")
    assert {(g["name"], g["kept"]) for g in groups} == {(g.name, g.kept) for g in report.groups}


def test_loss_curves_pass_through_the_losses_at_the_widths(report: Report) -> None:
    assert "id=tradeoffs" not in page(report, "a.onnx", "b.onnx")
    text = page(spa.prune(RESNET, ratio=0.4, samples=8, threads=1, round_to=16).report, "a.onnx", "b.onnx")
    groups = data_of(text)["groups"]
    assert "id=tradeoffs" in text and isinstance(groups, list)
    for g in groups:
        curve = dict(g["curve"])
        assert curve[g["size"]] == 0 and list(curve) == [g["size"] - g["size"] * k // 8 for k in range(9)]
        if g["kept"] in curve:
            assert curve[g["kept"]] == pytest.approx(g["loss"], rel=1e-2), g["name"]
    assert any(g["loss"] and g["kept"] in dict(g["curve"]) for g in groups)


def test_what_was_left_has_its_reason_and_what_would_free_it(report: Report) -> None:
    text = page(report, "a.onnx", "b.onnx")
    assert re.search(r"the request ignores &#39;layer1.1.conv1\*&#39;<td>leave out --ignore", text)
    assert re.search(r"graph output &#39;logits&#39; carries it<td>nothing: the interface must not change", text)


def test_names_never_leave_their_place(report: Report) -> None:
    group = replace(report.groups[0], name=HOSTILE)
    hostile = replace(
        report, groups=(group,), layers={HOSTILE: HOSTILE}, notes=(HOSTILE,), frozen=((HOSTILE, 2, HOSTILE),)
    )
    tags = Reader(page(hostile, HOSTILE, HOSTILE)).tags
    assert "img" not in tags
    assert tags.count("script") == Reader(page(report, "a", "b")).tags.count("script") == 4
    groups = data_of(page(hostile, "a", "b"))["groups"]
    assert isinstance(groups, list) and groups[0]["layer"] == HOSTILE


def test_the_command_makes_the_same_request_again(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request.of(
        max_drop=1.0, evaluate="python eval.py {model}", ignore=["a*", "b c"], mean=[0.5, 0.25], sizes={"n": 3},
        cross_norm=True, criterion="l2", samples=64,
    )  # fmt: skip
    line = command_line("prune", "in put.onnx", "o.onnx", request.to_dict(), {})
    caught: list[Request] = []
    monkeypatch.setattr("spa.api.prune_file", lambda model, request, progress: caught.append(request))
    import shlex

    from typer.testing import CliRunner

    from spa.cli import app

    CliRunner().invoke(app, shlex.split(line)[1:])
    assert caught == [request]


def curve_of(size: int, i: int) -> tuple[tuple[int, float], ...]:
    return tuple((size - size * k // 8, 1e-3 * k**2 * (1 + i % 7)) for k in range(9))


def many_groups(report: Report, count: int) -> Report:
    groups = tuple(
        GroupReport(
            f"onnx::Conv_{i}[0]", 512, 512 - i % 500, 0.01 + i % 7 / 99, 0.02, (), 1e-3 + i % 90, curve_of(512, i)
        )
        for i in range(count)
    )
    layers = {g.name: f"/backbone/stage{i // 100}/block{i}/conv/Conv" for i, g in enumerate(groups)}
    frozen = tuple((f"frozen_{i}[1]", 80, "graph output 'y' carries it") for i in range(count // 2))
    return replace(report, groups=groups, layers=layers, frozen=frozen)


def test_a_thousand_groups_take_less_than_three_megabytes(report: Report) -> None:
    assert len(page(many_groups(report, 1000), "a.onnx", "b.onnx").encode()) < 1_500_000


def found_sweep() -> Sweep:
    points = tuple(
        Point(
            name=f"{criterion}-macs-{r / 10}-by8", criterion=criterion, of="macs", ratio=r / 10, latency_ms=None,
            round_to=8, reached=r / 10, macs=1000 - 100 * r, params=500 - 40 * r, bytes=2000 - 160 * r,
            memory=300 - 20 * r, change=r**3 / 1000 * (1 + (criterion == "l2")), milliseconds=1 - r / 20, on_front=criterion == "obspa",
        )
        for criterion in ("obspa", "l2")
        for r in (1, 5, 8)
    )  # fmt: skip
    refused = Point("l1-macs-0.9-by8", "l1", "macs", 0.9, None, 8, refused="cannot remove 90.0% of the macs")
    return Sweep(
        model="a.onnx", dense={"macs": 1000, "params": 500, "bytes": 2000, "memory": 300, "milliseconds": 1.0},
        cost="macs",
        points=(*points, refused), loss="change", metric_name=None, knee=points[1].name, folder="f", environment={},
    )  # fmt: skip


def test_a_sweeps_page_links_to_its_files_and_says_what_was_refused() -> None:
    text = sweep_page(found_sweep(), "spa sweep a.onnx -o f")
    links = Reader(text).links
    assert "obspa-macs-0.5-by8.onnx" in links and "obspa-macs-0.5-by8.json" in links and "sweep.csv" in links
    assert not any(link.startswith(("http", "//", "/")) for link in links)
    assert "No l1-macs-0.9-by8: cannot remove 90.0% of the macs" in text
    assert text.count("<tr class=knee>") == 1
    assert '<td class=number data-value="200">200' in text  # the memory of the knee
    assert ">accuracy<" not in text and ">output error<" in text  # columns are of what was measured


def opened(file: Path, width: int) -> tuple[str, str]:
    """A page's elements once its scripts have run, and what the browser had to say."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_draw_their_charts_without_a_word_in_the_console(report: Report, width: int, tmp_path: Path) -> None:
    searched = spa.prune(RESNET, criterion="l2", min_metric=97, evaluate=f"top1:{RESNET.parent / 'digits_test.npz'}")
    pages = {
        "many": (page(many_groups(report, 1000), "a.onnx", "b.onnx"), ["widths", "shares", "losses", "tradeoffs"]),
        "searched": (page(searched.report, "a.onnx", "b.onnx"), ["evaluations", "widths", "shares"]),
        "sweep": (sweep_page(found_sweep(), "spa sweep"), ["pareto"]),
        "sensitivity": (sensitivity_page(spa.sensitivity(RESNET, criterion="l2"), "spa sensitivity"), ["curves"]),
    }
    for name, (text, charts) in pages.items():
        file = tmp_path / f"{name}.html"
        file.write_text(text, encoding="utf-8")
        elements, console = opened(file, width)
        assert console == "", name
        for chart in charts:
            drawn = re.search(rf"<div class=\"chart\" id=\"{chart}\">(.*?)</figcaption>", elements, re.S)
            assert drawn is not None and "<svg" in drawn[1] and "NaN" not in drawn[1], (name, chart)
        ready = re.search(r'data-ready="(\d+)"', elements)
        assert ready is not None and int(ready[1]) < 2000, name  # milliseconds


def test_results_say_what_they_are_in_a_line_and_in_a_notebook(report: Report) -> None:
    result = spa.prune(RESNET, ratio=0.4, criterion="l2")
    assert re.fullmatch(r"<spa.Result: MACs 5.39 M → .* \(−\d\d\.\d%\), parameters .*, bytes .*>", repr(result))
    assert "<td>MACs</td><td>5.39 M</td>" in result._repr_html_()
    shown = found_sweep()._repr_html_()
    assert shown.count("<tr>") == 7 and "<td>knee</td>" in shown and "l1-macs-0.9" not in shown
