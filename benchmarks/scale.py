"""The time and memory of `spa prune` on large models: `l2` beside the time of copying their files, and `obspa`.

    python benchmarks/scale.py FOLDER [--only resnet50 decoder_1b ...] [--rounds 3]
    python benchmarks/scale.py FOLDER --obspa decoder_125m [decoder_1b]

The models are built here, with random weights (`scale_models.py`), into FOLDER, one after the other; each is removed
when it has been measured, unless `--keep`. A copy (`cp`) and a pruning take turns, both with the model's files dropped
from the page cache. Peak memory is measured in a run of its own: the proportional set sizes of the process and of its
children, summed at each moment. Cells of models that are not run are kept from the last result.

`--obspa` calibrates decoders with sequences of random tokens instead, once each: minutes to hours. The weights are
random, too, so that the change of the outputs says nothing of real models.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import ours

LIMITS: dict[str, Any] = {"timeout": 1800, "cores": common.THREADS}
PAUSE, LONG_PAUSE = 0.02, 0.25  # seconds between two looks at the memory, which take a fifth of a core at the former
# By model: the limits of the issue on time (in copies, or in seconds) and on peak memory (MB, from the file's).
TARGETS: dict[str, tuple[str, float, str]] = {
    "decoder_0.2b": ("copies", 2.5, "1000"),
    "decoder_1b": ("copies", 2.5, "1000"),
    "decoder_7b": ("copies", 2.5, "2000"),
    "decoder_7b_int4": ("copies", 3.0, "2000"),
    "vgg16": ("seconds", 5.39 / 3, "2.2 * file + 200"),  # a third of Torch-Pruning's process in results/speed.md
    "vit_b_16": ("seconds", 2.80 / 3, "2.2 * file + 200"),
    "resnet50": ("seconds", 0.9, "2.2 * file + 200"),
}
# By decoder: the limits on seconds and on peak memory (MB) with obspa; None where time is stated alone.
OBSPA: dict[str, tuple[float | None, float]] = {"decoder_125m": (600, 2000), "decoder_1b": (None, 4000)}
SEQUENCES, TOKENS, VOCABULARY = 128, 128, 32000
HELD_OUT = 16  # further sequences, on which changes are measured
HOURS = 6  # after which a calibration is given up
Cell = dict[str, Any]


# -- measure ---------------------------------------------------------------------------------------------------------


def drop_from_cache(folder: Path) -> None:
    """Write a folder's files to the disk and drop them from the page cache."""
    for path in folder.iterdir():
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def prune_command(path: Path, target: Path) -> list[str]:
    """Return the command that removes half of the MACs by L2."""
    module = ours.command(path, target)[:7]
    return [*module, "--criterion", "l2", "--ratio", "0.5"]


def timed(command: Sequence[str], source: Path, out: Path) -> common.Child:
    """Run a command that writes into an empty folder, the source's files cold."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    drop_from_cache(source)
    os.sync()
    return common.run(command, **LIMITS)


def peak_of_all(command: Sequence[str], out: Path, seconds: float = float("inf"), pause: float = PAUSE) -> float:
    """Return the most memory of a process and its children together, MB (10^6 bytes), by proportional set sizes.

    Args:
        command: the process.
        out: a folder that is emptied before.
        seconds: after which it is killed.
        pause: seconds between two looks.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most, start = 0, time.monotonic()
    watcher_done = threading.Event()
    while process.poll() is None:
        if time.monotonic() - start > seconds:
            process.kill()
        most = max(most, sum(map(_proportional, _family(process.pid))))
        watcher_done.wait(pause)
    return most / 1e6


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(p for child in children for p in _family(int(child)))]


def _proportional(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure(name: str, folder: Path, rounds: int) -> Cell:
    """Measure one model, whose files lie in a folder of their own."""
    source, out = folder / name, folder / "out"
    path = source / "model.onnx"
    commands = {
        "copy": ["cp", "-r", f"{source}/.", str(out)],
        "prune": prune_command(path, out / "pruned.onnx"),
    }
    runs: dict[str, list[common.Child]] = {key: [] for key in commands}
    for _ in range(rounds):
        for key, command in commands.items():
            runs[key].append(timed(command, source, out))
    failed = next((child for children in runs.values() for child in children if not child.ok), None)
    if failed is not None:
        return {"status": failed.status, "reason": failed.reason}
    pruned = sum(f.stat().st_size for f in out.iterdir())
    peak = peak_of_all(commands["prune"], out)
    shutil.rmtree(out)
    cell: Cell = {"status": "ok", "reason": "", "peak MB": round(peak), "pruned MB": round(pruned / 1e6)}
    cell["MB"] = round(sum(f.stat().st_size for f in source.iterdir()) / 1e6)
    cell["largest process MB"] = max(child.peak_mb for child in runs["prune"])
    for key, children in runs.items():
        cell[f"{key} seconds"] = round(statistics.median(child.seconds for child in children), 2)
        cell[f"{key} rounds"] = [child.seconds for child in children]
    cell["prune cpu seconds"] = round(statistics.median(child.cpu_seconds for child in runs["prune"]), 2)
    return cell


def measure_obspa(name: str, folder: Path) -> Cell:
    """Measure one calibration, whose model lies in a folder of its own."""
    source, out, data = folder / name, folder / "out", folder / "ids.npz"
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES + HELD_OUT, TOKENS))
    np.savez(data, ids=ids)
    command = [sys.executable, "-m", "spa.cli", "prune", str(source / "model.onnx"), "-o", str(out / "pruned.onnx")]
    command += [
        "--ratio",
        "0.3",
        "--data",
        str(data),
        "--samples",
        str(SEQUENCES),
        "--threads",
        str(common.THREADS),
        "--insist",
    ]
    start = time.perf_counter()
    peak = peak_of_all(command, out, HOURS * 3600, LONG_PAUSE)
    cell: Cell = {"status": "ok" if (out / "pruned.onnx").exists() else "failed", "peak MB": round(peak)}
    cell["seconds"] = round(time.perf_counter() - start)
    cell["MB"] = round(sum(f.stat().st_size for f in source.iterdir()) / 1e6)
    shutil.rmtree(out)
    data.unlink()
    return cell


