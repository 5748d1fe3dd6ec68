"""The time and memory that SPA takes, beside Torch-Pruning on the same networks.

    python benchmarks/speed.py --cache DIR [--only resnet50 ...] [--sides ours torch-pruning] [--rounds 3]

Both remove half of the channels by L2 on two cores. Every measurement is a whole process; the sides take
turns, and the median of the rounds is shown. Three sections: the sixteen networks, two targets, growth
with nodes and bytes. Cells of sides that are not run are kept from the last result.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import common
import models16
import ours

SIDES = ("ours", "torch-pruning")
LIMITS: dict[str, Any] = {"timeout": 300, "memory": 9 * common.GIB, "cores": common.THREADS}
TARGETS = {"resnet50 seconds": 4.0, "swin_t analysis seconds": 1.5}
GROWTH = (1, 2, 4)
_NEEDS = {"peer export": "peer whole", "ours phases": "ours whole"}  # not tried where that one fails
Cell = dict[str, Any]


# -- measure ---------------------------------------------------------------------------------------------


def median(children: Sequence[common.Child]) -> Cell:
    """Return the medians over the rounds; the first failure, if one failed."""
    failed = next((child for child in children if not child.ok), None)
    if failed:
        return {"status": failed.status, "reason": failed.reason, "process seconds": failed.seconds}
    cell: Cell = {"status": "ok", "reason": "", "rounds": [child.seconds for child in children]}
    cell["process seconds"] = round(statistics.median(cell["rounds"]), 3)
    cell["peak MB"] = statistics.median(child.peak_mb for child in children)
    phases = children[0].data.get("seconds", {})
    cell["seconds"] = {
        name: round(statistics.median(child.data["seconds"][name] for child in children), 4) for name in phases
    }
    return cell


def ours_whole(path: Path, folder: Path) -> common.Child:
    """Run `spa prune` as a user does: load, analyse, prune, save, verify."""
    target = folder / "pruned.onnx"
    child = common.run(ours.command(path, target), **LIMITS)
    target.unlink(missing_ok=True)
    return child


def ours_phases(path: Path, folder: Path) -> common.Child:
    """Run the same through the Python interface, phase by phase."""
    target = folder / "phases.onnx"
    child = common.python("ours.py", "prune", str(path), "--out", str(target), **LIMITS)
    target.unlink(missing_ok=True)
    return child


def ours_analysis(path: Path, _folder: Path) -> common.Child:
    """Run the analysis alone."""
    return common.python("ours.py", "analyze", str(path), **LIMITS)


def peer_whole(name: str, folder: Path) -> common.Child:
    """Build, prune, run once and torch.save with Torch-Pruning."""
    return common.python("peers.py", "torch-pruning", name, *_edits(name), "--save", str(folder / "peer.pt"), **LIMITS)


def peer_export(name: str, folder: Path) -> common.Child:
    """Do the same, but export the result to ONNX, which is what SPA's users have at the end."""
    target = str(folder / "peer.onnx")
    return common.python("peers.py", "torch-pruning", name, *_edits(name), "--export", target, **LIMITS)


def _edits(name: str) -> list[str]:
    return ["--documented-edits"] if name.startswith("vit") else []


def measure(path: Path, name: str, sides: Sequence[str], rounds: int, folder: Path) -> dict[str, Cell]:
    """Measure one network, the sides in turns; a run that failed is not repeated."""
    jobs: dict[str, Any] = {}
    if "ours" in sides:
        jobs |= {
            "ours whole": lambda: ours_whole(path, folder),
            "ours phases": lambda: ours_phases(path, folder),
            "ours analysis": lambda: ours_analysis(path, folder),
        }
    if "torch-pruning" in sides:
        jobs["peer whole"] = lambda: peer_whole(name, folder)
        jobs["peer export"] = lambda: peer_export(name, folder)
    return _alternate(jobs, rounds, name)


