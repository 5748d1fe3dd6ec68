"""The common part of the benchmarks: machine and versions, measured child processes, tables in Markdown.

This module imports the standard library only. A child's peak memory as the kernel reports it is never
less than what its parent held when it started it, so the parents stay small: models are built and pruned
in children.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
THREADS = 2
GIB = 1024**3

_PACKAGES = (
    "spa-onnx",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "tensorflow-cpu",
    "keras",
    "tf2onnx",
    "jax",
    "flax",
    "jax2onnx",
    "torch",
    "torchvision",
    "torch-pruning",
    "onnxsim",
)
_MEMORY_SIGNS = (
    "MemoryError",
    "bad_alloc",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
)
_MARK = "@@result "


# -- machine and versions --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe where and when a result was taken: hardware, system, versions, load at this moment."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads used": THREADS,
        "memory GiB": round(memory / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load average": load(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def load() -> float:
    """Return the machine's load average over the last minute (processes that want a core)."""
    return round(os.getloadavg()[0], 2)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "from the checkout" if name == "spa-onnx" else "not installed"
    return found


# -- measured child processes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """The outcome of one child process.

    Attributes:
        status: "ok", "failed", "out of memory" or "timeout".
        reason: one line that says why, empty when ok.
        seconds: wall-clock time of the whole process.
        peak_mb: largest resident set, MB (10^6 bytes).
        data: what the child handed to `answer`.
        cpu_seconds: processor time of all its threads.
    """

    status: str
    reason: str
    seconds: float
    peak_mb: float
    data: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if the child ended well."""
        return self.status == "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def run(
    command: Sequence[str],
    timeout: float = 600,
    memory: int | None = None,
    cores: int | None = None,
    output: Path | None = None,
) -> Child:
    """Run a command to its end and measure it.

    Args:
        command: program and arguments.
        timeout: seconds after which the child and its own children are killed.
        memory: limit on the address space (RLIMIT_AS), bytes; None for none.
        cores: number of CPU cores the child may use; None for all.
        output: the file that gets what the child writes to its standard output; None for none.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
            preexec_fn=lambda: _restrict(memory, cores),
        )
        code, usage, late = _wait(process, start + timeout)
        seconds = time.perf_counter() - start
        texts = [_text(stream) for stream in (out, err)]
    if output is not None:
        output.write_text(texts[0])
    peak = usage.ru_maxrss * 1024 / 1e6  # Linux counts in KiB
    status, reason = _verdict(code, late, texts[1], timeout)
    processor = round(usage.ru_utime + usage.ru_stime, 3)
    return Child(status, reason, round(seconds, 3), round(peak, 1), _answered(texts[0]), processor)


def python(script: str, *arguments: str, **limits: Any) -> Child:
    """Run a Python script of this folder, see `run`."""
    return run([sys.executable, str(HERE / script), *arguments], **limits)


def answer(data: Mapping[str, Any]) -> None:
    """Hand data from a child to its parent, as one marked line on standard output."""
    print(_MARK + json.dumps(data), flush=True)


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every run would compile its modules anew
    return environment


def _restrict(memory: int | None, cores: int | None) -> None:
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def _wait(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, resource.struct_rusage, bool]:
    """Wait with os.wait4, which alone gives the peak memory of this one child."""
    late = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage, late
        if not late and time.perf_counter() > deadline:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.002)


def _text(stream: Any) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _verdict(code: int, late: bool, errors: str, timeout: float) -> tuple[str, str]:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")[:300]
    if late:
        return "timeout", f"killed after {timeout:g} s"
    if code == 0:
        return "ok", ""
    if any(sign in errors for sign in _MEMORY_SIGNS) or code == -signal.SIGKILL:
        said = [line.strip() for line in errors.splitlines() if any(sign in line for sign in _MEMORY_SIGNS)]
        return "out of memory", said[-1][:300] if said else last
    return "failed", last or f"exit code {code}"


def _answered(output: str) -> dict[str, Any]:
    marked = [line for line in output.splitlines() if line.startswith(_MARK)]
    return json.loads(marked[-1].removeprefix(_MARK)) if marked else {}


# -- results ---------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def describe(info: Mapping[str, Any]) -> str:
    """Return the machine's description as one Markdown paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return (
        f"{info['date']}; {info['cpu']}, {info['cores']} cores, {info['memory GiB']} GiB, {info['system']}; "
        f"{info['threads used']} threads used; load average at the start {info['load average']}.\n{versions}."
    )


def write(name: str, text: str, data: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write results/NAME.md and results/NAME.json, each by way of a temporary name."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text.rstrip() + "\n"), (".json", json.dumps(data, indent=1) + "\n")):
        target = folder / (name + suffix)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(content)
        partial.replace(target)


def previous(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return the data that an earlier run wrote, or an empty dict."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a command-line parser with the options that all benchmarks know."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "spa-models16",
        help="folder of the exported models (default: in the system's temporary folder)",
    )
    parser.add_argument("--only", nargs="*", default=None, metavar="MODEL", help="these models only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    return parser