# -- show ------------------------------------------------------------------------------------------------------------


def row(name: str, cell: Cell) -> list[str]:
    """Return a model's line of the table."""
    if cell["status"] != "ok":
        return [name, cell["status"], *[""] * 9]
    unit, limit, memory = TARGETS[name]
    ratio = cell["prune seconds"] / cell["copy seconds"]
    most = eval_limit(memory, cell["MB"])
    value = ratio if unit == "copies" else cell["prune seconds"]
    return [
        name,
        f"{cell['MB']}",
        f"{len(cell['prune rounds'])}",
        f"{cell['copy seconds']:.2f}",
        f"{cell['prune seconds']:.2f}",
        f"{cell['prune cpu seconds']:.1f}",
        f"{ratio:.1f}",
        f"{limit:.2f} {unit}",
        "yes" if value <= limit else "**no**",
        f"{cell['peak MB']}",
        f"{most:.0f}, {'yes' if cell['peak MB'] <= most else '**no**'}",
    ]


def obspa_row(name: str, cell: Cell) -> list[str]:
    """Return a decoder's line of the table of calibrations."""
    seconds, memory = OBSPA[name]
    done = cell["status"] == "ok"
    met = "" if seconds is None else f"{seconds:.0f}, {'yes' if done and cell['seconds'] <= seconds else '**no**'}"
    most = f"{memory:.0f}, {'yes' if done and cell['peak MB'] <= memory else '**no**'}"
    return [name, f"{cell['MB']}", cell["status"], f"{cell['seconds']}", met, f"{cell['peak MB']}", most]


def eval_limit(limit: str, megabytes: float) -> float:
    """Return a limit on memory in MB: a number, or so many times the file and a number."""
    if "*" not in limit:
        return float(limit)
    factor, _, constant = limit.partition(" * file + ")
    return float(factor) * megabytes + float(constant)


def page(data: dict[str, Any]) -> str:
    """Return results/scale.md."""
    header = [
        "model",
        "MB",
        "rounds",
        "copy s",
        "prune s",
        "CPU s",
        "copies",
        "at most",
        "met",
        "peak MB",
        "at most, met",
    ]
    rows = [row(name, data["cells"][name]) for name in TARGETS if name in data["cells"]]
    calibrated = data.get("obspa", {})
    every = {**data["cells"], **{f"{name} by obspa": cell for name, cell in calibrated.items()}}
    machines = "\n\n".join(
        f"{', '.join(n for n, cell in every.items() if cell['machine'] == key)}: {common.describe(info)}"
        for key, info in data["machines"].items()
        if any(cell["machine"] == key for cell in every.values())
    )
    heads = ["model", "MB", "", "seconds", "at most, met", "peak MB", "at most, met"]
    lines = [obspa_row(name, calibrated[name]) for name in OBSPA if name in calibrated]
    failed = [f"- {key}: {c['status']}: `{c['reason']}`" for key, c in data["cells"].items() if c["status"] != "ok"]
    return f"""# Large models: time beside a copy, and memory

`spa prune --criterion l2 --ratio 0.5`, whole process, beside `cp` of the same files, both cold (the files dropped from
the page cache), in turns; medians of so many rounds (made by `benchmarks/scale.py`, which builds the models with random
weights). Peak memory is that of the process and its children together, proportional set size, in
a run of its own: pages of mapped files count.

{common.table(header, rows)}

## With obspa

`spa prune --ratio 0.3 --samples {SEQUENCES}`: scores, the full repair and the check, {SEQUENCES} sequences of {TOKENS}
random tokens, {common.THREADS} threads, once; memory as above, of the same run.

{common.table(heads, lines) if lines else "Not run yet."}

## What failed

{chr(10).join(failed) or "None."}

## Machine

{machines}
"""


def main() -> None:
    """Build and measure the models asked for and write the table."""
    parser = common.arguments(__doc__)
    parser.add_argument("folder", type=Path, help="where the models are built; gigabytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--obspa", nargs="+", choices=list(OBSPA), help="calibrate these decoders instead")
    parser.add_argument("--keep", action="store_true", help="keep the models, and take those that are there")
    options = parser.parse_args()
    data = common.previous("scale", options.results) or {"machines": {}, "cells": {}}
    key = time.strftime("%Y-%m-%d %H:%M:%S")
    data["machines"][key] = common.machine()
    cells = data.setdefault("obspa", {}) if options.obspa else data["cells"]
    for name in options.obspa or options.only or [n for n in TARGETS if "7b" not in n]:
        source = options.folder / name
        if not source.exists():
            built = common.python("scale_models.py", name, str(source), timeout=1800)
            if not built.ok:
                raise SystemExit(f"{name}: {built.reason}")
        found = measure_obspa(name, options.folder) if options.obspa else measure(name, options.folder, options.rounds)
        cells[name] = found | {"machine": key}
        print(name, cells[name], flush=True)
        if not options.keep:
            shutil.rmtree(source)
        used = {cell["machine"] for part in (data["cells"], data.get("obspa", {})) for cell in part.values()}
        data["machines"] = {k: info for k, info in data["machines"].items() if k in used}
        common.write("scale", page(data), data, options.results)


if __name__ == "__main__":
    main()
