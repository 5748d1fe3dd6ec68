"""The per cent of sixteen torchvision networks that SPA and its peers remove.

    python benchmarks/coverage.py --cache DIR [--only resnet50 ...] [--sides ours torch-pruning onnxsim]

Half of the channels of every group by L2, the classifier's outputs untouched, normalisation crossings
allowed. Every cell is a process of its own with a time and a memory limit. Cells of sides that are not
run are kept from the last result, so one side can be measured anew.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import common
import models16

SIDES = ("ours", "torch-pruning", "onnxsim")
LIMITS: dict[str, Any] = {"timeout": 300, "memory": 9 * common.GIB, "cores": common.THREADS}
Cells = dict[str, dict[str, Any]]


# -- measure ---------------------------------------------------------------------------------------------


def cell(child: common.Child) -> dict[str, Any]:
    """Return what the table needs of a child: share removed, seconds, or why there is none."""
    facts: dict[str, Any] = {"status": child.status, "reason": child.reason}
    facts |= {"process seconds": child.seconds, "peak MB": child.peak_mb}
    if child.ok:
        data = child.data
        facts |= {key: data[key] for key in ("before", "after", "seconds", "error") if key in data}
        if "before" in data:
            before, after = (_parameters(data[key]) for key in ("before", "after"))
            facts["removed"] = round(100 * (1 - after / before), 2)
    return facts


def _parameters(count: int | dict[str, int]) -> int:
    return count["parameters"] if isinstance(count, dict) else count


def measure_ours(cache: Path, name: str, exporters: list[str]) -> Cells:
    """Prune every export, and test exactness on it."""
    cells = {}
    for exporter in exporters:
        path = str(models16.cached(cache, name, exporter))
        key = f"{name}.{exporter}"
        cells[f"ours {key}"] = cell(common.python("ours.py", "prune", path, **LIMITS))
        cells[f"exact {key}"] = cell(common.python("ours.py", "exact", path, **LIMITS))
    return cells


def measure_torch_pruning(_cache: Path, name: str, _exporters: list[str]) -> Cells:
    """Prune the module; ViT also with the edits by hand that Torch-Pruning documents."""
    cells = {f"torch-pruning {name}": cell(common.python("peers.py", "torch-pruning", name, **LIMITS))}
    if name.startswith("vit"):
        child = common.python("peers.py", "torch-pruning", name, "--documented-edits", **LIMITS)
        cells[f"torch-pruning, edited {name}"] = cell(child)
    return cells


def measure_onnxsim(cache: Path, name: str, exporters: list[str]) -> Cells:
    """Prune every export as it is, and after onnxsim's own simplification."""
    cells = {}
    for exporter in exporters:
        path = str(models16.cached(cache, name, exporter))
        key = f"{name}.{exporter}"
        cells[f"onnxsim {key}"] = cell(common.python("peers.py", "onnxsim", path, **LIMITS))
        cells[f"onnxsim, simplified {key}"] = cell(common.python("peers.py", "onnxsim", path, "--simplify", **LIMITS))
    return cells


MEASURE = {"ours": measure_ours, "torch-pruning": measure_torch_pruning, "onnxsim": measure_onnxsim}


# -- show ------------------------------------------------------------------------------------------------


def share(facts: dict[str, Any] | None) -> str:
    """Return a table's cell: the per cent removed, or why there is none."""
    if not facts:
        return ""
    return f"{facts['removed']:.1f}" if facts["status"] == "ok" else facts["status"]


def seconds(facts: dict[str, Any] | None, *phases: str) -> str:
    """Return the sum of these phases, seconds."""
    if not facts or facts["status"] != "ok":
        return ""
    return f"{sum(facts['seconds'].get(phase, 0) for phase in phases):.2f}"


def best(cells: Cells, name: str, exporters: list[str]) -> dict[str, Any] | None:
    """Return onnxsim's best result on a network, over exporters, with and without simplification."""
    keys = [f"{side} {name}.{exporter}" for side in ("onnxsim", "onnxsim, simplified") for exporter in exporters]
    found = [cells[key] for key in keys if key in cells and cells[key]["status"] == "ok"]
    return max(found, key=lambda facts: facts["removed"], default=None)


