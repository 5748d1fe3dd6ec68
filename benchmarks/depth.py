"""Depth and width together against width alone: the change of the outputs at one measured latency.

    python benchmarks/depth.py --data DIR --networks DIR [--only resnet56 vit embedder recogniser] [--of latency macs]
                               [--ratios 0.3 0.5] [--samples N]

`obspa` with real inputs: the two networks that `depth="auto"` repairs and compares, with branches (for latency with
detours, too) among the candidates and without. Changes (mean squared, over the outputs' variance) are those on test
inputs that neither saw. ResNet-56 and CIFAR-10 images are read from a folder (`accuracy.py` says which files it holds);
the ViT is `models/digits_vit.onnx`; the embedder and the recogniser come with their inputs from `real.py`, whose folder
is `--networks`. Each network is a process of its own; cells that are not run are kept from the last result. Timing is
on one thread, which a busy machine disturbs less than two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

HERE = Path(__file__).parent
WHAT = {
    "resnet56": "ResNet-56, CIFAR-10",
    "vit": "ViT, digits",
    "embedder": "MiniLM-L6",
    "recogniser": "PP-OCRv4 recogniser",
}
REAL = {"embedder": "minilm", "recogniser": "recogniser"}  # names in `real_networks`
SAMPLES = {"resnet56": 256, "vit": 256, "embedder": 96, "recogniser": 48}
SIZES = {"recogniser": {"x[2]": 48}}
TESTS = 64
THREADS = 1
Feeds = dict[str, np.ndarray]


def inputs(name: str, data: Path, networks: Path, samples: int) -> tuple[Path, Feeds, list[Feeds]]:
    """Return a network's file, its calibration inputs and batches of test inputs."""
    if name in REAL:
        from real_networks import NETWORKS
        from real_networks.base import CALIBRATION, TEST, Place

        place, network = Place(networks), NETWORKS[REAL[name]]
        file = network.find(place)
        calibration, test = network.inputs(place, CALIBRATION, samples), network.inputs(place, TEST, TESTS)
        return file, dict(calibration.feeds), test.batches()
    if name == "vit":
        models = HERE.parent / "models"
        train, test_images = (np.load(models / f"digits_{part}.npz")["input"] for part in ("train", "test"))
        return models / "digits_vit.onnx", {"input": train[:samples]}, [{"input": test_images[:TESTS]}]
    import accuracy

    with np.load(data / "cifar10_subset.npz") as stored:
        train, test_images = (accuracy.normalised(stored[key]) for key in ("x_train", "x_test"))
    return data / "resnet56_cifar10.onnx", {"image": train[:samples]}, [{"image": test_images[:TESTS]}]


def measure(name: str, of: str, options: Any) -> dict[str, Any]:
    """Score a network once; for each ratio prune it with and without depth, time both, and compare outputs."""
    import onnx

    import spa
    from spa import goals
    from spa.coupling.cost import measure as cost
    from spa.errors import OutOfReachError
    from spa.job import prepare
    from spa.model.graph import Graph
    from spa.running.bench import bench
    from spa.running.change import Yardstick
    from spa.running.padding import with_padding

    samples = options.samples or SAMPLES[name]
    file, given, tests = inputs(name, options.data, options.networks, samples)
    sizes = SIZES.get(name)
    request = spa.Request.of(data=given, samples=samples, of=of, depth="auto", threads=THREADS, sizes=sizes)
    job = prepare(spa.analyze(file, sizes=sizes), request)
    goals.prepare_inputs(job)
    graph = Graph(onnx.load(file), file.parent)
    yardstick = Yardstick(graph, with_padding(graph, tests, THREADS), THREADS)
    cells = {}
    for ratio in options.ratios:
        budget = replace(job.budget, ratio=ratio)
        found, refusal = [], None
        for candidate in reversed(goals.depths(job)):  # widths alone first
            try:
                found.append(goals.of_candidate(job, budget, candidate))
            except OutOfReachError as error:
                refusal = str(error).partition(". ")[0]
        if not found:
            cells[f"{ratio:g}"] = {"reason": refusal}
            continue
        timed = bench(
            [file, *(o.model for o in found)], seconds=4.0, threads=THREADS, isolate_memory=False, sizes=sizes or {}
        )
        dense, *macs = (spa.analyze(m, sizes=sizes) for m in (file, *(o.model for o in found)))
        cells[f"{ratio:g}"] = {
            "samples": samples,
            "widths alone": refusal,
            "change": [yardstick.change(o.model).error for o in found],
            "held out": [o.error for o in found],
            "ms": [m.p10_ms for m in timed.models],
            "faster": [m.speedup_p10 for m in timed.models],
            "macs": [cost(m).macs / cost(dense).macs for m in macs],
            "gone": [b.name for b in job.selection.branches if b.name in found[-1].plan.kept],
            "branches": len(job.selection.branches),
            "load": common.load(),
        }
    return cells


