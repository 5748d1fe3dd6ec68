"""Magika, which tells the type of a file from its first and last 1,024 bytes, on files found on any machine."""

from __future__ import annotations

import os
import sysconfig
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from real_networks.base import Array, Inputs, Network, Outputs, Place, Scores, in_package, seeded

ENDS, READ, PADDING = 1024, 4096, 256  # bytes kept of either end, bytes read, the id of no byte
FOLDERS = ("/usr/share", "/usr/include", "/etc")
PER_SUFFIX = 24  # files of one suffix, so that no type outnumbers the rest
VISITED = 60_000
WHITESPACE = b" \t\n\r\x0b\x0c"


def features(path: Path) -> Array:
    """Return a file's first and last bytes without white space at the ends, as the package does: (2048,)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(READ).lstrip(WHITESPACE)[:ENDS]
        file.seek(max(0, size - READ))
        last = file.read(READ).rstrip(WHITESPACE)[-ENDS:]
    found = np.full(2 * ENDS, PADDING, np.int32)
    found[: len(first)] = list(first)
    found[2 * ENDS - len(last) :] = list(last)
    return found


@lru_cache
def files(part: int) -> tuple[Path, ...]:
    """Find files of many types; every other one of a suffix for a part."""
    found: dict[str, list[Path]] = defaultdict(list)
    visited = 0
    for folder in (*FOLDERS, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for root, folders, names in os.walk(folder):
            folders.sort()
            visited += len(names)
            for name in sorted(names):
                path = Path(root, name)
                if len(found[path.suffix.lower()]) < 8 * PER_SUFFIX and path.is_file() and not path.is_symlink():
                    found[path.suffix.lower()].append(path)
            if visited > VISITED:
                break
    rng = seeded(0, 6)
    chosen: list[Path] = []
    for suffix in sorted(found):
        candidates = [found[suffix][i] for i in rng.permutation(len(found[suffix]))[: 2 * PER_SUFFIX]]
        chosen += [p for p in candidates[part::2] if os.access(p, os.R_OK) and p.stat().st_size >= 64]
    return tuple(chosen)


def file_inputs(place: Place, part: int, count: int) -> Inputs:
    """Choose files and read them."""
    found = files(part)
    chosen = [found[i] for i in seeded(part, 6).permutation(len(found))[:count]]
    return Inputs(feeds={"bytes": np.stack([features(path) for path in chosen])})


def label_score(inputs: Inputs, dense: Outputs, found: Outputs) -> Scores:
    """Return the agreement with the dense network's labels."""
    (a,), (b,) = dense.values(), found.values()
    return {"agreement": float(np.mean(a.argmax(axis=1) == b.argmax(axis=1)))}


NETWORKS = (
    Network(
        name="magika",
        title="magika, the type of a file",
        metric="label agreement",
        find=in_package("magika/models/standard_v3_3/model.onnx"),
        inputs=file_inputs,
        score=label_score,
    ),
)
