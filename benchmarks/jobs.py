"""Sweeps on several processes: how much faster, and are the files the same?

    python benchmarks/jobs.py [--repairs full quick] [--rounds 1]

Seven ratios of the digits' ResNet (512 inputs, `--threads 1`), a whole `spa.sweep`: calibration, scoring, repair, the
timing of the networks in turns, and the start of the processes. On 1, 2 and 4 processes in turns; where there are fewer
cores, four are there for the comparison of the files, not for their time. To be run on an otherwise idle machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common

MODELS = Path(__file__).parent.parent / "models"
JOBS = (1, 2, 4)
RATIOS = "0.1:0.7:0.1"


def sweep(jobs: int, repair: str, folder: Path) -> float:
    """Return the seconds of a sweep into a folder."""
    import spa

    start = time.perf_counter()
    spa.sweep(
        MODELS / "digits_resnet.onnx",
        folder,
        ratio=RATIOS,
        data=MODELS / "digits_train.npz",
        samples=512,
        threads=1,
        reconstruct=repair,
        jobs=jobs,
    )
    return time.perf_counter() - start


def measured(repair: str, rounds: int) -> list[dict[str, Any]]:
    """Measure one repair on all numbers of processes, in turns."""
    seconds: dict[int, list[float]] = {jobs: [] for jobs in JOBS}
    files: dict[int, dict[str, bytes]] = {}
    for _ in range(rounds):
        for jobs in JOBS:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / "sweep"
                seconds[jobs].append(sweep(jobs, repair, folder))
                files[jobs] = {p.name: p.read_bytes() for p in folder.glob("*.onnx")}
    medians = {jobs: statistics.median(found) for jobs, found in seconds.items()}
    return [
        {
            "repair": repair,
            "jobs": jobs,
            "seconds": medians[jobs],
            "faster": medians[1] / medians[jobs],
            "networks": len(files[jobs]),
            "same": files[jobs] == files[1],
        }
        for jobs in JOBS
    ]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--repairs", nargs="+", default=["full", "quick"], choices=["full", "quick", "readers"])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    machine = common.machine()
    rows = [row for repair in options.repairs for row in measured(repair, options.rounds)]
    cells = [
        (
            r["repair"],
            r["jobs"],
            f"{r['seconds']:.1f}",
            f"{r['faster']:.2f} x",
            r["networks"],
            "yes" if r["same"] else "**no**",
        )
        for r in rows
    ]
    table = common.table(("repair", "processes", "seconds", "faster", "networks", "same bytes as on one"), cells)
    text = f"# Sweeps on several processes\n\n{_about(options.rounds)}\n\n{table}\n\n{common.describe(machine)}\n"
    common.write("jobs", text, {"machine": machine, "rows": rows}, Path(options.results))


def _about(rounds: int) -> str:
    return (
        f"Seven ratios ({RATIOS}) of the digits' ResNet, 512 inputs, one thread for each process; medians of {rounds} "
        "rounds (made by `benchmarks/jobs.py`). Whole sweeps, with the start of the processes, and with the timing of "
        "the networks, which is done alone."
    )


if __name__ == "__main__":
    main()
