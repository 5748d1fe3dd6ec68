"""The time and memory of pruning by optimal brain surgery, and what the time goes into.

    python benchmarks/obspa_speed.py --cache DIR --data DIR --networks DIR [--only resnet56 resnet50 detector minilm]

Half of the MACs go, widths are not rounded. Every row is a process of its own on two cores: ResNet-56 with 512 CIFAR-10
images from a folder (`accuracy.py` says which files it holds); torchvision's ResNet-50 at 224 x 224 with random weights
and 128 inputs that are made up; PP-OCRv4's text detector with 32 pages and a sentence embedder with 128 sentences
(`real.py` says what the folder of networks holds, and makes the inputs). The time is compared to that of one dense pass
over the same inputs, which any calibration needs. Rows that are not run are kept from the last result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import models16

LIMITS: dict[str, Any] = {"timeout": 1200, "memory": 16 * common.GIB, "cores": common.THREADS}
TARGETS = {"resnet56": 15, "resnet50": 90, "detector": 40, "minilm": 60}  # seconds
PASSES = 12  # dense passes that pruning may take
BASE_MB, TIMES_FILE = 800, 4  # of memory, and more for the file
WHAT = {
    "resnet56": "ResNet-56, 512 CIFAR-10 images",
    "resnet50": "ResNet-50, 128 made-up images of 224 x 224",
    "detector": "PP-OCRv4 text detector, 32 pages of 320 x 480",
    "minilm": "MiniLM-L6, 128 sentences",
}
REAL = {"detector": 32, "minilm": 128}  # networks and inputs of `real.py`
KINDS = ("onnxruntime, runs", "onnxruntime, sessions", "BLAS and LAPACK", "the rest")
LINES = 10


def command(name: str, cache: Path, data: Path, networks: Path | None) -> list[str]:
    """Return what `ours.py obspa` is called with."""
    if name == "resnet56":
        return [str(data / "resnet56_cifar10.onnx"), "--data", str(data), "--samples", "512"]
    if name in REAL:
        count, file = str(REAL[name]), cache / f"{name}.npz"
        made = common.python("real_worker.py", "calibrate", str(networks), name, count, str(file), timeout=600)
        if networks is None or not made.ok:
            raise SystemExit(f"{name} needs --networks, the folder that real.py fills. {made.reason}")
        return [made.data["file"], "--data", str(file), "--samples", count]
    models16.ensure(cache, [name], ["torchscript"])
    return [str(models16.cached(cache, name, "torchscript")), "--samples", "128"]


def measure(name: str, cache: Path, data: Path, networks: Path | None) -> dict[str, Any]:
    """Return the figures of one row."""
    machine, words = common.machine(), command(name, cache, data, networks)
    child = common.python("ours.py", "obspa", *words, **LIMITS)
    return child.to_dict() | {"machine": machine, "file MB": Path(words[0]).stat().st_size / 1e6}


def summary(cells: dict[str, dict[str, Any]]) -> str:
    """Return the table of whole processes, with the shares of the time spent pruning."""
    header = ["network", "seconds", "at most", "CPU s", "dense pass, s", "passes", "peak MB", "at most"]
    header += [*(f"{k}, %" for k in KINDS), "load before"]
    rows = []
    for name, cell in cells.items():
        if cell["status"] != "ok":
            rows.append([WHAT[name], cell["status"], TARGETS[name], *[""] * (len(header) - 3)])
            continue
        kinds, found = cell["data"]["samples"]["kinds"], cell["data"]
        shares = [f"{100 * kinds.get(k, 0) / sum(kinds.values()):.0f}" for k in KINDS]
        time = [_against(cell["seconds"], TARGETS[name]), TARGETS[name], f"{found['cpu seconds']:.0f}"]
        passes = found["seconds"]["prune"] / found["dense pass"]
        most = BASE_MB + TIMES_FILE * cell["file MB"]
        size = [_against(found["memory"] / 1e6, most), f"{most:.0f}"]
        row = [WHAT[name], *time, f"{found['dense pass']:.2f}", _against(passes, PASSES), *size, *shares]
        rows.append([*row, cell["machine"]["load average"]])
    return common.table(header, rows)


def _against(value: float, limit: float) -> str:
    return f"{value:.0f}" if value <= limit else f"**{value:.0f}**"


def details(name: str, cell: dict[str, Any]) -> str:
    """Return one network's stages and the lines that took longest."""
    if cell["status"] != "ok":
        return f"## {WHAT[name]}\n\n{cell['status']}: {cell['reason']}"
    samples, stages = cell["data"]["samples"], cell["data"]["report"]["seconds"]
    total = sum(samples["kinds"].values())
    heavy = [line for line in samples["lines"] if line[0] != "the rest"]
    rest = [line for line in samples["lines"] if line[0] == "the rest"][:LINES]
    rows = [[f"`{e}`", at, kind, f"{100 * s / total:.1f}"] for kind, at, e, s in heavy + rest]
    peak = samples["peak"]
    return f"""## {WHAT[name]}

Seconds by stage: {", ".join(f"{key} {value:.1f}" for key, value in stages.items())}. The largest resident set was seen
at `{peak["line"]}`: {peak["MB"]:.0f} MB, of which {peak["MB in files"]:.0f} in mapped files.

{common.table(["expression", "line", "kind", "%"], rows)}

{common.describe(cell["machine"])}"""


def page(cells: dict[str, dict[str, Any]]) -> str:
    """Return results/obspa_speed.md."""
    parts = "\n\n".join(details(name, cell) for name, cell in cells.items())
    return f"""# Speed of optimal brain surgery with reconstruction

Ratio 0.5 of the MACs, `round_to=1`; whole processes on {common.THREADS} cores of a machine that others used at the same
time, so the seconds are upper bounds (made by `benchmarks/obspa_speed.py`). CPU s are those of all threads, waiting in
BLAS for each other included. Passes: the time of `spa.prune` over that of one dense pass over the inputs (at most
{PASSES}). Bold: above the limit. Shares are those of `spa.prune` alone, from looking at the main
thread every 5 ms (`benchmarks/sampling.py`): the calls into BLAS and LAPACK, onnxruntime's runs and the making of its
sessions; the rest is Python and numpy, mostly moving memory.

{summary(cells)}

{parts}
"""


def main() -> None:
    """Measure and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 networks and images")
    parser.add_argument("--networks", type=Path, help="the folder that real.py fills, for the detector and MiniLM")
    options = parser.parse_args()
    data = common.previous("obspa_speed", options.results)
    for name in options.only or TARGETS:
        data[name] = measure(name, options.cache, options.data, options.networks)
        print(
            name, data[name]["status"], data[name]["seconds"], data[name]["peak_mb"], data[name]["reason"], flush=True
        )
        common.write("obspa_speed", page(data), data, options.results)


if __name__ == "__main__":
    main()
