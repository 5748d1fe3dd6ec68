"""Are the pruned networks faster? Latency in onnxruntime's CPU provider, original against pruned.

    python benchmarks/latency.py --cache DIR [--only resnet50 ...] [--seconds 6]

Half of the channels by L2, uniformly, once with widths as they come and once rounded to multiples of 8.
`spa.bench` runs the three models in turns, on two threads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import models16

NAMES = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "vit_b_16", "convnext_tiny")
ROUNDINGS = (8, 1)


def measure(path: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Prune with each rounding, then time original and pruned in turns."""
    files, shares = [path], []
    for rounding in ROUNDINGS:
        target = folder / f"rounded{rounding}.onnx"
        child = common.python("ours.py", "prune", str(path), "--out", str(target), "--round-to", str(rounding))
        if not child.ok:
            return {"status": child.status, "reason": child.reason}
        files.append(target)
        shares.append({key: value for key, value in child.data.items() if key != "report"})
    names = [str(file) for file in files]
    child = common.python("ours.py", "bench", *names, "--seconds", str(seconds), cores=common.THREADS)
    return {"status": child.status, "reason": child.reason, "pruned": shares, **child.data}


def row(name: str, cell: dict[str, Any]) -> list[str]:
    """Return a network's line of the table."""
    if cell["status"] != "ok":
        return [name, cell["status"], *[""] * (4 * len(ROUNDINGS))]
    dense, *pruned = cell["models"]
    cells = [name, f"{dense['median_ms']:.2f}"]
    for counts, model in zip(cell["pruned"], pruned, strict=True):
        removed = 100 * (1 - counts["after"] / counts["before"])
        cells += [
            f"{removed:.1f}",
            f"{counts['macs before'] / counts['macs after']:.2f}",
            f"{model['median_ms']:.2f}",
            f"{model['speedup']:.2f}",
        ]
    return cells


def page(data: dict[str, Any]) -> str:
    """Return results/latency.md."""
    header = ["network", "original ms"]
    for rounding in ROUNDINGS:
        header += [f"round to {rounding}: parameters cut %", "MACs ÷", "ms", "times faster"]
    rows = [row(name, data["cells"][name]) for name in NAMES if name in data["cells"]]
    return f"""# Latency, original against pruned

Half of the channels of every group by L2, uniformly; onnxruntime, CPU provider, {common.THREADS}
threads, batch 1, all its optimisations, models in turns run by run, medians (made by
`benchmarks/latency.py`, {data["exporter"]} exports).

{common.table(header, rows)}

## Machine

{common.describe(data["machine"])}
"""


def main() -> None:
    """Measure and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("--exporter", default="torchscript", choices=models16.EXPORTERS)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each model")
    options = parser.parse_args()
    names = options.only or list(NAMES)
    models16.ensure(options.cache, names, [options.exporter])
    data = common.previous("latency", options.results) or {"cells": {}}
    data |= {"machine": common.machine(), "exporter": options.exporter}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="spa-latency-") as folder:
            path = models16.cached(options.cache, name, options.exporter)
            data["cells"][name] = measure(path, Path(folder), options.seconds)
        print(row(name, data["cells"][name]), data["cells"][name]["reason"], flush=True)
        common.write("latency", page(data), data, options.results)


if __name__ == "__main__":
    main()
