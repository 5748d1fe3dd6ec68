"""Is a budget of latency met? What was asked for, estimated and measured, and what the same share of MACs gives.

    python benchmarks/latency_budget.py --cache DIR [--only resnet50 ...]

L2, global ranking, onnxruntime on two threads, batch 1. Each cell is a process of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import models16

NAMES = ("resnet50", "mobilenet_v2")
RATIOS = (0.3, 0.5, 0.7)


def measure(path: Path, ratio: float) -> dict[str, Any]:
    """Remove a share of the latency, and the same share of the MACs, and time both beside the original."""
    import spa
    from spa.running.bench import bench

    results = [
        spa.prune(path, ratio=ratio, of=of, criterion="l2", threads=common.THREADS) for of in ("latency", "macs")
    ]
    found = bench([path, *(r.model for r in results)], seconds=4.0, threads=common.THREADS, isolate_memory=False)
    reports = [r.report for r in results]
    return {
        "latency": reports[0].latency,
        "notes": reports[0].notes,
        "seconds": reports[0].seconds,
        "macs removed": [1 - r.after.macs / r.before.macs for r in reports],
        "ms": [m.median_ms for m in found.models],
        "times faster": [m.speedup for m in found.models],
    }


def row(name: str, ratio: str, cell: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    if "latency" not in cell:
        return [name, ratio, cell["reason"], *[""] * 8]
    found = cell["latency"]
    removed = [f"{100 * (1 - 1 / faster):.0f}" for faster in cell["times faster"][1:]]
    macs = [f"{100 * share:.0f}" for share in cell["macs removed"]]
    times = [f"{found[key]:.2f}" for key in ("dense", "goal", "estimated", "measured")]
    choices, seconds = str(found["choices"]), f"{cell['seconds']['choose']:.0f}"
    return [name, ratio, *times, choices, seconds, removed[0], macs[0], removed[1]]


def page(data: dict[str, Any]) -> str:
    """Return results/latency_budget.md."""
    header = ["network", "asked %", "original ms", "goal ms", "estimated ms", "measured ms", "choices", "s"]
    header += ["latency cut %", "MACs cut for it %", "latency cut by the same % of MACs"]
    rows = [row(name, ratio, cell) for name, cells in data["cells"].items() for ratio, cell in cells.items()]
    return f"""# Budgets of latency

A share of the latency removed by `of="latency"`: the milliseconds to arrive at, the estimate for the widths taken
in the end, what was measured beside the original, how many choices that took, and the seconds for timing and
choosing (what earlier rows timed is known already). The last three columns are a second measurement of three
networks in turns: the original, that one, and one from which the same share of the MACs was removed. L2, global
ranking; onnxruntime, CPU provider, {common.THREADS} threads, batch 1, all its optimisations (made by
`benchmarks/latency_budget.py`, {data["exporter"]} exports). The machine was shared: the original's time shows how much.

{common.table(header, rows)}

## Machine

{common.describe(data["machine"])}
"""


def main() -> None:
    """Measure and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("--exporter", default="torchscript", choices=models16.EXPORTERS)
    parser.add_argument("--child", nargs=2, metavar=("FILE", "RATIO"), help="measure in this process")
    options = parser.parse_args()
    if options.child:
        common.answer(measure(Path(options.child[0]), float(options.child[1])))
        return
    names = options.only or list(NAMES)
    models16.ensure(options.cache, names, [options.exporter])
    data = common.previous("latency_budget", options.results) or {"cells": {}}
    data |= {"machine": common.machine(), "exporter": options.exporter}
    for name in names:
        path = models16.cached(options.cache, name, options.exporter)
        for ratio in RATIOS:
            child = common.python("latency_budget.py", "--child", str(path), str(ratio))
            cell = child.data or {"reason": child.reason}
            data["cells"].setdefault(name, {})[f"{100 * ratio:.0f}"] = cell
            print(row(name, str(ratio), cell), flush=True)
            common.write("latency_budget", page(data), data, options.results)


if __name__ == "__main__":
    main()