def row(key: str, cell: dict[str, Any]) -> list[object]:
    """Return a line of the table."""
    name, of, ratio = key.split("/")
    start = [WHAT[name], of, f"{float(ratio):.0%}"]
    if "change" not in cell:
        return [*start, cell["reason"], *[""] * 8]
    if cell.get("widths alone"):  # there is one network: what of it stands for widths alone is what they reach
        at_most = "at most " + str(cell["widths alone"]).partition("at most ")[2].partition(" ")[0]
        cell = cell | {name: [math.nan, *cell[name]] for name in ("macs", "change")}
        cell["faster"] = [cell["faster"][0], math.nan, *cell["faster"][1:]]
    else:
        at_most = ""
    less = [f"{1 - 1 / faster:.0%}" for faster in cell["faster"][1:]]
    macs = [f"{1 - share:.0%}" for share in cell["macs"]]
    change = [f"{value:.4f}" for value in cell["change"]]
    best = "**" if at_most or cell["change"][1] < cell["change"][0] else ""
    if at_most:
        less[0], macs[0], change[0] = at_most, "", "out of reach"
    gone = f"{len(cell['gone'])} of {cell['branches']}"
    return [*start, *less, *macs, change[0], f"{best}{change[1]}{best}", gone, cell["samples"], cell["load"]]


def page(data: dict[str, Any]) -> str:
    """Return results/depth.md."""
    header = ["network", "budget", "asked", "latency cut, widths", "with depth", "MACs cut, widths", "with depth"]
    header += ["change, widths", "with depth", "parts gone", "inputs", "load"]
    rows = [row(key, cell) for key, cell in sorted(data["cells"].items())]
    return f"""# Depth and width together

`obspa` with real inputs, a fraction of the latency (`of="latency"`) or of the MACs removed, once by widths alone
and once with parts that go as a whole among the candidates, the two of which `depth="auto"` keeps the better; made by
`benchmarks/depth.py`. Parts are residual branches; since decision 53 those of latency have detours among them, too.
The latency cut is a second measurement of three networks in turns, the original and both results: the time that a
tenth of the runs stay below; onnxruntime, CPU provider, {THREADS} thread, batch 1. Change: mean squared change of the
outputs (logits before a last softmax) over their variance, on {TESTS} test inputs that neither pruning saw. Bold: less
than by widths alone, or where these reach no such cut (then the most that they reach is given, as it is estimated).
The machine was shared; load is its load average when the cell was done.

{common.table(header, rows)}

## Machine

{common.describe(data["machine"])}
"""


def _options() -> Any:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 network and images")
    parser.add_argument("--networks", type=Path, required=True, help="the folder that real.py fills")
    parser.add_argument("--of", nargs="*", default=["latency"], choices=["latency", "macs"])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.3, 0.5])
    parser.add_argument("--samples", type=int, help="calibration inputs, in place of each network's own number")
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "OF"), help="measure in this process")
    return parser.parse_args()


def _cells(name: str, of: str, options: Any) -> dict[str, Any]:
    words: Sequence[str] = ["--data", str(options.data), "--networks", str(options.networks)]
    words = [*words, "--ratios", *map(str, options.ratios)]
    words = [*words, *(["--samples", str(options.samples)] if options.samples else [])]
    child = common.python("depth.py", *words, "--child", name, of, timeout=7200)
    return child.data or {f"{ratio:g}": {"reason": child.reason} for ratio in options.ratios}


def main() -> None:
    """Measure and write the table."""
    options = _options()
    if options.child:
        name, of = options.child
        common.answer(measure(name, of, options))
        return
    data = common.previous("depth", options.results) or {"cells": {}}
    data["machine"] = common.machine()
    for name in options.only or WHAT:
        for of in options.of:
            for ratio, cell in _cells(name, of, options).items():
                key = f"{name}/{of}/{ratio}"
                data["cells"][key] = cell
                print(row(key, cell), flush=True)
            common.write("depth", page(data), data, options.results)


if __name__ == "__main__":
    main()
