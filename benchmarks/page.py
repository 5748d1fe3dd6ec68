"""The page of a network with a thousand groups: its size, and what it takes a browser until all of it is drawn.

    python -m benchmarks.page [--groups 1000] [--opens 10]

The report is that of the digits' ResNet with a thousand groups in place of its own, each with a loss curve. Chromium
(Debian's package ``chromium``) opens the page afresh each time, without a window. Measured are the CPU seconds of all
its processes beyond those for an empty page, which others at work on the machine hardly change, and the time from the
start of the navigation until the last chart, which the page notes itself. ``results/page.md`` has the figures.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import spa
from benchmarks.common import describe, machine
from spa.report import GroupReport, Report
from spa.report.html import page

RESNET = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
READY = re.compile(r'data-ready="(\d+)"')


def enlarged(report: Report, count: int) -> Report:
    """Return a report with so many groups, half as many frozen ones, and names as long as exporters give them."""
    curve = tuple((512 - 64 * k, 1e-3 * k**2) for k in range(9))
    groups = tuple(
        GroupReport(f"onnx::Conv_{i}[0]", 512, 512 - i % 500, 0.01 + i % 7 / 99, 0.02, (), 1e-3 + i % 90, curve)
        for i in range(count)
    )
    layers = {g.name: f"/backbone/stage{i // 100}/block{i}/conv/Conv" for i, g in enumerate(groups)}
    frozen = tuple((f"frozen_{i}[1]", 80, "graph output 'y' carries it") for i in range(count // 2))
    return replace(report, groups=groups, layers=layers, frozen=frozen)


def opened(browser: str, file: Path) -> tuple[float, float | None]:
    """Return the CPU seconds of opening a page, and the milliseconds until it was drawn, which a script in it says."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
        command = [browser, *options, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom"]
        before = spent()
        shown = subprocess.run(
            [*command, file.as_uri()], capture_output=True, text=True, timeout=300, check=True
        ).stdout
        found = READY.search(shown)
        return spent() - before, None if found is None else float(found[1])


def spent() -> float:
    """Return the CPU seconds of all processes that have come to an end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--opens", type=int, default=10)
    options = parser.parse_args()
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        raise SystemExit("this needs Chromium")
    report = spa.prune(RESNET, ratio=0.4, criterion="l2").report
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page(enlarged(report, options.groups), "dense.onnx", "pruned.onnx"), encoding="utf-8")
        empty = Path(folder) / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>", encoding="utf-8")
        size = file.stat().st_size
        idle = [opened(browser, empty)[0] for _ in range(options.opens)]
        found = [opened(browser, file) for _ in range(options.opens)]
    seconds, drawn = (np.array(part, float) for part in zip(*found, strict=True))
    print(f"{options.groups} groups: {size / 1e6:.2f} MB")
    print(f"CPU seconds beyond an empty page: {np.median(seconds) - np.median(idle):.2f} (median of {len(seconds)})")
    print(f"drawn after {np.median(drawn):.0f} ms (median; {drawn.min():.0f} to {drawn.max():.0f})")
    print(describe(machine()))


if __name__ == "__main__":
    main()