def overview(cells: Cells, names: list[str], exporters: list[str]) -> str:
    """Return the table of shares removed, one row per network, and the medians."""
    rows = []
    for name in names:
        peer = share(cells.get(f"torch-pruning {name}"))
        edited = cells.get(f"torch-pruning, edited {name}")
        peer += f" ({share(edited)} edited by hand)" if edited else ""
        rows.append(
            [
                name,
                *(share(cells.get(f"ours {name}.{exporter}")) for exporter in exporters),
                peer,
                share(best(cells, name, exporters)),
            ]
        )
    columns = [[_number(row[at]) for row in rows] for at in range(1, len(exporters) + 3)]
    medians = [_median(column) for column in columns]
    rows.append(["**median of those that work**", *medians])
    rows.append(["**work**", *(str(sum(x is not None for x in column)) for column in columns)])
    header = ["network", *(f"SPA, {exporter}" for exporter in exporters), "Torch-Pruning", "onnxsim, at best"]
    return common.table(header, rows)


def _number(text: object) -> float | None:
    try:
        return float(str(text).split()[0])
    except (ValueError, IndexError):
        return None


def _median(column: list[float | None]) -> str:
    numbers = [number for number in column if number is not None]
    return f"{statistics.median(numbers):.1f}" if numbers else ""


def details(cells: Cells, names: list[str], exporters: list[str]) -> str:
    """Return the table of seconds, exactness and onnxsim's shares, one row per export."""
    rows = []
    for name in names:
        peer = cells.get(f"torch-pruning {name}")
        for exporter in exporters:
            key = f"{name}.{exporter}"
            raw, simplified = cells.get(f"onnxsim {key}"), cells.get(f"onnxsim, simplified {key}")
            ours, exact = cells.get(f"ours {key}"), cells.get(f"exact {key}", {})
            error = f"{exact['error']:.1e}" if "error" in exact else exact.get("status", "")
            rows.append(
                [
                    key,
                    share(ours),
                    seconds(ours, "prune"),
                    error,
                    share(peer),
                    seconds(peer, "graph", "prune"),
                    share(raw),
                    seconds(raw, "load", "prune"),
                    share(simplified),
                    seconds(simplified, "load", "simplify", "prune"),
                ]
            )
    header = [
        "export",
        "SPA %",
        "s",
        "exact to",
        "Torch-Pruning %",
        "s",
        "onnxsim raw %",
        "s",
        "simplified first %",
        "s",
    ]
    return common.table(header, rows)


def failures(cells: Cells) -> str:
    """Return one line per failed cell."""
    lines = [f"- {key}: {c['status']}: `{c['reason']}`" for key, c in cells.items() if c["status"] != "ok"]
    return "\n".join(lines) or "None."


def page(data: dict[str, Any], names: list[str], exporters: list[str]) -> str:
    """Return results/coverage.md."""
    cells: Cells = data["cells"]
    machines = "\n\n".join(f"{side}: {common.describe(info)}" for side, info in data["machines"].items())
    return f"""# Coverage: parameters removed at half of the channels

Per cent of the parameters that are gone when half of the channels of every group are removed by L2,
uniformly, the classifier's outputs untouched (made by `benchmarks/coverage.py`). Random weights; exports
are raw. Parameters are counted as PyTorch counts them, without BatchNorm's running statistics; auxiliary
classifiers are not built. Limits: {LIMITS["timeout"]} s, {LIMITS["memory"] // common.GIB} GiB of address
space, {LIMITS["cores"]} cores.

{overview(cells, names, exporters)}

## Every export

Seconds are the work alone, without imports: SPA from the path to the pruned model (its analysis
included), Torch-Pruning its graph and its pruning (without building the model), onnxsim loading,
simplifying where named (with the batch fixed to 1, which lets it fold most), pruning. "exact to" is the
largest difference to the original with the removed channels' readers zeroed, relative to the output, on
the plan without normalisation crossings.

{details(cells, names, exporters)}

## What failed

{failures(cells)}

## Machine

{machines}
"""


def main() -> None:
    """Measure the sides asked for and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("--exporters", nargs="+", default=list(models16.EXPORTERS), choices=models16.EXPORTERS)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    options = parser.parse_args()
    names = options.only or list(models16.NAMES)
    models16.ensure(options.cache, names, options.exporters)
    data = common.previous("coverage", options.results) or {"machines": {}, "cells": {}}
    for side in options.sides:
        data["machines"][side] = common.machine()
        for name in names:
            found = MEASURE[side](options.cache, name, options.exporters)
            data["cells"] |= found
            for key, facts in found.items():
                print(key, facts.get("removed", facts.get("error", facts["reason"])), flush=True)
            text = page(data, list(models16.NAMES), options.exporters)
            common.write("coverage", text, data, options.results)
    common.write("coverage", page(data, list(models16.NAMES), options.exporters), data, options.results)


if __name__ == "__main__":
    main()
