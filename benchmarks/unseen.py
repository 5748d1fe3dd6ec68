"""Networks that this project has never seen, exported, pruned and compared: counts, and the refusals by kind.

    python benchmarks/unseen.py [--only 'timm/*' ...] [--again] [--seconds 600] [--timeout 180]

Each network (`unseen_networks.py`) has a process of its own with a time limit, forked from one that has the libraries
loaded, and one thread. What is measured is what coverage_frameworks.py measures. Results are kept in results/, so the
script can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import common
import coverage_frameworks
import models16
import unseen_networks

NAME = "unseen"
TRACED = "torchscript/"  # by the quicker exporter first
WAIT = 6  # seconds for each CPU second, beside other work on the machine


def _child(name: str, pipe: Any, seconds: int) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    facts = coverage_frameworks.measure(name, unseen_networks.build)
    if facts["stage"] == "import" and name.startswith(TRACED):  # what an importer does by itself
        facts = coverage_frameworks.measure(name.removeprefix(TRACED), unseen_networks.build)
    pipe.send(facts)


def measured(name: str, seconds: int) -> dict[str, Any]:
    """Measure a network in a forked process of so many CPU seconds; its own children are killed with it."""
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs, seconds))
    process.start()
    theirs.close()
    try:
        late = {"stage": "process", "reason": f"killed after {WAIT * seconds} s"}
        facts = ours.recv() if ours.poll(WAIT * seconds) else late
    except EOFError:
        process.join()
        spent = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        facts = {"stage": "process", "reason": f"{seconds} CPU s" if spent else f"ended with code {process.exitcode}"}
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
    return facts | {"process s": round(time.perf_counter() - start, 1)}


def _load() -> None:
    """Load what the networks come from, once for all of them."""
    models16.torchvision_models()
    import onnxscript
    import timm
    import torch
    import transformers

    import spa.exporters.pytorch
    import spa.importers.pytorch

    torch.set_num_threads(1)
    torch.onnx.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),), dynamo=True, verbose=False)  # fills its tables
    transformers.logging.set_verbosity_error()
    assert onnxscript and timm and spa.importers.pytorch and spa.exporters.pytorch


# -- tell ------------------------------------------------------------------------------------------------

EXACT = 1e-4  # of the largest output; rounding is 1000 times less
KINDS = {  # by a part of the message; the first that fits
    "through sequences and optionals": "channels go through sequences",
    "in ONNX is not the same": "its outputs differ from run to run, or depend on more than its inputs",
    "cannot remove": "more was asked for than can go beside inputs, outputs and normalisations",
    "no group can be pruned": "every group crosses a normalisation, or is an input or an output",
    "has no group that can be pruned": "every channel is an input or an output",
    "cannot be expressed in ONNX": "PyTorch's exporters refuse it",
    "its operands decide it": "data decide sizes that others must match",
}


def kind(facts: dict[str, Any]) -> str:
    """Return the kind of a refusal or failure; empty where the network was pruned and is the masked original."""
    if facts["stage"] == "build":
        return "not built by this script"
    if facts["stage"] == "process":
        return "not measured within the time"
    if facts["stage"] != "done":
        reason = facts.get("reason", "")
        return next((text for part, text in KINDS.items() if part in reason), reason)
    if facts["import error"] > EXACT:
        return "rounding grows in the dense network already: PyTorch and onnxruntime differ by more than 1e-4"
    wrong = max(facts.get("error", 0), facts.get("back error", 0)) > EXACT or facts["back"] == "none"
    return "wrong outputs" if wrong else ""


def page(data: dict[str, Any]) -> str:
    """Return the text of results/unseen.md."""
    cells = data["cells"]
    text = [
        "# Networks that this project has never seen",
        "Made by `benchmarks/unseen.py`: architectures of transformers and timm that no other result here has, with "
        "random weights, as small as their configuration allows. Each is exported by PyTorch's exporter, "
        f"{coverage_frameworks.RATIO:.0%} of its MACs are removed by `l2`, and the result is compared with the masked "
        "original in onnxruntime, and as the user's class in PyTorch. `--again` measures all anew; without it the "
        f"script goes on where it was: {len(cells)} of {len(data['names'])} listed networks were tried.",
        "The script makes configurations and inputs by itself; where a class refuses them, nothing was measured. "
        "Not all cells were taken at one commit.",
        common.describe(data["machine"]),
        common.table(HEADER, _counts(cells)),
        "## Refusals by kind",
    ]
    refused = defaultdict(list)
    for name, facts in sorted(cells.items()):
        if found := kind(facts):
            refused[found].append(name.rpartition("/")[2])
    lines = [f"- {found}: {len(names)} ({', '.join(names)})." for found, names in sorted(refused.items())]
    text += ["\n".join(lines) or "None.", "## Pruned", common.table(COLUMNS, _rows(cells))]
    return "\n\n".join(text) + "\n"


HEADER = (
    "library",
    "tried",
    "built",
    "pruned and exact",
    "wrong outputs",
    "class",
    "class in part",
    "graph",
    "refused",
)
COLUMNS = ("network", "MACs removed", "error to masked original", "class kept", "class error")


def _counts(cells: dict[str, dict[str, Any]]) -> list[list[object]]:
    rows: list[list[object]] = []
    for library in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        mine = [facts for name, facts in cells.items() if name.rpartition("/")[0] == library]
        built = [f for f in mine if f["stage"] not in ("build", "process")]
        done = [f for f in built if f["stage"] == "done"]
        backs = Counter(map(coverage_frameworks.kept_class, done))
        wrong = sum(kind(f) == "wrong outputs" for f in done)
        row = [library, len(mine), len(built), len(done) - wrong, wrong]
        rows.append([*row, backs["yes"], backs["in part"], backs["graph"], len(built) - len(done)])
    return rows


def _rows(cells: dict[str, dict[str, Any]]) -> list[list[object]]:
    return [
        [
            name,
            f"{facts['removed']:.0%}",
            f"{facts['error']:.0e}" if "error" in facts else "statistics",
            coverage_frameworks.kept_class(facts),
            f"{facts['back error']:.0e}" if "back error" in facts else "",
        ]
        for name, facts in sorted(cells.items())
        if facts["stage"] == "done"
    ]


def main() -> None:
    """Measure what is missing, or everything again; write the page now and then."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after this time")
    parser.add_argument("--timeout", type=int, default=120, help="for one network, in CPU seconds")
    parser.add_argument("--part", default="0/1", help="i/n: each n-th network, from the i-th on")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    start = time.perf_counter()
    _load()
    data = common.previous(NAME, options.results) or {
        "machine": coverage_frameworks._machine() | {"threads used": 1},
        "cells": {},
    }
    cells = data["cells"]
    names = data.get("names") or unseen_networks.names()
    data["names"] = names
    first, step = map(int, options.part.split("/"))
    wanted = [n for n in names if any(fnmatch.fnmatch(n, p) for p in options.only)][first::step]
    for name in wanted:
        if (name in cells and not options.again) or time.perf_counter() - start > options.seconds:
            continue
        facts = measured(name, options.timeout)
        cells[name] = facts
        print(
            name,
            facts["stage"],
            facts.get("reason", "")[:400],
            facts.get("back", ""),
            f"{facts.get('error', -1):.0e}",
            f"{facts['process s']:.0f} s",
            flush=True,
        )
        common.write(NAME, page(data), data, options.results)


if __name__ == "__main__":
    main()
