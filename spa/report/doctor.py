"""The findings of ``spa doctor``: versions, extras, the machine, and what is wrong with them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from spa.extras import entry_points
from spa.report.environment import environment
from spa.running.memory import available, total
from spa.widths.stopwatch import Cache, cache_file

DISTRIBUTION = "spa-onnx"
DEVELOPERS = ("docs", "test", "tools")  # extras that no user needs
PLUGINS = ("spa.rules", "spa.criteria")
LITTLE = 2**30  # bytes


def examination() -> dict[str, Any]:
    """Look at the installation and the machine.

    Returns:
        ``environment`` (versions, platform, processor); ``packages`` and ``extras``, in each of which a package has its
        ``version`` (None where it is not there), what is ``needed`` and whether that is ``met``; ``providers`` of
        onnxruntime; ``cores`` (of the machine, and those that this process may use); ``memory`` in bytes (total and
        available); ``plugins`` by entry-point group; the ``cache`` of latencies; free bytes of the ``temporary``
        folder; and the ``problems``, as sentences.

    >>> sorted(examination()["packages"])[:3]
    ['cloudpickle', 'filelock', 'jinja2']
    """
    import onnxruntime

    required = list(_requirements())
    packages = {name: found for extra, name, found in required if not extra}
    extras: dict[str, dict[str, Any]] = {}
    for extra, name, found in required:
        if extra and extra not in DEVELOPERS:
            extras.setdefault(extra, {})[name] = found
    cache, temporary = cache_file(), tempfile.gettempdir()
    found = {
        "environment": environment(),
        "packages": packages,
        "extras": extras,
        "providers": list(onnxruntime.get_available_providers()),
        "cores": {"machine": os.cpu_count(), "usable": usable_cores()},
        "memory": {"total": total(), "available": available()},
        "plugins": {group: sorted(e.value for e in entry_points(group)) for group in PLUGINS},
        "cache": {"path": str(cache), "latencies": len(Cache(cache))},
        "temporary": {"path": temporary, "free": shutil.disk_usage(temporary).free},
    }
    return found | {"problems": list(_problems(found))}


def _requirements() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each package that SPA needs: for which extra (empty: always), its name, and what is there of it."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    for line in lines:
        requirement = Requirement(line)
        extra = re.search(r'extra == "([^"]+)"', line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        version = None
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(requirement.name)
        met = version is not None and requirement.specifier.contains(version, prereleases=True)
        yield (
            extra[1] if extra else "",
            requirement.name,
            {
                "version": version,
                "needed": str(requirement.specifier),
                "met": met,
            },
        )


def usable_cores() -> float:
    """Return the cores that this process may use: those it is bound to, or the share that a container is given."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(float(bound), int(quota) / int(period))
    return float(bound)


def _problems(found: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong, with the remedy."""
    if not found["packages"]:
        yield f"{DISTRIBUTION} is not installed, but run from its sources. Run  pip install .  there."
    for name, package in found["packages"].items():
        if not package["met"]:
            state = package["version"] or "is missing"
            yield f"{name} {state}: {package['needed']} is needed. Run  pip install -U {name}."
    for extra, packages in found["extras"].items():
        there = {name for name, package in packages.items() if package["version"] is not None}
        wrong = [
            f"{n} {p['version']} (needed: {p['needed']})" for n, p in packages.items() if n in there and not p["met"]
        ]
        if wrong:
            yield f"the extra {extra!r}: {', '.join(wrong)}. Run  pip install -U 'spa-onnx[{extra}]'."
    room = found["memory"]["available"]
    if room is not None and room < LITTLE:
        yield f"only {room / 2**20:.0f} MiB of memory are free. Ask for fewer --samples, or end other programs."
    folder, free = found["temporary"]["path"], found["temporary"]["free"]
    if free < LITTLE:
        yield f"only {free / 2**20:.0f} MiB are free in {folder!r}. Set TMPDIR."
