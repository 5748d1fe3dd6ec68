"""The parts of `real.py` that hold arrays, each in a process of its own: make inputs, and measure a pruned file.

python benchmarks/real_worker.py list
python benchmarks/real_worker.py calibrate DIR NETWORK COUNT FILE [PHOTOS]
python benchmarks/real_worker.py measure DIR NETWORK REPORT FILE [PHOTOS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
from real_networks import NETWORKS
from real_networks.base import CALIBRATION, TEST, Inputs, Network, Place

from spa.model.graph import Graph
from spa.running.change import Yardstick
from spa.running.feeds import make_feeds
from spa.running.padding import with_padding
from spa.running.runtime import input_specs, load_session, run

APART = 64  # test inputs on which the report's own measure is taken


def calibrate(network: Network, place: Place, count: int, target: Path) -> dict[str, Any]:
    """Write calibration inputs; return the seconds of one dense pass over them, and the network's file."""
    file = network.find(place)
    if not count:
        return {"file": str(file)}
    inputs = network.inputs(place, CALIBRATION, count)
    np.savez(target, **inputs.feeds)
    return {"file": str(file), "count": inputs.count, "dense pass": _pass_seconds(file, inputs)}


def _pass_seconds(file: Path, inputs: Inputs) -> float:
    """Return the seconds that a dense network takes for some inputs, once it is warm."""
    session, batches = load_session(str(file), optimise=True, threads=common.THREADS), inputs.batches()
    run(session, batches[0])
    start = time.perf_counter()
    for batch in batches:
        run(session, batch)
    return time.perf_counter() - start


def measure(network: Network, place: Place, report: dict[str, Any], pruned: Path) -> dict[str, Any]:
    """Return the scores of both networks on test inputs, and the change by the measure of reports."""
    file = network.find(place)
    inputs = network.inputs(place, TEST, network.tests)
    dense = network.run(file, inputs)
    found = network.run(pruned, inputs)
    graph = Graph(onnx.load(file), file.parent)
    batches = with_padding(graph, _first(inputs, APART), common.THREADS)
    change = Yardstick(graph, batches, common.THREADS).change(onnx.load(pruned))
    return {
        "dense": network.score(inputs, dense, dense),
        "pruned": network.score(inputs, dense, found),
        "change apart": change.error,
        "agreement apart": dict(change.agreement),
        "dense pass": _made_up_pass(file, report.get("calibration") or {}),
    }


def _first(inputs: Inputs, count: int) -> list[dict[str, np.ndarray]]:
    """Return the batches of the first samples."""
    return inputs.batches()[: max(1, count // inputs.batch)]


def _made_up_pass(file: Path, calibration: dict[str, Any]) -> float | None:
    """Return the seconds of one dense pass over inputs like those that were made up, from the time of a few batches."""
    shapes = calibration.get("inputs")
    if calibration.get("source") != "synthetic" or not shapes:
        return None
    batch = next(iter(shapes.values()))[0] or 1
    session = load_session(str(file), optimise=True, threads=common.THREADS)
    open_axes = [(s.name, i) for s in input_specs(session) for i, d in enumerate(s.shape) if not isinstance(d, int)]
    feeds = make_feeds(session, sizes={f"{name}[{axis}]": shapes[name][axis] for name, axis in open_axes})
    run(session, feeds)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(session, feeds)
        times.append(time.perf_counter() - start)
    return min(times) * (calibration["samples"] + calibration.get("held_out", 0)) / batch


def main() -> None:
    """Do one part."""
    if sys.argv[1:] == ["list"]:
        common.answer(
            {name: {k: getattr(n, k) for k in ("title", "metric", "options", "most")} for name, n in NETWORKS.items()}
        )
        return
    part, folder, name, what, file, *photos = sys.argv[1:]
    place = Place(Path(folder), Path(photos[0]) if photos else None)
    network = NETWORKS[name]
    if part == "calibrate":
        common.answer(calibrate(network, place, int(what), Path(file)))
    else:
        common.answer(measure(network, place, json.loads(Path(what).read_text()), Path(file)))


if __name__ == "__main__":
    main()
