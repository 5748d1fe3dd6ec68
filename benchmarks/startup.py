"""Startup times: importing the package, the command line's version, and a cold `spa prune` without calibration.

    python benchmarks/startup.py [--turns 20] [--against OTHER_PYTHON] [--out benchmarks/results/startup.md]

Every turn starts a fresh process of each command, in turns, so that a busy machine slows all alike; the least is what
the machine allows, the median what a user sees. `--against` adds the same commands in another environment, say one
with an earlier commit installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime

MODEL = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"
# What a command that needs none of them must not import.
HEAVY = "scipy jinja2 psutil platformdirs torch tensorflow jax sklearn PIL"


def commands(python: str, folder: Path) -> dict[str, list[str]]:
    """Return each command by its title, for one environment."""
    spa = str(Path(python).parent / "spa")
    prune = [spa, "prune", str(MODEL), "--criterion", "l2", "-o", str(folder / "small.onnx")]
    return {
        "import spa": [python, "-c", "import spa"],
        "spa --version": [spa, "--version"],
        "spa prune models/digits_resnet.onnx --criterion l2": prune,
    }


def seconds(command: list[str]) -> float:
    """Run a command in a fresh process and return how long it took, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def heavy_imports(python: str, folder: Path) -> list[str]:
    """Return the packages of HEAVY that a cold `spa prune` imports."""
    arguments = commands(python, folder)["spa prune models/digits_resnet.onnx --criterion l2"]
    code = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from spa.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('imported:', *[m for m in {HEAVY.split()!r} if m in sys.modules])"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.rpartition("imported:")[2].split()


def table(times: dict[tuple[str, str], list[float]]) -> str:
    """Return the table of times, in seconds."""
    rows = ["| command | environment | least | median |", "| --- | --- | ---: | ---: |"]
    rows += [
        f"| `{title}` | {where} | {min(found):.2f} s | {statistics.median(found):.2f} s |"
        for (title, where), found in times.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--against", metavar="PYTHON", help="the python of another environment")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pythons = {"this": sys.executable} | ({"other": options.against} if options.against else {})
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(-1, options.turns):  # the first turn compiles and fills the file cache
            for where, python in pythons.items():
                for title, command in commands(python, folder).items():
                    found = seconds(command)
                    if turn >= 0:
                        times.setdefault((title, where), []).append(found)
        heavy = heavy_imports(sys.executable, folder)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}"
    report = (
        "# Startup\n\n"
        f"`python benchmarks/startup.py --turns {options.turns}`; {machine}; {versions}.\n\n"
        f"{table(dict(sorted(times.items(), key=lambda item: item[0][0])))}\n\n"
        f"Imported by the last command, of {', '.join(HEAVY.split())}: {', '.join(heavy) or 'none'}.\n"
    )
    print(report, end="")
    if options.out:
        options.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