def _alternate(jobs: dict[str, Any], rounds: int, label: str) -> dict[str, Cell]:
    done: dict[str, list[common.Child]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            if all(child.ok for child in done[key] + done.get(_NEEDS.get(key, ""), [])):
                done[key].append(job())
    return {f"{key} {label}": median(children) for key, children in done.items() if children}


def grow(rounds: int, folder: Path, nodes: int = 1000, megabytes: int = 50) -> dict[str, Any]:
    """Measure SPA on residual networks with 1, 2, 4 times the nodes, and 1, 2, 4 times the bytes."""
    cells: dict[str, Any] = {}
    for kind in ("nodes", "bytes"):
        for factor in GROWTH:
            blocks, channels = (nodes // 7 * factor, 8) if kind == "nodes" else (20, _width(megabytes * factor, 20))
            path = folder / f"{kind}{factor}.onnx"
            facts = common.python("synthetic.py", str(path), "--blocks", str(blocks), "--channels", str(channels))
            jobs = {
                "ours whole": lambda p=path: ours_whole(p, folder),
                "ours phases": lambda p=path: ours_phases(p, folder),
                "ours analysis": lambda p=path: ours_analysis(p, folder),
            }
            cells |= _alternate(jobs, rounds, f"{kind} x{factor}")
            cells[f"facts {kind} x{factor}"] = facts.data
            path.unlink(missing_ok=True)
    return cells


def _width(megabytes: int, blocks: int) -> int:
    """Return the width that makes so many blocks, of two 3 x 3 float kernels each, about this big."""
    return 2 * round((megabytes * 1e6 / (2 * 9 * 4 * blocks)) ** 0.5 / 2)


# -- show ------------------------------------------------------------------------------------------------


def _ok(cell: Cell | None) -> TypeGuard[Cell]:
    return cell is not None and cell["status"] == "ok"


def _seconds(cell: Cell | None, *phases: str) -> str:
    """Return the sum of these phases, or the whole process, or why there is neither."""
    if not cell:
        return ""
    if not _ok(cell):
        return cell["status"]
    return f"{sum(cell['seconds'][name] for name in phases) if phases else cell['process seconds']:.2f}"


def _peer_total(cell: Cell | None) -> float | None:
    """Return Torch-Pruning's whole process without building the dense model."""
    return cell["process seconds"] - cell["seconds"]["build the model"] if _ok(cell) else None


def _memory(cell: Cell | None) -> str:
    return f"{cell['peak MB']:.0f}" if _ok(cell) else ""


def side_by_side(cells: dict[str, Cell]) -> str:
    """Return the table of whole processes on the sixteen networks."""
    rows, ratios = [], []
    for name in models16.NAMES:
        whole, peer = cells.get(f"ours whole {name}"), cells.get(f"peer whole {name}")
        total = _peer_total(peer)
        shown = f"{total:.2f}" if total else _seconds(peer)
        ratio = total / whole["process seconds"] if total and _ok(whole) else None
        ratios += [ratio] if ratio else []
        rows.append([name, _seconds(whole), shown, f"{ratio:.1f}" if ratio else "", _memory(whole), _memory(peer)])
    header = ["network", "SPA s", "Torch-Pruning s", "times faster", "SPA peak MB", "Torch-Pruning peak MB"]
    summary = f"Median ratio {statistics.median(ratios):.1f}, least {min(ratios):.1f}." if ratios else ""
    return common.table(header, rows) + "\n\n" + summary


def phases(cells: dict[str, Cell]) -> str:
    """Return the table of what the time goes into."""
    header = ["network", *(f"SPA {key}" for key in ("import", "analysis", "prune", "save + verify"))]
    header += [f"TP {key}" for key in ("import", "graph", "prune", "torch.save", "ONNX export", "build model")]
    rows = []
    for name in models16.NAMES:
        own, analysis, peer, export = (
            cells.get(f"{key} {name}") for key in ("ours phases", "ours analysis", "peer whole", "peer export")
        )
        row = [name, _seconds(own, "import"), _seconds(analysis, "analysis"), _seconds(own, "prune")]
        row += [_seconds(own, "save")]
        row += [_seconds(peer, key) for key in ("import", "graph", "prune", "save")]
        rows.append([*row, _seconds(export, "export"), _seconds(peer, "build the model")])
    return common.table(header, rows)


def targets(cells: dict[str, Cell], sizes: dict[str, int]) -> str:
    """Return the table of the two targets."""
    rows = []
    whole = cells.get("ours whole resnet50")
    if _ok(whole):
        limit = 4 * sizes["resnet50"] / 1e6 + 300
        rows.append(_target("ResNet-50, whole process, s", TARGETS["resnet50 seconds"], whole["process seconds"]))
        rows.append(_target("ResNet-50, peak memory, MB (4 x the file + 300)", limit, whole["peak MB"]))
    swin = cells.get("ours analysis swin_t")
    if _ok(swin):
        rows.append(
            _target(
                "Swin-T, load and analysis, s",
                TARGETS["swin_t analysis seconds"],
                swin["seconds"]["analysis"],
            )
        )
    return common.table(["target", "at most", "measured", "met"], rows)


def _target(name: str, limit: float, value: float) -> list[str]:
    return [name, f"{limit:.4g}", f"{value:.4g}", "yes" if value < limit else "**no**"]


def growth(cells: dict[str, Any]) -> str:
    """Return the table of growth; the exponent is the slope from once to four times (1 is linear)."""
    rows = []
    for kind in ("nodes", "bytes"):
        for factor in GROWTH:
            label = f"{kind} x{factor}"
            facts = cells.get(f"facts {label}", {})
            whole, phases, analysis = (cells.get(f"ours {key} {label}") for key in ("whole", "phases", "analysis"))
            size = f"{facts['bytes'] / 1e6:.1f}" if facts else ""
            rows.append(
                [
                    label,
                    facts.get("nodes", ""),
                    size,
                    _seconds(analysis, "analysis"),
                    _seconds(phases, "prune", "save"),
                    _seconds(whole),
                    _memory(whole),
                ]
            )
        rows.append(
            [
                f"**exponent, {kind}**",
                "",
                "",
                _slope(cells, "analysis", kind, "analysis"),
                _slope(cells, "phases", kind, "prune", "save"),
                "",
                "",
            ]
        )
    return common.table(["network", "nodes", "MB", "analysis s", "prune+save+verify s", "process s", "peak MB"], rows)


def _slope(cells: dict[str, Any], key: str, kind: str, *phases: str) -> str:
    ends = [cells.get(f"ours {key} {kind} x{factor}") for factor in (GROWTH[0], GROWTH[-1])]
    if not all(_ok(cell) for cell in ends):
        return ""
    first, last = (sum(cell["seconds"][name] for name in phases) for cell in ends if cell)
    return f"{math.log(last / first) / math.log(GROWTH[-1] / GROWTH[0]):.2f}"


def page(data: dict[str, Any]) -> str:
    """Return results/speed.md."""
    cells = data["cells"]
    machines = "\n\n".join(f"{side}: {common.describe(info)}" for side, info in data["machines"].items())
    failed = [f"- {key}: {c['status']}: `{c['reason']}`" for key, c in cells.items() if c.get("status", "ok") != "ok"]
    return f"""# Speed, beside Torch-Pruning

Half of the channels of every group by L2, uniformly; random weights; {common.THREADS} cores; medians of
{data["rounds"]} rounds in turns (made by `benchmarks/speed.py`, {data["exporter"]} exports). Seconds of
wall clock.

SPA's process is `spa prune`: interpreter, import, load, analysis, pruning, saving, verification in
onnxruntime. "prune" is everything from the path to the pruned model in memory, analysis included;
"analysis" is `spa.analyze` alone, load included. Torch-Pruning's process is interpreter, imports,
dependency graph, pruning, one forward pass, `torch.save`; **building the dense model is not counted**,
nor is exporting to ONNX. ViT there has the edits by hand that its authors document.

{side_by_side(cells)}

## Phases

Each side in one process that takes the time between its steps.

{phases(cells)}

## Targets

{targets(cells, data["sizes"])}

## Growth

Residual networks (`benchmarks/synthetic.py`); the exponent is the slope from the smallest to the
largest: 1 is linear.

{growth(cells)}

## What failed

{chr(10).join(failed) or "None."}

## Machine

{machines}
"""


def main() -> None:
    """Measure the sides asked for and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("--exporter", default="torchscript", choices=models16.EXPORTERS)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-growth", action="store_true")
    options = parser.parse_args()
    names = options.only or list(models16.NAMES)
    models16.ensure(options.cache, names, [options.exporter])
    data = common.previous("speed", options.results) or {"machines": {}, "cells": {}, "sizes": {}}
    data |= {"rounds": options.rounds, "exporter": options.exporter}
    data["machines"] |= {side: common.machine() for side in options.sides}
    with tempfile.TemporaryDirectory(prefix="spa-speed-") as scratch:
        folder = Path(scratch)
        for name in names:
            path = models16.cached(options.cache, name, options.exporter)
            data["sizes"][name] = path.stat().st_size
            found = measure(path, name, options.sides, options.rounds, folder)
            data["cells"] |= found
            for key, cell in found.items():
                print(key, cell.get("process seconds"), cell["reason"], flush=True)
            common.write("speed", page(data), data, options.results)
        if "ours" in options.sides and not options.skip_growth:
            data["cells"] |= grow(options.rounds, folder)
    common.write("speed", page(data), data, options.results)


if __name__ == "__main__":
    main()
